"""Batches that keep a data subject's rows together, so that they can later be forgotten cheaply and specifically."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from warnings import warn

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from lightning_unlearn.data.placement import batch_caps, place_subjects
from lightning_unlearn.exceptions import UnlearningWarning
from lightning_unlearn.types import SampleId
from lightning_unlearn.utilities.checks import check_fraction, check_positive_int, expected

__all__ = ["LOW_ENTROPY", "SubjectGroupedBatchSampler", "label_entropy"]

LOW_ENTROPY = 0.75
"""Below this ratio of label entropy in the batches to that in random batches, a warning is given.

Heuristic: with a ratio of 0.63 (four one-class subjects in each batch of 64, ten classes) small networks lost 3 to 15
points of test accuracy on Fashion-MNIST, and with one class a batch they died; with mixed subjects nothing was lost.
"""


def label_entropy(labels: NDArray[np.int64], batches: Sequence[NDArray[np.int64]]) -> float:
    """Mean entropy of the labels in a batch, in nats.

    Args:
        labels: int64 of shape (n,), class of each row.
        batches: Rows of each batch.

    >>> label_entropy(np.array([0, 0, 1, 1]), [np.array([0, 1]), np.array([0, 2])])  # doctest: +ELLIPSIS
    0.34657...
    """
    entropies = []
    for batch in batches:
        shares = np.unique(labels[batch], return_counts=True)[1] / len(batch)
        entropies.append(float(-(shares * np.log(shares)).sum()))
    return float(np.mean(entropies)) if entropies else 0.0


class SubjectGroupedBatchSampler(Sampler[list[int]]):
    """A batch sampler for training runs from which subjects may later ask to be forgotten.

    Subtracting recorded updates costs about as much as the fraction of steps that saw the subject. Here a subject's
    rows sit in as few batches as `max_share` allows, each filled up with rows drawn at random from all the others.
    Every row occurs exactly once per epoch. The order is a pure function of (seed, epoch); no global random state is
    read.

    Grouping makes the removal cheaper and specific, not exact: an optimizer with momentum smears each step over the
    following ones.

    Under data parallelism the bound holds for the global batch of all ranks, which is dealt out to them, so each rank
    takes its own sampler with `num_replicas` and `rank` and the Trainer needs `use_distributed_sampler=False`
    (`SubjectGrouping` does all that). A last batch that does not go up evenly is padded with repeated rows.

    Args:
        subjects: Subject of each row, `None` for rows that are not grouped.
        batch_size: Rows per batch and rank.
        max_share: Largest share of a global batch for one subject; a third to a half keeps training healthy.
        drop_last: Whether rows that do not fill a global batch are left out, drawn anew each epoch.
        seed: Seed of the order.
        num_replicas: Number of ranks.
        rank: This rank.
        labels: Class of each row; a warning is given where batches come out with hardly more than one class.

    Raises:
        ValueError: an argument is out of range, or no placement keeps all subjects within `max_share`.

    >>> sampler = SubjectGroupedBatchSampler(["ann"] * 3 + [None] * 9, batch_size=6)
    >>> [sorted(row for row in batch if row < 3) for batch in sampler]
    [[], [0, 1, 2]]
    """

    def __init__(
        self,
        subjects: Sequence[SampleId | None],
        batch_size: int,
        *,
        max_share: float = 0.5,
        drop_last: bool = False,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        labels: Sequence[int] | None = None,
    ) -> None:
        self.batch_size = check_positive_int("batch_size", batch_size)
        self.drop_last = bool(drop_last)
        self.num_replicas = check_positive_int("num_replicas", num_replicas)
        self.rank = check_positive_int("rank", rank, zero=True)
        if rank >= num_replicas:
            raise ValueError(expected("rank", f"below num_replicas={num_replicas}", rank))
        self.max_share = check_fraction("max_share", max_share)
        self.seed = check_positive_int("seed", seed, zero=True)
        self.epoch = 0
        self._skip = 0
        self._global_batch = self.batch_size * self.num_replicas
        if max_share * self._global_batch < 1:
            rule = f"at least 1 / {self._global_batch}, one row of the global batch"
            raise ValueError(expected("max_share", rule, max_share))
        self._rows_of: dict[SampleId, list[int]] = {}
        self._ungrouped: list[int] = []
        for row, subject in enumerate(subjects):
            (self._ungrouped if subject is None else self._rows_of.setdefault(subject, [])).append(row)
        self._n_rows = len(subjects)
        if self._n_rows == 0:
            raise ValueError(expected("subjects", "the subject (or None) of each row", subjects))
        batches = self._batches(0)
        if labels is not None:
            if len(labels) != self._n_rows:
                raise ValueError(expected("labels", f"one for each of the {self._n_rows} rows", len(labels)))
            self._compare_entropy(np.asarray(labels, dtype=np.int64), batches)

    @property
    def sampler(self) -> SubjectGroupedBatchSampler:
        """The sampler itself: through it Lightning finds `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch; Lightning does it before every epoch."""
        self.epoch = check_positive_int("epoch", epoch, zero=True)

    def skip(self, batches: int) -> None:
        """Leave out the first batches of the next epoch that is drawn: a resumed run has trained on them already."""
        self._skip = check_positive_int("batches", batches, zero=True)

    def __len__(self) -> int:
        full, rest = divmod(self._n_rows, self._global_batch)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        start, self._skip = self._skip, 0
        for batch in self._batches(self.epoch)[start:]:
            padded = np.resize(batch, -(-len(batch) // self.num_replicas) * self.num_replicas)
            yield padded[self.rank :: self.num_replicas].tolist()

    def _sizes(self) -> list[int]:
        full, rest = divmod(self._n_rows, self._global_batch)
        return [self._global_batch] * full + ([rest] if rest and not self.drop_last else [])

    def _batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """All global batches of an epoch."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
        sizes = self._sizes()
        left_out = set(rng.permutation(self._n_rows)[sum(sizes) :].tolist())
        groups = [[row for row in rows if row not in left_out] for rows in self._rows_of.values()]
        groups = [rng.permutation(np.asarray(rows, dtype=np.int64)).tolist() for rows in groups if rows]
        others = rng.permutation(np.asarray([row for row in self._ungrouped if row not in left_out], dtype=np.int64))
        placed = place_subjects([len(rows) for rows in groups], sizes, self.max_share, rng)
        used, batches = 0, []
        for size, parts in zip(sizes, placed, strict=True):
            rows = [groups[subject].pop() for subject, count in parts.items() for _ in range(count)]
            take = size - len(rows)
            batches.append(rng.permutation(np.concatenate((np.asarray(rows, np.int64), others[used : used + take]))))
            used += take
        # The order of the batches must not depend on where placement starts; a short one stays last, as everywhere.
        n_full = sum(size == self._global_batch for size in sizes)
        return [batches[index] for index in rng.permutation(n_full)] + batches[n_full:]

    def _compare_entropy(self, labels: NDArray[np.int64], batches: Sequence[NDArray[np.int64]]) -> None:
        shuffled = np.random.Generator(np.random.Philox(self.seed)).permutation(self._n_rows)
        random_batches = np.split(shuffled, np.cumsum(self._sizes()))[: len(batches)]
        usual, ours = label_entropy(labels, random_batches), label_entropy(labels, batches)
        if ours < LOW_ENTROPY * usual:
            warn(
                f"Batches hold few classes: their label entropy is {ours:.2f} nats, against {usual:.2f} in random "
                "batches. Training may suffer badly. Group fewer subjects, or lower `max_share` (now "
                f"{self.max_share:g}, so up to {max(batch_caps([self._global_batch], self.max_share))} rows of one "
                "subject in a batch).",
                UnlearningWarning,
                stacklevel=3,
            )
