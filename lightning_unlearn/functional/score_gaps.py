"""One number for how far the scores of an unlearned model are from those of a retrained one."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from lightning_unlearn.utilities.checks import check_fraction, expected

__all__ = ["SplitScores", "average_gap", "tug_of_war", "tug_of_war_membership"]


@dataclass(frozen=True, slots=True)
class SplitScores:
    """Scores of one model, all of them fractions in [0, 1].

    Attributes:
        forget_accuracy: Accuracy on the forget set.
        retain_accuracy: Accuracy on the retain set.
        test_accuracy: Accuracy on held-out data.
        membership: Result of a membership attack on the forget set, or `None`. Which attack is up to the user; both
            models must have been attacked in the same way.

    Raises:
        ValueError: a score is no fraction in [0, 1]. Percentages are refused.
    """

    forget_accuracy: float
    retain_accuracy: float
    test_accuracy: float
    membership: float | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None or item.name != "membership":
                check_fraction(item.name, value, zero=True)

    @property
    def accuracies(self) -> tuple[float, float, float]:
        """The three accuracies: forget, retain, test."""
        return self.forget_accuracy, self.retain_accuracy, self.test_accuracy


def _gaps(left: tuple[float, ...], right: tuple[float, ...]) -> list[float]:
    return [abs(mine - other) for mine, other in zip(left, right, strict=True)]


def _memberships(unlearned: SplitScores, retrained: SplitScores) -> tuple[float, float]:
    if unlearned.membership is None or retrained.membership is None:
        rule = "the result of one attack on both models"
        raise ValueError(expected("membership", rule, (unlearned.membership, retrained.membership)))
    return unlearned.membership, retrained.membership


def tug_of_war(unlearned: SplitScores, retrained: SplitScores) -> float:
    r"""ToW of Zhao et al. 2024 (arXiv 2406.01257): :math:`\prod_s (1 - |a_u(s) - a_g(s)|)` over forget, retain, test.

    1 where all three accuracies are the retrained model's, 0 where one of them is as far off as it can be.

    Args:
        unlearned: Scores of the model under test.
        retrained: Scores of the retrained model on the same samples.

    Returns:
        A number in [0, 1].

    >>> tug_of_war(SplitScores(1.0, 1.0, 0.75), SplitScores(0.5, 1.0, 0.75))
    0.5
    """
    return math.prod(1 - gap for gap in _gaps(unlearned.accuracies, retrained.accuracies))


def tug_of_war_membership(unlearned: SplitScores, retrained: SplitScores) -> float:
    """ToW-MIA of Zhao et al. 2024 (arXiv 2406.01257): ToW with a membership attack in the forget accuracy's place.

    The authors' attack is a support vector machine on the confidence, and `membership` the share of the forget set that
    it takes for members or for non-members, which are equally far apart between two models. Any other may stand here.

    Args:
        unlearned: Scores of the model under test.
        retrained: Scores of the retrained model on the same samples.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: a model has no result of an attack.

    >>> tug_of_war_membership(SplitScores(1.0, 1.0, 0.75, 0.25), SplitScores(0.5, 1.0, 0.75, 0.5))
    0.75
    """
    mine, other = _memberships(unlearned, retrained)
    left, right = (mine, *unlearned.accuracies[1:]), (other, *retrained.accuracies[1:])
    return math.prod(1 - gap for gap in _gaps(left, right))


def average_gap(unlearned: SplitScores, retrained: SplitScores) -> float:
    """Mean distance of the scores from the retrained model's, as in the tables of Fan et al. 2024 (arXiv 2310.12508).

    Over the three accuracies, and the membership attack where both models have been attacked: four numbers, as in those
    tables, which give percentage points, 100 times the value here. Gaps of one table and another can only be compared
    where both contain the attack, and the same one.

    Args:
        unlearned: Scores of the model under test.
        retrained: Scores of the retrained model on the same samples.

    Returns:
        A number in [0, 1]; 0 is best.

    Raises:
        ValueError: one model was attacked and the other was not.

    >>> average_gap(SplitScores(1.0, 1.0, 0.75), SplitScores(0.25, 1.0, 0.75))
    0.25
    >>> average_gap(SplitScores(1.0, 1.0, 0.75, 0.5), SplitScores(0.25, 1.0, 0.75, 0.25))
    0.25
    """
    gaps = _gaps(unlearned.accuracies, retrained.accuracies)
    if unlearned.membership is not None or retrained.membership is not None:
        mine, other = _memberships(unlearned, retrained)
        gaps.append(abs(mine - other))
    return math.fsum(gaps) / len(gaps)
