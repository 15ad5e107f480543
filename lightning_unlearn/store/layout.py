"""Layers in pieces: which process recorded what of each, and how pieces become layers again.

A record names what changed by a number: that of a layer in the signature, or, from the number of layers on, that of a
piece in the store's list of pieces. The list only ever grows, so a record means the same for good, whatever number of
processes, or cut of the layers, a later run has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.types import LayerDelta, LayerInfo, LayerPiece, ModelSignature

__all__ = ["add_piece", "join_pieces", "pieces_from_dict", "pieces_to_dict", "places_in_layer", "with_pieces"]


def with_pieces(signature: ModelSignature, pieces: Iterable[LayerPiece]) -> ModelSignature:
    """The signature as records number it: layers first, then pieces, each with its own shape.

    >>> whole = ModelSignature((LayerInfo("weight", (4, 3), "float32"),))
    >>> with_pieces(whole, [LayerPiece(0, 6, (6,), (1,))]).layers[1]
    LayerInfo(name='weight', shape=(6,), dtype='float32', kind='parameter')
    """
    layers = signature.layers
    return ModelSignature((*layers, *(replace(layers[piece.layer], shape=piece.shape) for piece in pieces)))


def pieces_to_dict(pieces: Sequence[LayerPiece]) -> dict[str, Any]:
    """Plain JSON data of a list of pieces."""
    return {"pieces": [list(asdict(piece).values()) for piece in pieces]}


def pieces_from_dict(body: dict[str, Any]) -> tuple[LayerPiece, ...]:
    """The pieces of `pieces_to_dict`.

    >>> pieces = (LayerPiece(0, 6, (2, 3), (4, 1)),)
    >>> pieces_from_dict(pieces_to_dict(pieces)) == pieces
    True
    """
    return tuple(
        LayerPiece(int(layer), int(start), tuple(map(int, shape)), tuple(map(int, strides)))
        for layer, start, shape, strides in body["pieces"]
    )


def places_in_layer(piece: LayerPiece, positions: Tensor) -> Tensor:
    """Where entries of a piece are in its layer, int64.

    Args:
        piece: The piece.
        positions: Integers of any shape: places in the piece, in row-major order.

    >>> places_in_layer(LayerPiece(0, 6, (2, 3), (4, 1)), torch.tensor([0, 2, 3, 5]))
    tensor([ 6,  8, 10, 12])
    """
    rest = positions.to(torch.int64)
    found = torch.full_like(rest, piece.start)
    for size, stride in zip(reversed(piece.shape), reversed(piece.strides), strict=True):
        found += rest % size * stride
        rest = rest // size
    return found


def add_piece(total: Tensor, piece: LayerPiece, part: Tensor) -> None:
    """Add the entries of a piece to those of its layer.

    Args:
        total: The layer, contiguous, of shape (numel,); changed in place.
        piece: Which of its entries.
        part: The piece's entries, of shape (piece.numel,).

    >>> total = torch.zeros(6)
    >>> add_piece(total, LayerPiece(0, 1, (2, 2), (3, 1)), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    >>> total
    tensor([0., 1., 2., 0., 3., 4.])
    """
    total.as_strided(piece.shape, piece.strides, total.storage_offset() + piece.start).add_(part.view(piece.shape))


def join_pieces(info: LayerInfo, parts: Sequence[tuple[LayerPiece, LayerDelta]]) -> LayerDelta:
    """The change of a layer from those of its pieces.

    Args:
        info: The layer.
        parts: Pieces, and what changed in each; positions are places in the piece.

    Returns:
        Positions in the layer, ascending; without positions where all pieces are there, and whole.

    Raises:
        ValueError: two pieces hold the same entry.

    >>> info, run = LayerInfo("bias", (5,), "float32"), LayerPiece(0, 0, (3,), (1,))
    >>> rest = LayerDelta(2, torch.tensor([1]), torch.tensor([4.0]))
    >>> join_pieces(info, [(LayerPiece(0, 3, (2,), (1,)), rest), (run, LayerDelta(1, None, torch.ones(3)))])
    LayerDelta(layer=0, indices=tensor([0, 1, 2, 4]), values=tensor([1., 1., 1., 4.]))
    """
    number = parts[0][0].layer
    everywhere = [
        places_in_layer(piece, torch.arange(piece.numel) if delta.indices is None else delta.indices)
        for piece, delta in parts
    ]
    positions, order = torch.cat(everywhere).sort(stable=True)
    if bool((positions[1:] == positions[:-1]).any()):
        raise ValueError(f"an entry of layer {number} twice")
    values = torch.cat([delta.values for _, delta in parts])[order]
    whole = positions.numel() == info.numel and all(delta.indices is None for _, delta in parts)
    return LayerDelta(number, None if whole else positions, values)
