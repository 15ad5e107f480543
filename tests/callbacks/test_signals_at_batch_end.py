"""Real signals at awkward moments of real processes: the run is saved at the end of a batch, and loses nothing."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from tests.helpers import signalled
from tests.helpers.same_runs import assert_same
from tests.helpers.slurm import Slurm

JOB = 'srun python "$SCRIPT" "$FOLDER" "$SETTINGS"\n'


def event(where, batch=5, rank=0, what="SIGUSR1"):
    return {"rank": rank, "batch": batch, "where": where, "what": what}


class Cluster:
    """Runs the script as a job, again and again, until it is not queued again."""

    def __init__(self, folder, python):
        self.python, self.folder, self.n_runs = python, folder, 0

    def run(self, name, devices, events):
        place = self.folder / name
        slurm = Slurm(self.folder / f"slurm-{name}", self.python)
        (slurm.folder / "job.sbatch").write_text(JOB)
        settings = json.dumps({"devices": devices, "events": events})
        script = str(Path(signalled.__file__))
        environment = slurm.environment(n_tasks=devices)
        environment |= {"SCRIPT": script, "FOLDER": str(place), "SETTINGS": settings}
        output = []
        for restart in range(4):
            job = slurm.start(
                slurm.folder / "job.sbatch",
                environment={**environment, "SLURM_RESTART_COUNT": str(restart)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            output.append(job.communicate(timeout=120)[0])  # returns when the last process has ended
            if len(slurm.requeued) == restart:
                assert job.returncode == 0, output[-1][-4000:]
                assert (place / "trained.ckpt").exists(), output[-1][-4000:]
                return place, slurm, output
        raise AssertionError("queued again and again")


@pytest.fixture
def cluster(warm_python, tmp_path):
    return Cluster(tmp_path, warm_python)


def steps_in(path):
    return torch.load(path, weights_only=False)["global_step"]


def check_requeued(cluster, devices, events):
    whole, _, _ = cluster.run("whole", devices, [])
    place, slurm, output = cluster.run("requeued", devices, events)
    assert len(slurm.requeued) == 1
    assert slurm.requeued[0].startswith("requeue 12")
    assert "Traceback" not in "".join(output)
    saved = [steps_in(path) for path in sorted(place.glob("hpc_ckpt_*.ckpt"))]
    assert_same(place, whole)
    return saved


@pytest.mark.parametrize("where", ["half", "before"])
def test_one_process_is_saved_behind_the_step_that_a_signal_finds_under_way(cluster, where):
    assert check_requeued(cluster, 1, [event(where)]) == [5]


def test_signals_that_two_processes_get_at_different_batches(cluster):
    events = [event("half", batch=5, rank=1), event("before", batch=6, rank=0)]
    (saved,) = check_requeued(cluster, 2, events)
    assert saved in (5, 6)
