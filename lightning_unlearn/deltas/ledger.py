"""The deletion ledger: what was subtracted from which weights, so that nothing is subtracted twice."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_unlearn.deltas.accumulate import accumulate
from lightning_unlearn.deltas.plan import DeletionPlan
from lightning_unlearn.exceptions import (
    DeletionRequestError,
    MissingDeltaError,
    StoreMismatchError,
    UnsupportedStrategyError,
)
from lightning_unlearn.functional.pruning import Keep
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.store.index import in_ranges
from lightning_unlearn.store.lineage import LedgerEntry, Lineage
from lightning_unlearn.types import ModelState, SampleId
from lightning_unlearn.utilities.checks import expected, shorten
from lightning_unlearn.utilities.parameters import (
    apply_change,
    change_norm,
    clone_parameters,
    of_whole,
    tensors_digest,
    tensors_distance,
    weights_digest,
)
from lightning_unlearn.utilities.whole_weights import is_sharded

__all__ = ["DeletionLedger", "LedgerEntry"]

_KEY_BYTES = 32
_HASH_BYTES = 16
_WHOLE = 1.0 - 1e-9


class DeletionLedger:
    """Edits of the weights that a store knows, kept in the store's lineage; see `open`.

    Forgotten ids are kept as keyed hashes (HMAC-SHA256, 128 bits), so that "already forgotten" can still be told from
    "unknown" after they were purged, by whoever has the key. The key is not in the store.
    """

    def __init__(self, store: DeltaStore, key: bytes | None) -> None:
        self.store = store
        self._key = key

    @classmethod
    def open(cls, store: DeltaStore, key: bytes | None = None) -> DeletionLedger:
        """Open the ledger of a store.

        Args:
            store: The store.
            key: Secret of the id hashes; by default the file `<store>.ledger-key` beside the store, made (readable by
                its owner only) when the first entry is written.

        Raises:
            StoreMismatchError: the entries were made with another key, or their key is gone.
        """
        files, name = store.files.sibling(".ledger-key")
        if key is None and files.exists(name):
            key = files.read(name)
        check = store.lineage.key_check
        if check is not None and (key is None or _key_check(key) != check):
            got = "no key" if key is None else "another"
            remedy = f"Pass it, or put it back as {files.url}/{name}."
            raise StoreMismatchError(expected("key", "the key that the ledger was begun with", got, remedy))
        return cls(store, key)

    @property
    def entries(self) -> tuple[LedgerEntry, ...]:
        """All entries, in the order in which they were made."""
        return self.store.lineage.entries

    def subtracted(self, edits: Iterable[str]) -> dict[int, float]:
        """What these edits subtracted together: step -> fraction, at most 1."""
        return self.store.lineage.subtracted(edits)

    def honoured(self, sample_ids: Iterable[SampleId], edits: Collection[str]) -> dict[SampleId, str]:
        """Those of the ids that these edits have forgotten, and by which entry."""
        by_hash = {
            hashed: entry.entry_id for entry in self.entries if entry.entry_id in edits for hashed in entry.id_hashes
        }
        if not by_hash:
            return {}
        hashes = {sample_id: self._hash(sample_id) for sample_id in sample_ids}
        return {sample_id: by_hash[hashed] for sample_id, hashed in hashes.items() if hashed in by_hash}

    def relearned(self, honoured: Mapping[SampleId, str], state: ModelState) -> dict[SampleId, npt.NDArray[np.int64]]:
        """Those of the honoured ids that these weights were trained on again since, and the steps that did it.

        Args:
            honoured: Id -> entry, from `honoured` with the state's edits.
            state: The weights.

        Returns:
            Id -> ascending int64 steps that are in the weights now and were not as the entry was made.
        """
        found = {}
        for sample_id, entry_id in honoured.items():
            entry = self.store.lineage.entry(entry_id)
            before = None if entry is None else self.store.lineage.state_of(entry.before)
            if before is not None:
                steps = self.store.steps_of([sample_id], within=state.ranges)
                later = steps[~in_ranges(steps, before.ranges)]
                if later.size:
                    found[sample_id] = later
        return found

    def record(
        self,
        plan: DeletionPlan,
        module: nn.Module,
        *,
        method: str,
        keep: Keep = None,
        amounts: Mapping[int, float] | None = None,
    ) -> LedgerEntry:
        """Write an entry and the weights it led to, in one atomic step.

        Where the module is sharded, every process calls this, and the first one writes.

        Args:
            plan: The plan that was carried out.
            module: The module after the edit.
            method: Name of the method.
            keep: How far deltas were pruned; must be the plan's where it is given.
            amounts: What was subtracted, the plan's amounts by default; empty for an edit that subtracts no deltas.

        Raises:
            ValueError: `keep` is not the plan's, so an undo would add back something else.
            StoreMismatchError: the plan was made without a store, or its weights are not known any more.
        """
        if keep is not None and keep != plan.keep:
            raise ValueError(expected("keep", f"the plan's {plan.keep!r}", keep, "Make the plan with the same `keep`."))
        before = plan.state
        if before is None:
            raise StoreMismatchError(expected("plan", "made with a store", "one without", "Plan with the store."))

        def write(parameters: Mapping[str, Tensor]) -> LedgerEntry:
            key, entry_id = self._require_key(), uuid.uuid4().hex[:12]
            after = self._state(parameters, before, (*before.edits, entry_id))
            entry = LedgerEntry(
                entry_id=entry_id,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                method=method,
                scale=plan.scale,
                keep=plan.keep,
                amounts=dict(plan.amounts if amounts is None else amounts),
                id_hashes=tuple(sorted(map(self._hash, plan.request.sample_ids))),
                before=before.digest,
                after=after.digest,
            )

            def change(lineage: Lineage) -> Lineage:
                if before not in lineage.states:
                    rule, remedy = "made for weights that are still known", "Make the plan again."
                    raise StoreMismatchError(expected("plan", rule, before.digest, remedy))
                return replace(lineage.with_entry(entry).with_state(after), key_check=_key_check(key))

            self.store.update_lineage(change)
            return entry

        written = of_whole(module, write)
        if is_sharded(module):
            self.store.refresh()  # of what the first process wrote
        return written

    @torch.no_grad()
    def undo(self, entry_id: str, module: nn.Module) -> ModelState:
        """Add the subtracted sum back, in place: the weights return to what they were within two roundings.

        Steps recorded after the edit stay, and so do running statistics: re-estimate those. Only the latest edit of
        the weights can be undone, because later ones rest on it; undo those first.

        Args:
            entry_id: The entry.
            module: A module with weights that contain the edit.

        Returns:
            The state the weights are in now.

        Raises:
            UnsupportedStrategyError: the module is sharded.
            DeletionRequestError: there is no such entry, or it is not the latest edit of these weights.
            StoreMismatchError: the store does not know these weights.
            MissingDeltaError: the entry's deltas were purged. The weights are unchanged in each of these cases.
        """
        if is_sharded(module):
            rule, remedy = "whole for an undo", "Load its weights into a module outside of the Trainer."
            raise UnsupportedStrategyError(expected("module", rule, "a sharded one", remedy))
        entry = self._entry(entry_id)
        self.store.check_model(module)
        state = self.store.state_of(weights_digest(module))
        if state is None:
            remedy = "Undo the edit on the very weights that it led to."
            raise StoreMismatchError(
                expected("module", "one with weights that the store knows", "other weights", remedy)
            )
        if entry_id not in state.edits[-1:]:
            remedy = "Undo later edits first, in reverse order."
            raise DeletionRequestError(expected("entry_id", "the latest edit of these weights", entry_id, remedy))
        if entry.purged != "no":
            raise MissingDeltaError(
                expected("entry_id", "an entry whose deltas are kept", f"{entry_id}, which was purged")
            )
        change = accumulate(self.store, entry.amounts, keep=entry.keep)
        backup = clone_parameters(module)
        try:
            apply_change(module, change)
            after = self._state(dict(module.named_parameters()), state, state.edits[:-1])
            self.store.update_lineage(lambda lineage: lineage.with_entry(replace(entry, undone=True)).with_state(after))
        except BaseException:
            for name, parameter in module.named_parameters():
                parameter.copy_(backup[name])
            raise
        return after

    def purge(self, entry_id: str) -> None:
        """Remove the entry's ids from the store, and the deltas that are wholly subtracted; an undo is over then.

        Deltas of which only a share was subtracted stay, because other samples are still in the weights through
        them. An interrupted purge is finished by calling it again.

        Raises:
            DeletionRequestError: there is no such entry, it was undone, or known weights have learnt some of the ids
                again: without the ids in the store these weights would pass for having forgotten them.
            StoreMismatchError: a writer is open.
            StoreCorruptedError: the store is damaged; repair it first.
        """
        entry = self._entry(entry_id)
        if entry.purged == "yes":
            return
        if entry.undone:
            got, remedy = f"{entry_id}, which was undone", "Forget its ids again, and purge that entry."
            raise DeletionRequestError(expected("entry_id", "an entry in force", got, remedy))
        again = self._open_again(entry)
        if again:
            rule = f"an entry whose ids stayed forgotten in all weights that rest on {entry_id}"
            remedy = "Forget these ids in the retrained weights first."
            got = f"ids that a later fit was trained on again: {shorten(again)}"
            raise DeletionRequestError(expected("entry_id", rule, got, remedy))
        self.store.update_lineage(lambda lineage: lineage.with_entry(replace(entry, purged="purging")))
        self.store.refresh()
        hashes = set(entry.id_hashes)
        ids = {one for one in self.store.reader.distinct_ids() if self._hash(one) in hashes}
        results = [state for state in self.store.lineage.states if state.edits[-1:] == (entry_id,)]
        total = self.subtracted(results[0].edits if results else (entry_id,))
        self.store.purge(ids, {step for step, amount in total.items() if amount >= _WHOLE})
        self.store.update_lineage(lambda lineage: lineage.with_entry(replace(entry, purged="yes")))

    def _open_again(self, entry: LedgerEntry) -> list[SampleId]:
        """Ids of the entry that some known weights have learnt again, where no weights built on them forgot them."""
        hashes = set(entry.id_hashes)
        ids = [one for one in self.store.reader.distinct_ids() if self._hash(one) in hashes]
        states = [state for state in self.store.lineage.states if entry.entry_id in state.edits]
        found: set[SampleId] = set()
        for state in states:
            depth = len(state.edits)
            built_on = [other.edits[depth:] for other in states if other.edits[:depth] == state.edits]
            again = self.relearned(self.honoured(ids, state.edits), state)
            found.update(one for one in again if not any(self.honoured([one], edits) for edits in built_on))
        return sorted(found, key=str)

    def _entry(self, entry_id: str) -> LedgerEntry:
        self.store.refresh()
        entry = self.store.lineage.entry(entry_id)
        if entry is None:
            raise DeletionRequestError(
                expected("entry_id", "an entry of this ledger", entry_id, "`entries` lists them.")
            )
        return entry

    def _state(self, parameters: Mapping[str, Tensor], before: ModelState, edits: tuple[str, ...]) -> ModelState:
        initial = self.store.initial_weights()
        if not before.drifted:  # or the frozen ones may be among what had changed, as the entry's weights say
            self.store.check_unchanged(
                {name: parameters.get(name) for name in self.store.frozen if name not in initial}
            )
        travel, norm = tensors_distance(parameters, initial), change_norm(parameters)
        return ModelState(tensors_digest(parameters), before.ranges, edits, travel, norm, before.drifted)

    def _hash(self, sample_id: SampleId) -> str:
        kind = "s" if isinstance(sample_id, str) else "i"
        text = f"{self.store.store_id}|{kind}{sample_id}".encode("utf-8", "surrogatepass")
        return hmac.digest(self._require_key(), text, hashlib.sha256)[:_HASH_BYTES].hex()

    def _require_key(self) -> bytes:
        files, name = self.store.files.sibling(".ledger-key")
        if self._key is None and self.store.lineage.key_check is not None and files.exists(name):
            self._key = files.read(name)  # of an entry that another process has made since
        if self._key is None:
            key = secrets.token_bytes(_KEY_BYTES)
            files.publish(name, key, exclusive=True, mode=0o600)
            self._key = key
        return self._key


def _key_check(key: bytes) -> str:
    """Tells two keys apart without telling the key."""
    return hmac.digest(key, b"lightning-unlearn ledger", hashlib.sha256)[:8].hex()
