"""The distributed examples: by Lightning's launcher, by torchrun and as a SLURM job, with one result."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_unlearn.store.delta_store import DeltaStore
from tests.helpers.same_runs import assert_same
from tests.helpers.slurm import Slurm

EXAMPLES = Path(__file__).parent.parent / "examples" / "distributed"
TRAIN = EXAMPLES / "train.py"
EPOCHS = ("--epochs", 2)


def call(command, **kwargs):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **kwargs)  # noqa: S603
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def by_lightning(python, folder):
    call([python, TRAIN, "--folder", folder, "--devices", 2, *EPOCHS])


def by_torchrun(python, folder):
    launcher = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    call(
        [*launcher, TRAIN, "--folder", folder, "--devices", 2, *EPOCHS], env={**os.environ, "PYTHON_EXEC": str(python)}
    )


def as_job(python, folder):
    slurm = Slurm(folder.parent / "slurm", python)
    environment = {**slurm.environment(), "FOLDER": str(folder), "SLURM_SUBMIT_DIR": str(EXAMPLES)}
    job = slurm.start(
        EXAMPLES / "job.sbatch", *EPOCHS, environment=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = job.communicate(timeout=300)
    assert job.returncode == 0, err[-3000:]
    assert slurm.requeued == []
    return out


@pytest.mark.slow
def test_a_job_that_is_preempted_goes_on_as_if_nothing_had_been(warm_python, tmp_path):
    long = ("--epochs", 12)
    call([warm_python, TRAIN, "--folder", tmp_path / "whole", "--devices", 2, *long])
    folder = tmp_path / "preempted"
    slurm = Slurm(tmp_path / "slurm", warm_python)
    environment = {**slurm.environment(), "FOLDER": str(folder), "SLURM_SUBMIT_DIR": str(EXAMPLES)}

    def start():
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return slurm.start(EXAMPLES / "job.sbatch", *long, environment=environment, **pipes)

    job = start()
    while not list(folder.glob("checkpoints/*.ckpt")):  # the first epoch is over
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.02)
    tasks = (slurm.folder / "processes").read_text().split()[:2]
    for task in tasks:
        os.kill(int(task), signal.SIGUSR1)
    output, _ = job.communicate(timeout=120)
    assert slurm.requeued == [f"requeue {environment['SLURM_JOB_ID']}"], output
    assert not (folder / "trained.ckpt").exists()
    assert len(list(folder.glob("hpc_ckpt_*.ckpt"))) == 1
    output, _ = start().communicate(timeout=300)
    assert "Trained 276 steps on 2 processes." in output, output
    assert len(slurm.requeued) == 1
    assert (folder / "unlearned.ckpt").exists()
    assert_same(folder, tmp_path / "whole")


def check_launchers(python, folder):
    ways = {by_lightning: folder / "lightning", by_torchrun: folder / "torchrun", as_job: folder / "job"}
    said = {way.__name__: way(python, where) for way, where in ways.items()}
    for way in (by_torchrun, as_job):
        assert_same(ways[by_lightning], ways[way])
    assert "Trained 46 steps on 2 processes." in said["as_job"]
    assert (ways[as_job] / "unlearned.ckpt").exists()
    assert DeltaStore.open(ways[as_job] / "store").world_size == 2
    ledger = DeltaStore.open(ways[as_job] / "store").lineage.entries
    assert [entry.undone for entry in ledger] == [False]
    return ways


def test_the_launchers_give_the_same_store_and_weights(warm_python, tmp_path):
    check_launchers(warm_python, tmp_path)


@pytest.mark.slow
def test_the_launchers_of_a_user(tmp_path):
    folder = check_launchers(sys.executable, tmp_path)[by_lightning]
    said = call([sys.executable, EXAMPLES / "forget.py", "--folder", folder])
    assert "memorisation" in said


@pytest.mark.slow
def test_a_method_that_trains_runs_on_several_processes(warm_python, tmp_path):
    folder = tmp_path / "run"
    call([warm_python, TRAIN, "--folder", folder, "--devices", 2, "--epochs", 20])
    steps = DeltaStore.open(folder / "store").n_steps
    arguments = ["--folder", folder, "--devices", 2, "--method", "scrub"]
    said = call([warm_python, EXAMPLES / "forget.py", *arguments])
    assert "of the memorisation" in said
    assert DeltaStore.open(folder / "store").n_steps > steps  # what the pass did is recorded as well


def test_a_finished_run_goes_on_where_it_was(warm_python, tmp_path):
    short, whole = tmp_path / "short", tmp_path / "whole"
    call([warm_python, TRAIN, "--folder", short, "--epochs", 1])
    call([warm_python, TRAIN, "--folder", short, "--epochs", 1])  # nothing is left to do
    call([warm_python, TRAIN, "--folder", whole, "--epochs", 1])
    assert_same(short, whole)
