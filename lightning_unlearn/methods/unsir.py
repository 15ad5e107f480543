"""UNSIR: forget classes by training on noise that stands for them, then repair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_unlearn.exceptions import DeletionRequestError, MissingRequirementError
from lightning_unlearn.methods.base import Forgets, Guarantee, Requirement, hyperparameters
from lightning_unlearn.methods.loss_method import LossMethod, UnlearningHost, as_loss, user_loss, weighted_sum
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.search_space import FloatRange, IntRange, SearchSpace
from lightning_unlearn.types import Part
from lightning_unlearn.utilities.batches import leading_size
from lightning_unlearn.utilities.checks import check_positive, check_positive_int, expected, shorten

__all__ = ["Unsir"]


@register
@hyperparameters
class Unsir(LossMethod):
    r"""UNSIR: impair the model with noise that is labelled as the classes to forget, then repair it.

    It forgets whole classes only.

    Rule: noise N is found for the classes c by Adam on :math:`-L(N, c; \theta_o) + \lambda \, \mathrm{mean} \|N\|^2`,
    inputs on which the original is as wrong about c as can be. *Impair*: minimise the user's training loss on a retain
    batch plus that on (N, c), so that c comes to mean the noise. *Repair*: the user's training loss on retain data.

    Guarantee: heuristic. Of the forget data only the classes, and the shape of one batch, are used.

    Cost: `noise_steps` forward and backward passes of a frozen copy, `impair_steps` steps of two passes and
    `repair_steps` of one; and a look at the labels of all data, to see that classes are whole.

    Fails: on samples of classes that are also kept, which is refused. Inputs must be one floating-point tensor.

    Differs from code in use: every step of the impairment has a batch of noise beside the retain batch, where the code
    shuffles 20 copies of it with a sample of the retain data into one epoch (so `impair_steps` counts the copies, and
    its remaining steps are repair); the learning rate is the same in both halves, as in a port of the code; several
    classes share one batch of noise. Running statistics of normalisation layers learn nothing from the noise.

    Args:
        noise_steps: Steps of Adam on the noise; 40, the code's 5 epochs of 8 steps.
        noise_lr: Its learning rate; 0.1 in the code.
        noise_penalty: :math:`\lambda`; 0.1 in the code. The norm is a sum over a sample's entries.
        noise_weight: Weight of the noise's loss in the impairment; 1 (in the code a sample of either counts the same).
        impair_steps: 20, the code's copies of the noise.
        repair_steps: 50 (ours, as for `FineTune`; the code has an epoch).
        seed: Seed of the noise.
        optimizer: Builds the optimizer; default the user's own, fresh, without schedulers.
        lr_scale: Factor on the user's learning rates; a third, as for the repair (ours; the code has Adam 0.02 and
            0.01, its port 1e-4).

    Raises:
        DeletionRequestError: at fit start, a class of the forget data has samples among the retain data.
        MissingRequirementError: inputs that are no floating-point tensor, or targets that are not one class a sample.

    Source: Tarun et al. 2023, arXiv 2111.08947.

    >>> Unsir(impair_steps=10, repair_steps=30).max_steps
    40
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({Requirement.FORGET_DATA, Requirement.RETAIN_DATA})
    guarantee: ClassVar[Guarantee] = "heuristic"
    source: ClassVar[str] = "Tarun et al. 2023, arXiv 2111.08947"
    forgets: ClassVar[Forgets] = "classes"
    parts: ClassVar[tuple[Part, ...]] = ("retain",)
    search_space: ClassVar[SearchSpace] = {
        "lr_scale": FloatRange(0.03, 3, log=True),
        "impair_steps": IntRange(5, 60, log=True),
        "repair_steps": IntRange(10, 150, log=True),
        "noise_weight": FloatRange(0.1, 10, log=True),
    }

    noise_steps: int = 40
    noise_lr: float = 0.1
    noise_penalty: float = 0.1
    noise_weight: float = 1.0
    impair_steps: int = 20
    repair_steps: int = 50
    seed: int = 0
    lr_scale: float = 1 / 3
    max_steps: int | None = field(default=None, init=False)
    max_epochs: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.noise_steps = check_positive_int("noise_steps", self.noise_steps, zero=True)
        self.noise_lr = check_positive("noise_lr", self.noise_lr)
        self.noise_penalty = check_positive("noise_penalty", self.noise_penalty, zero=True)
        self.noise_weight = check_positive("noise_weight", self.noise_weight)
        self.impair_steps = check_positive_int("impair_steps", self.impair_steps)
        self.repair_steps = check_positive_int("repair_steps", self.repair_steps, zero=True)
        self.seed = check_positive_int("seed", self.seed, zero=True)
        self.max_steps = self.impair_steps + self.repair_steps
        super().__post_init__()
        self._noise: Any = None

    def prepare(self, host: UnlearningHost) -> None:
        """See that classes are whole, and make the noise."""
        template = next(iter(host.part_batches("forget")))
        classes = _classes(host, "forget")
        shared = sorted(classes & _classes(host, "retain"))
        if shared:
            rule = "whole classes for Unsir"
            got = f"some samples of class {shorten(shared)}, of which others are kept"
            raise DeletionRequestError(expected("forget", rule, got, "Use a method that forgets samples."))
        self._noise = self._noise_batch(host, template, sorted(classes))

    def step(self, host: UnlearningHost, batch: Mapping[Part, Any], batch_idx: int) -> Tensor | None:
        """The user's loss on the retain part, and on the noise while the model is being impaired."""
        retain = user_loss(host, "retain", batch, batch_idx)
        if host.global_step >= self.impair_steps:
            return retain
        noise = as_loss(host.user_step("forget", self._noise, batch_idx))
        return weighted_sum((1.0, retain), (self.noise_weight, noise))

    def finish(self, host: UnlearningHost) -> None:
        """Let go of the noise."""
        self._noise = None

    def _noise_batch(self, host: UnlearningHost, template: Any, classes: list[int]) -> Any:
        """A batch of the template's kind and size: noise, labelled with the classes in turn."""
        adapter, original = host.batch_adapter, host.frozen_twin()
        inputs, targets = adapter.inputs(template), adapter.targets(template)
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            rule = "a floating-point tensor for Unsir, which makes noise of its shape"
            raise MissingRequirementError(expected("inputs", rule, type(inputs).__name__))
        labels = torch.tensor(classes, device=targets.device, dtype=targets.dtype)
        labels = labels[torch.arange(len(targets), device=targets.device) % len(classes)]
        # Drawn on the CPU, so that every process and device has the same.
        drawn = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(self.seed))
        noise = drawn.to(inputs.device, inputs.dtype).requires_grad_()
        optimizer = torch.optim.Adam([noise], lr=self.noise_lr)
        with torch.enable_grad():
            for _ in range(self.noise_steps):
                wrong = adapter.loss(adapter.logits(original, noise), labels)
                size = noise.square().flatten(1).sum(1).mean()
                (noise.grad,) = torch.autograd.grad(self.noise_penalty * size - wrong, noise)
                optimizer.step()
        return adapter.replaced(template, inputs=noise.detach(), targets=labels)


def _classes(host: UnlearningHost, part: Part) -> set[int]:
    found: set[int] = set()
    for batch in host.part_batches(part):
        targets = host.batch_adapter.targets(batch)
        if targets.is_floating_point() or targets.ndim != 1 or len(targets) != leading_size(batch):
            got = f"{targets.dtype} of shape {tuple(targets.shape)}"
            raise MissingRequirementError(expected("targets", "one class number a sample for Unsir", got))
        found.update(targets.tolist())
    return found
