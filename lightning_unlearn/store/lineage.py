"""The family tree of a store: which runs wrote it, which weights are known to contain what, which edits were made.

One small document, replaced atomically: an edit and the weights it led to are committed together or not at all.
Everything here is a pure function from one lineage to the next; `DeltaStore` reads and writes the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeAlias

from lightning_unlearn.exceptions import StoreMismatchError
from lightning_unlearn.functional.pruning import Keep, Pruning
from lightning_unlearn.types import ModelState, OptimizerInfo, Scale
from lightning_unlearn.utilities.checks import expected, shorten

__all__ = [
    "LedgerEntry",
    "Lineage",
    "Run",
    "RunKind",
    "lineage_from_dict",
    "lineage_to_dict",
]

RunKind: TypeAlias = Literal["fit", "repair"]


@dataclass(frozen=True, slots=True)
class Run:
    """One training run; its steps go from `first` to the first step of the next run.

    Attributes:
        kind: `"fit"`, or `"repair"` for training after an edit.
        first: Ordinal of its first step.
        optimizers: Its optimizers.
    """

    kind: RunKind
    first: int
    optimizers: tuple[OptimizerInfo, ...]


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One subtraction.

    Attributes:
        entry_id: Its id.
        created: Time in UTC, ISO 8601.
        method: Name of the method.
        scale: Whether whole steps or shares of them were subtracted.
        keep: How far stored deltas, or their sum, were pruned further.
        amounts: Step -> fraction of its delta that was subtracted.
        id_hashes: Keyed hashes of the forgotten ids, sorted.
        before: Digest of the weights it was applied to.
        after: Digest of the weights it led to.
        purged: Whether the forgotten ids were removed from the store.
        undone: Whether it was undone in some later state.
    """

    entry_id: str
    created: str
    method: str
    scale: Scale
    keep: Keep
    amounts: Mapping[int, float]
    id_hashes: tuple[str, ...]
    before: str
    after: str
    purged: Literal["no", "purging", "yes"] = "no"
    undone: bool = False


@dataclass(frozen=True, slots=True)
class Lineage:
    """All runs, known states and edits, each in the order in which they happened.

    Attributes:
        runs: Training runs.
        states: Known weights; the last one is the tip.
        entries: Subtractions.
        key_check: Tells whether a key is the one the ids were hashed with; `None` before the first entry.
        initial: Files with initial values that were added later, and their digests.
        layouts: Files with the pieces that layers were recorded in, and their digests; pieces are numbered through.
    """

    runs: tuple[Run, ...] = ()
    states: tuple[ModelState, ...] = ()
    entries: tuple[LedgerEntry, ...] = ()
    key_check: str | None = field(default=None)
    initial: tuple[tuple[str, str], ...] = ()
    layouts: tuple[tuple[str, str], ...] = ()

    @property
    def n_steps(self) -> int:
        """How many steps a store must have at least, because known weights contain them."""
        return max((stop for state in self.states for _, stop in state.ranges), default=0)

    def state_of(self, digest: str) -> ModelState | None:
        """The latest state with these weights."""
        return next((state for state in reversed(self.states) if state.digest == digest), None)

    def shortest_state_of(self, digest: str) -> ModelState | None:
        """Of the states with these weights and the edits of the latest, the one with the fewest steps.

        Steps that moved no weight (a rate of zero, a gradient of zero) make another state of the same weights.
        """
        known = [state for state in reversed(self.states) if state.digest == digest]
        alike = [state for state in known if (state.edits, state.drifted) == (known[0].edits, known[0].drifted)]
        return min(alike, key=lambda state: state.n_steps, default=None)

    def entry(self, entry_id: str) -> LedgerEntry | None:
        """The entry of that id."""
        return next((entry for entry in self.entries if entry.entry_id == entry_id), None)

    def subtracted(self, edits: Iterable[str]) -> dict[int, float]:
        """What these edits subtracted together, step by step; at most 1."""
        total: dict[int, float] = {}
        for entry_id in edits:
            entry = self.entry(entry_id)
            for step, amount in entry.amounts.items() if entry is not None else ():
                total[step] = min(1.0, total.get(step, 0.0) + amount)
        return total

    def with_run(self, run: Run, *, resumed: bool) -> Lineage:
        """A run begins; a resumed one continues the last entry, and one that never recorded a step is replaced."""
        runs = self.runs
        if resumed and runs and runs[-1].kind == run.kind and runs[-1].first <= run.first:
            run = replace(run, first=runs[-1].first)
            runs = runs[:-1]
        elif runs and runs[-1].first == run.first:
            runs = runs[:-1]
        return replace(self, runs=(*runs, run))

    def with_state(self, state: ModelState) -> Lineage:
        """A state becomes the tip."""
        return replace(self, states=(*(known for known in self.states if known != state), state))

    def with_entry(self, entry: LedgerEntry) -> Lineage:
        """An entry is added, or replaces the one of its id."""
        if self.entry(entry.entry_id) is None:
            return replace(self, entries=(*self.entries, entry))
        return replace(self, entries=tuple(entry if e.entry_id == entry.entry_id else e for e in self.entries))

    def truncated(self, n_steps: int) -> Lineage:
        """Without the states and runs that contain steps from `n_steps` on.

        Raises:
            StoreMismatchError: a later run that led to known weights, or an edit in force, contains such steps.
        """
        dropped = [state for state in self.states if any(stop > n_steps for _, stop in state.ranges)]
        later = [run for run in self.runs if run.first >= n_steps and run.first > 0]
        built_on = [
            run for run in later if any(start <= run.first < stop for state in dropped for start, stop in state.ranges)
        ]
        digests = {state.digest for state in dropped}
        edits = [
            entry.entry_id
            for entry in self.entries
            if not entry.undone and ({entry.before, entry.after} & digests or any(s >= n_steps for s in entry.amounts))
        ]
        if built_on or edits:
            got = (
                f"a {built_on[0].kind} run from step {built_on[0].first} on" if built_on else f"edits {shorten(edits)}"
            )
            raise StoreMismatchError(
                expected(
                    "n_steps", "such that nothing known rests on the dropped steps", got, "Record into a new store."
                )
            )
        states = tuple(state for state in self.states if state not in dropped)
        return replace(self, states=states, runs=tuple(run for run in self.runs if run not in later))


def lineage_to_dict(lineage: Lineage) -> dict[str, Any]:
    """Plain JSON data of a lineage."""
    body = asdict(lineage)
    for entry, source in zip(body["entries"], lineage.entries, strict=True):
        entry["amounts"] = [[step, amount] for step, amount in sorted(source.amounts.items())]
        entry["keep"] = _keep_to_plain(source.keep)
    return body


def _keep_to_plain(keep: Keep) -> Any:
    """A list of pairs for fractions by pattern, because their order matters; an object for a `Pruning`."""
    if isinstance(keep, Pruning):
        return {"keep": _keep_to_plain(keep.keep), "when": keep.when, "criterion": keep.criterion, "seed": keep.seed}
    return [[pattern, value] for pattern, value in keep.items()] if isinstance(keep, Mapping) else keep


def _keep_from_plain(plain: Any) -> Keep:
    if isinstance(plain, Mapping):
        return Pruning(**{**plain, "keep": _keep_from_plain(plain["keep"])})
    return dict(plain) if isinstance(plain, list) else plain


def lineage_from_dict(body: Mapping[str, Any]) -> Lineage:
    """The lineage of `lineage_to_dict`.

    >>> lineage = Lineage((Run("fit", 0, (OptimizerInfo("SGD", 0.1, 0.0),)),))
    >>> lineage_from_dict(lineage_to_dict(lineage)) == lineage
    True
    """
    return Lineage(
        runs=tuple(
            Run(run["kind"], run["first"], tuple(OptimizerInfo(**optimizer) for optimizer in run["optimizers"]))
            for run in body["runs"]
        ),
        states=tuple(
            ModelState(
                state["digest"],
                tuple((start, stop) for start, stop in state["ranges"]),
                tuple(state["edits"]),
                state["travel"],
                state["norm"],
                state.get("drifted", False),
            )
            for state in body["states"]
        ),
        entries=tuple(_entry(entry) for entry in body["entries"]),
        key_check=body["key_check"],
        initial=tuple((name, digest) for name, digest in body.get("initial", ())),
        layouts=tuple((name, digest) for name, digest in body.get("layouts", ())),
    )


def _entry(body: Mapping[str, Any]) -> LedgerEntry:
    return LedgerEntry(
        **{
            **body,
            "keep": _keep_from_plain(body["keep"]),
            "amounts": {int(step): float(amount) for step, amount in body["amounts"]},
            "id_hashes": tuple(body["id_hashes"]),
        }
    )
