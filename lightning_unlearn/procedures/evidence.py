"""From the outputs of several models on the same samples to the estimates that the decision rule looks at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_unlearn.procedures.outputs import ModelOutputs
from lightning_unlearn.procedures.verdict import Estimate, Evidence

__all__ = ["gather_evidence", "mean_estimate", "share_estimate"]


def mean_estimate(values: Tensor) -> Estimate:
    """Mean of a vector with its standard error over the samples (unbiased; 0 where there is one sample only).

    >>> print(mean_estimate(torch.tensor([0.0, 1.0, 0.0, 1.0])))
    50 ± 29 points
    """
    values = values.double()
    error = float(values.std()) / math.sqrt(values.numel()) if values.numel() > 1 else 0.0
    return Estimate(float(values.mean()), error)


def share_estimate(hits: Tensor) -> Estimate:
    """Share of true entries with a standard error that is not zero where all are alike (Agresti and Coull 1998).

    >>> print(share_estimate(torch.ones(20, dtype=torch.bool)))
    100 ± 6 points
    """
    count, n = int(hits.sum()), hits.numel()
    smoothed = (count + 2) / (n + 4)
    return Estimate(count / n, math.sqrt(smoothed * (1 - smoothed) / (n + 4)))


def _training_noise(
    retrained: Mapping[str, ModelOutputs], references: Sequence[ModelOutputs], original_test: ModelOutputs
) -> float:
    """How much confidence differs between trainings that saw the same data.

    Measured on the forget set where further retrained models are given. Otherwise the shift between the original and
    the retrained model on the *test* set stands for it: neither saw that data.
    """
    if references:
        means = [float(outputs.confidences.mean()) for outputs in (retrained["forget"], *references)]
        return float(torch.tensor(means, dtype=torch.float64).std())
    return abs(float((original_test.confidences - retrained["test"].confidences).mean()))


def _held_out_excess(forget: ModelOutputs, test: ModelOutputs, altered: Tensor | None) -> Estimate:
    """Confidence on the forget set minus what the same model gives to labels it never saw.

    Of an altered label no more is known than that it gets something between nothing and all that the model leaves to
    the wrong labels of a held-out sample; within that range the excess is zero.
    """
    seen, unseen = mean_estimate(forget.confidences), mean_estimate(test.confidences)
    share = 0.0 if altered is None else float(altered.double().mean())
    least = (1 - share) * unseen.value
    most = least + share * (1 - unseen.value)
    excess = seen.value - min(max(seen.value, least), most)
    return Estimate(excess, math.hypot(seen.error, unseen.error))


def gather_evidence(
    outputs: Mapping[str, Mapping[str, ModelOutputs]],
    references: Sequence[ModelOutputs] = (),
    altered: Tensor | None = None,
) -> Evidence:
    """Build the evidence from outputs that belong together sample by sample.

    Args:
        outputs: Model -> split -> outputs; models `original` and `unlearned`, optionally `retrained` and `placebo`;
            splits `forget` and `test`.
        references: Outputs of further retrained models on the forget set.
        altered: Which forgotten samples carry a label other than their true one, bool (N,), if known.

    Returns:
        The evidence, against the retrained model if there is one and against held-out samples otherwise.
    """
    original, unlearned = outputs["original"], outputs["unlearned"]
    retrained, placebo = outputs.get("retrained"), outputs.get("placebo")
    noise = 0.0 if retrained is None else _training_noise(retrained, references, original["test"])

    def excess(model: Mapping[str, ModelOutputs]) -> Estimate:
        if retrained is None:
            return _held_out_excess(model["forget"], model["test"], altered)
        paired = mean_estimate(model["forget"].confidences - retrained["forget"].confidences)
        return Estimate(paired.value, math.hypot(paired.error, noise))

    def difference(first: Mapping[str, ModelOutputs], second: Mapping[str, ModelOutputs]) -> Estimate:
        return mean_estimate(first["forget"].confidences - second["forget"].confidences)

    expected = original["test"].correct
    if retrained is not None and retrained["test"].correct.sum() < expected.sum():
        # Forgetting a whole class costs accuracy by design; only what is lost beyond that is damage.
        expected = retrained["test"].correct
    return Evidence(
        reference="held-out" if retrained is None else "retrained",
        samples=len(original["forget"]),
        original=excess(original),
        unlearned=excess(unlearned),
        moved=difference(original, unlearned),
        damage=mean_estimate(expected.double() - unlearned["test"].correct.double()),
        placebo=None if placebo is None else excess(placebo),
        advantage=None if placebo is None else difference(placebo, unlearned),
    )
