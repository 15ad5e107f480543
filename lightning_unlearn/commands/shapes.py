"""Names, shapes and dtypes of a model that is named on the command line, without any of its weights in memory."""

from __future__ import annotations

import importlib
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_unlearn.types import LayerInfo, ModelSignature
from lightning_unlearn.utilities.checks import expected, shorten
from lightning_unlearn.utilities.parameters import model_signature

__all__ = ["frozen_but", "read_shapes"]

_SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_STATISTICS = (".running_mean", ".running_var")


def read_shapes(model: str, arguments: Mapping[str, Any] | None = None) -> tuple[ModelSignature, frozenset[str]]:
    """The layers of a model, and which of them are frozen.

    A class or factory is called on PyTorch's meta device, so a model of any size takes no memory. Of a checkpoint only
    what describes its tensors is read. It does not say what is frozen, nor which of its tensors are buffers: of these
    BatchNorm's running statistics are known by their names.

    Args:
        model: `package.module:name`, `package.module.name`, or the path of a `.safetensors` file, of a Lightning
            checkpoint, or of a state dict that `torch.save` wrote.
        arguments: What the class or factory is called with.

    Raises:
        ValueError: there is nothing of that name, it makes no module, or it cannot be read.

    >>> signature, frozen = read_shapes("torch.nn:Linear", {"in_features": 2, "out_features": 3})
    >>> [(layer.name, layer.shape) for layer in signature.layers], frozen
    ([('weight', (3, 2)), ('bias', (3,))], frozenset())
    """
    if os.path.isfile(model):
        return ModelSignature(tuple(_layers(_described(model)))), frozenset()
    module = _built(_named(model), model, dict(arguments or {}))
    frozen = frozenset(name for name, parameter in module.named_parameters() if not parameter.requires_grad)
    return model_signature(module), frozen


def frozen_but(signature: ModelSignature, trainable: Sequence[str]) -> frozenset[str]:
    """Names of the parameters that none of the patterns (`fnmatch`) matches.

    Raises:
        ValueError: a pattern matches no parameter.

    >>> layers = (LayerInfo("head.weight", (2, 2), "float32"), LayerInfo("base.weight", (2, 2), "float32"))
    >>> frozen_but(ModelSignature(layers), ["head.*"])
    frozenset({'base.weight'})
    """
    names = [layer.name for layer in signature.layers if layer.kind == "parameter"]
    for pattern in trainable:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(expected("trainable", f"patterns of names such as {shorten(names, 3)}", pattern))
    return frozenset(name for name in names if not any(fnmatchcase(name, pattern) for pattern in trainable))


def _named(path: str) -> Any:
    place, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    rule = "`package.module:name` of a class or factory, or the path of a checkpoint"
    if not place or not attribute:
        raise ValueError(expected("model", rule, path, f"There is no such file, seen from {os.getcwd()}."))
    try:
        found: Any = importlib.import_module(place)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(expected("model", rule, f"{path} ({error})")) from error
    return found


def _built(found: Any, path: str, arguments: dict[str, Any]) -> nn.Module:
    if isinstance(found, nn.Module):
        return found
    factory: Callable[..., Any] = found
    try:
        with torch.device("meta"):
            made = factory(**arguments)
    except Exception as error:  # whatever the user's code raises: it is named, and nothing has happened yet
        rule = "something that can be called with these arguments, and built on the meta device"
        got = f"{path} with {arguments} ({type(error).__name__}: {error})"
        remedy = "Give `model_args`, or name a checkpoint, of which only the shapes are read."
        raise ValueError(expected("model", rule, got, remedy)) from error
    if not isinstance(made, nn.Module):
        raise ValueError(
            expected("model", "a class or factory of a torch.nn.Module", f"{path} ({type(made).__name__})")
        )
    return made


def _layers(described: Mapping[str, tuple[tuple[int, ...], str]]) -> list[LayerInfo]:
    # Buffers come last, as in every signature.
    layers = [
        LayerInfo(name, shape, dtype, "buffer" if name.endswith(_STATISTICS) else "parameter")
        for name, (shape, dtype) in described.items()
    ]
    return sorted(layers, key=lambda layer: layer.kind == "buffer")


def _described(path: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every floating-point tensor."""
    if path.endswith(".safetensors"):
        return _header(path)
    try:
        content = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        rule = "a checkpoint that loads with weights_only=True"
        raise ValueError(expected("model", rule, f"{path} ({reason})", "Save its `state_dict` alone.")) from error
    held = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    found = {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in held.items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point()
    }
    if not found:
        raise ValueError(expected("model", "a checkpoint with a `state_dict`", path))
    return found


def _header(path: str) -> dict[str, tuple[tuple[int, ...], str]]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: (tuple(one.get_shape()), _SAFETENSORS[one.get_dtype()])
                for name, one in slices.items()
                if one.get_dtype() in _SAFETENSORS
            }
    except SafetensorError as error:
        raise ValueError(expected("model", "an intact safetensors file", f"{path} ({error})")) from error
