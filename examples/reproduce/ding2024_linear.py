"""Losses of the linear model: original, fine-tuned, golden and masked, solved for and predicted."""

from __future__ import annotations

from collections.abc import Iterator

from ding2024_settings import Linear
from studies import Row
from torch import Tensor

from lightning_unlearn.functional.linear_masking import (
    feature_mask,
    importance_mask,
    masked_solution,
    predicted_masked_losses,
)
from lightning_unlearn.functional.linear_problem import LinearProblem, draw_linear_problem
from lightning_unlearn.functional.linear_theory import (
    Losses,
    fine_tuned_solution,
    golden_solution,
    losses_of,
    original_solution,
    predicted_losses,
)

__all__ = ["MODELS", "linear_rows"]

MODELS = ("original", "fine-tuned", "golden", "A: overlap discarded", "B: overlap kept")


def drawn(setting: Linear, share: float, seed: int) -> LinearProblem:
    """A problem of which this share of the features is shared."""
    shared = round(share * setting.features)
    own = (setting.features - shared) // 2
    sizes = {"d_retain": own, "d_forget": own, "d_overlap": shared}
    return draw_linear_problem(setting.samples, setting.samples, **sizes, seed=seed)


def solved(problem: LinearProblem, count: int) -> Iterator[tuple[str, Tensor, Losses]]:
    """Every model, fine-tuned on the first so many samples: its name, weights and predicted losses."""
    rows = range(count)
    yield "original", original_solution(problem), predicted_losses(problem, "original")
    yield "fine-tuned", fine_tuned_solution(problem, rows), predicted_losses(problem, "fine_tuned")
    yield "golden", golden_solution(problem), predicted_losses(problem, "golden")
    for name, keep in zip(MODELS[3:], ("retain", "retain_and_overlap"), strict=True):
        weights = masked_solution(problem, feature_mask(problem, keep), rows)
        yield name, weights, predicted_masked_losses(problem, keep, rows)


def linear_rows(setting: Linear, seed: int) -> list[Row]:
    """Losses over the number of fine-tuning samples, over the share of shared features, and over what masks keep.

    `miss` is the largest distance of a measured loss from its prediction, in units of the mean squared label.
    """
    found: list[Row] = []
    settings = [("tuned", setting.share, count) for count in setting.tuned]
    settings += [("share", share, setting.tuned_part) for share in setting.shares]
    for over, share, count in settings:
        problem = drawn(setting, share, seed)
        scale = float(problem.y_forget.square().mean())
        for name, weights, predicted in solved(problem, count):
            losses = losses_of(weights, problem)
            miss = max(abs(one - other) for one, other in zip(losses, predicted, strict=True)) / scale
            found.append(
                {"over": over, "share": share, "tuned": count, "model": name, **losses._asdict(), "miss": miss}
            )
    problem = drawn(setting, setting.share, seed)
    for keep in setting.keeps:
        for of in ("retain", "forget"):
            weights = masked_solution(problem, importance_mask(problem, keep, of=of), range(setting.tuned_part))
            losses = losses_of(weights, problem)
            found.append({"over": "keep", "keep": keep, "model": of, **losses._asdict()})
    return found
