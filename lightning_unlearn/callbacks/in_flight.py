"""Results of a step on their way from an accelerator: buffers at both ends, and who may touch them when.

The life of a slot: the training thread queues kernels that fill its buffers on the device, then, on a stream of its
own that first waits for these kernels, copies into pinned buffers on the host, then an event. Whoever needs the
result, the writer's thread or the training thread that has come round to the same slot, waits for the event and copies
out of the pinned buffers, under a lock and only once. Not before that does the training thread use the slot again; so
nothing is overwritten that a copy, or a reader, still needs, and no more than the ring's steps are ever under way.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_unlearn.callbacks.captured_layers import Layer, not_finite, whole_layer
from lightning_unlearn.exceptions import LightningUnlearnError
from lightning_unlearn.functional.pruning import split_positions
from lightning_unlearn.types import LayerDelta

__all__ = ["InFlight", "Row", "Slot"]


@dataclass(slots=True)
class Row:
    """One selection: of a layer, or of all layers one after the other.

    Attributes:
        layers: Whose changes.
        numel: How many entries they have.
        kept: How many of them are kept.
        buffer: Whether the layer is a buffer, of which nothing is left out.
        start: Where its places in the slot begin.
        drawn: Positions that the host drew.
    """

    layers: tuple[Layer, ...]
    numel: int
    kept: int
    buffer: bool = False
    start: int = 0
    drawn: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether everything is kept, so that there are no positions."""
        return self.kept == self.numel and len(self.layers) == 1


@dataclass(slots=True)
class _Ends:
    """The buffers of a slot, at one of its two ends."""

    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    counts: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    finite: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    squares: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    edited: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.bool))

    def used(self, places: int, rows: int) -> tuple[Tensor, ...]:
        """What a step of so many places and rows has filled."""
        counted = (self.counts[:rows], self.finite[:rows], self.squares, self.edited)
        return (self.positions[:places], self.values[:places], *counted)


class Slot:
    """Buffers for one step under way.

    Attributes:
        near: The buffers on the device, to be filled between `prepare` and `send`.
    """

    def __init__(self, device: torch.device) -> None:
        self.near = _Ends()
        self._far = _Ends()
        self._device = device
        self._streams = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if self._streams else None  # type: ignore[no-untyped-call]
        self._pending: InFlight | None = None

    def prepare(self, rows: Sequence[Row]) -> None:
        """Wait until the slot is free, and make room for these rows."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        start = 0
        for row in rows:
            row.start, start = start, start + row.kept
        wide = torch.int64 if any(row.numel >= 1 << 31 for row in rows) else torch.int32
        sparse = any(not row.whole for row in rows)
        if (
            self.near.values.numel() < start
            or self.near.counts.numel() < len(rows)
            or self.near.positions.dtype != wide
        ):
            self.near, self._far = (self._allocate(start, len(rows), wide, near) for near in (True, False))
        if sparse and self.near.positions.numel() < start:
            self.near.positions = torch.empty(start, dtype=wide, device=self._device)
            self._far.positions = torch.empty(start, dtype=wide, pin_memory=self._streams)
        self.near.squares.zero_()
        self.near.edited.zero_()

    def _allocate(self, places: int, rows: int, wide: torch.dtype, near: bool) -> _Ends:
        def empty(size: int | tuple[()], dtype: torch.dtype) -> Tensor:
            if near:
                return torch.empty(size, dtype=dtype, device=self._device)
            return torch.empty(size, dtype=dtype, pin_memory=self._streams)

        return _Ends(
            empty(0, wide),
            empty(places, torch.float32),
            empty(rows, torch.int64),
            empty(rows, torch.bool),
            empty(2, torch.float64),
            empty((), torch.bool),
        )

    def send(self, rows: Sequence[Row], step: int) -> InFlight:
        """Queue the copy to the host, and give back what waits for it."""
        event, places = None, max((row.start + row.kept for row in rows), default=0)
        used = self.near.used(places, len(rows))
        if self._side is not None:
            # The side stream begins where the kernels queued so far end; the current stream does not wait for it.
            self._side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._side):
                self._copy(used, self._far.used(places, len(rows)))
                # Where a capture is dropped with copies under way, the allocator must not give the memory away.
                for tensor in used:
                    tensor.record_stream(self._side)
                # Whoever waits sleeps: the writer's thread waits for most of a step, and would spin on a core.
                event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                event.record(self._side)
        else:
            self._copy(used, self._far.used(places, len(rows)))
        self._pending = InFlight(self._far, rows, step, event)
        return self._pending

    @staticmethod
    def _copy(used: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        for source, target in zip(used, targets, strict=True):
            target.copy_(source, non_blocking=True)


class InFlight:
    """One step's result, which may still be on its way; every method may be called on any thread.

    Asking waits for the copy, not for anything queued on the device later.
    """

    def __init__(self, far: _Ends, rows: Sequence[Row], step: int, event: torch.cuda.Event | None) -> None:
        self._far: _Ends | None = far
        self._rows = rows
        self._step = step
        self._event = event
        self._lock = threading.Lock()
        self._deltas: list[LayerDelta] = []
        self._error: LightningUnlearnError | None = None
        self._squares = (0.0, 0.0)
        self._edited = False

    def deltas(self) -> list[LayerDelta]:
        """Kept entries by layer, in pageable memory of their own.

        Raises:
            LightningUnlearnError: a change is not finite.
        """
        self.wait()
        if self._error is not None:
            raise self._error
        return self._deltas

    def squares(self) -> tuple[float, float]:
        """Sums of squares of what is dropped, and of everything; zeros where the step was not measured."""
        self.wait()
        return self._squares

    def edited(self) -> bool:
        """The flag that was given on its way with the step."""
        self.wait()
        return self._edited

    def wait(self) -> None:
        """Take the result out of the buffers, which are then free."""
        with self._lock:
            far = self._far
            if far is None:
                return
            if self._event is not None:
                self._event.synchronize()
            self._squares = (float(far.squares[0]), float(far.squares[1]))
            self._edited = bool(far.edited)
            finite, counts = far.finite.tolist(), far.counts.tolist()
            for number, row in enumerate(self._rows):
                if not finite[number]:
                    names = row.layers[0].name if len(row.layers) == 1 else "one of the layers"
                    self._error = self._error or not_finite(names, self._step)
                elif counts[number]:
                    self._deltas += self._read(far, row, counts[number])
            self._far = None
            self._rows = ()

    def _read(self, far: _Ends, row: Row, count: int) -> list[LayerDelta]:
        numbers = [layer.number for layer in row.layers]
        if row.whole:
            values = far.values[row.start : row.start + row.numel].clone()
            delta = LayerDelta(numbers[0], None, values) if row.buffer else whole_layer(numbers[0], values)
            return [] if delta is None else [delta]
        if row.drawn is not None:
            positions, kept = row.drawn, row.kept
        else:
            positions, kept = far.positions[row.start : row.start + count].clone(), count
        values = far.values[row.start : row.start + kept].clone()
        parts = split_positions(positions, [layer.tensor.numel() for layer in row.layers])
        shares = torch.split(values, [part.numel() for part in parts])
        return [
            LayerDelta(number, part, share)
            for number, part, share in zip(numbers, parts, shares, strict=True)
            if part.numel()
        ]
