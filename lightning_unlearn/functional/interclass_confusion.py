"""Interclass confusion: are two classes, whose labels were swapped in the forget set, still taken for each other?"""

from __future__ import annotations

from torch import Tensor

from lightning_unlearn.utilities.checks import expected

__all__ = ["check_class_pair", "fgt_error", "ic_error"]


def check_class_pair(classes: tuple[int, int], num_classes: int) -> tuple[int, int]:
    """Return two different class numbers as ints.

    Raises:
        ValueError: they are not two different numbers from 0 to `num_classes - 1`.

    >>> check_class_pair((0, 3), 10)
    (0, 3)
    """
    pair = tuple(classes)
    if len(pair) != 2 or len({*pair}) != 2 or not all(type(one) is int and 0 <= one < num_classes for one in pair):
        raise ValueError(expected("classes", f"two different class numbers from 0 to {num_classes - 1}", classes))
    return pair[0], pair[1]


def _rows(confusion: Tensor, classes: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
        raise ValueError(expected("confusion", "a square matrix of counts", tuple(confusion.shape)))
    pair = check_class_pair(classes, len(confusion))
    return confusion[list(pair)], pair


def ic_error(confusion: Tensor, classes: tuple[int, int]) -> Tensor:
    """IC-ERR: the share of samples of two classes that are given any wrong class.

    Wrong is every class but the sample's own, not only the other of the two. On data with true labels (retain, test) a
    model that never saw the swapped labels has a low error here; the right value is the retrained model's.

    Source: the interclass confusion test of Goel et al. 2022 (arXiv 2201.06640), in the form that the evaluation code
    of SCRUB computes (Kurmanji et al. 2023, arXiv 2302.09880).

    Args:
        confusion: (C, C) counts of samples, rows true classes, columns predicted ones; any integer or floating dtype.
        classes: The two classes A and B.

    Returns:
        A float64 scalar in [0, 1]; NaN where neither class has a sample.

    Raises:
        ValueError: the matrix is not square, or the classes are not two different ones of it.

    >>> import torch
    >>> counts = torch.tensor([[6, 2, 2], [1, 9, 0], [5, 5, 5]])
    >>> ic_error(counts, (0, 1))
    tensor(0.2500, dtype=torch.float64)
    """
    rows, (first, second) = _rows(confusion, classes)
    total = rows.double().sum()
    return (total - rows[0, first].double() - rows[1, second].double()) / total


def fgt_error(confusion: Tensor, classes: tuple[int, int]) -> Tensor:
    """FGT-ERR: how many samples of two classes are taken for the other of the two.

    A count, as in the code of SCRUB, so it grows with the data: compare models on the same samples. The right value is
    the retrained model's. Source and arguments as for :func:`ic_error`.

    Args:
        confusion: (C, C) counts of samples, rows true classes, columns predicted ones.
        classes: The two classes A and B.

    Returns:
        A scalar of the matrix's dtype.

    Raises:
        ValueError: the matrix is not square, or the classes are not two different ones of it.

    >>> import torch
    >>> fgt_error(torch.tensor([[6, 2, 2], [1, 9, 0], [5, 5, 5]]), (0, 1))
    tensor(3)
    """
    rows, (first, second) = _rows(confusion, classes)
    return rows[0, second] + rows[1, first]
