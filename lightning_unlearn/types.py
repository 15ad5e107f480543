"""Plain data that several layers share: identities, what a store holds, and states of a model.

Nothing here computes more than a property; everything is frozen, so it may be passed around freely.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import Tensor

__all__ = [
    "DataFingerprint",
    "Identity",
    "IndexCodec",
    "LayerDelta",
    "LayerInfo",
    "LayerPiece",
    "ModelSignature",
    "ModelState",
    "OptimizerInfo",
    "Part",
    "RecordingSettings",
    "SampleId",
    "Scale",
    "Split",
    "StepRecord",
    "StepStatus",
    "ValueDtype",
    "WeightChange",
]

SampleId: TypeAlias = int | str
"""A position in the recorded dataset, or a stable key of the user's (recommended)."""

Identity: TypeAlias = Literal["position", "key", "batch"]
"""Where ids come from: the index the dataset received, `sample_keys[index]`, or `sample_id(batch)`."""

Part: TypeAlias = Literal["forget", "retain"]
Split: TypeAlias = Literal["forget", "retain", "test"]
Scale: TypeAlias = Literal["step", "share"]
"""How much of a touched step is subtracted: all of it, or the forgotten samples' share of its batch."""

ValueDtype: TypeAlias = Literal["float32", "bfloat16", "scaled_float16", "int8"]
WeightChange: TypeAlias = Mapping[str, Tensor]
"""Name of a parameter -> what is *added* to it."""


class IndexCodec(enum.IntEnum):
    """How the positions of kept entries are written (see `docs/store-format.md`)."""

    DENSE = 0
    BITMASK = 1
    BLOCK8 = 2
    GAP8 = 3
    BLOCK16 = 4


class StepStatus(enum.IntEnum):
    """What happened to the delta of a step. Ids, batch size and seconds are kept in every case."""

    STORED = 0
    UNWATCHED = 1
    OVER_BUDGET = 2
    PURGED = 3
    LOST = 4


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One tensor of the recorded module.

    Attributes:
        name: Name in the user's `named_parameters()` / `named_buffers()`.
        shape: Global shape.
        dtype: Name of the dtype, such as `"float32"`.
        kind: `"parameter"` or `"buffer"`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Literal["parameter", "buffer"] = "parameter"

    @property
    def numel(self) -> int:
        """Number of entries.

        >>> LayerInfo("weight", (3, 4), "float32").numel
        12
        """
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class ModelSignature:
    """Names, shapes and dtypes of every parameter and float buffer, in order; a layer's number is its place here."""

    layers: tuple[LayerInfo, ...]


@dataclass(frozen=True, slots=True)
class LayerPiece:
    """The part of a layer that one process held and recorded, where parameters are sharded.

    The entry at `index` of the piece is entry `start + sum(index * strides)` of the layer, counted in row-major order.

    Attributes:
        layer: The layer's number in the model signature.
        start: Place of the first entry in the layer.
        shape: Shape of the piece, with neighbouring entries joined into one dimension; `(n,)` for a run of entries.
        strides: How far apart in the layer neighbours along each dimension are.
    """

    layer: int
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of entries.

        >>> LayerPiece(0, 6, (2, 3), (4, 1)).numel
        6
        """
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        """One behind the place of its last entry in the layer.

        >>> LayerPiece(0, 6, (2, 3), (4, 1)).stop
        13
        """
        reach = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self.start + reach + 1 if self.numel else self.start

    @property
    def is_run(self) -> bool:
        """Whether its entries are neighbours in the layer.

        >>> LayerPiece(0, 6, (3,), (1,)).is_run, LayerPiece(0, 6, (2, 3), (4, 1)).is_run
        (True, False)
        """
        return self.strides == (1,)


@dataclass(frozen=True, slots=True)
class DataFingerprint:
    """What is known of the recorded dataset; positions are valid only for a dataset with the same fingerprint.

    Attributes:
        identity: Where the ids came from.
        length: Number of samples of the underlying dataset, `None` where it has no length.
        digest: A hash the user supplied, or `None`.
    """

    identity: Identity
    length: int | None = None
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class OptimizerInfo:
    """One optimizer of the recorded run; `momentum` is 0.0 for plain SGD and `None` where it has no meaning."""

    name: str
    lr: float
    momentum: float | None = None

    @property
    def is_plain_sgd(self) -> bool:
        """Whether no fraction of touched steps is safe to subtract.

        >>> OptimizerInfo("SGD", 0.1, 0.0).is_plain_sgd, OptimizerInfo("AdamW", 1e-3).is_plain_sgd
        (True, False)
        """
        return self.name == "SGD" and not self.momentum


@dataclass(frozen=True, slots=True)
class RecordingSettings:
    """How the deltas of a store were selected and written.

    Attributes:
        keep: Fraction of every layer that is kept, in (0, 1].
        keep_overrides: Pattern (`fnmatch`) of layer names -> fraction; the first match wins.
        criterion: `"magnitude"` (largest absolute change) or `"random"`.
        scope: `"layer"` or `"global"` (one threshold over all layers of a step).
        value_dtype: How values are written.
        compression: `"zstd"` or `None`.
        watched: Whether only steps with a watched id hold a delta.
        buffers: Whether float buffers were recorded as well.
    """

    keep: float
    keep_overrides: Mapping[str, float] = field(default_factory=dict)
    criterion: Literal["magnitude", "random"] = "magnitude"
    scope: Literal["layer", "global"] = "layer"
    value_dtype: ValueDtype = "scaled_float16"
    compression: Literal["zstd"] | None = None
    watched: bool = False
    buffers: Literal["ignore", "record"] = "ignore"

    @property
    def is_dense(self) -> bool:
        """Whether every entry of every layer is kept.

        >>> RecordingSettings(keep=1.0).is_dense, RecordingSettings(keep=1.0, keep_overrides={"*.bias": 0.5}).is_dense
        (True, False)
        """
        return self.keep == 1.0 and all(value == 1.0 for value in self.keep_overrides.values())


@dataclass(frozen=True, slots=True)
class LayerDelta:
    """The kept entries of one layer's change in one step (after - before).

    Attributes:
        layer: The layer's number in the model signature.
        indices: Ascending flat positions, int32 or int64 of shape (k,), or `None` where every entry is kept.
        values: float32 of shape (k,).
    """

    layer: int
    indices: Tensor | None
    values: Tensor


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step.

    Attributes:
        step: Zero-based ordinal over all optimizers; not `global_step`.
        optimizer: Number of the optimizer that stepped.
        sample_ids: Ids of all batches behind the step, repeated as often as they occurred.
        batch_size: Number of samples behind the step, over all ranks and accumulated batches.
        seconds: Wall time since the previous step.
        status: What happened to the delta.
        pruning_error: Relative L2 error that pruning made in the delta (the largest over ranks, each of which has its
            own layers); NaN where it was not measured.
        rounding_error: Relative L2 error that rounding made in the kept values, likewise.
        edited: Whether something other than an optimizer changed the weights since the step before.
    """

    step: int
    optimizer: int
    sample_ids: tuple[SampleId, ...]
    batch_size: int
    seconds: float
    status: StepStatus
    pruning_error: float = math.nan
    rounding_error: float = math.nan
    edited: bool = False


@dataclass(frozen=True, slots=True)
class ModelState:
    """Weights the store knows: which recorded steps they contain and which edits were made to them.

    Attributes:
        digest: `weights_digest` of the parameters.
        ranges: Half-open ranges of ordinals, ascending and disjoint.
        edits: Ids of the ledger entries applied to these weights, in order.
        travel: L2 distance of the parameters to the initial weights of the lineage.
        norm: L2 norm of the parameters.
        drifted: Whether something other than an optimizer changed them after the last of these steps.
    """

    digest: str
    ranges: tuple[tuple[int, int], ...]
    edits: tuple[str, ...]
    travel: float
    norm: float
    drifted: bool = False

    @property
    def n_steps(self) -> int:
        """Number of recorded steps in these weights.

        >>> ModelState("d", ((0, 10), (15, 20)), (), 1.0, 2.0).n_steps
        15
        """
        return sum(stop - start for start, stop in self.ranges)
