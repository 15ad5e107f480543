"""What an optimizer step changed: after - before of every parameter, and which of its entries are kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_unlearn.exceptions import LightningUnlearnError, UnsupportedStrategyError
from lightning_unlearn.functional.pruning import (
    SelectionScratch,
    keep_of,
    kept_count,
    largest_entries,
    largest_entries_global,
    random_entries,
)
from lightning_unlearn.types import LayerDelta, RecordingSettings
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.distributed import share_out
from lightning_unlearn.utilities.parameters import float_buffers

__all__ = ["DeltaCapture"]

# From this density on the positions of the non-zero entries would cost more bytes than the zeros they leave out.
_DENSE_FROM = 7 / 8


@dataclass(slots=True)
class _Layer:
    """A tensor of the module that this rank records."""

    number: int
    name: str
    tensor: Tensor
    kept: int
    before: Tensor | None = None
    own_scratch: Tensor | None = None


class DeltaCapture:
    """Keeps the weights as they were after the last step, so that the next step's change is one subtraction.

    Differences are formed in float32 (in float64 and then rounded, for float64 weights), never in 16 bits. Nothing the
    size of the model is allocated per step. Under data parallelism each rank takes its share of the layers, which
    costs no communication because the weights agree.

    Args:
        module: The module whose parameters are recorded; layers are numbered as in `model_signature`.
        settings: What is kept.
        rank: This process.
        world_size: Number of processes.
        seed: For `criterion="random"`.
        share: Whether returned dense values are views of buffers that the next step overwrites; otherwise they are
            copies. Sparse values are always copies.
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
    ) -> None:
        self._settings = settings
        self._seed = seed
        self._share = share
        parameters = list(module.named_parameters())
        # One threshold over all layers needs all of them in one place.
        one_place = settings.scope == "global"
        owners = share_out([parameter.numel() for _, parameter in parameters], 1 if one_place else world_size)
        self._layers: dict[int, _Layer] = {}
        self._known = {id(parameter) for _, parameter in parameters}
        for number, ((name, parameter), owner) in enumerate(zip(parameters, owners, strict=True)):
            if owner == rank:
                kept = kept_count(parameter.numel(), keep_of(name, settings.keep, settings.keep_overrides))
                self._layers[id(parameter)] = _Layer(number, name, parameter, kept)
        self._module = module
        self._buffers: dict[str, _Layer] = {}
        if settings.buffers == "record" and rank == 0:
            for number, (name, buffer) in enumerate(float_buffers(module).items(), len(parameters)):
                self._buffers[name] = _Layer(number, name, buffer, buffer.numel(), buffer.detach().clone())
        self._scratch = torch.empty(0)
        self._selection = SelectionScratch(0)

    def watch(self, optimizer: Optimizer) -> bool:
        """Remember the weights of parameters that this optimizer holds and that are not known yet.

        To be called before training and before every step: unfreezing adds parameters in the middle of a run.

        Returns:
            Whether all parameters of the optimizer belong to the module.

        Raises:
            UnsupportedStrategyError: a parameter is not real floating-point.
        """
        for layer in self._layers_of(optimizer):
            if layer.before is None:
                if not layer.tensor.is_floating_point():
                    got = f"{layer.tensor.dtype} ({layer.name})"
                    raise UnsupportedStrategyError(expected("parameters", "real floating-point numbers", got))
                layer.before = layer.tensor.detach().clone()
                self._reserve(layer)
        return all(id(parameter) in self._known for parameter in _parameters(optimizer))

    @torch.no_grad()
    def changes(self, optimizer: Optimizer, step: int) -> list[LayerDelta]:
        """The kept entries of what changed since the last call, by layer; layers without change are left out.

        Args:
            optimizer: The optimizer that has just stepped; only its parameters are looked at.
            step: The step's ordinal, for the message and the random criterion.

        Raises:
            LightningUnlearnError: a change is not finite.
        """
        layers = self._layers_of(optimizer)
        if self._settings.scope == "global":
            deltas = self._select_globally(layers, step)
        else:
            found = (self._select(layer, self._difference(layer, self._shared(layer)), step) for layer in layers)
            deltas = [delta for delta in found if delta is not None]
        for layer in self._current_buffers():
            difference = self._difference(layer, torch.empty(layer.tensor.numel(), device=layer.tensor.device))
            self._check_finite(layer, difference, step)
            if torch.count_nonzero(difference):
                deltas.append(LayerDelta(layer.number, None, difference.cpu()))
        return deltas

    @torch.no_grad()
    def skip(self, optimizer: Optimizer) -> None:
        """Take note of a step whose change is not recorded."""
        for layer in [*self._layers_of(optimizer), *self._current_buffers()]:
            if layer.before is not None:
                layer.before.copy_(layer.tensor)

    def drifted(self) -> list[str]:
        """Names of parameters that something other than an optimizer changed since the last step."""
        return [
            layer.name
            for layer in self._layers.values()
            if layer.before is not None and not torch.equal(layer.before, layer.tensor.detach())
        ]

    def _current_buffers(self) -> list[_Layer]:
        # Unlike a parameter, a buffer may be another tensor after the forward pass.
        for name, buffer in float_buffers(self._module).items() if self._buffers else ():
            if name in self._buffers:
                self._buffers[name].tensor = buffer
        return list(self._buffers.values())

    def _layers_of(self, optimizer: Optimizer) -> list[_Layer]:
        found = {id(parameter): self._layers.get(id(parameter)) for parameter in _parameters(optimizer)}
        return sorted((layer for layer in found.values() if layer is not None), key=lambda layer: layer.number)

    def _reserve(self, layer: _Layer) -> None:
        n, device = layer.tensor.numel(), layer.tensor.device
        if self._settings.scope == "global" or layer.kept == n:
            layer.own_scratch = torch.empty(n, device=device)
        elif n > self._scratch.numel() or device != self._scratch.device:
            self._scratch = torch.empty(max(n, self._scratch.numel()), device=device)
        if device.type == "cpu" and layer.kept < n and n > self._selection.bits.numel():
            self._selection = SelectionScratch(n)

    def _shared(self, layer: _Layer) -> Tensor:
        if layer.own_scratch is not None:
            return layer.own_scratch
        n, device = layer.tensor.numel(), layer.tensor.device
        scratch = self._scratch
        return scratch[:n] if scratch.device == device else torch.empty(n, device=device)

    @staticmethod
    def _difference(layer: _Layer, out: Tensor) -> Tensor:
        """What was added, as float32 of shape (n,) in `out`, in logical order whatever the memory format."""
        after, before = layer.tensor.detach(), layer.before
        if before is None:
            raise RuntimeError(f"the weights of {layer.name} before the step are unknown")
        shaped = out.view(after.shape)
        if after.dtype in (torch.float32, torch.float64):
            torch.sub(after, before, out=shaped)
        else:
            shaped.copy_(after).sub_(before)
        before.copy_(after)
        return out

    def _select(self, layer: _Layer, difference: Tensor, step: int) -> LayerDelta | None:
        n = difference.numel()
        if layer.kept == n or self._settings.criterion == "random":
            self._check_finite(layer, difference, step)
            changed = int(torch.count_nonzero(difference))
            if changed == 0:
                return None
            if layer.kept < n:
                positions = random_entries(n, layer.kept, (self._seed, step, layer.number))
            elif changed >= _DENSE_FROM * n:
                return LayerDelta(layer.number, None, self._keep(difference))
            else:  # rows of an embedding that no sample touched
                positions = torch.nonzero(difference).flatten()
        else:
            try:
                positions = largest_entries(difference, layer.kept, self._selection)
            except ValueError as error:
                raise self._not_finite(layer, step) from error
            if positions.numel() == 0:
                return None
        return LayerDelta(layer.number, positions.cpu(), difference[positions.to(difference.device)].cpu())

    def _select_globally(self, layers: Sequence[_Layer], step: int) -> list[LayerDelta]:
        differences = [self._difference(layer, self._shared(layer)) for layer in layers]
        for layer, difference in zip(layers, differences, strict=True):
            self._check_finite(layer, difference, step)
        count = kept_count(sum(difference.numel() for difference in differences), self._settings.keep)
        if self._settings.criterion == "random":
            sizes = torch.tensor([difference.numel() for difference in differences])
            drawn = random_entries(int(sizes.sum()), count, (self._seed, step))
            bounds = torch.searchsorted(drawn, torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)))).tolist()
            starts = (sizes.cumsum(0) - sizes).tolist()
            kept: Sequence[Tensor] = [
                drawn[first:last] - start for first, last, start in zip(bounds[:-1], bounds[1:], starts, strict=True)
            ]
        else:
            kept = largest_entries_global(differences, count)
        return [
            LayerDelta(layer.number, positions.cpu(), difference[positions.to(difference.device)].cpu())
            for layer, difference, positions in zip(layers, differences, kept, strict=True)
            if positions.numel() and torch.count_nonzero(difference)
        ]

    def _keep(self, values: Tensor) -> Tensor:
        return values if self._share and values.device.type == "cpu" else values.to("cpu", copy=True)

    @staticmethod
    def _not_finite(layer: _Layer, step: int) -> LightningUnlearnError:
        return LightningUnlearnError(
            f"Expected every change of weights to be finite, but `{layer.name}` became infinite or NaN in step {step}. "
            "The training has diverged: resume from a checkpoint, with a lower learning rate or clipped gradients."
        )

    def _check_finite(self, layer: _Layer, difference: Tensor, step: int) -> None:
        # A sum needs no memory; it can only be non-finite without cause where finite values overflow it.
        if not bool(torch.isfinite(difference.sum())) and not bool(torch.isfinite(difference).all()):
            raise self._not_finite(layer, step)


def _parameters(optimizer: Optimizer | LightningOptimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
