"""A probe: what the model does on a fixed sample of retain data, before and after each stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_unlearn.modules.probe import probe_loss
from lightning_unlearn.procedures.outputs import collect_outputs

__all__ = ["probe", "probe_loader"]


def probe(
    model: LightningModule,
    loader: DataLoader[Any],
    max_samples: int = 1000,
    adapter: Callable[[LightningModule, Any], tuple[Tensor, Tensor]] | None = None,
) -> dict[str, float]:
    """Measure loss and, where the module is a classifier that can be read, accuracy on the same samples each time.

    Args:
        model: The user's module; mode, buffers and random state are left as they were.
        loader: Retain data in evaluation form.
        max_samples: At most so many samples, spread evenly over the data.
        adapter: `(module, batch) -> (logits, targets)`.

    Returns:
        `"samples"`, and `"accuracy"` (fraction) and `"loss"` (nats) where they can be measured: accuracy needs logits
        and class targets, the loss the user's own `training_step` under automatic optimization.
    """
    part = probe_loader(loader, max_samples)
    found: dict[str, float] = {}
    try:
        outputs = collect_outputs(model, part, adapter=adapter)
    except (TypeError, ValueError):
        # Not a classifier of (x, y) batches and no adapter: then the user's own loss is all there is to probe.
        if adapter is not None:
            raise
    else:
        found["accuracy"] = float((outputs.logits.argmax(dim=-1) == outputs.targets).double().mean())
        found["samples"] = float(len(outputs.targets))
    loss = probe_loss(model, part, max_samples=max_samples)
    if loss is not None:
        found["loss"] = loss
    return found


def probe_loader(loader: DataLoader[Any], max_samples: int) -> DataLoader[Any]:
    """The same evenly spread samples of the loader's dataset, in order; the loader itself where it is small enough."""
    total = len(loader.dataset)  # type: ignore[arg-type]
    if total <= max_samples:
        return loader
    positions = [number * total // max_samples for number in range(max_samples)]
    return DataLoader(
        Subset(loader.dataset, positions), batch_size=loader.batch_size or 256, collate_fn=loader.collate_fn
    )
