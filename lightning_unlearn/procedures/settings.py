"""How a pass is run, whatever the method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from lightning import LightningModule

from lightning_unlearn.procedures.guards import ProbeThresholds
from lightning_unlearn.utilities.checks import check_choice

__all__ = ["BatchNormPolicy", "PassSettings"]

BatchNormPolicy: TypeAlias = Literal["reestimate", "keep", "subtract"]


@dataclass(frozen=True, slots=True)
class PassSettings:
    """How a pass is run, whatever the method.

    Attributes:
        batch_norm: `"reestimate"` running statistics on retain data after an edit, `"keep"` them, or `"subtract"`
            their recorded changes (the store must hold buffers).
        seed: Seeds everything before each stage that draws; `None` leaves the random state alone.
        record: Write the ledger entry and record training steps; without it the store is only read.
        force: Carry out a plan that refuses, and keep a model that the probe calls collapsed.
        probe_samples: Retain samples in a probe; 0 switches probes (and the rollback) off.
        thresholds: When a probe warns and rolls back.
        sample_id: As given to the recorder, to record a repair with ids from the batch.
        sample_keys: As given to the recorder.
        adapter: `(module, batch) -> (logits, targets)` for modules whose batches are not `(x, y)`.
    """

    batch_norm: BatchNormPolicy = "reestimate"
    seed: int | None = None
    record: bool = True
    force: bool = False
    probe_samples: int = 1000
    thresholds: ProbeThresholds = field(default_factory=ProbeThresholds)
    sample_id: Any = None
    sample_keys: Any = None
    adapter: Callable[[LightningModule, Any], tuple[torch.Tensor, torch.Tensor]] | None = None

    def __post_init__(self) -> None:
        check_choice("batch_norm", self.batch_norm, ("reestimate", "keep", "subtract"))
