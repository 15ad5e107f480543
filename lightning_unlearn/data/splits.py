"""Splitting a user's training loader into the data to forget and the data to keep, by sample id."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_unlearn.data.grouping import SubjectGroupedBatchSampler
from lightning_unlearn.data.positions import RootIndex, SampleKeys, resolve_keys
from lightning_unlearn.data.samplers import CyclingDistributedSampler, FilteredBatchSampler, FilteredSampler
from lightning_unlearn.exceptions import DeletionRequestError, UnsupportedStrategyError
from lightning_unlearn.types import Part, SampleId
from lightning_unlearn.utilities.checks import expected, shorten

__all__ = [
    "CARRIED_SETTINGS",
    "Positions",
    "check_splittable",
    "positions_of",
    "sample_ids_of",
    "split_positions",
    "subset_loader",
]

Positions: TypeAlias = npt.NDArray[np.int64]
"""Ascending positions in a loader's dataset, shape (n,)."""

CARRIED_SETTINGS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)
"""What a new loader takes over from the user's, unchanged."""


def check_splittable(loader: Any, name: str = "data") -> DataLoader[Any]:
    """Return `loader` when it is one `DataLoader` over a map-style dataset.

    Raises:
        UnsupportedStrategyError: several loaders, another iterable, or an iterable dataset, whose samples have no ids.
    """
    if not isinstance(loader, DataLoader):
        remedy = "Combine several training sets with `torch.utils.data.ConcatDataset`."
        raise UnsupportedStrategyError(expected(name, "one torch DataLoader for training", type(loader), remedy))
    if isinstance(loader.dataset, IterableDataset):
        remedy = "An iterable dataset has no sample ids to split by; use a map-style dataset."
        raise UnsupportedStrategyError(expected(name, "a loader of a map-style dataset", type(loader.dataset), remedy))
    return loader


def _is_position(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _checked_ids(ids: Collection[SampleId], keyed: bool) -> list[SampleId]:
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise DeletionRequestError(expected("forget", "a collection of sample ids", ids, "Put a single id in a list."))
    requested = list(ids)
    if not requested:
        raise DeletionRequestError(expected("forget", "at least one sample id", requested))
    wrong = [] if keyed else [i for i in requested if not _is_position(i)]
    if wrong:
        remedy = "Positions are integers; pass `sample_keys` to name samples by keys."
        raise DeletionRequestError(expected("forget", "positions in the dataset", wrong[:5], remedy))
    if len(set(requested)) < len(requested):
        seen: set[SampleId] = set()
        repeated = {i for i in requested if i in seen or seen.add(i)}  # type: ignore[func-returns-value]
        raise DeletionRequestError(f"Expected `forget` to be ids without repeats, but got twice: {shorten(repeated)}.")
    return requested


def positions_of(ids: Collection[SampleId], dataset: Any, sample_keys: SampleKeys | None = None) -> Positions:
    """Where samples are in a loader's dataset.

    Args:
        ids: Positions in the *underlying* dataset (through `Subset`, `random_split` and `ConcatDataset`), or, with
            `sample_keys`, keys; one key may stand for many rows.
        dataset: The dataset of the training loader.
        sample_keys: Position in the underlying dataset -> stable key.

    Returns:
        Ascending positions in `dataset`; a sample that occurs in it several times gives several.

    Raises:
        DeletionRequestError: no ids, repeated ids, or ids that are not in this training data.

    >>> from torch.utils.data import Subset
    >>> positions_of([7], Subset(range(10), [9, 8, 7]))
    array([2])
    >>> positions_of(["ann"], range(4), sample_keys=["bob", "ann", "bob", "ann"])
    array([1, 3])
    """
    requested = _checked_ids(ids, keyed=sample_keys is not None)
    index = RootIndex()
    found = index.positions(dataset)
    roots: Positions = np.arange(len(dataset), dtype=np.int64) if found is None else found
    if sample_keys is None:
        mask = np.isin(roots, np.array(requested, dtype=np.int64))
        present: set[SampleId] = set(roots[mask].tolist())
    else:
        keys = resolve_keys(sample_keys, index.length or 0)
        wanted = set(requested)
        mask = np.fromiter((keys[root] in wanted for root in roots), dtype=bool, count=len(roots))
        present = {keys[root] for root in roots[mask]}
    unknown = [i for i in requested if i not in present]
    if unknown:
        kind = "positions" if sample_keys is None else "sample keys"
        raise DeletionRequestError(
            f"Expected `forget` to be {kind} of the training data ({len(roots)} samples), but got unknown ones: "
            f"{shorten(unknown)}. Check that `data` is the data the model was trained on."
        )
    return np.flatnonzero(mask).astype(np.int64)


def sample_ids_of(dataset: Any, sample_keys: SampleKeys | None = None) -> list[SampleId]:
    """The id of every position of a loader's dataset: the position in the underlying dataset, or its key.

    >>> from torch.utils.data import Subset
    >>> sample_ids_of(Subset(range(10), [9, 8])), sample_ids_of(Subset(range(3), [2, 0]), ["ann", "bob", "eve"])
    ([9, 8], ['eve', 'ann'])
    """
    index = RootIndex()
    found = index.positions(dataset)
    roots: list[int] = list(range(len(dataset))) if found is None else found.tolist()
    if sample_keys is None:
        return list(roots)
    keys = resolve_keys(sample_keys, index.length or 0)
    return [keys[root] for root in roots]


def split_positions(
    loader: DataLoader[Any], forget: Collection[SampleId], sample_keys: SampleKeys | None = None
) -> tuple[Positions, Positions]:
    """Positions of the samples to forget and of all other samples the loader draws from.

    A `SubsetRandomSampler` bounds what was trained on: positions it never draws are in neither part.

    Raises:
        DeletionRequestError: as `positions_of`, or an id the loader's sampler never draws.

    >>> split_positions(DataLoader(range(5)), [1, 2])
    (array([1, 2]), array([0, 3, 4]))
    """
    check_splittable(loader)
    chosen = positions_of(forget, loader.dataset, sample_keys)
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if isinstance(sampler, SubsetRandomSampler):
        drawn = np.unique(np.asarray(list(sampler.indices), dtype=np.int64))
        if sample_keys is None and (missing := np.setdiff1d(chosen, drawn)).size:
            raise DeletionRequestError(
                f"Expected `forget` to be samples the training loader draws, but got positions outside its "
                f"SubsetRandomSampler: {shorten(missing.tolist())}."
            )
        chosen = np.intersect1d(chosen, drawn)
        if not chosen.size:
            raise DeletionRequestError("Expected `forget` to be samples the training loader draws, but it draws none.")
    else:
        drawn = np.arange(len(loader.dataset), dtype=np.int64)  # type: ignore[arg-type]
    return chosen, np.setdiff1d(drawn, chosen, assume_unique=True)


@dataclass(frozen=True)
class _Batching:
    """How a loader forms batches: `size` is `None` without batching; `policy` is a batch sampler of the user's."""

    sampler: Any
    size: int | None
    drop_last: bool = False
    policy: Any = None
    lists: bool = False


def _batching(loader: DataLoader[Any]) -> _Batching:
    policy = loader.batch_sampler
    if type(policy) is BatchSampler:  # also where the user passed one: then `loader.batch_size` says None
        return _Batching(policy.sampler, policy.batch_size, policy.drop_last)
    if policy is not None:
        size = getattr(policy, "batch_size", None)
        if not isinstance(size, int):
            size = math.ceil(len(loader.dataset) / len(policy)) if len(policy) else 1  # type: ignore[arg-type]
        return _Batching(loader.sampler, size, policy=policy)
    if type(loader.sampler) is BatchSampler:  # the dataset is indexed with whole lists
        inner = loader.sampler
        return _Batching(inner.sampler, inner.batch_size, inner.drop_last, lists=True)
    return _Batching(loader.sampler, None)


def _copy_of(generator: torch.Generator | None) -> torch.Generator | None:
    if generator is None:
        return None
    return torch.Generator(generator.device).set_state(generator.get_state())


def _part_sampler(
    own: Any,
    subset: Subset[Any],
    part: Part | None,
    generator: torch.Generator | None,
    seed: int | None,
    replicas: tuple[int, int] | None,
) -> Sampler[int]:
    if part is None:
        return SequentialSampler(subset)
    indices: Sequence[int] = subset.indices
    if isinstance(own, DistributedSampler):
        shuffle, drop_last = (own.shuffle, own.drop_last) if part == "retain" else (True, False)
        return CyclingDistributedSampler(subset, own.num_replicas, own.rank, shuffle, own.seed, drop_last)
    plain = isinstance(own, (RandomSampler, SubsetRandomSampler)) and not getattr(own, "replacement", False)
    if replicas is not None and (part == "forget" or plain):
        return CyclingDistributedSampler(subset, *replicas, shuffle=True, seed=0 if seed is None else seed)
    if part == "forget":
        return RandomSampler(subset, generator=generator)
    if isinstance(own, RandomSampler):
        asked = own.num_samples if own.num_samples != len(own.data_source) else None
        return RandomSampler(subset, own.replacement, asked, generator)
    if isinstance(own, SubsetRandomSampler):
        return RandomSampler(subset, generator=generator)
    if isinstance(own, SequentialSampler):
        return SequentialSampler(subset)
    if isinstance(own, WeightedRandomSampler):
        draws = max(1, round(own.num_samples * len(indices) / len(own.weights)))
        weights = own.weights[torch.as_tensor(indices)].tolist()
        return WeightedRandomSampler(weights, draws, own.replacement, generator)
    return FilteredSampler(own, indices)


def subset_loader(
    loader: DataLoader[Any],
    positions: Iterable[int],
    *,
    part: Part | None,
    seed: int | None = None,
    replicas: tuple[int, int] | None = None,
) -> DataLoader[Any]:
    """A loader over some positions of another loader's dataset, otherwise like it.

    Workers, collate function, pinned memory and the batch size are taken over; the generator is cloned, so the user's
    own is not advanced. A subclass of `DataLoader` comes back as a plain one.

    Args:
        loader: The user's training loader.
        positions: Positions in `loader.dataset`.
        part: `"retain"` keeps the user's sampling policy. `"forget"` shuffles plainly and never drops a batch, so
            every sample is seen in every pass. `None` is the evaluation form: in order, every sample once.
        seed: Seeds the shuffling instead of the user's generator.
        replicas: (number of replicas, rank) to shard shuffled parts by; `None` in a single process.

    Returns:
        A `DataLoader` over a `Subset`. In the retain part a last batch of a single sample is left out (batch
        normalisation cannot be trained on it), and `drop_last` is ignored where it would leave nothing.

    Raises:
        UnsupportedStrategyError: an iterable dataset; a batch sampler of the user's, or list indexing, over several
            processes.
        DeletionRequestError: no positions, or positions outside the dataset.

    >>> [batch.tolist() for batch in subset_loader(DataLoader(range(6), batch_size=2), [0, 3, 4], part=None)]
    [[0, 3], [4]]
    """
    check_splittable(loader)
    chosen = sorted({int(position) for position in positions})
    if not chosen or chosen[0] < 0 or chosen[-1] >= len(loader.dataset):  # type: ignore[arg-type]
        rule = f"at least one position below {len(loader.dataset)}"  # type: ignore[arg-type]
        raise DeletionRequestError(expected("positions", rule, chosen[:5]))
    batching = _batching(loader)
    # Grouping by data subject serves deletion, not learning: what is kept is drawn freely.
    grouped = isinstance(batching.policy, SubjectGroupedBatchSampler)
    filtered = batching.policy is not None and part == "retain" and not grouped
    if replicas is not None and part is not None and (filtered or batching.lists):
        found = type(batching.policy or loader.sampler)
        remedy = "Its batches cannot be shared out over processes; use a plain DataLoader, or one device."
        raise UnsupportedStrategyError(expected("data", "a loader without a batch sampler of its own", found, remedy))

    generator = _copy_of(loader.generator or getattr(batching.sampler, "generator", None))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
    settings = {name: getattr(loader, name) for name in CARRIED_SETTINGS if hasattr(loader, name)}
    settings["generator"] = generator
    if part is None:
        settings["persistent_workers"] = False
    subset: Subset[Any] = Subset(loader.dataset, chosen)
    if filtered:
        return DataLoader(subset, batch_sampler=FilteredBatchSampler(batching.policy, chosen), **settings)
    own: Any = RandomSampler(subset) if batching.policy is not None else batching.sampler
    sampler = _part_sampler(own, subset, part, generator, seed, replicas)
    if batching.size is None:
        return DataLoader(subset, batch_size=None, sampler=sampler, **settings)
    drop_last = _drops_last(batching, part, sampler, replicas)
    if batching.lists:
        return DataLoader(subset, batch_size=None, sampler=BatchSampler(sampler, batching.size, drop_last), **settings)
    return DataLoader(subset, batching.size, sampler=sampler, drop_last=drop_last, **settings)


def _drops_last(batching: _Batching, part: Part | None, sampler: Any, replicas: tuple[int, int] | None) -> bool:
    if part != "retain" or batching.size is None:
        return False
    drawn = len(sampler)
    if replicas is not None and not isinstance(sampler, DistributedSampler):
        drawn = math.ceil(drawn / replicas[0])  # Lightning shards this one later
    single = batching.size > 1 and drawn % batching.size == 1
    return drawn >= batching.size and (batching.drop_last or single)
