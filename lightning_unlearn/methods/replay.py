"""The batches of a recorded run, as positions in a training loader's dataset."""

from __future__ import annotations

from collections.abc import Sequence

from lightning import LightningModule

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.exceptions import StoreMismatchError
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import SampleId
from lightning_unlearn.utilities.checks import expected, shorten
from lightning_unlearn.utilities.parameters import weights_digest

__all__ = ["replayable_batches"]

_INSTEAD = 'Use `Retrain(order="same")` or `"fresh"`.'


def replayable_batches(
    store: DeltaStore, module: LightningModule, data: UnlearningDataModule, *, skip: int = 0
) -> list[list[int]]:
    """Positions of every batch that the module's weights were trained on, in order.

    A step that accumulated several batches is cut at the loader's batch size.

    Args:
        store: The recording.
        module: A module with weights that the store knows.
        data: The split training data.
        skip: How many of the first recorded steps to leave out.

    Raises:
        StoreMismatchError: the weights are unknown or rest on an edit; ids of steps were damaged or purged; an id names
            several rows or none of the training data; or batches cannot be told apart within a step.
    """
    state = store.shortest_state_of(weights_digest(module))
    if state is None or state.edits:
        got = "other weights" if state is None else "weights that rest on a subtraction"
        raise StoreMismatchError(expected("model", "the one that was recorded", got, _INSTEAD))
    steps = [step for start, stop in state.ranges for step in range(start, stop)][skip:]
    records = [store.record(step) for step in steps]
    missing = [record.step for record in records if len(record.sample_ids) != record.batch_size]
    if missing:
        rule = "a store with the ids of every step"
        raise StoreMismatchError(expected("store", rule, f"steps without some: {shorten(missing)}", _INSTEAD))
    # Optimizers that take turns on one batch, as in adversarial training, record it once each.
    batches = [record.sample_ids for record in records if record.optimizer == 0]
    places = _places(data.sample_ids, {one for batch in batches for one in batch})
    longest = max((len(batch) for batch in batches), default=0)
    size = data.batch_size
    if size is None or longest <= size:
        return [[places[one] for one in batch] for batch in batches]
    return [[places[one] for one in part] for batch in batches for part in _cut(batch, size)]


def _cut(batch: Sequence[SampleId], size: int) -> list[Sequence[SampleId]]:
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def _places(ids: Sequence[SampleId], wanted: set[SampleId]) -> dict[SampleId, int]:
    places: dict[SampleId, int] = {}
    repeated = set()
    for place, one in enumerate(ids):
        if one in places:
            repeated.add(one)
        places[one] = place
    if repeated & wanted:
        rule = "one id for every row, to replay recorded batches"
        raise StoreMismatchError(
            expected("sample_keys", rule, f"several rows of {shorten(repeated & wanted)}", _INSTEAD)
        )
    unknown = wanted - places.keys()
    if unknown:
        rule = "the recorded training data"
        raise StoreMismatchError(expected("data", rule, f"data without ids {shorten(unknown)}", _INSTEAD))
    return places
