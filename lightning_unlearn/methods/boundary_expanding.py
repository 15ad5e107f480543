"""Boundary Expanding: send the data to forget to a class of their own, and then take that class away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.methods.base import Guarantee, Requirement, hyperparameters
from lightning_unlearn.methods.loss_method import PushingMethod, UnlearningHost
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.search_space import Choices, FloatRange, IntRange, SearchSpace
from lightning_unlearn.types import Part
from lightning_unlearn.utilities.checks import check_positive_int, expected, shorten
from lightning_unlearn.utilities.modes import isolated_rng

__all__ = ["BoundaryExpanding"]


@register
@hyperparameters
class BoundaryExpanding(PushingMethod):
    r"""Boundary Expanding: give the classifier one more class, train the data to forget on it, and drop it again.

    Rule: a row C + 1 is added to the classifier, with the initial values of a fresh layer; cross-entropy of the forget
    data against class C + 1 is minimised, over the forget data alone; then the row is gone.

    Guarantee: heuristic: what separates the data from the rest moves into the extra class.

    Cost: one forward and backward pass of the forget data a step.

    Fails: as label flipping: it over-forgets data that were never memorised (see `PushingMethod`), and nothing holds on
    to the data to keep. Without the row the second-likeliest class is the answer, which may be the label still: the
    defaults forget little (`docs/comparison.md`).

    Differs from code in use: the row is never part of the module, whose shapes, names and checkpoints stay as they are:
    its outputs are appended to those of the classifier during the step. A checkpoint taken in the middle of the pass
    lacks it, so the pass cannot be resumed. The loss is the adapter's cross-entropy, because the user's own step may
    count classes. Partial updates do not restrict the row. Running statistics of normalisation layers learn nothing
    from forget batches.

    Args:
        layer: Name of the classifier, an `nn.Linear`; by default the last one with a trainable weight. It must be used
            in `forward` and have as many outputs as there are logits.
        seed: Seed of the row's initial values.
        max_steps: Optimizer steps; 20 unless `max_epochs` is given (ours; 10 epochs are common).
        max_epochs: Passes over the forget data instead.
        optimizer: Builds the optimizer; default the user's own, fresh, without schedulers. The row joins its first
            group of parameters, or that of the classifier.
        lr_scale: Factor on the user's learning rates; 0.002 (ours: 0.01 destroyed a small network that was
            not watched; rates of 1e-6 to 1e-4 are common).
        stop: See `PushingMethod`.
        check_every: Steps between two looks at the losses.
        forget_statistics: See `ForgetStatistics`.

    Raises:
        MissingRequirementError: at fit start or in the first step, no such layer, or targets that are no class numbers.

    Source: Chen et al. 2023, arXiv 2303.11570; read from a port of its code; stopping rule ours.

    >>> BoundaryExpanding(layer="net.head").layer
    'net.head'
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({Requirement.FORGET_DATA})
    guarantee: ClassVar[Guarantee] = "heuristic"
    source: ClassVar[str] = "Chen et al. 2023, arXiv 2303.11570"
    parts: ClassVar[tuple[Part, ...]] = ("forget",)
    default_steps: ClassVar[int | None] = 20
    # Rates of 1e-6 to 1e-4 are common (recalled), for 10 epochs; with fewer steps the range lies higher.
    search_space: ClassVar[SearchSpace] = {
        "lr_scale": FloatRange(0.0002, 0.02, log=True),
        "max_steps": IntRange(5, 60, log=True),
        "stop": Choices(("held_out", "retain", None)),
    }

    layer: str | None = None
    seed: int = 0
    lr_scale: float = 0.002

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seed = check_positive_int("seed", self.seed, zero=True)
        self._classifier: nn.Linear | None = None
        self._row: nn.Linear | None = None
        self._joined = False

    def prepare(self, host: UnlearningHost) -> None:
        """Find the classifier, and make one more row for it."""
        classifier = _classifier(cast(LightningModule, host), self.layer)
        with isolated_rng(self.seed):
            row = nn.Linear(classifier.in_features, 1, bias=classifier.bias is not None)
        row.to(classifier.weight.device, classifier.weight.dtype)
        self._classifier, self._row = classifier, row
        self._joined = False

    def step(self, host: UnlearningHost, batch: Mapping[Part, Any], batch_idx: int) -> Tensor:
        """Cross-entropy of the forget part against the extra class."""
        classifier, row = cast(nn.Linear, self._classifier), cast(nn.Linear, self._row)
        with _extra_outputs(classifier, row):
            logits, targets = host.outputs_of("forget", batch["forget"])
        n_classes = classifier.out_features
        if logits.shape[1] != n_classes + 1:
            rule = "the name of the `nn.Linear` whose outputs are the logits"
            got = f"one of {n_classes} outputs, where {logits.shape[1]} logits came back"
            raise MissingRequirementError(expected("layer", rule, got, "Pass `layer`."))
        if targets.is_floating_point():
            rule = "class numbers for BoundaryExpanding"
            raise MissingRequirementError(expected("targets", rule, targets.dtype, "Use LabelFlipping."))
        if not self._joined:
            # Not before: what starts with the training takes stock of the optimizer, and the row is nobody's business.
            _join(cast(LightningModule, host).trainer.optimizers, classifier, row)
            self._joined = True
        # Negative class numbers, which losses take for "to be ignored", stay.
        return host.batch_adapter.loss(logits, targets.where(targets < 0, torch.full_like(targets, n_classes)))

    def update_masks(self, host: UnlearningHost, iteration: int) -> Mapping[nn.Parameter, Tensor]:
        """Those of the method; and every process steps the row with the same gradient."""
        strategy = cast(LightningModule, host).trainer.strategy
        for parameter in cast(nn.Linear, self._row).parameters():
            if parameter.grad is not None:
                # Data-parallel wrappers average the gradients of what is in the module, which the row is not.
                averaged: Any = strategy.reduce(parameter.grad, reduce_op="mean")
                parameter.grad = averaged
        return super().update_masks(host, iteration)

    def finish(self, host: UnlearningHost) -> None:
        """Drop the row."""
        self._classifier = self._row = None


def _classifier(module: nn.Module, name: str | None) -> nn.Linear:
    layers = {found: layer for found, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    if name is not None and name in layers:
        return layers[name]
    trainable = [layer for layer in layers.values() if layer.weight.requires_grad]
    if name is not None or not trainable:
        rule = "the name of an `nn.Linear`" if name is not None else "given where no `nn.Linear` has a trainable weight"
        raise MissingRequirementError(expected("layer", rule, name, f"There are {shorten(layers) or 'none'}."))
    return trainable[-1]


def _join(optimizers: Sequence[Optimizer], classifier: nn.Linear, row: nn.Linear) -> None:
    """Have the row trained as the classifier is; without it, as the first parameters are."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    home = next((group for group in groups if any(one is classifier.weight for one in group["params"])), groups[0])
    home["params"].extend(row.parameters())
    if "param_names" in home:
        home["param_names"].extend(f"extra_class.{name}" for name, _ in row.named_parameters())


@contextmanager
def _extra_outputs(classifier: nn.Linear, row: nn.Linear) -> Iterator[None]:
    """Append the row's output to what the classifier gives, whatever comes after it."""

    def append(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return torch.cat((output, row(inputs[0])), dim=-1)

    handle = classifier.register_forward_hook(append)
    try:
        yield
    finally:
        handle.remove()
