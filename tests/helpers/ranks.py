"""Processes of one training, started as an outer launcher would: nobody ends the others when one of them dies."""

import json
import os
import subprocess

from tests.helpers.slurm import free_port


def start_ranks(python, script, *arguments, n_ranks=2):
    """Start the processes; their errors and their output go to one pipe each."""
    port = str(free_port())
    processes = []
    for rank in range(n_ranks):
        outer = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(n_ranks), "RANK": str(rank)}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [str(python), str(script), *map(str, arguments)]
        environment = {**os.environ, **(outer if n_ranks > 1 else {}), **meeting}
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **pipe))  # noqa: S603
    return processes


def run_ranks(python, script, folder, n_ranks=2, **settings):
    """Exit codes and outputs of a training, by rank."""
    settings = json.dumps({"devices": n_ranks, **settings})
    processes = start_ranks(python, script, folder, settings, n_ranks=n_ranks)
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    return [process.returncode for process in processes], outputs
