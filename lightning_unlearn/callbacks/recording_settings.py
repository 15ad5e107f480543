"""How much is kept and how it is written: what the user said, or what suits the training."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from lightning_unlearn.functional.pruning import DEFAULT_KEEP, FEW_TRAINABLE
from lightning_unlearn.types import RecordingSettings, ValueDtype
from lightning_unlearn.utilities.checks import check_fraction, expected

__all__ = ["RequestedSettings", "keep_settings", "trainable_share"]


def keep_settings(keep: float | Mapping[str, float], scope: str) -> tuple[float, dict[str, float]]:
    """A fraction and overrides; a pattern `"*"` at the end is the fraction for all other layers.

    Raises:
        ValueError: a fraction is out of range, patterns do not fit the scope, or one can never match.

    >>> keep_settings({"*.bias": 1.0, "*": 0.2}, "layer")
    (0.2, {'*.bias': 1.0})
    """
    if not isinstance(keep, Mapping):
        return check_fraction("keep", keep), {}
    if not keep or not all(isinstance(pattern, str) for pattern in keep):
        raise ValueError(expected("keep", "a fraction, or a mapping from patterns of layer names to fractions", keep))
    if scope == "global":
        raise ValueError(expected("keep", "one fraction where scope='global'", dict(keep), "Use scope='layer'."))
    overrides = {pattern: check_fraction(f"keep[{pattern!r}]", value) for pattern, value in keep.items()}
    if "*" in overrides and next(reversed(overrides)) != "*":
        raise ValueError(expected("keep", "a mapping with '*' last, as the first match wins", dict(keep)))
    return overrides.pop("*", DEFAULT_KEEP), overrides


def trainable_share(parameters: Mapping[str, Tensor], trainable: Collection[str]) -> float:
    """Share of the parameters that require gradients, by number of entries; 1.0 where there are none.

    >>> import torch
    >>> trainable_share({"base": torch.ones(9), "head": torch.ones(1)}, {"head"})
    0.1
    """
    total = sum(parameter.numel() for parameter in parameters.values())
    return sum(parameters[name].numel() for name in trainable) / total if total else 1.0


@dataclass(frozen=True, slots=True)
class RequestedSettings:
    """What the user said; `resolve` settles the rest.

    Attributes:
        base: Everything but what is to be chosen; its `keep` and `value_dtype` hold for a training of all parameters.
        choose_keep: Whether `keep` was left open.
        choose_dtype: Whether `value_dtype` was left open.
    """

    base: RecordingSettings
    choose_keep: bool
    choose_dtype: bool

    @classmethod
    def of(
        cls,
        keep: float | Mapping[str, float] | None,
        value_dtype: ValueDtype | None,
        *,
        scope: Literal["layer", "global"],
        criterion: Literal["magnitude", "random"],
        compression: Literal["zstd"] | None,
        watched: bool,
        buffers: Literal["ignore", "record"],
    ) -> RequestedSettings:
        """From the recorder's arguments, of which all but `keep` have been checked.

        Raises:
            ValueError: `keep` is out of range.
        """
        fraction, overrides = keep_settings(DEFAULT_KEEP if keep is None else keep, scope)
        base = RecordingSettings(
            keep=fraction,
            keep_overrides=overrides,
            criterion=criterion,
            scope=scope,
            value_dtype="scaled_float16" if value_dtype is None else value_dtype,
            compression=compression,
            watched=watched,
            buffers=buffers,
        )
        return cls(base, keep is None, value_dtype is None)

    @property
    def is_open(self) -> bool:
        """Whether anything is to be chosen."""
        return self.choose_keep or self.choose_dtype

    def resolve(self, share: float, recorded: RecordingSettings | None = None) -> RecordingSettings:
        """The settings of one training.

        Args:
            share: Share of trainable parameters.
            recorded: Settings of the store that is continued, if one is: what was left open is taken from it.

        Returns:
            What is left open is dense float32 below `FEW_TRAINABLE`, else a tenth of each layer as scaled float16.
        """
        settings = self.base
        if self.choose_keep and recorded is not None:
            settings = replace(settings, keep=recorded.keep, keep_overrides=recorded.keep_overrides)
        elif self.choose_keep and share < FEW_TRAINABLE:
            settings = replace(settings, keep=1.0)
        if self.choose_dtype and recorded is not None:
            settings = replace(settings, value_dtype=recorded.value_dtype)
        elif self.choose_dtype and share < FEW_TRAINABLE:
            settings = replace(settings, value_dtype="float32")
        return settings
