"""As much of SLURM as a job file needs: the variables of `sbatch`, `srun`, and an `scontrol` that takes notes."""

import os
import shlex
import socket
import subprocess
from pathlib import Path

SRUN = r"""#!/usr/bin/env bash
# Starts one process for each task, and ends as the worst of them.
tasks=$SLURM_NTASKS
while [[ $1 == --* ]]; do
    case $1 in --ntasks=*) tasks=${1#*=} ;; --ntasks-per-node=*) export SLURM_NTASKS_PER_NODE=${1#*=} ;; esac
    shift
done
export SLURM_NTASKS=$tasks SLURM_NODEID=0
pids=()
for ((task = 0; task < tasks; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    pids+=($!)
done
echo "${pids[*]} $$ $PPID" >"$FAKE_SLURM/processes"
worst=0
for pid in "${pids[@]}"; do wait "$pid" || worst=$?; done
exit "$worst"
"""
SCONTROL = """#!/usr/bin/env bash
# A job that is queued again is ended: its processes, `srun` and the shell that runs the job file.
echo "$*" >>"$FAKE_SLURM/scontrol.log"
read -ra processes <"$FAKE_SLURM/processes"
kill -TERM "${processes[@]}"
"""


def free_port(low=15000, high=24999):
    """A port that is free now, in the range that Lightning derives from a job's number."""
    for port in range(low + os.getpid() % 7000, high):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


class Slurm:
    """A cluster of one node in a folder; `python` is what its jobs call by that name."""

    def __init__(self, folder, python):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True)
        # Not a link: an interpreter that is called by another path does not find its environment.
        called = f'#!/usr/bin/env bash\nexec {shlex.quote(str(python))} "$@"\n'
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", called)):
            (self.folder / name).write_text(text)
            (self.folder / name).chmod(0o755)

    @property
    def requeued(self):
        """What `scontrol` was called with, so far."""
        log = self.folder / "scontrol.log"
        return log.read_text().splitlines() if log.exists() else []

    def environment(self, job=None, n_tasks=2):
        """What `sbatch` tells a job."""
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))},
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "FAKE_SLURM": str(self.folder),
            "SLURM_JOB_ID": str(120000 + free_port() - 15000) if job is None else job,
            "SLURM_JOB_NAME": "unlearn",
            "SLURM_NTASKS": str(n_tasks),
            "SLURM_NTASKS_PER_NODE": str(n_tasks),
            "SLURM_NNODES": "1",
            "SLURM_NODELIST": "127.0.0.1",
        }

    def start(self, file, *arguments, environment, **kwargs):
        """Run a job file as SLURM's batch step would."""
        command = ["bash", str(file), *map(str, arguments)]
        return subprocess.Popen(command, env=environment, text=True, **kwargs)  # noqa: S603
