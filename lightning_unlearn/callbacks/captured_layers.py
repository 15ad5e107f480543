"""A tensor that is recorded: its value before the step, what a step added to it, and what to say when it broke."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_unlearn.exceptions import LightningUnlearnError
from lightning_unlearn.types import LayerDelta, LayerPiece
from lightning_unlearn.utilities.sharded import local_part

__all__ = ["Layer", "difference", "equal_bits", "not_finite", "same_bits", "whole_layer"]

# From this density on the positions of the non-zero entries would cost more bytes than the zeros they leave out.
_DENSE_FROM = 7 / 8
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(slots=True)
class Layer:
    """A tensor of the module that this rank records.

    Attributes:
        number: What records call it: its place in the model signature, or the number of the piece.
        name: Its name in the module.
        tensor: The parameter or buffer itself.
        kept: How many entries of the whole layer to keep.
        before: Its value after the last step, once it is known.
        scratch: float32 of shape (n,) for its change, where that is handed out.
        piece: Which entries of the layer this process holds, where they are not all.
    """

    number: int
    name: str
    tensor: Tensor
    kept: int
    before: Tensor | None = None
    scratch: Tensor | None = None
    piece: LayerPiece | None = None

    @property
    def value(self) -> Tensor:
        """What this process holds of it now, without a graph and without a copy."""
        return local_part(self.tensor.detach())

    @property
    def previous(self) -> Tensor:
        """Its value after the last step.

        Raises:
            LightningUnlearnError: nobody looked at it before this step.
        """
        if self.before is None:
            raise LightningUnlearnError(
                f"Expected `{self.name}` to be frozen or trainable throughout a step, but it was unfrozen within one. "
                "Unfreeze parameters before the step, in a hook such as `on_train_batch_start`."
            )
        return self.before


def difference(layer: Layer, out: Tensor) -> Tensor:
    """What a step added, in `out`: float32 of shape (n,), in logical order whatever the memory format.

    Formed in float32, or in float64 and then rounded, never in 16 bits. The layer's previous value becomes the one of
    now.
    """
    after, before = layer.value, layer.previous
    shaped = out.view(after.shape)
    if after.dtype in (torch.float32, torch.float64):
        torch.sub(after, before, out=shaped)
    else:
        shaped.copy_(after).sub_(before)
    before.copy_(after)
    return out


def _as_integers(tensor: Tensor) -> Tensor:
    size = tensor.element_size()
    if tensor.is_contiguous() and tensor.numel() * size % 8 == tensor.storage_offset() * size % 8 == 0:
        return tensor.view(-1).view(torch.int64)  # 1.7 times as fast as four bytes at a time
    return tensor.view(_INTEGERS[size])


def _integers_of(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    ours, theirs = _as_integers(first), _as_integers(second)
    if ours.dtype == theirs.dtype and ours.shape == theirs.shape:
        return ours, theirs
    integers = _INTEGERS[first.element_size()]
    return first.view(integers), second.view(integers)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape and dtype agree bit for bit, so that NaN equals itself.

    >>> same_bits(torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]))
    True
    """
    return torch.equal(*_integers_of(first.detach(), second.detach()))


def equal_bits(first: Tensor, second: Tensor) -> Tensor:
    """`same_bits` as a scalar tensor on the device, without waiting for it."""
    return torch.eq(*_integers_of(first.detach(), second.detach())).all()


def whole_layer(number: int, change: Tensor) -> LayerDelta | None:
    """A change that is kept whole: as it is, without its zeros where these are many, or `None` where it is all zero."""
    changed = int(torch.count_nonzero(change))
    if changed >= _DENSE_FROM * change.numel():
        return LayerDelta(number, None, change) if changed else None
    positions = torch.nonzero(change).flatten()  # rows of an embedding that no sample touched
    return LayerDelta(number, positions, change[positions]) if changed else None


def not_finite(name: str, step: int) -> LightningUnlearnError:
    """The error of a training that has diverged."""
    return LightningUnlearnError(
        f"Expected every change of weights to be finite, but `{name}` became infinite or NaN in step {step}. "
        "The training has diverged: resume from a checkpoint, with a lower learning rate or clipped gradients."
    )
