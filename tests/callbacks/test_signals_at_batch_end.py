"""Real signals at awkward moments of real processes: the run is saved at the end of a batch, and loses nothing."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from lightning import Callback
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from torch.utils.data import DataLoader

from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.callbacks.signals_at_batch_end import REQUEUE, TERMINATE, SignalsAtBatchEnd
from lightning_unlearn.callbacks.subject_grouping import SubjectGrouping
from lightning_unlearn.exceptions import LightningUnlearnError
from lightning_unlearn.store.delta_store import DeltaStore
from tests.helpers import signalled
from tests.helpers.models import quiet_trainer
from tests.helpers.ranks import run_ranks
from tests.helpers.recorded import BATCH, ROWS, datasets
from tests.helpers.same_runs import assert_same
from tests.helpers.slurm import Slurm

JOB = 'srun python "$SCRIPT" "$FOLDER" "$SETTINGS"\n'
SCRIPT = Path(signalled.__file__)
STEPS_PER_EPOCH = ROWS // BATCH

pytestmark = [
    # It is: `SubjectGrouping` goes on in the middle of an epoch.
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def event(where, batch=5, rank=0, what="SIGUSR1"):
    return {"rank": rank, "batch": batch, "where": where, "what": what}


def steps_in(path):
    return torch.load(path, weights_only=False)["global_step"]


# One process, in this one: a cluster's environment, a real signal, and an `scontrol` that takes notes.


@pytest.fixture
def requeues(tmp_path, monkeypatch):
    """The calls of `scontrol`, for Trainers of this process that believe to be on SLURM."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$*" >>{tools}/log\n')
    (tools / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    for name, value in {"JOB_ID": "4711", "NTASKS": "1", "NTASKS_PER_NODE": "1", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_NODEID", "0")
    return lambda: (tools / "log").read_text().splitlines() if (tools / "log").exists() else []


def fit(folder, *callbacks, events=(), ckpt_path=None, plugins=(), **arguments):
    """One fit, and the handlers of signals before and after it."""
    before = {name: signal.getsignal(name) for name in (signal.SIGUSR1, signal.SIGTERM)}
    folder.mkdir(exist_ok=True)
    grouping = SubjectGrouping([row // 4 for row in range(ROWS)])
    recorder = DeltaRecorder(folder / "store", keep=1.0, value_dtype="float32")
    trainer = quiet_trainer(
        max_epochs=2,
        callbacks=[grouping, recorder, signalled.Events(list(events)), *callbacks],
        default_root_dir=folder,
        **({"plugins": list(plugins)} if plugins else {}),
        **arguments,
    )
    users = list(trainer.callbacks)
    torch.manual_seed(0)
    module = signalled.Module()
    train, test = datasets()
    loaders = DataLoader(train, BATCH, shuffle=True), DataLoader(test, 64)
    try:
        trainer.fit(module, *loaders, ckpt_path=ckpt_path)
    finally:
        assert {name: signal.getsignal(name) for name in before} == before
        assert trainer.callbacks == users
        assert not {REQUEUE, TERMINATE} & set(vars(trainer._signal_connector))
    trainer.save_checkpoint(folder / "trained.ckpt")
    return trainer


@pytest.mark.parametrize("where", ["start", "before", "half", "after", "end", "validation"])
def test_a_run_is_saved_between_two_steps_and_goes_on_from_there(tmp_path, requeues, where):
    batch = STEPS_PER_EPOCH if where == "validation" else 5
    fit(tmp_path / "whole")
    fit(tmp_path / "run", events=[event(where, batch)], plugins=[SLURMEnvironment()])
    assert requeues() == ["requeue 4711"]
    saved = tmp_path / "run" / "hpc_ckpt_1.ckpt"
    assert steps_in(saved) == batch
    assert_same(tmp_path / "run", tmp_path / "whole")
    fit(tmp_path / "run", ckpt_path=saved)  # drops what was recorded behind it, and records it again
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_the_same_notice_twice_is_acted_on_once(tmp_path, requeues):
    events = [event("half", 5), event("start", 6), event("half", 7), event("half", 14)]
    fit(tmp_path / "run", events=events, plugins=[SLURMEnvironment()])
    assert requeues() == ["requeue 4711"]
    assert [path.name for path in (tmp_path / "run").glob("hpc_ckpt_*")] == ["hpc_ckpt_1.ckpt"]


def test_a_signal_before_the_first_batch_waits_for_it(tmp_path, requeues):
    class Early(Callback):
        def on_train_start(self, trainer, pl_module):
            os.kill(os.getpid(), signal.SIGUSR1)

    fit(tmp_path / "run", Early(), plugins=[SLURMEnvironment()])
    assert requeues() == ["requeue 4711"]
    assert steps_in(tmp_path / "run" / "hpc_ckpt_1.ckpt") == 1


def test_a_signal_behind_the_last_batch_is_acted_on_before_the_fit_ends(tmp_path, requeues):
    class Late(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                os.kill(os.getpid(), signal.SIGUSR1)

    fit(tmp_path / "run", Late(), plugins=[SLURMEnvironment()])
    assert requeues() == ["requeue 4711"]
    assert steps_in(tmp_path / "run" / "hpc_ckpt_1.ckpt") == 2 * STEPS_PER_EPOCH
    fit(tmp_path / "run", ckpt_path=tmp_path / "run" / "hpc_ckpt_1.ckpt")  # nothing is left to do


def test_a_signal_after_the_last_look_is_delivered_to_whoever_handles_it_then(tmp_path, requeues):
    class TooLate(Callback):
        def on_fit_end(self, trainer, pl_module):
            trainer._signal_connector._slurm_sigusr_handler_fn(signal.SIGUSR1, None)

    got = []
    previous = signal.signal(signal.SIGUSR1, lambda signum, frame: got.append(signum))
    try:
        # Who has a handler of their own keeps it: Lightning does not requeue then.
        fit(tmp_path / "run", TooLate(), plugins=[SLURMEnvironment()])
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert got == [signal.SIGUSR1]
    assert requeues() == []


def test_without_a_cluster_nothing_is_added_and_without_a_recorder_it_can_be(tmp_path, requeues):
    seen = []

    class Seen(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append([type(one) for one in trainer.callbacks if isinstance(one, SignalsAtBatchEnd)])

    fit(tmp_path / "alone", Seen(), plugins=[LightningEnvironment()])
    own = SignalsAtBatchEnd()
    fit(tmp_path / "own", Seen(), own, plugins=[SLURMEnvironment()])
    fit(tmp_path / "refused", Seen(), plugins=[SLURMEnvironment(auto_requeue=False)])
    assert seen == [[], [SignalsAtBatchEnd], []]
    trainer = quiet_trainer(
        callbacks=[signalled.Events([event("half")]), own], plugins=[SLURMEnvironment()], default_root_dir=tmp_path
    )
    trainer.fit(signalled.Module(), *(DataLoader(data, BATCH) for data in datasets()))
    assert steps_in(tmp_path / "hpc_ckpt_1.ckpt") == 5


def test_a_version_of_lightning_that_is_not_known_is_refused(tmp_path, requeues, monkeypatch):
    monkeypatch.delattr("lightning.pytorch.trainer.connectors.signal_connector._SignalConnector." + REQUEUE)
    with pytest.raises(LightningUnlearnError, match=f"without `{REQUEUE}`"):
        fit(tmp_path / "run", plugins=[SLURMEnvironment()])


# Whoever saves at any moment all the same is told.


class SaveNow(signalled.Events):
    """A user's own handler, which saves at once."""

    def __init__(self, folder, where, batch=5):
        super().__init__([event(where, batch, what="SIGUSR2")])
        self.path = folder / "now.ckpt"

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.previous = signal.signal(signal.SIGUSR2, lambda *args: trainer.save_checkpoint(self.path))

    def teardown(self, trainer, pl_module, stage):
        signal.signal(signal.SIGUSR2, self.previous)

    def on_exception(self, trainer, pl_module, exception):
        signal.signal(signal.SIGUSR2, self.previous)


def test_a_checkpoint_in_the_middle_of_a_step_is_refused_and_what_came_before_it_is_sound(tmp_path):
    saving = SaveNow(tmp_path, "half", batch=STEPS_PER_EPOCH + 3)
    with pytest.raises(LightningUnlearnError, match="one in the middle of a step") as caught:
        fit(tmp_path / "run", saving, enable_checkpointing=True)
    assert not saving.path.exists()
    note = "\n".join(caught.value.__notes__)
    assert f"{STEPS_PER_EPOCH + 2} steps are published" in note
    assert f"the newest checkpoint, which was saved after {STEPS_PER_EPOCH} steps" in note
    store = DeltaStore.open(tmp_path / "run" / "store")
    assert store.verify().ok
    assert store.n_steps == STEPS_PER_EPOCH + 2
    assert max(stop for state in store.lineage.states for _, stop in state.ranges) == STEPS_PER_EPOCH
    fit(tmp_path / "whole")
    (checkpoint,) = (tmp_path / "run").rglob("epoch=*.ckpt")
    fit(tmp_path / "run", ckpt_path=checkpoint, enable_checkpointing=True)
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_checkpoint_beside_the_update_itself_is_fine(tmp_path, where):
    saving = SaveNow(tmp_path, where)
    fit(tmp_path / "run", saving)
    assert saving.path.exists()


def test_a_checkpoint_saved_before_training_goes_on_says_where_the_one_it_resumed_stood(tmp_path):
    recorder = DeltaRecorder(tmp_path / "store")
    assert recorder.state_dict() == {}
    resumed = {"store_id": "s", "n_steps": 3, "ranges": [[0, 3]], "edits": [], "digest": "d"}
    recorder.load_state_dict(resumed)
    assert recorder.state_dict() == resumed


# Several processes.


class Cluster:
    """Runs the script as a job, again and again, until it is not queued again."""

    def __init__(self, folder, python):
        self.python, self.folder = python, folder

    def run(self, name, devices, events):
        place = self.folder / name
        slurm = Slurm(self.folder / f"slurm-{name}", self.python)
        (slurm.folder / "job.sbatch").write_text(JOB)
        settings = json.dumps({"devices": devices, "events": events})
        environment = slurm.environment(n_tasks=devices)
        environment |= {"SCRIPT": str(SCRIPT), "FOLDER": str(place), "SETTINGS": settings}
        output = []
        for restart in range(4):
            job = slurm.start(
                slurm.folder / "job.sbatch",
                environment={**environment, "SLURM_RESTART_COUNT": str(restart)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            output.append(job.communicate(timeout=240)[0])  # returns when the last process has ended
            if len(slurm.requeued) == restart:
                assert job.returncode == 0, output[-1][-4000:]
                assert (place / "trained.ckpt").exists(), output[-1][-4000:]
                return place, slurm, "".join(output)
        raise AssertionError("queued again and again")


@pytest.fixture(scope="module")
def whole(warm_python, tmp_path_factory):
    """An uninterrupted training on two processes."""
    folder = tmp_path_factory.mktemp("whole")
    codes, outputs = run_ranks(warm_python, SCRIPT, folder)
    assert codes == [0, 0], outputs
    return folder


PAIRS = {
    "at different batches": [event("half", batch=5, rank=1), event("before", batch=6, rank=0)],
    "one process alone": [event("half", batch=5, rank=1)],
    "together": [event("before", batch=5, rank=0), event("half", batch=5, rank=1)],
    "as the other starts a batch": [event("start", batch=6, rank=0), event("half", batch=5, rank=1)],
    "in a validation": [event("validation", batch=8, rank=1)],
}


@pytest.mark.parametrize(
    "events",
    [
        pytest.param(pair, marks=[pytest.mark.slow] if n else [], id=name)
        for n, (name, pair) in enumerate(PAIRS.items())
    ],
)
def test_a_job_of_two_processes_is_queued_again_and_loses_nothing(warm_python, tmp_path, whole, events):
    place, slurm, output = Cluster(tmp_path, warm_python).run("requeued", 2, events)
    assert len(slurm.requeued) == 1
    assert slurm.requeued[0].startswith("requeue 12")
    assert "Traceback" not in output
    (saved,) = place.glob("hpc_ckpt_*.ckpt")
    first = min(one["batch"] for one in events)
    assert steps_in(saved) in (first, first + 1)
    assert_same(place, whole)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_two_processes_end_at_the_same_batch_when_one_is_told_to(warm_python, tmp_path, whole, rank):
    told = [event("half", batch=STEPS_PER_EPOCH + 3, rank=rank, what="SIGTERM")]
    codes, outputs = run_ranks(warm_python, SCRIPT, tmp_path, events=told)
    assert codes == [0, 0], outputs  # as Lightning ends
    assert "Traceback" not in "".join(outputs)
    assert not (tmp_path / "trained.ckpt").exists()
    store = DeltaStore.open(tmp_path / "store")
    assert [commit.n_steps for commit in store.reader.commits] == [store.n_steps] * 2
    assert store.n_steps in (STEPS_PER_EPOCH + 3, STEPS_PER_EPOCH + 4)
    codes, outputs = run_ranks(warm_python, SCRIPT, tmp_path)
    assert codes == [0, 0], outputs
    assert_same(tmp_path, whole)
