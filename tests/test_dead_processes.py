"""A process that is killed, fails or hangs: the others say so in time, and the store and the checkpoints are sound."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.exceptions import LightningUnlearnError, StoreCorruptedError
from lightning_unlearn.store.delta_store import DeltaStore
from tests.helpers import forgetting_ranks, killed_purge, signalled
from tests.helpers.models import BoringClassifier, IdDataset, loader, quiet_trainer
from tests.helpers.ranks import run_ranks, start_ranks
from tests.helpers.recorded import BATCH, ROWS
from tests.helpers.same_runs import assert_same

TRAIN, FORGET, PURGE = (Path(module.__file__) for module in (signalled, forgetting_ranks, killed_purge))
STEPS_PER_EPOCH = ROWS // BATCH
STEPS = 3 * STEPS_PER_EPOCH


def event(where, batch, rank, what="SIGKILL"):
    return {"rank": rank, "batch": batch, "where": where, "what": what}


@pytest.fixture(scope="module")
def whole(warm_python, tmp_path_factory):
    """An uninterrupted training on two processes."""
    folder = tmp_path_factory.mktemp("whole")
    codes, outputs = run_ranks(warm_python, TRAIN, folder)
    assert codes == [0, 0], outputs
    return folder


def check_resumed(python, folder, whole):
    """The next run goes on from the newest checkpoint, and ends as if nothing had been."""
    assert DeltaStore.open(folder / "store").verify().ok
    codes, outputs = run_ranks(python, TRAIN, folder)
    assert codes == [0, 0], outputs
    assert_same(folder, whole)


DEATHS = [(1, "half"), (0, "half"), (1, "before"), (0, "after"), (1, "end")]


@pytest.mark.parametrize(
    ("dead", "where"),
    [pytest.param(*case, marks=[] if n == 0 else [pytest.mark.slow]) for n, case in enumerate(DEATHS)],
)
def test_a_process_that_is_killed_while_recording(warm_python, tmp_path, whole, dead, where):
    batch = STEPS_PER_EPOCH + 4
    codes, outputs = run_ranks(warm_python, TRAIN, tmp_path, events=[event(where, batch, dead)])
    survivor = 1 - dead
    assert codes[dead] == -signal.SIGKILL
    assert codes[survivor] == 1
    text = outputs[survivor]
    assert f"which was saved after {STEPS_PER_EPOCH} steps" in text
    assert f"This is process {survivor} of 2" in text
    assert "another process has ended or hangs" in text
    store = DeltaStore.open(tmp_path / "store")
    assert store.n_steps >= STEPS_PER_EPOCH  # what the checkpoint implies
    assert store.reader.commits[survivor].n_steps in (batch - 1, batch)  # and what the survivor had
    check_resumed(warm_python, tmp_path, whole)


def test_a_process_that_fails_in_a_hook_is_named_by_the_other(warm_python, tmp_path, whole):
    codes, outputs = run_ranks(warm_python, TRAIN, tmp_path, events=[event("after", STEPS_PER_EPOCH + 4, 1, "ENOSPC")])
    assert codes == [1, 1]
    assert "No space left on device" in outputs[1]
    assert "Process 1 failed first: OSError(28, 'No space left on device')" in outputs[0]
    assert "Process 0 failed first" not in outputs[1]
    check_resumed(warm_python, tmp_path, whole)


@pytest.mark.slow
def test_a_process_that_hangs_is_waited_for_no_longer_than_was_set(warm_python, tmp_path, whole):
    settings = {"devices": 2, "timeout": 5, "events": [event("before", STEPS_PER_EPOCH + 4, 1, "hang")]}
    waiting, hanging = start_ranks(warm_python, TRAIN, tmp_path, json.dumps(settings))
    try:
        output, _ = waiting.communicate(timeout=120)
        assert waiting.returncode == 1
        assert hanging.poll() is None
    finally:
        hanging.kill()
        hanging.communicate()
    assert "imed out" in output
    assert "DDPStrategy(timeout=...)" in output
    check_resumed(warm_python, tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_lightnings_own_launcher_ends_both_and_nothing_is_lost(warm_python, tmp_path, whole, dead):
    settings = json.dumps({"devices": 2, "events": [event("half", STEPS_PER_EPOCH + 4, dead)]})
    done = subprocess.run(  # noqa: S603
        [str(warm_python), str(TRAIN), str(tmp_path), settings], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    check_resumed(warm_python, tmp_path, whole)


# A purge of a store of two processes, by one.


def purged(source, target):
    shutil.copytree(source / "store", target)
    return target


def names_of(store):
    return {name for name in store.files.names() if not name.endswith(".lock")}


def seen(url):
    store = DeltaStore.open(url)
    rows = [(store.record(step).status, sorted(store.record(step).sample_ids)) for step in range(store.n_steps)]
    deltas = [
        {name: one.values.tolist() for name, one in store.read(step).items()} if rows[step][0] == 0 else None
        for step in range(store.n_steps)
    ]
    return rows, deltas


@pytest.mark.parametrize("survive", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1, 3, 4, 5, 6, 7))])
def test_a_purge_that_is_killed_is_finished_by_the_next(warm_python, tmp_path, whole, survive):
    ids, steps = [0, 1, 2, 3], [1, 5]
    finished = purged(whole, tmp_path / "finished")
    DeltaStore.open(finished).purge(ids, steps)
    url = purged(whole, tmp_path / "killed")
    command = [str(warm_python), str(PURGE), str(url), *map(json.dumps, (survive, ids, steps))]
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
    assert done.returncode in (-signal.SIGKILL, 0) if survive > 4 else done.returncode == -signal.SIGKILL, done.stderr
    store = DeltaStore.open(url)
    assert store.n_steps == STEPS
    assert store.verify().ok
    store.purge(ids, steps)
    assert seen(url) == seen(finished)
    assert not store.ids_in(range(STEPS)) & set(ids)


# A pass on two processes.


@pytest.mark.parametrize(
    "dead", [[1], pytest.param([0], marks=pytest.mark.slow), pytest.param([0, 1], marks=pytest.mark.slow)]
)
def test_processes_that_are_killed_while_forgetting(warm_python, tmp_path, whole, dead):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    before = DeltaStore.open(tmp_path / "store")
    codes, outputs = run_ranks(warm_python, FORGET, tmp_path, events=[event("after", 3, rank) for rank in dead])
    assert codes == [-signal.SIGKILL if rank in dead else 1 for rank in range(2)], outputs
    after = DeltaStore.open(tmp_path / "store")
    assert after.verify().ok
    assert after.lineage.states == before.lineage.states
    if len(dead) == 1:  # the survivor takes the pass back; what nobody takes back is a run without a step
        assert after.lineage == before.lineage
    assert [commit.n_steps for commit in after.reader.commits] == [STEPS, STEPS]
    codes, outputs = run_ranks(warm_python, FORGET, tmp_path)
    assert codes == [0, 0], outputs
    assert all("steps of the pass: 6" in output for output in outputs)
    assert DeltaStore.open(tmp_path / "store").n_steps == STEPS + 6


# Errors of one process alone as a recording begins.


def damaged_on_one(url, checkpoint, failing):
    """What each of two processes raises where one of them finds the store damaged."""
    torch.manual_seed(0)
    trainer = quiet_trainer(strategy="ddp", devices=2, callbacks=[DeltaRecorder(url)], max_epochs=2)
    opened = DeltaStore.open.__func__

    def damaged(cls, *args, **kwargs):
        if trainer.global_rank == failing:
            raise StoreCorruptedError("a bit is not what it was")
        return opened(cls, *args, **kwargs)

    DeltaStore.open = classmethod(damaged)
    started = time.monotonic()
    try:
        trainer.fit(BoringClassifier(), loader(IdDataset(43), batch_size=4))
    except LightningUnlearnError as error:
        return str(error), time.monotonic() - started
    finally:
        DeltaStore.open = classmethod(opened)
    return "", time.monotonic() - started


@pytest.mark.parametrize("failing", [0, 1])
def test_a_store_that_one_process_cannot_open_is_an_error_of_both(gloo_pool, tmp_path, failing):
    found = gloo_pool.run(damaged_on_one, str(tmp_path / "store"), None, failing)
    assert "a bit is not what it was" in found[failing][0]
    assert "a bit is not what it was" in found[1 - failing][0]
    with DeltaStore.open(tmp_path / "store").writer(1 - failing):
        pass  # nobody holds it any more
