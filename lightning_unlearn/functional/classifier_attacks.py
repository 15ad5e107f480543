"""Membership inference by a small classifier that is trained on the model's outputs, in the forms that papers report.

All of them are called MIA, and their numbers cannot be compared: accuracy on forget against held-out samples
(:func:`logistic_attack`), or the share of the forget set that a classifier of retain against held-out samples takes for
members (:func:`support_vector_attack`, :func:`entropy_attack`), which others turn round and call efficacy. The right
value of each is the retrained model's.

Samples are sorted before anything is drawn or fitted, so a result depends on the samples, the options and the seed, and
not on the order of loaders or processes. Everything is fitted by scikit-learn, in float64 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_unlearn.utilities.checks import check_positive, check_positive_int, expected

__all__ = ["MIN_SAMPLES", "MemberShares", "entropy_attack", "logistic_attack", "support_vector_attack"]

MIN_SAMPLES = 10
"""Fewest samples of each split that a classifier is trained on."""

_HELD_OUT_SHARE = 0.1
"""Of a shuffle split; scikit-learn's default, which the published codes leave as it is."""

Rows: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class MemberShares:
    """Shares of three splits that an attack's classifier takes for members, each in [0, 1].

    The classifier was trained on `retain` (members) against `test` (non-members). Where these two shares are close, it
    cannot tell members from non-members, and the share of the forget set says nothing.

    Attributes:
        forget: Of the forget set, on which the classifier was not trained.
        retain: Of the retain samples it was trained on.
        test: Of the held-out samples it was trained on.

    >>> MemberShares(forget=0.25, retain=1.0, test=0.25).efficacy
    0.75
    """

    forget: float
    retain: float
    test: float

    @property
    def efficacy(self) -> float:
        """Share of the forget set taken for non-members, "MIA efficacy" in the literature: `1 - forget`."""
        return 1 - self.forget


def _rows(name: str, values: Tensor, fewest: int = MIN_SAMPLES) -> Rows:
    """The samples in float64 and in an order of their own."""
    if values.ndim not in (1, 2) or len(values) < fewest:
        rule = f"of shape (N,) or (N, F) with N of at least {fewest}"
        raise ValueError(expected(name, rule, tuple(values.shape), "With this few an attack shows nothing."))
    rows: Rows = values.detach().double().cpu().numpy().reshape(len(values), -1)
    if not np.isfinite(rows).all():
        raise ValueError(
            expected(name, "finite", f"{int((~np.isfinite(rows)).any(axis=1).sum())} samples that are not")
        )
    return rows[np.lexsort(rows.T[::-1])]


def _balanced(members: Rows, nonmembers: Rows, seed: int) -> tuple[Rows, Rows]:
    """Both groups in the size of the smaller, the larger one sub-sampled without replacement."""
    generator = np.random.default_rng(seed)
    size = min(len(members), len(nonmembers))
    members, nonmembers = (
        rows if len(rows) == size else rows[np.sort(generator.choice(len(rows), size, replace=False))]
        for rows in (members, nonmembers)
    )
    return members, nonmembers


def _labelled(members: Rows, nonmembers: Rows) -> tuple[Rows, npt.NDArray[np.int64]]:
    labels = np.repeat(np.array([1, 0]), [len(members), len(nonmembers)])
    return np.concatenate([members, nonmembers]), labels


def logistic_attack(
    member_losses: Tensor,
    nonmember_losses: Tensor,
    *,
    n_splits: int = 10,
    clip: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Accuracies of logistic regression on the loss, forget set against held-out samples, on samples left out of it.

    The larger group is sub-sampled to the size of the smaller. In each stratified split a classifier is trained on
    nine tenths and scored on the rest. 0.5 means that it cannot tell them apart. The right value is the retrained
    model's, which is 0.5 only where the forgotten samples are distributed as the held-out ones are: to forget a class,
    take held-out samples of that class.

    SCRUB's form is `n_splits=5, clip=100.0`; that of the starting kit of the NeurIPS 2023 unlearning challenge is the
    default. Without `clip` one huge loss moves the whole fit.

    Args:
        member_losses: (N,) losses of the forget set, any floating dtype. Retain samples belong to neither group.
        nonmember_losses: (M,) losses of held-out samples. Retain samples are members: never pass them here.
        n_splits: Number of shuffle splits.
        clip: Largest magnitude of a loss; larger ones are taken for this. `None` for no limit.
        seed: Of the sub-sampling and of the splits.

    Returns:
        float64 of shape (n_splits,), each in [0, 1]. Splits overlap: their spread over the root of their number is no
        standard error.

    Guarantee:
        Heuristic: one attack and not the strongest. Equal arguments give equal results, in any order of the samples.

    Source:
        Kurmanji et al. 2023, arXiv 2302.09880 (SCRUB), and the challenge's starting kit; options of their code.
        They sub-sample from a global random state or cut off the end, here it is the seed that decides.

    Raises:
        ValueError: fewer than 10 losses on a side, one is NaN, or infinite without `clip`, or an option is not a
            positive number.

    >>> logistic_attack(torch.linspace(0, 1, 20), torch.linspace(3, 4, 30), n_splits=3)
    tensor([1., 1., 1.], dtype=torch.float64)
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score

    check_positive_int("n_splits", n_splits)
    check_positive_int("seed", seed, zero=True)
    if clip is not None:
        limit = check_positive("clip", clip)
        member_losses, nonmember_losses = (
            losses.double().clamp(-limit, limit) for losses in (member_losses, nonmember_losses)
        )
    groups = _rows("member_losses", member_losses), _rows("nonmember_losses", nonmember_losses)
    features, labels = _labelled(*_balanced(*groups, seed))
    splits = StratifiedShuffleSplit(n_splits=n_splits, test_size=_HELD_OUT_SHARE, random_state=seed)
    scores = cross_val_score(LogisticRegression(), features, labels, cv=splits, scoring="accuracy")
    return torch.from_numpy(scores)


def _shares(classifier: Any, *, forget: Rows, retain: Rows, test: Rows) -> MemberShares:
    """Train the classifier on retain against test, and ask it about all three."""
    widths = {"forget": forget.shape[1], "retain": retain.shape[1], "test": test.shape[1]}
    if len(set(widths.values())) > 1:
        raise ValueError(expected("features", "equally many for every split", widths))
    classifier.fit(*_labelled(retain, test))
    parts = {"forget": forget, "retain": retain, "test": test}
    return MemberShares(**{name: float(classifier.predict(rows).mean()) for name, rows in parts.items()})


def support_vector_attack(*, forget: Tensor, retain: Tensor, test: Tensor, seed: int = 0) -> MemberShares:
    """Share of the forget set that a support vector classifier of retain against held-out samples takes for members.

    The "MIA" of Unlearn-Sparse and SalUn, which report the efficacy (:attr:`MemberShares.efficacy`), mostly that of the
    confidence. RBF kernel with `C=3` and `gamma="auto"` (one over the number of features), features unscaled. The
    larger of both training sets is sub-sampled to the size of the smaller.

    Args:
        forget: (N,) or (N, F) features of the forget set, such as those of
            :func:`lightning_unlearn.functional.prediction_scores.attack_features`, any floating dtype.
        retain: (M,) or (M, F) of retain samples, the members.
        test: (L,) or (L, F) of held-out samples, the non-members.
        seed: Of the sub-sampling.

    Returns:
        Shares of all three splits that the classifier takes for members; where it was trained, of the samples kept.

    Guarantee:
        Heuristic: one attack and not the strongest. Equal arguments give equal results, in any order of the samples.

    Source:
        Jia et al. 2023, arXiv 2304.04934, and Fan et al. 2024, arXiv 2310.12508; options of their code, which takes the
        first retain samples in place of random ones, and whose modified entropy is wrong (see
        :func:`lightning_unlearn.functional.prediction_scores.modified_entropy`).

    Raises:
        ValueError: fewer than 10 retain or held-out samples or no sample to forget, features that are not finite, or
            differ in number, or a negative seed.

    >>> retain, test = torch.linspace(0.9, 1.0, 30), torch.linspace(0.2, 0.8, 20)
    >>> support_vector_attack(forget=torch.tensor([0.95, 0.5, 0.4]), retain=retain, test=test).forget
    0.3333333333333333
    """
    from sklearn.svm import SVC

    check_positive_int("seed", seed, zero=True)
    members, nonmembers = _balanced(_rows("retain", retain), _rows("test", test), seed)
    classifier = SVC(C=3, gamma="auto", kernel="rbf")
    return _shares(classifier, forget=_rows("forget", forget, fewest=1), retain=members, test=nonmembers)


def entropy_attack(*, forget: Tensor, retain: Tensor, test: Tensor) -> MemberShares:
    """Share of the forget set that logistic regression of retain against held-out entropies takes for members.

    The "MIA" of Selective Synaptic Dampening, after Bad-Teacher. All samples are used, with weights that give both
    training sets the same say.

    Args:
        forget: (N,) entropies of the forget set in nats, such as those of
            :func:`lightning_unlearn.functional.prediction_scores.prediction_entropy`, any floating dtype.
        retain: (M,) of retain samples, the members.
        test: (L,) of held-out samples, the non-members.

    Returns:
        Shares of all three splits that the classifier takes for members.

    Guarantee:
        Heuristic: one attack and not the strongest. Equal arguments give equal results, in any order of the samples.

    Source:
        Foster et al. 2024, arXiv 2308.07707 (code), after Chundawat et al. 2023, arXiv 2205.08096. Their classifier is
        multinomial over two classes, where both share the penalty; here it is the same classifier as a binary one,
        whose `C` is twice as large. Bad-Teacher's own code has a support vector classifier on sets as unequal as they
        come, which leans to the larger one: use :func:`support_vector_attack` on entropies.

    Raises:
        ValueError: fewer than 10 retain or held-out samples or no sample to forget, or entropies that are not finite.

    >>> retain, test = torch.linspace(0, 0.5, 40), torch.linspace(1, 2, 10)
    >>> entropy_attack(forget=torch.tensor([0.0, 0.1, 1.9]), retain=retain, test=test)
    MemberShares(forget=0.6666666666666666, retain=1.0, test=0.0)
    """
    from sklearn.linear_model import LogisticRegression

    for name, entropies in (("forget", forget), ("retain", retain), ("test", test)):
        if entropies.ndim != 1:
            raise ValueError(expected(name, "a vector of entropies", tuple(entropies.shape)))
    return _shares(
        LogisticRegression(C=2.0, class_weight="balanced"),
        forget=_rows("forget", forget, fewest=1),
        retain=_rows("retain", retain),
        test=_rows("test", test),
    )
