"""Bad Teacher: answer as a model that knows nothing on the data to forget, as the original elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_unlearn.functional.distillation import DistillationReduction, mixed_teacher_loss
from lightning_unlearn.methods.base import Guarantee, Requirement, hyperparameters
from lightning_unlearn.methods.loss_method import PushingMethod, UnlearningHost, weighted_sum
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.search_space import Choices, FloatRange, IntRange, SearchSpace
from lightning_unlearn.types import Part
from lightning_unlearn.utilities.checks import check_choice, check_fraction, check_positive, check_positive_int
from lightning_unlearn.utilities.reinitialise import reinitialise

__all__ = ["BadTeacher"]


@register
@hyperparameters
class BadTeacher(PushingMethod):
    r"""Bad Teacher: learn from an incompetent teacher on the data to forget, from the original on the data to keep.

    Rule: minimise :math:`w \, KL(p_o \| p_\theta)` on a retain batch plus :math:`(1 - w) \, KL(l p_d + (1 - l) p_o \|
    p_\theta)` on a forget batch; :math:`p_o` is the original's answer, :math:`p_d` that of a model of the same kind
    with fresh weights, both in eval mode, all at temperature T. Labels are not used.

    Guarantee: heuristic. Answers on the forget data become those of a model that learnt nothing, which a retrained
    model's are not: it generalises. Unlike an ascent it has somewhere to arrive.

    Cost: two forward and backward passes and three forward passes of teachers a step; two more copies of the model.

    Fails: as all methods that push (see `PushingMethod`), most of all on data that were never memorised. The training
    loss plays no part, so nothing repairs the model beyond what the original knew.

    Differs from code in use: a step has a batch of either part, weighted by w, where the code shuffles the forget data
    with a random 30 % of the retain data into one epoch of mixed batches (`w` is then the retain share of what is
    mixed); the divergence is the textbook's mean over samples, where the code divides by the number of classes as well
    (`reduction="official"`; with Adam that changes little, with SGD it divides the rate).

    Args:
        retain_weight: w, in (0, 1]; 0.9 as in `NegGradPlus` (ours: a half cost more test accuracy where clean random
            samples were forgotten).
        mix: l, the incompetent teacher's share on forget data; 1 as in the paper's experiments.
        temperature: T; 1 as in the code. There is no factor :math:`T^2`.
        reduction: See `DistillationReduction`.
        teacher_factory: Builds the incompetent teacher, a module that the adapter can ask; by default a copy of the
            model with every layer reset (parameters of layers that cannot reset themselves are shuffled).
        seed: Seed of the fresh weights; the same teacher on every process.
        max_steps: Optimizer steps; 50 unless `max_epochs` is given (ours; the code has one epoch).
        max_epochs: Passes over the longer part instead.
        optimizer: Builds the optimizer; default the user's own, fresh, without schedulers.
        lr_scale: Factor on the user's learning rates; a tenth (ours: measured on digits; the code has Adam 1e-4).
        stop: See `PushingMethod`.
        check_every: Steps between two looks at the losses.
        forget_statistics: See `ForgetStatistics`.

    Source: Chundawat et al. 2023, arXiv 2205.08096; stopping rule ours.

    >>> BadTeacher().retain_weight
    0.9
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({Requirement.FORGET_DATA, Requirement.RETAIN_DATA})
    guarantee: ClassVar[Guarantee] = "heuristic"
    source: ClassVar[str] = "Chundawat et al. 2023, arXiv 2205.08096"
    parts: ClassVar[tuple[Part, ...]] = ("forget", "retain")
    default_steps: ClassVar[int | None] = 50
    # `stop=None` is in it, because what is learnt has a bound: the other teacher's answer.
    search_space: ClassVar[SearchSpace] = {
        "lr_scale": FloatRange(0.01, 1, log=True),
        "max_steps": IntRange(10, 150, log=True),
        "retain_weight": FloatRange(0.5, 0.99),
        "temperature": FloatRange(0.5, 4, log=True),
        "stop": Choices(("held_out", "retain", None)),
    }

    retain_weight: float = 0.9
    mix: float = 1.0
    temperature: float = 1.0
    reduction: DistillationReduction = "batchmean"
    teacher_factory: Callable[[], nn.Module] | None = field(default=None, repr=False)
    seed: int = 0
    lr_scale: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.retain_weight = check_fraction("retain_weight", self.retain_weight)
        self.mix = check_fraction("mix", self.mix, zero=True)
        self.temperature = check_positive("temperature", self.temperature)
        self.reduction = check_choice("reduction", self.reduction, ("batchmean", "official"))
        self.seed = check_positive_int("seed", self.seed, zero=True)
        self._teachers: tuple[nn.Module, nn.Module] | None = None

    def prepare(self, host: UnlearningHost) -> None:
        """Freeze the original, and make a model of its kind that knows nothing."""
        competent = host.frozen_twin()
        if self.teacher_factory is None:
            incompetent: nn.Module = host.frozen_twin()
            reinitialise(incompetent, self.seed)
        else:
            incompetent = self.teacher_factory().to(competent.device).requires_grad_(False).eval()
        self._teachers = incompetent, competent

    def step(self, host: UnlearningHost, batch: Mapping[Part, Any], batch_idx: int) -> Tensor | None:
        """The weighted sum of the divergences on both parts."""
        retain = self._divergence(host, "retain", batch["retain"], 0.0)
        if self.retain_weight == 1.0:
            return retain
        forget = self._divergence(host, "forget", batch["forget"], self.mix)
        return weighted_sum((self.retain_weight, retain), (1.0 - self.retain_weight, forget))

    def finish(self, host: UnlearningHost) -> None:
        """Let go of the teachers."""
        self._teachers = None

    def _divergence(self, host: UnlearningHost, part: Part, batch: Any, share: float) -> Tensor:
        logits, targets = host.outputs_of(part, batch)
        incompetent, competent = cast(tuple[nn.Module, nn.Module], self._teachers)
        with torch.no_grad():
            known, _ = host.batch_adapter(competent, batch)
            # On retain data the other teacher has no share, so it is not asked.
            unknown = host.batch_adapter(incompetent, batch)[0] if share else known
        return mixed_teacher_loss(
            logits,
            unknown,
            known,
            share=share,
            temperature=self.temperature,
            reduction=self.reduction,
            multi_label=targets.is_floating_point(),
        )
