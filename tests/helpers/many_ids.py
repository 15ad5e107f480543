"""Stores with very many recorded ids and no deltas, written straight from arrays."""

import struct

import numpy as np
import torch

from lightning_unlearn.store.commits import CommitLog
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.records import record_crc
from lightning_unlearn.store.segment import STEP_COLUMNS, Content, write_content
from lightning_unlearn.types import DataFingerprint, LayerInfo, ModelSignature, RecordingSettings, StepStatus

BATCH = 64
STEPS_OF_A_SEGMENT = 80_000  # about 64 MiB


def drawn_ids(count, samples, seed=0):
    """The ids of the steps, segment by segment: arrays of shape (steps, 64)."""
    rng, left = np.random.default_rng(seed), count // BATCH
    while left:
        steps = min(left, STEPS_OF_A_SEGMENT)
        yield rng.integers(0, samples, (steps, BATCH), dtype=np.int32)
        left -= steps


def _content(ids, start):
    steps, nan = len(ids), float("nan")
    wide, zero = ids.astype("<i8"), np.zeros(len(ids), np.int64)
    crcs = []
    for i in range(steps):
        numbers = struct.pack("<qqqdqqffq", start + i, 0, BATCH, 0.0, int(StepStatus.UNWATCHED), BATCH, nan, nan, 0)
        crcs.append(record_crc(numbers, wide[i].tobytes(), b"", 0))
    known = {
        "batch_size": BATCH, "status": int(StepStatus.UNWATCHED), "record_crc32": crcs,
        "pruning_error": nan, "rounding_error": nan,
    }  # fmt: skip
    columns = {
        name: np.broadcast_to(np.array(known.get(name, 0), dtype), steps).copy() for name, dtype in STEP_COLUMNS.items()
    }
    return Content(columns, np.full(steps, BATCH, np.int64), zero, zero, ids.astype("<i4").reshape(-1), None, b"")


def store_of_many_ids(url, count, samples, seed=0):
    """A store whose steps saw the ids that `drawn_ids` gives."""
    store = DeltaStore.create(
        url,
        signature=ModelSignature((LayerInfo("w", (4,), "float32"),)),
        settings=RecordingSettings(keep=0.1),
        data=DataFingerprint("position", samples),
        initial={"w": torch.zeros(4)},
    )
    log, start, refs = CommitLog(store.files, store.store_id, 0), 0, []
    for ids in drawn_ids(count, samples, seed):
        name = log.segment_name()
        ref, chunks = write_content(
            _content(ids, start), [], name=name, start=start, rank=0, store_id=store.store_id, compression=None
        )
        log.publish_segment(ref, chunks)
        refs.append(ref)
        start += len(ids)
    log.commit(refs)
    log.release()
    store.refresh()
    return store
