"""Compare an unlearned model with what it should be: a model that never saw the forgotten samples."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.utils.data import RandomSampler

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.procedures.comparison import Comparison
from lightning_unlearn.procedures.evidence import gather_evidence
from lightning_unlearn.procedures.outputs import Adapter, ModelOutputs, collect_outputs_together
from lightning_unlearn.procedures.rows import metric_rows
from lightning_unlearn.procedures.verdict import DecisionRule, decide
from lightning_unlearn.results import EvaluationResult, ModelRole
from lightning_unlearn.types import Split
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.costs import speedup

__all__ = ["evaluate"]

_SPLITS: tuple[Split, ...] = ("forget", "retain", "test")


def evaluate(
    original: LightningModule,
    unlearned: LightningModule,
    *,
    data: Mapping[Split, Iterable[Any]],
    retrained: LightningModule | None = None,
    placebo: LightningModule | None = None,
    references: Sequence[LightningModule] = (),
    true_targets: Tensor | None = None,
    paired: bool = False,
    unlearning_seconds: float | None = None,
    retraining_seconds: float | None = None,
    store_bytes: int | None = None,
    adapter: Adapter | None = None,
    device: torch.device | str | None = None,
    rule: DecisionRule | None = None,
) -> EvaluationResult:
    """Measure original, unlearned, retrained and placebo model side by side, and say what follows.

    The right value of every metric is the retrained model's. Rows have an interval over samples where one can be given,
    and with `references` the noise floor between trainings. First it is asked whether there was anything to forget;
    then whether the unlearned model moved to the reference, clearly more than the placebo, and unharmed. Parameter
    distance is reported and decides nothing. All models see each batch together, so differences are taken sample by
    sample, whatever the loaders' order. Nothing is trained, and models, modes and random state are left as they were.

    On several processes, every one that calls it gets the whole result: give each loaders over all samples. Models that
    are in pieces (FSDP2, tensor parallel) need all processes to call it with the same models and the same batches;
    what one of them cannot do is raised by all.

    Args:
        original: The trained model that holds the samples.
        unlearned: The model after the forgetting pass.
        data: Loaders of `"forget"` and `"test"` (held out from all training), optionally `"retain"`, which ToW and
            average gap need. Evaluation form: no augmentation, no dropped last batch.
        retrained: A model trained without the forgotten samples. Without one, held-out samples stand in for it.
        placebo: The original after the same pass for an *innocent* group of the same size and placement. "Forgotten"
            is said only with one.
        references: Further retrained models (other seeds); they measure the noise between trainings. Distances to
            `retrained` have a noise floor with two or more, other metrics with one, which makes two retrained models.
        true_targets: True labels of the forget set in its loader's order, (N,), where labels were wrong: a second
            score, and it tells the rule that held-out data are no stand-in for the labels given.
        paired: Whether `retrained` shares initial weights and order of data with `original`. Otherwise the
            verification error is marked as unpaired.
        unlearning_seconds: How long the pass took; reported with the speedup over `retraining_seconds`.
        retraining_seconds: How long retraining took.
        store_bytes: Size of the delta store.
        adapter: How to get logits and targets from a module and a batch, see :mod:`.outputs`.
        device: Where to compute; by default where each module is.
        rule: Thresholds of the decision.

    Returns:
        The typed result; :class:`lightning_unlearn.results.EvaluationResult` says what is in it.

    Raises:
        MissingRequirementError: the forget or the test loader is missing, or an adapter is needed.
        ValueError: an unknown split, a shuffled forget loader together with `true_targets`, `references` without
            `retrained`, a cost that is negative or not finite, or an empty loader.
        UnsupportedStrategyError: a model is in pieces, and the processes have different batches; or it is under FSDP1.
        LightningUnlearnError: a model is in pieces, and another process has failed.
    """
    started = time.perf_counter()
    _check(data, retrained, references, true_targets, (unlearning_seconds, retraining_seconds, store_bytes))
    given: dict[ModelRole, LightningModule | None] = {
        "original": original,
        "unlearned": unlearned,
        "retrained": retrained,
        "placebo": placebo,
    }
    models = {role: model for role, model in given.items() if model is not None}
    others = {f"reference {number}": model for number, model in enumerate(references, start=1)}
    found = {
        split: collect_outputs_together(
            {**{str(role): model for role, model in models.items()}, **others},
            data[split],
            adapter=adapter,
            device=device,
        )
        for split in _SPLITS
        if split in data
    }
    outputs = {role: {split: item[role] for split, item in found.items()} for role in models}
    extra = [(model, {split: item[name] for split, item in found.items()}) for name, model in others.items()]

    true = _true_outputs({role: item["forget"] for role, item in outputs.items()}, true_targets)
    altered = true["original"].targets != outputs["original"]["forget"].targets if true else None
    comparison = Comparison(models, outputs, extra, true, altered is not None and bool(altered.any()), paired)
    evidence = gather_evidence(_by_name(outputs), [item["forget"] for _, item in extra], altered)
    decision = decide(evidence, rule)
    return EvaluationResult(
        rows=metric_rows(comparison),
        models=tuple(models),
        samples={split: len(item["original"]) for split, item in found.items()},
        something_to_forget=decision.something_to_forget,
        outcome=decision.outcome,
        verdict=decision.verdict,
        removed=decision.removed,
        removed_by_placebo=decision.removed_by_placebo,
        notes=_notes(comparison),
        warnings=_warnings(comparison),
        costs=_costs(unlearning_seconds, retraining_seconds, store_bytes),
        seconds=time.perf_counter() - started,
    )


def _by_name(outputs: Mapping[ModelRole, Mapping[Split, ModelOutputs]]) -> dict[str, dict[str, ModelOutputs]]:
    return {str(role): {str(split): item for split, item in splits.items()} for role, splits in outputs.items()}


def _check(
    data: Mapping[Split, Iterable[Any]],
    retrained: LightningModule | None,
    references: Sequence[LightningModule],
    true_targets: Tensor | None,
    costs: tuple[float | None, ...],
) -> None:
    unknown = sorted(set(data) - set(_SPLITS))
    if unknown:
        raise ValueError(expected("data", f"loaders of {', '.join(map(repr, _SPLITS))}", unknown))
    missing = [split for split in ("forget", "test") if split not in data]
    if missing:
        remedy = "Held-out samples are what the forgotten ones are compared with."
        raise MissingRequirementError(
            expected("data", f"with a loader for {' and '.join(missing)}", list(data), remedy)
        )
    if references and retrained is None:
        raise ValueError(expected("references", "empty without `retrained`", len(references), "Pass one as retrained."))
    if true_targets is not None and _shuffles(data["forget"]):
        remedy = "`true_targets` are matched by position: use shuffle=False."
        raise ValueError(expected("data['forget']", "a loader with a fixed order", "a shuffled one", remedy))
    if any(cost is not None and not 0 <= cost < math.inf for cost in costs):
        raise ValueError(expected("seconds and bytes", "finite and at least 0", costs))


def _shuffles(loader: Iterable[Any]) -> bool:
    # Given a batch sampler, a DataLoader shows a sequential sampler that it does not use.
    batches = getattr(loader, "batch_sampler", None)
    samplers = (getattr(loader, "sampler", None), getattr(batches, "sampler", None))
    return any(isinstance(sampler, RandomSampler) for sampler in samplers)


def _true_outputs(
    forget: Mapping[ModelRole, ModelOutputs], true_targets: Tensor | None
) -> dict[ModelRole, ModelOutputs]:
    if true_targets is None:
        return {}
    return {role: item.with_targets(true_targets) for role, item in forget.items()}


def _notes(comparison: Comparison) -> tuple[str, ...]:
    members = len(comparison.outputs["original"]["forget"])
    notes = ["Spreads are standard errors over samples; they do not contain the noise between training runs."]
    notes.append(
        "Intervals (95 %) are over samples as well: Student's for means, Agresti and Coull's for accuracies, normal "
        "with Hanley and McNeil's error for an AUROC. An AUROC of 0 or 1 has none, nor has what no error is known of."
    )
    auroc_error = 0.29 / members**0.5
    notes.append(f"With {members} forgotten samples an AUROC near 0.5 has a standard error of about {auroc_error:.2f}.")
    if min(members, len(comparison.outputs["original"]["test"])) >= comparison.min_members:
        notes.append("Attacks by loss and by confidence order samples alike: together they are one piece of evidence.")
    if comparison.altered:
        notes.append(
            "Labels of the forget set are wrong: a model that never saw them has a high loss there, so a membership "
            "AUROC near 0 is right for it, not 0.5."
        )
    if comparison.references:
        notes.append(f"Noise between trainings was measured with {len(comparison.references) + 1} retrained models.")
    return tuple(notes)


def _warnings(comparison: Comparison) -> tuple[str, ...]:
    found = []
    outputs = comparison.outputs["original"]
    members, nonmembers = len(outputs["forget"]), len(outputs["test"])
    if "retrained" not in comparison.models:
        found.append("No retrained reference: held-out samples stand in for it, which is weaker evidence.")
        if not comparison.true_outputs:
            found.append("If forget labels are wrong or forget samples unusual, the held-out stand-in is not valid.")
    elif not comparison.references:
        found.append("One retrained model only: how much two retrainings differ was not measured.")
    if "retrained" in comparison.models and not comparison.paired:
        found.append("The verification error is unpaired and shows mostly the noise of training.")
    if "placebo" not in comparison.models:
        found.append("No placebo: whether the effect is specific to the forgotten samples was not checked.")
    if min(members, nonmembers) < comparison.min_members:
        found.append(
            f"No membership attack: {members} members and {nonmembers} held-out samples, at least "
            f"{comparison.min_members} of each are needed."
        )
    elif nonmembers < 100:
        found.append(f"Only {nonmembers} held-out samples: membership and test figures are coarse.")
    return tuple(found)


def _costs(unlearning: float | None, retraining: float | None, store_bytes: int | None) -> dict[str, float]:
    named = {"unlearning_seconds": unlearning, "retraining_seconds": retraining, "store_bytes": store_bytes}
    costs = {name: float(value) for name, value in named.items() if value is not None}
    if unlearning and retraining:
        costs["speedup"] = speedup(unlearning, retraining)
    return costs
