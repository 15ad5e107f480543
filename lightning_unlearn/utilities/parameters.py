"""Named tensors of a module: what is recorded, in which order, and a digest of their values."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_unlearn.types import LayerInfo, ModelSignature, WeightChange
from lightning_unlearn.utilities.distributed import on_first_process
from lightning_unlearn.utilities.whole_weights import WholeWeights, is_sharded, whole_tensors

__all__ = [
    "apply_change",
    "change_norm",
    "clone_parameters",
    "float_buffers",
    "gathered_weights",
    "model_signature",
    "of_whole",
    "parameter_distance",
    "parameter_norm",
    "signature_of",
    "tensors_digest",
    "tensors_distance",
    "weights_digest",
]

T = TypeVar("T")


def float_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Floating-point buffers by name (BatchNorm's running statistics, not its batch counter)."""
    return {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}


def gathered_weights(module: nn.Module, root: nn.Module | None = None) -> WholeWeights:
    """Parameters and buffers, whole: the module's own, or gathered on the first process where it is sharded.

    There the other processes get tensors on the `meta` device, names are without what wrappers put into them, and every
    process must call this. Arguments are those of `whole_tensors`.
    """
    if is_sharded(module, root):
        return whole_tensors(module, everywhere=False, root=root)
    parameters: dict[str, Tensor] = {name: parameter.detach() for name, parameter in module.named_parameters()}
    floating = float_buffers(module)
    return WholeWeights(
        parameters,
        floating,
        {name: buffer for name, buffer in module.named_buffers() if name not in floating},
        frozenset(name for name, parameter in module.named_parameters() if parameter.requires_grad),
    )


def of_whole(module: nn.Module, function: Callable[[dict[str, Tensor]], T], root: nn.Module | None = None) -> T:
    """What `function` says of a module's whole parameters; under sharding the first process asks it for all of them."""
    parameters = gathered_weights(module, root).parameters
    return on_first_process(lambda: function(parameters)) if is_sharded(module, root) else function(parameters)


def model_signature(module: nn.Module, root: nn.Module | None = None) -> ModelSignature:
    """Names, shapes and dtypes of all parameters, then of all float buffers; tied parameters count once.

    Of a sharded module those of the whole tensors: every process must call this. `root` is that of `whole_tensors`.

    >>> [layer.name for layer in model_signature(nn.Linear(2, 1)).layers]
    ['weight', 'bias']
    """
    weights = gathered_weights(module, root)
    return signature_of(weights.parameters, weights.buffers)


def signature_of(parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> ModelSignature:
    """Names, shapes and dtypes of these tensors, in this order; they may be on any device, `meta` included."""

    def info(name: str, tensor: Tensor, buffer: bool) -> LayerInfo:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return LayerInfo(name, tuple(tensor.shape), dtype, "buffer" if buffer else "parameter")

    layers = [info(name, parameter, False) for name, parameter in parameters.items()]
    return ModelSignature((*layers, *(info(name, buffer, True) for name, buffer in buffers.items())))


def clone_parameters(module: nn.Module) -> dict[str, Tensor]:
    """A detached copy of every parameter, by name, on the module's own device and dtype."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@torch.no_grad()
def apply_change(module: nn.Module, change: WeightChange, *, scale: float = 1.0) -> None:
    """Add `scale * change` to the named parameters or buffers, in place.

    The sum is formed in the wider of the two dtypes and rounded once, so a float64 change loses nothing on the way.

    Raises:
        KeyError: a name is not a parameter or float buffer of the module; nothing was changed.
    """
    tensors = {**dict(module.named_parameters()), **float_buffers(module)}
    targets = {name: tensors[name] for name in change}
    for name, target in targets.items():
        delta = change[name].to(target.device)
        wide = torch.promote_types(target.dtype, delta.dtype)
        target.copy_(target.to(wide) + scale * delta.to(wide))


def _l2(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(math.fsum(float(tensor.detach().double().square().sum()) for tensor in tensors))


def parameter_norm(module: nn.Module) -> float:
    """L2 norm of all parameters, accumulated in float64; where they are sharded, every process must call this."""
    return of_whole(module, change_norm)


def change_norm(change: WeightChange) -> float:
    """L2 norm of a change of weights, accumulated in float64.

    >>> change_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    5.0
    """
    return _l2(change.values())


def parameter_distance(module: nn.Module, reference: Mapping[str, Tensor]) -> float:
    """L2 distance of the module's parameters to `reference`, paired by name, accumulated in float64.

    A parameter that `reference` lacks counts as unchanged: whoever leaves it out must know that it is. Where the
    module is sharded, `reference` holds whole tensors, and every process must call this.
    """
    return of_whole(module, lambda parameters: tensors_distance(parameters, reference))


def tensors_distance(tensors: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """L2 distance of tensors to those of the same name, accumulated in float64; see `parameter_distance`."""
    return _l2(
        tensor.detach().double() - reference[name].to(tensor.device).double()
        for name, tensor in tensors.items()
        if name in reference
    )


@torch.no_grad()
def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hex digest over names, dtypes, shapes and bits; see `weights_digest`, which is this of a module's parameters."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(tensors.items()):
        tensor = parameter.detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def weights_digest(module: nn.Module, root: nn.Module | None = None) -> str:
    """Hex digest over the names, dtypes, shapes and bits of all parameters; buffers are left out.

    Two modules have the same digest exactly when their parameters agree bit for bit, whatever the device, and whether
    or not they are sharded: then they are gathered on the first process, and every process must call this.

    Args:
        module: The module.
        root: As in `whole_tensors`.

    >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> _ = b.load_state_dict(a.state_dict())
    >>> weights_digest(a) == weights_digest(b)
    True
    """
    return of_whole(module, tensors_digest, root)
