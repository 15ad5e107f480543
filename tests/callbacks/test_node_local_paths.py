"""One string, another place on every node: two processes with directories of their own, as on a cluster."""

import os
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.callbacks.weight_change_penalty import WeightChangePenalty
from lightning_unlearn.deltas.request import DeletionRequest
from lightning_unlearn.exceptions import LightningUnlearnError, MissingDeltaError
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.joining import join_parts
from lightning_unlearn.store.parts import open_here
from tests.callbacks.sharded_training import train
from tests.callbacks.test_recording_session import DENSE, CrashAt, SaveAtEpoch
from tests.helpers.models import BoringClassifier, IdDataset, loader, quiet_trainer
from tests.helpers.parts import file_contents, put_up_shelf
from tests.helpers.replay import assert_leads_to
from tests.helpers.stores import make_store

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")


@contextmanager
def working_directory(path):
    before = os.getcwd()
    os.makedirs(path, exist_ok=True)
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def fit(folders, store, checkpoint, *, resume=None, crash_at=100, seed=0, epochs=2, module=None, penalty=False, **more):
    """A training of two processes in the pool, each in its own directory: the error, and the weights."""
    put_up_shelf()
    torch.manual_seed(1)
    module = module or BoringClassifier()
    recorder = DeltaRecorder(store, anchor_every=4, **DENSE, **more)
    penalties = [WeightChangePenalty(1.0)] if penalty else []
    callbacks = [recorder, *penalties, SaveAtEpoch(checkpoint, 0), CrashAt(crash_at)]
    trainer = quiet_trainer(strategy="ddp", devices=2, callbacks=callbacks, max_epochs=epochs)
    error = ""
    with warnings.catch_warnings(), working_directory(folders[dist.get_rank()]):
        warnings.simplefilter("ignore")
        try:
            trainer.fit(module, loader(IdDataset(43), batch_size=4), ckpt_path=resume)
        except (RuntimeError, LightningUnlearnError) as raised:
            error = f"{type(raised).__name__}: {raised}"
    return error, {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def record_of(store):
    """Everything about the steps of a store but their time."""
    steps = []
    for step in range(store.n_steps):
        record = store.record(step)
        deltas = {
            name: (None if delta.indices is None else delta.indices.tolist(), delta.values.tolist())
            for name, delta in store.read(step).items()
        }
        steps.append((record.optimizer, record.sample_ids, record.batch_size, record.status, record.edited, deltas))
    anchors = [(step, rank, store.read_anchor(step, rank)) for step in store.anchors for rank in range(2)]
    states = [
        (step, rank, one.rng.torch.tolist(), {name: value.tolist() for name, value in one.weights.items()})
        for step, rank, one in anchors
    ]
    known = [(state.digest, state.ranges, state.travel, state.drifted) for state in store.lineage.states]
    return steps, states, known, [(run.kind, run.first) for run in store.lineage.runs]


class Cluster:
    """Two nodes, each with a working directory, and a place that both see."""

    def __init__(self, pool, folder):
        self.pool, self.folder = pool, folder
        self.nodes = [str(folder / "node0"), str(folder / "node1")]
        self.main, self.part = (Path(node) / "run" for node in self.nodes)

    def apart(self, store="run", **kwargs):
        return self.pool.run(fit, self.nodes, store, str(self.folder / "apart.ckpt"), **kwargs)

    def together(self, store=None, **kwargs):
        shared = [str(self.folder)] * 2
        return self.pool.run(fit, shared, store or "shared", str(self.folder / "together.ckpt"), **kwargs)

    @property
    def shared(self):
        return DeltaStore.open(self.folder / "shared")


@pytest.fixture
def cluster(gloo_pool, tmp_path):
    return Cluster(gloo_pool, tmp_path)


def no_errors(results):
    return [error for error, _ in results] == ["", ""]


def test_each_node_records_its_part_and_joined_they_are_the_recording_of_one_place(cluster):
    together, apart = cluster.together(), cluster.apart()
    assert no_errors(together)
    assert no_errors(apart)
    for (_, ours), (_, theirs) in zip(together, apart, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {path.name for path in cluster.part.iterdir()} == {"store.json", "store.json.lock", "rank-00001"}
    assert not (cluster.main / "rank-00001").exists()
    store = DeltaStore.open(cluster.main)
    assert store.info().missing_ranks == (1,)
    module = BoringClassifier()
    module.load_state_dict(apart[0][1])
    with pytest.raises(MissingDeltaError, match=r"12 steps of each of its 2 ranks.*rank 1.*store join"):
        DeletionRequest([3]).plan(store, module)
    store.join([cluster.part])
    assert record_of(store) == record_of(cluster.shared)
    assert store.verify().ok
    assert_leads_to(store, module)
    assert DeletionRequest([3]).plan(store, module).amounts


def test_a_crashed_training_is_resumed_from_parts(cluster):
    for run in (cluster.together, cluster.apart):
        assert [error for error, _ in run(crash_at=8)] == ["RuntimeError: crash"] * 2
    # What rank 0 cannot know after an error it does not claim.
    assert DeltaStore.open(cluster.main).lineage.n_steps == 6
    assert no_errors(cluster.together(resume=str(cluster.folder / "together.ckpt")))
    assert no_errors(cluster.apart(resume=str(cluster.folder / "apart.ckpt")))
    store = DeltaStore.open(cluster.main)
    store.join([cluster.part])
    assert record_of(store) == record_of(cluster.shared)


def test_joined_parts_may_be_continued_where_they_are_or_in_one_place(cluster):
    assert no_errors(cluster.together())
    assert no_errors(cluster.apart())
    store = DeltaStore.open(cluster.main)
    store.join([cluster.part])
    # From the first epoch's end, on the nodes: what was joined beyond it belongs to a branch that is given up.
    checkpoint = str(cluster.folder / "apart.ckpt")
    assert no_errors(cluster.apart(resume=checkpoint, epochs=3))
    store = DeltaStore.open(cluster.main)
    assert store.missing_ranks == (1,)
    assert store.here.n_steps == 6
    store.join([cluster.part])
    assert no_errors(cluster.together(resume=str(cluster.folder / "together.ckpt"), epochs=3))
    assert store.n_steps == 18
    assert record_of(store) == record_of(cluster.shared)
    # And again, with all processes in the joined store.
    assert no_errors(cluster.together(str(cluster.main), resume=checkpoint, epochs=2))
    store = DeltaStore.open(cluster.main)
    assert (store.n_steps, store.missing_ranks, store.verify().ok) == (12, (), True)


def test_a_penalty_around_the_recorded_start_has_it_on_every_node(cluster):
    for run, name in ((cluster.together, "together"), (cluster.apart, "apart")):
        assert [error for error, _ in run(crash_at=8, penalty=True)] == ["RuntimeError: crash"] * 2
        saved = torch.load(cluster.folder / f"{name}.ckpt", weights_only=True)["callbacks"]
        (penalty,) = (one for key, one in saved.items() if key.startswith("WeightChangePenalty"))
        assert "values" not in str(penalty), "the store holds them"
    resumed = [
        run(resume=str(cluster.folder / f"{name}.ckpt"), penalty=True)
        for run, name in ((cluster.together, "together"), (cluster.apart, "apart"))
    ]
    assert all(map(no_errors, resumed))
    for (_, ours), (_, theirs) in zip(*resumed, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    store = DeltaStore.open(cluster.main)
    store.join([cluster.part])
    assert record_of(store) == record_of(cluster.shared)


def cut(folders, store, kind):
    with working_directory(folders[dist.get_rank()]):
        return train(kind, store, **DENSE)


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "tensor"])
def test_layers_in_pieces_on_several_nodes(cluster, kind):
    together = cluster.pool.run(cut, [str(cluster.folder)] * 2, "shared", kind)
    apart = cluster.pool.run(cut, cluster.nodes, "run", kind)
    assert all(torch.equal(apart[0][name], one) for name, one in together[0].items())
    store = DeltaStore.open(cluster.main)
    assert store.missing_ranks == (1,)
    store.join([cluster.part])
    assert store.pieces == cluster.shared.pieces != ()
    assert record_of(store) == record_of(cluster.shared)
    copy = cluster.folder / "copy"
    join_parts(copy, [cluster.main, cluster.part])
    assert record_of(DeltaStore.open(copy)) == record_of(cluster.shared)


def continue_known(folders, store, checkpoint, weights):
    module = BoringClassifier()
    module.load_state_dict(weights)
    return fit(folders, store, checkpoint, module=module, epochs=1, kind="repair")


def test_a_purged_store_is_not_continued_with_parts_that_were_not(cluster):
    _, weights = cluster.apart()[0]
    store = DeltaStore.open(cluster.main)
    store.join([cluster.part])
    store.purge([3])
    results = cluster.pool.run(continue_known, cluster.nodes, "run", str(cluster.folder / "more.ckpt"), weights)
    assert all("the steps that were joined" in error for error, _ in results)
    assert DeltaStore.open(cluster.part, check=False).here.commits[1].n_steps == 12
    store.refresh()
    assert store.n_steps == 12
    shutil.rmtree(cluster.part)
    results = cluster.pool.run(
        continue_known, [cluster.nodes[0]] * 2, "run", str(cluster.folder / "more.ckpt"), weights
    )
    assert no_errors(results)
    assert DeltaStore.open(cluster.main).n_steps == 18


@pytest.mark.parametrize("problem", ["missing", "other", "behind", "swapped"])
def test_a_part_that_cannot_be_continued_is_refused_on_every_rank(cluster, problem):
    assert no_errors(cluster.apart(epochs=1))
    rule = {
        "missing": "Expected `store of rank 1` to be store",
        "other": "Expected `store of rank 1` to be store",
        "behind": "Expected `store` to be a store in which every rank has 6 steps, but got '2 of rank 1'",
        "swapped": "Expected `url` to be a whole store",
    }
    if problem in {"missing", "other"}:
        shutil.rmtree(cluster.part)
    if problem == "other":
        make_store(cluster.part, world_size=2)
    if problem == "behind":
        with DeltaStore.open(cluster.part, check=False).writer(1) as writer:
            writer.truncate(2)
    if problem == "swapped":
        cluster.nodes.reverse()
    store_id = DeltaStore.open(cluster.main).store_id
    segments = {name for name in file_contents(cluster.folder) if name.suffix == ".safetensors"}
    results = cluster.apart(resume=str(cluster.folder / "apart.ckpt"))
    assert all(error.startswith(f"StoreMismatchError: {rule[problem]}") for error, _ in results)
    assert len({error for error, _ in results}) == 1
    assert segments <= set(file_contents(cluster.folder))
    assert DeltaStore.open(cluster.main).store_id == store_id


def test_what_failed_before_its_first_step_is_replaced_on_every_node_and_nothing_else_is(cluster):
    failed = cluster.apart(sample_id="no_such_key")
    assert all("no_such_key" in error for error, _ in failed)
    left = DeltaStore.open(cluster.main).store_id
    assert DeltaStore.open(cluster.part, check=False).store_id == left
    assert no_errors(cluster.apart(module=BoringClassifier(seed=5)))
    store = DeltaStore.open(cluster.main)
    assert store.store_id != left
    assert DeltaStore.open(cluster.part, check=False).store_id == store.store_id
    # Steps are never replaced: neither rank 0's, of which the others are elsewhere, nor a part's.
    refused = cluster.apart(module=BoringClassifier(seed=6))
    assert all("weights that the store knows" in error for error, _ in refused)
    assert DeltaStore.open(cluster.main).lineage.n_steps == 12
    shutil.rmtree(cluster.main)
    before = file_contents(cluster.part)
    refused = cluster.apart(module=BoringClassifier(seed=6))
    assert all("a place for a part of it" in error and store.store_id in error for error, _ in refused)
    assert file_contents(cluster.part) == before


def test_a_url_that_is_no_directory_is_shared_without_locks_or_refused(cluster):
    assert no_errors(cluster.together())
    put_up_shelf()
    url = f"shelf://{cluster.folder}/remote/run"
    assert no_errors(cluster.together(url))
    store = DeltaStore.open(url)
    assert (store.files.is_local, store.missing_ranks) == (False, ())
    assert record_of(store) == record_of(cluster.shared)
    crashed = cluster.together(f"{url}2", crash_at=8)
    assert [error for error, _ in crashed] == ["RuntimeError: crash"] * 2
    assert no_errors(cluster.together(f"{url}2", resume=str(cluster.folder / "together.ckpt")))
    assert DeltaStore.open(f"{url}2").n_steps == 12
    # Memory is not shared by processes: nothing tells that the second one's would be kept.
    refused = cluster.together("memory://of-each-process")
    assert all("Give every rank access to one place" in error for error, _ in refused)


def open_at_once(url, body, rounds):
    found = []
    for number in range(rounds):
        dist.barrier()
        found.append(open_here(f"{url}{number}", body, dist.get_rank() + 1, begins=True).is_part)
    return found


@pytest.mark.parametrize("left_over", [False, True])
def test_ranks_of_one_node_make_its_part_once(gloo_pool, tmp_path, left_over):
    store = make_store(tmp_path / "main", world_size=3)
    for number in range(20 if left_over else 0):
        open_here(tmp_path / f"node{number}", {**store.body, "store_id": "0" * 32}, 1, begins=True)
    assert gloo_pool.run(open_at_once, str(tmp_path / "node"), store.body, 20) == [[True] * 20] * 2
    for number in range(20):
        part = DeltaStore.open(tmp_path / f"node{number}", check=False)
        assert (part.is_part, part.store_id) == (True, store.store_id)
        assert not [path for path in (tmp_path / f"node{number}").iterdir() if path.name.startswith(".tmp")]
