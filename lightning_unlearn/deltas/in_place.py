"""A plan carried out in place, on weights that may be in pieces on several processes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from lightning_unlearn.deltas.accumulate import MEMORY_BYTES
from lightning_unlearn.deltas.layer_sums import layer_sums
from lightning_unlearn.deltas.plan import DeletionPlan
from lightning_unlearn.exceptions import StoreMismatchError
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.utilities.checks import check_positive_int, expected
from lightning_unlearn.utilities.distributed import on_every_process
from lightning_unlearn.utilities.parameters import weights_digest
from lightning_unlearn.utilities.sharded import held_part, is_cut, local_part_like
from lightning_unlearn.utilities.whole_weights import is_sharded, named_parameters, writable_parameters

__all__ = ["subtract_plan"]


@torch.no_grad()
def subtract_plan(
    module: nn.Module,
    plan: DeletionPlan,
    store: DeltaStore,
    *,
    force: bool = False,
    root: nn.Module | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> None:
    """Subtract what a plan says from a module's parameters, in place, each process from what it holds.

    For modules that cannot go through `unlearn`, which edits a copy: those that are already sharded by FSDP2 or tensor
    parallelism (`DTensor`s of any placement), or by FSDP1 with its parameters' own names. Under these every process
    calls it, outside forward and backward; a hook such as `on_fit_start` is the place, where the strategy has set the
    model up. A module that is not sharded is edited by the process that calls it alone.

    Guarantee: the weights are bit for bit those that `unlearn` with `Amnesiac` or `PartialAmnesiac` makes of the same
    module on one process. Every weight is changed once, with one rounding from float64. Nothing else is done: running
    statistics stay (re-estimate them), and an optimizer that exists already still knows the samples. Write the entry
    with `DeletionLedger.record(plan, module, method=...)` afterwards, on every process.

    Cost: each process reads the deltas once, of those that were recorded in pieces only the ones that it holds entries
    of, and has `memory_bytes` for sums; the digest that recognises the weights
    gathers a sharded module once on the first process. Under FSDP1 one FSDP module is gathered at a time.

    Args:
        module: The module, with the weights that the plan was made for.
        plan: From `DeletionRequest.plan(store, module)`; under sharding every process makes it.
        store: The store.
        force: As in `DeletionPlan.check`.
        root: The outermost FSDP module, where `module` is below it; by default Lightning's is found.
        memory_bytes: Bound on the float64 sums that are in memory at a time (at least one layer's).

    Raises:
        StoreMismatchError: the plan was made without a store or for other weights (subtracted already, say), or the
            module is another one.
        DeletionRequestError: the plan is not to be carried out.
        MissingDeltaError: a step has no delta.
        StoreCorruptedError: a delta is damaged.
        LightningUnlearnError: on processes that found nothing wrong, where another one did. In all of these cases the
            weights are unchanged everywhere.

    >>> from lightning_unlearn import DeletionRequest  # doctest: +SKIP
    >>> class Forgetting(MyModule):  # doctest: +SKIP
    ...     def on_fit_start(self):
    ...         plan = DeletionRequest(["user-7"]).plan(store, self)
    ...         subtract_plan(self, plan, store)
    """
    check_positive_int("memory_bytes", memory_bytes)
    sharded = is_sharded(module, root)
    digest = weights_digest(module, root)
    store.check_model(module, root)

    held = {name: held_part(one) for name, one in named_parameters(module).items() if is_cut(one)}
    spans = {name: (start, start + _reach(shape, strides)) for name, (start, shape, strides) in held.items()}

    def first_group() -> tuple[Iterator[dict[str, Tensor]], dict[str, Tensor]]:
        if plan.state is None:
            raise StoreMismatchError(expected("plan", "made with a store", "one without", "Plan with the store."))
        if digest != plan.state.digest:
            remedy = "Plan for these weights: `DeletionRequest.plan(store, module)`."
            raise StoreMismatchError(expected("plan", "made for the weights of `module`", "one for others", remedy))
        plan.check(force)
        sums = layer_sums(store, plan.amounts, keep=plan.keep, memory_bytes=memory_bytes, spans=spans or None)
        return sums, next(sums, {})  # which has checked every step and every byte that it needs

    sums, first = on_every_process(first_group) if sharded else first_group()
    for group in chain((first,), sums):
        for name, tensor, like in writable_parameters(module, group, root):
            change = group[name]
            if name in held:
                # Of what is in pieces here, only what lies between the first entry and the last was summed.
                _, shape, strides = held[name]
                change = change.as_strided(shape, strides, change.storage_offset()).reshape(tensor.shape)
            else:
                change = local_part_like(change, like)
            device = torch.device("cpu") if tensor.device.type == "mps" else tensor.device  # has no float64
            tensor.copy_(tensor.to(device, torch.float64) - change.to(device))


def _reach(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How far behind the first entry the last one of a piece ends; 0 where it is empty."""
    return 0 if 0 in shape else 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
