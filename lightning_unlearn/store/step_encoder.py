"""What was appended, and how it becomes the bytes of one step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lightning_unlearn.store.codec import EncodedLayer, encode_layer, relative_rounding_error
from lightning_unlearn.store.records import EncodedStep, encode_step
from lightning_unlearn.types import LayerDelta, ModelSignature, RecordingSettings, SampleId, StepStatus
from lightning_unlearn.utilities.checks import expected

__all__ = ["Deltas", "PendingStep", "StepEncoder"]

Deltas: TypeAlias = Sequence[LayerDelta] | Callable[[], Sequence[LayerDelta]]
"""The changes of a step, or what returns them once they have arrived from an accelerator."""


@dataclass(frozen=True, slots=True)
class PendingStep:
    """One appended step that is not encoded yet; see `StoreWriter.append`."""

    optimizer: int
    sample_ids: tuple[SampleId, ...]
    batch_size: int
    seconds: float
    deltas: Deltas
    status: StepStatus
    pruning_error: float | Callable[[], float] | None
    edited: bool | Callable[[], bool]


class StepEncoder:
    """Encodes steps as a store's settings say.

    Args:
        signature: Names and shapes of the recorded layers.
        settings: How values are written; buffers are always float32.
    """

    def __init__(self, signature: ModelSignature, settings: RecordingSettings) -> None:
        self._layers = signature.layers
        self._settings = settings

    def check(self, deltas: Sequence[LayerDelta]) -> tuple[LayerDelta, ...]:
        """The deltas, if their layers are in the signature.

        Raises:
            ValueError: a layer is not.
        """
        for delta in deltas:
            if not 0 <= delta.layer < len(self._layers):
                raise ValueError(expected("layer", f"below {len(self._layers)}", delta.layer))
        return tuple(deltas)

    def encode(self, pending: PendingStep) -> EncodedStep:
        """The step as bytes; waits for what is still on its way.

        Raises:
            ValueError: a delta does not fit its layer, or a value is not finite.
        """
        deltas = self.check(pending.deltas()) if callable(pending.deltas) else pending.deltas
        pruning_error = pending.pruning_error() if callable(pending.pruning_error) else pending.pruning_error
        edited = pending.edited() if callable(pending.edited) else pending.edited
        layers = []
        for delta in deltas:
            info = self._layers[delta.layer]
            value_dtype = "float32" if info.kind == "buffer" else self._settings.value_dtype
            layers.append(encode_layer(delta, info.numel, value_dtype))
        if pruning_error is None:
            return self._record(pending, pending.status, layers, edited)
        rounding_error = relative_rounding_error(zip(deltas, layers, strict=True))
        return self._record(pending, pending.status, layers, edited, float(pruning_error), rounding_error)

    def without_delta(self, pending: PendingStep, status: StepStatus, edited: bool) -> EncodedStep:
        """Everything about the step but its delta."""
        return self._record(pending, status, [], edited)

    def _record(
        self,
        pending: PendingStep,
        status: StepStatus,
        layers: Sequence[EncodedLayer],
        edited: bool,
        pruning_error: float = math.nan,
        rounding_error: float = math.nan,
    ) -> EncodedStep:
        return encode_step(
            optimizer=pending.optimizer,
            sample_ids=pending.sample_ids,
            batch_size=pending.batch_size,
            seconds=pending.seconds,
            status=status,
            layers=layers,
            compression=self._settings.compression,
            pruning_error=pruning_error,
            rounding_error=rounding_error,
            edited=bool(edited),
        )
