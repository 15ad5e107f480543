"""What every test gets: the shared gloo pool, and guards that no test leaves traces for the next one."""

import logging
import os
import random
import threading

import numpy as np
import pytest
import torch

from tests.helpers.distributed import GlooPool
from tests.helpers.warm_python import start_server, write_client

# Two cores and small tensors: more threads only add noise, in time and in the order of sums.
torch.set_num_threads(1)
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.WARNING)

# Lightning and torch set these on their own in a test process, and neither changes what a later test computes.
ALLOWED_ENVIRONMENT = {
    "PYTEST_CURRENT_TEST",
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "KMP_INIT_AT_FORK",
    "KMP_DUPLICATE_LIB_OK",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
}


@pytest.fixture(scope="session")
def _gloo_pools():
    pools = []
    yield pools
    for pool in pools:
        pool.close()


@pytest.fixture
def gloo_pool(_gloo_pools):
    """Two gloo processes shared by all tests: `gloo_pool.run(function, *args)` -> results by rank.

    The function must be importable (module level); a failure on a rank fails the test with that rank's traceback.
    """
    if not _gloo_pools or not _gloo_pools[-1].is_alive:
        _gloo_pools.append(GlooPool())
    return _gloo_pools[-1]


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory):
    """Path of a `python` that has everything imported already; see `tests/helpers/warm_python.py`."""
    folder = tmp_path_factory.mktemp("warm")
    address, client = folder / "server", folder / "python"
    write_client(client, address)
    server = start_server(address)
    assert server.stdout.readline() == b"ready\n"
    yield client
    server.terminate()
    server.wait()
    server.stdout.close()


@pytest.fixture(scope="module")
def four_processes():
    """Four gloo processes of a module's own, for the slow few that need more than two: they take long to import."""
    pool = GlooPool(4, timeout=400.0)
    yield pool
    pool.close()


def _environment():
    return {key: value for key, value in os.environ.items() if key not in ALLOWED_ENVIRONMENT}


@pytest.fixture(autouse=True)
def _no_leaks():
    """Every test starts from the same seeds and must give back what it changed in the process."""
    for key in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(key, None)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    before = _environment()
    threads = set(threading.enumerate())
    yield
    assert _environment() == before, "the test changed environment variables"
    assert not (torch.distributed.is_available() and torch.distributed.is_initialized()), "a process group is left"
    assert torch.get_num_threads() == 1, "the number of torch threads was changed"
    assert torch.get_default_dtype() == torch.float32, "the default dtype was changed"
    assert torch.is_grad_enabled(), "gradients were left disabled"
    assert not torch.are_deterministic_algorithms_enabled(), "deterministic algorithms were left on"
    left = [thread for thread in set(threading.enumerate()) - threads if not thread.daemon]
    for thread in left:
        thread.join(5)
    assert not [thread for thread in left if thread.is_alive()], "a thread is left running"
