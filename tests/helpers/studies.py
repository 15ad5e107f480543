"""Small data sets for the studies of papers, and the check that a study goes on where it was stopped."""

import gzip
import json
import pickle

import numpy as np
import pytest


def write_cifar10(root, rows=60):
    """Noise in the shape of CIFAR-10; labels go round."""
    generator = np.random.default_rng(0)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        pixels = generator.integers(256, size=(rows, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [row % 10 for row in range(rows)]}))


def write_mnist(root, folder="MNIST", train=100, test=100, *, packed=True, noise=255):
    """Noise around a grey for each class, in the shape of the MNIST family; labels go round."""
    generator = np.random.default_rng(1)
    target = root / folder / "raw"
    target.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        grey = (255 - noise) // 10 * labels[:, None, None]
        pixels = (grey + generator.integers(noise, size=(count, 28, 28))).astype(np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
            name = f"{part}-{kind}-ubyte"
            (target / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)


def run_in_two_goes(module, study, path, everything, stops):
    """Stop a study at a job, then go on: what was finished is as it was, and the rest is added.

    Args:
        module: The script; its `run_job` is what is stopped.
        study: Runs what is missing and returns how many jobs that were.
        path: The study's JSON.
        everything: All jobs.
        stops: Whether a job is one that is interrupted.

    Returns:
        The document in the end.
    """
    run_job = module.run_job

    def stopped(job, **arguments):
        if stops(job):
            raise KeyboardInterrupt
        return run_job(job, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run_job", stopped)
        with pytest.raises(KeyboardInterrupt):
            study()
    kept = json.loads(path.read_text())["jobs"]
    assert 0 < len(kept) < len(everything)
    assert study() == len(everything) - len(kept)
    document = json.loads(path.read_text())
    assert set(document["jobs"]) == {job.key for job in everything}
    assert {key: document["jobs"][key] for key in kept} == kept
    assert study() == 0
    return document
