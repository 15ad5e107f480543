"""Looking at a trained module through its own `training_step`: the loss on some data, and fresh running statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from lightning import LightningModule
from torch.utils.data import DataLoader

from lightning_unlearn.data.splits import check_splittable, subset_loader
from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.methods.loss_method import as_loss
from lightning_unlearn.modules.silent import silent_step
from lightning_unlearn.utilities.batch_norm import reestimate_batch_norm, tracking_layers
from lightning_unlearn.utilities.batches import leading_size
from lightning_unlearn.utilities.checks import check_positive_int, expected
from lightning_unlearn.utilities.modes import evaluating, isolated_rng, preserved_buffers

__all__ = ["ProbeData", "probe_loss", "reestimate"]


class ProbeData:
    """Some samples of a loader, drawn once, to look at a module's own training loss on them again and again.

    Batches are read once and kept, so that random transforms do not blur what two looks compare.

    Args:
        loader: Data; its order and dropped batches do not matter.
        max_samples: At most so many samples, drawn with `seed`.
        seed: Seed of the draw and of random transforms that draw from torch.

    Raises:
        UnsupportedStrategyError: the data is iterable only.
    """

    def __init__(self, loader: DataLoader[Any], *, max_samples: int = 1000, seed: int = 0) -> None:
        check_splittable(loader, "loader")
        check_positive_int("max_samples", max_samples)
        self.loader = loader
        self.seed = seed
        total = len(loader.dataset)  # type: ignore[arg-type]
        self.positions: list[int] = np.random.default_rng(seed).permutation(total)[:max_samples].tolist()
        self._batches: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def mean_loss(self, model: LightningModule) -> float | None:
        """The mean of the module's own training loss, in eval mode; nothing is changed or logged.

        Works in and outside a Trainer.

        Returns:
            Mean weighted by batch size, in the loss's own unit; `None` under manual optimization (such a step returns
            no loss) and where the step skips every batch.
        """
        if self._batches is None:
            with isolated_rng(self.seed):
                self._batches = list(subset_loader(self.loader, self.positions, part=None))
        found = _losses(model, self._batches, self.seed)
        if not found:
            return None
        losses, sizes = zip(*found, strict=True)
        return float(np.average(losses, weights=sizes))

    def group_losses(self, model: LightningModule, size: int) -> list[float]:
        """The mean losses of groups of `size` samples; an incomplete last group is left out.

        Where the user's loader does not batch (its dataset gives whole batches), those of the batches.
        """
        drawn = subset_loader(self.loader, self.positions, part=None)
        if drawn.batch_size is not None:
            drawn = DataLoader(drawn.dataset, size, collate_fn=drawn.collate_fn, drop_last=True)
        with isolated_rng(self.seed):
            batches = list(drawn)
        return [loss for loss, _ in _losses(model, batches, self.seed)]


def _losses(model: LightningModule, batches: Iterable[Any], seed: int) -> list[tuple[float, int]]:
    """Loss and size of every batch that the module's step does not skip."""
    if not model.automatic_optimization:
        return []
    found = []
    with isolated_rng(seed), evaluating(model), preserved_buffers(model), silent_step(model) as step:
        for batch_idx, batch in enumerate(batches):
            loss = as_loss(step(batch, batch_idx))
            if loss is not None:
                found.append((float(loss.detach().double().mean()), leading_size(batch) or 1))
    return found


def probe_loss(
    model: LightningModule, loader: DataLoader[Any], *, max_samples: int = 1000, seed: int = 0
) -> float | None:
    """The mean of the module's own training loss over some data: one look of a `ProbeData`, and raises as that.

    Random transforms that draw from torch are drawn with `seed`, so two probes compare.
    """
    return ProbeData(loader, max_samples=max_samples, seed=seed).mean_loss(model)


def reestimate(
    model: LightningModule, loader: DataLoader[Any], *, max_batches: int | None = None, seed: int = 0
) -> bool:
    """Estimate the running statistics of normalisation layers anew from some data, through `training_step`.

    One shuffled pass with only these layers in train mode; weights, modes, metrics and the random state stay. Batches
    of one sample are left out where there are larger ones: they have no variance.

    Args:
        model: The user's module; its buffers are replaced.
        loader: Retain data.
        max_batches: Stop after so many batches.
        seed: Seed of the order and of random transforms.

    Returns:
        Whether the module has such layers.

    Raises:
        UnsupportedStrategyError: the data is iterable only, or a manually optimized step cannot run without gradients.
        ValueError: the loader gives no batch.
    """
    check_splittable(loader, "loader")
    if not tracking_layers(model):
        return False
    shuffled = subset_loader(loader, range(len(loader.dataset)), part="forget", seed=seed)  # type: ignore[arg-type]

    def batches() -> Iterator[Any]:
        for batch in shuffled:
            if shuffled.batch_size in (None, 1) or leading_size(batch) != 1:
                yield batch

    with isolated_rng(seed), evaluating(model), silent_step(model) as step:
        try:
            return reestimate_batch_norm(model, batches(), lambda batch: step(batch, 0), max_batches=max_batches)
        except RuntimeError as error:
            if model.automatic_optimization:
                raise
            rule = "running without gradients, its `manual_backward` and optimizers switched off"
            remedy = "Keep the running statistics instead."
            raise UnsupportedStrategyError(expected("training_step", rule, str(error), remedy)) from error
