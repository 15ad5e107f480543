"""A persistent pool of two real gloo processes, so that a distributed case costs milliseconds instead of seconds.

The processes are spawned once per test run, meet through a file, and use one thread each. A failure in a child fails
the test with the child's traceback; there is no way for a case to run in one process instead.
"""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

WORLD_SIZE = 2
TIMEOUT = 120.0
"""Seconds after which a case that does not answer counts as deadlocked."""


class ChildError(AssertionError):
    """What was raised on one or several ranks, with their tracebacks."""


def _serve(rank, world_size, rendezvous, connection):
    # Lightning then takes the processes as given by an outer launcher, so a real Trainer runs inside the pool.
    os.environ.update({"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
    os.environ["OMP_NUM_THREADS"] = "1"
    # A spawned process would spawn its own children, too, and loader workers would import everything again.
    multiprocessing.set_start_method("fork", force=True)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=Path(rendezvous).as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
    connection.send(("ready", None))
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        for key in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # of an earlier case, whose order of samples it would give
            os.environ.pop(key, None)
        try:
            function, args, kwargs = pickle.loads(message)  # noqa: S301
            answer = pickle.dumps(("done", function(*args, **kwargs)))
        except BaseException:
            answer = pickle.dumps(("failed", traceback.format_exc()))
        connection.send_bytes(answer)


class GlooPool:
    """Two processes in one gloo group, or as many as are asked for; `run` calls a function on all of them."""

    def __init__(self, world_size=WORLD_SIZE, timeout=TIMEOUT):
        self.world_size, self.timeout = world_size, timeout
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="gloo-pool-")
        self._processes, self._connections = [], []
        for rank in range(world_size):
            here, there = context.Pipe()
            arguments = (rank, world_size, os.path.join(self._folder.name, "rendezvous"), there)
            process = context.Process(target=_serve, args=arguments, daemon=False, name=f"gloo-{rank}")
            process.start()
            there.close()
            self._processes.append(process)
            self._connections.append(here)
        self._collect()

    def _collect(self):
        answers = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(self.timeout):
                self.close()
                raise ChildError(f"rank {rank} did not answer within {self.timeout:.0f} s")
            try:
                answers.append(pickle.loads(connection.recv_bytes()))  # noqa: S301
            except EOFError:
                code = self._processes[rank].exitcode
                self.close()
                raise ChildError(f"rank {rank} died (exit code {code})") from None
        failures = [f"rank {rank}:\n{text}" for rank, (kind, text) in enumerate(answers) if kind == "failed"]
        if failures:
            if len(failures) < self.world_size:
                # The ranks may now disagree on which collective comes next, so this group is not used again.
                self.close()
            raise ChildError("\n".join(failures))
        return [value for _, value in answers]

    @property
    def is_alive(self):
        return bool(self._processes) and all(process.is_alive() for process in self._processes)

    def run(self, function, *args, **kwargs):
        """Call a module-level function on both ranks at once and return their results, in the order of the ranks."""
        message = pickle.dumps((function, args, kwargs))
        for connection in self._connections:
            connection.send_bytes(message)
        return self._collect()

    def close(self):
        """End both processes; a pool that was closed is replaced by the `gloo_pool` fixture."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.terminate()
                process.join()
        self._connections, self._processes = [], []
        self._folder.cleanup()
