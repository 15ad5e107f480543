"""Many models side by side: the same numbers for each, on the same samples, against one reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from lightning_unlearn.functional.divergences import kl_to_reference
from lightning_unlearn.functional.membership import membership_auroc
from lightning_unlearn.functional.weight_distance import verification_error
from lightning_unlearn.procedures.outputs import Adapter, ModelOutputs, collect_outputs_together
from lightning_unlearn.types import Split
from lightning_unlearn.utilities.checks import check_choice

__all__ = ["compare_models"]


def compare_models(
    models: Mapping[str, LightningModule],
    data: Mapping[Split, Iterable[Any]],
    *,
    reference: str,
    true_targets: Tensor | None = None,
    adapter: Adapter | None = None,
    device: torch.device | str | None = None,
) -> dict[str, dict[str, float]]:
    """One row of numbers per model; `evaluate` says what such numbers mean, this only measures.

    On several processes, and with models in pieces, as `evaluate`.

    Args:
        models: Label -> module.
        data: Loaders of `"forget"`, `"retain"` and `"test"`, in evaluation form.
        reference: Label of the retrained model.
        true_targets: True labels of the forget set in its loader's order, (N,), where the labels are wrong.
        adapter: How to get logits and targets from a module and a batch.
        device: Where to compute; by default where each module is.

    Returns:
        Label -> `forget_accuracy`, `retain_accuracy`, `test_accuracy` (fractions), `true_label_accuracy` (with
        `true_targets`), `forget_kl` and `test_kl` (mean KL(reference || model) in nats), `membership_auroc` (loss
        threshold, forget against test), `verification_error` (L2 distance of the weights to the reference's).

    Raises:
        ValueError: `reference` is not among the models.
        UnsupportedStrategyError: a model is in pieces, and the processes have different batches.
    """
    check_choice("reference", reference, tuple(models))
    outputs = {
        split: collect_outputs_together(models, loader, adapter=adapter, device=device)
        for split, loader in data.items()
    }
    rows: dict[str, dict[str, float]] = {}
    for label, model in models.items():
        values = {f"{split}_accuracy": _accuracy(found[label]) for split, found in outputs.items()}
        if true_targets is not None:
            values["true_label_accuracy"] = _accuracy(outputs["forget"][label].with_targets(true_targets))
        for split in ("forget", "test"):
            logits, right = outputs[split][label].logits, outputs[split][reference].logits
            values[f"{split}_kl"] = float(kl_to_reference(logits, right).mean())
        values["membership_auroc"] = float(
            membership_auroc(outputs["forget"][label].losses, outputs["test"][label].losses)
        )
        values["verification_error"] = float(verification_error(model, models[reference]))
        rows[label] = values
    return rows


def _accuracy(outputs: ModelOutputs) -> float:
    return float(outputs.correct.double().mean())
