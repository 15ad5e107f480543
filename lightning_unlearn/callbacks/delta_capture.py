"""What an optimizer step changed: after - before of every parameter, and which of its entries are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_unlearn.callbacks.captured_layers import Layer, difference, equal_bits, not_finite, same_bits
from lightning_unlearn.callbacks.device_selection import DeviceSelection
from lightning_unlearn.callbacks.host_selection import HostSelection, Squares
from lightning_unlearn.callbacks.recording_layout import Held, RecordingLayout, layout_of
from lightning_unlearn.callbacks.shard_selection import ShardSelection
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.functional.pruning import keep_of, kept_count
from lightning_unlearn.functional.shard_selection import Alone, Reductions
from lightning_unlearn.types import LayerDelta, RecordingSettings
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.parameters import float_buffers

__all__ = ["DeltaCapture", "StepChange", "Watched"]


@dataclass(frozen=True, slots=True)
class Watched:
    """What was found right before a step.

    Attributes:
        edited: Names of parameters that something other than an optimizer changed since the last step. Always empty
            for weights on a CUDA device, where looking would mean waiting: see `StepChange.edited`.
    """

    edited: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepChange:
    """What one step did. Callables stand for what is still on its way from a device; calling waits for it.

    Attributes:
        deltas: Kept entries by layer; layers without change are left out. A callable raises `LightningUnlearnError`
            where a change is not finite; without one, that was raised before.
        pruning_error: L2 norm of what was left out, relative to that of the whole change of the parameters, in
            [0, 1]; `None` where it was not measured.
        edited: Whether something other than an optimizer had changed these weights before the step. That change is
            not part of the deltas.
    """

    deltas: list[LayerDelta] | Callable[[], list[LayerDelta]]
    pruning_error: float | Callable[[], float] | None
    edited: bool | Callable[[], bool]


class DeltaCapture:
    """Keeps the weights as they were after the last step, so that the next step's change is one subtraction.

    Differences are formed in float32 (in float64 and then rounded, for float64 weights), never in 16 bits. Nothing the
    size of the model is allocated per step: what is held is one copy of the recorded parameters, scratch (see
    `HostSelection`; `DeviceSelection` where weights are on a CUDA device, `ShardSelection` where layers are cut), and
    with `keep=1.0` or `scope="global"` their difference. Under data parallelism each rank takes its share of the
    layers, which costs no communication because the weights agree; where layers are sharded, the piece it holds.
    Parameters that are frozen cost nothing.

    Args:
        module: The module whose parameters are recorded; layers are numbered as in `model_signature`.
        settings: What is kept.
        rank: This process.
        world_size: Number of processes.
        seed: For `criterion="random"`.
        share: Whether returned dense values are views of buffers that the next step overwrites; otherwise they are
            copies. Sparse values are always copies.
        layout: Who records what; by default layers are whole, and shared out by size.
        names: Names of the parameters in the user's module, where a wrapper has given them others.
        first_piece: Number of the layout's first piece in the store.
        reductions: What processes do together that hold pieces of layers.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: RecordingSettings,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        share: bool = True,
        layout: RecordingLayout | None = None,
        names: Sequence[str] | None = None,
        first_piece: int = 0,
        reductions: Reductions | None = None,
    ) -> None:
        self._settings = settings
        self._seed = seed
        found = dict(module.named_parameters())
        parameters = list(zip(found if names is None else names, found.values(), strict=True))
        if layout is None:
            # One threshold over all layers needs all of them in one place.
            held = [Held.of(name, parameter) for name, parameter in parameters]
            layout = layout_of(held, rank, world_size, one_place=settings.scope == "global")
        self._layers: dict[int, Layer] = {}
        self._numbers = {id(parameter): number for number, (_, parameter) in enumerate(parameters)}
        self._kept = [
            kept_count(numel, keep_of(name, settings.keep, settings.keep_overrides))
            for (name, _), numel in zip(parameters, layout.numel, strict=True)
        ]
        for number, (name, parameter) in enumerate(parameters):
            if number in layout.mine:
                place = layout.mine[number]
                piece = None if place is None else layout.pieces[place]
                called = number if place is None else first_piece + place
                self._layers[id(parameter)] = Layer(called, name, parameter, self._kept[number], piece=piece)
        self._module = module
        self._buffers: dict[str, Layer] = {}
        if settings.buffers == "record" and rank == 0:
            for number, (name, buffer) in enumerate(float_buffers(module).items(), len(parameters)):
                self._buffers[name] = Layer(number, name, buffer, buffer.numel(), buffer.detach().clone())
        self._shards: ShardSelection | None = None
        if layout.is_sharded:
            names = [name for name, _ in parameters]
            self._shards = ShardSelection(settings, names, layout.numel, reductions or Alone(), seed=seed)
        self._host = HostSelection(settings, seed=seed, share=share)
        self._devices: dict[torch.device, DeviceSelection] = {}
        self._edits: dict[int, bool | dict[torch.device, Tensor]] = {}

    @torch.no_grad()
    def meet(self, optimizer: Optimizer) -> None:
        """Remember the weights of parameters that are new, because they were unfrozen; others are left alone.

        Raises:
            UnsupportedStrategyError: a parameter is not real floating-point.
        """
        for layer in self._layers_of(optimizer):
            tensor = layer.value
            if layer.before is None:
                if not tensor.is_floating_point():
                    got = f"{tensor.dtype} ({layer.name})"
                    raise UnsupportedStrategyError(expected("parameters", "real floating-point numbers", got))
                layer.before = tensor.clone()
                if not _has_streams(tensor.device) and self._shards is None:
                    self._host.reserve(layer)

    @torch.no_grad()
    def watch(self, optimizer: Optimizer) -> Watched:
        """`meet`, and look at the weights of this optimizer: before training, and before every step changes them.

        Parameters that something other than an optimizer changed since the last step (weight averaging, clamping, an
        edit in a hook) are remembered as they are now, so that the edit is not charged to the step that comes.

        Raises:
            UnsupportedStrategyError: a parameter is not real floating-point.
        """
        self.meet(optimizer)
        edited, flags = [], dict[torch.device, list[Tensor]]()
        for layer in self._layers_of(optimizer):
            tensor, before = layer.value, layer.previous
            if before.shape != tensor.shape or before.dtype != tensor.dtype or before.device != tensor.device:
                edited.append(layer.name)
                layer.before = tensor.clone()
            elif _has_streams(tensor.device):
                flags.setdefault(tensor.device, []).append(equal_bits(before, tensor))
                before.copy_(tensor)
            elif not same_bits(before, tensor):
                edited.append(layer.name)
                before.copy_(tensor)
        found = {device: ~torch.stack(equal).all() for device, equal in flags.items()}
        self._edits[id(optimizer)] = True if edited else found
        return Watched(tuple(edited))

    @torch.no_grad()
    def changes(self, optimizer: Optimizer, step: int, measure: bool = False) -> StepChange:
        """What changed since `watch` by the step that this optimizer has just made.

        On CUDA devices nothing is waited for, except where three steps are under way that nobody has asked for.

        Args:
            optimizer: The optimizer that has just stepped; only its parameters are looked at.
            step: The step's ordinal, for the message and the random criterion.
            measure: Whether to measure the pruning error as well, which costs about as much again.

        Raises:
            LightningUnlearnError: a change is not finite; or a parameter was unfrozen while the step was made.
        """
        layers, buffers = self._layers_of(optimizer), self._current_buffers()
        edits = self._edits.pop(id(optimizer), False)
        flags = edits if isinstance(edits, dict) else {}
        if self._shards is not None:
            return self._sharded_changes(self._shards, optimizer, step, measure, edits)
        here = [layer for layer in layers if not _has_streams(layer.tensor.device)]
        deltas, squares = self._host.select(here, step, measure)
        deltas += self._host_buffers([layer for layer in buffers if not _has_streams(layer.tensor.device)], step)
        devices = dict.fromkeys(one.tensor.device for one in (*layers, *buffers) if _has_streams(one.tensor.device))
        away = [
            self._device(device).start(
                [layer for layer in layers if layer.tensor.device == device],
                [layer for layer in buffers if layer.tensor.device == device],
                step,
                measure,
                flags.get(device),
            )
            for device in devices
        ]
        if not away:
            return StepChange(deltas, _relative([squares]) if measure else None, bool(edits))
        error = (lambda: _relative([squares, *(one.squares() for one in away)])) if measure else None
        return StepChange(
            lambda: sorted((*deltas, *(delta for one in away for delta in one.deltas())), key=lambda one: one.layer),
            error,
            edits if isinstance(edits, bool) else lambda: any(one.edited() for one in away),
        )

    def _sharded_changes(
        self,
        shards: ShardSelection,
        optimizer: Optimizer,
        step: int,
        measure: bool,
        edits: bool | Mapping[torch.device, Tensor],
    ) -> StepChange:
        # Not only the layers that are live here: processes must agree on what they select from.
        numbers = {self._numbers[id(one)]: id(one) for one in _parameters(optimizer) if id(one) in self._numbers}
        mine = self._layers_of(optimizer)
        deltas, squares = shards.select(
            {number: self._kept[number] for number in numbers},
            {self._numbers[id(layer.tensor)]: layer for layer in mine},
            step,
            measure,
        )
        deltas += self._host_buffers(self._current_buffers(), step)
        edited = edits if isinstance(edits, bool) else any(bool(flag) for flag in edits.values())
        return StepChange(deltas, _relative([squares]) if measure else None, edited)

    @torch.no_grad()
    def skip(self, optimizer: Optimizer, step: int) -> bool | Callable[[], bool]:
        """Take note of a step whose change is not recorded.

        Args:
            optimizer: The optimizer that has just stepped.
            step: The step's ordinal.

        Returns:
            Whether something other than an optimizer had changed these weights before the step, as in `StepChange`.
        """
        edits = self._edits.pop(id(optimizer), False)
        for layer in [*self._layers_of(optimizer), *self._current_buffers()]:
            layer.previous.copy_(layer.value)
        if isinstance(edits, bool):
            return edits
        away = [self._device(device).start([], [], step, False, flag) for device, flag in edits.items()]
        return (lambda: any(one.edited() for one in away)) if away else False

    def drifted(self) -> list[str]:
        """Names of parameters that something other than an optimizer changed since the last step."""
        return [
            layer.name
            for layer in self._layers.values()
            if layer.before is not None and not same_bits(layer.before, layer.value)
        ]

    def untouched(self) -> dict[str, Tensor]:
        """This rank's parameters that no optimizer has held so far, by name."""
        return {layer.name: layer.value for layer in self._layers.values() if layer.before is None}

    def _device(self, device: torch.device) -> DeviceSelection:
        if device not in self._devices:
            self._devices[device] = DeviceSelection(device, self._settings, seed=self._seed)
        return self._devices[device]

    def _host_buffers(self, buffers: Sequence[Layer], step: int) -> Iterator[LayerDelta]:
        for layer in buffers:
            change = difference(layer, torch.empty(layer.tensor.numel(), device=layer.tensor.device)).cpu()
            if not bool(torch.isfinite(change).all()):
                raise not_finite(layer.name, step)
            if torch.count_nonzero(change):
                yield LayerDelta(layer.number, None, change)

    def _current_buffers(self) -> list[Layer]:
        # Unlike a parameter, a buffer may be another tensor after the forward pass.
        for name, buffer in float_buffers(self._module).items() if self._buffers else ():
            if name in self._buffers:
                self._buffers[name].tensor = buffer
        return list(self._buffers.values())

    def _layers_of(self, optimizer: Optimizer) -> list[Layer]:
        """This rank's layers that the optimizer may change, in order: not those that are frozen and always were."""
        found = {id(parameter): self._layers.get(id(parameter)) for parameter in _parameters(optimizer)}
        live = (
            layer
            for layer in found.values()
            if layer is not None
            and (layer.before is not None or layer.tensor.requires_grad or layer.tensor.grad is not None)
        )
        return sorted(live, key=lambda layer: layer.number)


def _has_streams(device: torch.device) -> bool:
    return device.type == "cuda"


def _relative(squares: Sequence[Squares]) -> float:
    dropped, total = (math.fsum(one[side] for one in squares) for side in (0, 1))
    return math.sqrt(dropped / total) if total else 0.0


def _parameters(optimizer: Optimizer | LightningOptimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
