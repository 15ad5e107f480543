"""The smallest case: softmax regression in float64, whose Hessian is known in closed form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lightning_unlearn.functional.unlearning_error import unlearning_error_from_distance
from lightning_unlearn.functional.weight_distance import verification_error

__all__ = ["EPOCHS", "LEARNING_RATES", "toy_rows"]

SAMPLES, FEATURES, CLASSES, BATCH = 640, 20, 5, 32
LEARNING_RATES = (0.003, 0.01, 0.03, 0.05, 0.1, 0.2)
EPOCHS = (1, 2, 3, 5, 8)


def _gradient(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Of the mean cross-entropy."""
    residual = (x @ weights).softmax(1) - functional.one_hot(y, CLASSES).double()
    return x.T @ residual / len(x)


def _top_singular_value(weights: Tensor, x: Tensor) -> float:
    """Of the Hessian of the mean cross-entropy, the mean of xx^T (diag p - pp^T): exact, from all eigenvalues."""
    p = (x @ weights).softmax(1)
    of_logits = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    hessian = torch.einsum("ni,nj,nab->iajb", x, x, of_logits) / len(x)
    return float(torch.linalg.eigvalsh(hessian.reshape(FEATURES * CLASSES, -1)).abs().max())


def toy_rows(seed: int) -> list[dict[str, float]]:
    """Every learning rate and number of epochs of one seed; one training of each rate serves all numbers of epochs.

    Inputs are standard normal, labels are drawn from the softmax of a random linear model, weights start at 0.3 times
    standard normal. The first batch of 32 is forgotten. The curvature is taken at every step, on
    the batch of that step as in the official code; on all 640 samples it is two and a half times smaller.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, teacher = normal(SAMPLES, FEATURES), normal(FEATURES, CLASSES)
    y = torch.multinomial((x @ teacher).softmax(1), 1, generator=generator).flatten()
    start = 0.3 * normal(FEATURES, CLASSES)
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    first = _gradient(start, *batches[0])
    rows = []
    for lr in LEARNING_RATES:
        original, retrained, singular_values = start.clone(), start.clone(), list[float]()
        for epoch in range(1, max(EPOCHS) + 1):
            for number, batch in enumerate(batches):
                singular_values.append(_top_singular_value(original, batch[0]))
                original = original - lr * _gradient(original, *batch)
                if number:
                    retrained = retrained - lr * _gradient(retrained, *batch)
            if epoch not in EPOCHS:
                continue
            steps, mean = len(singular_values), sum(singular_values) / len(singular_values)
            distance = float((original - start).norm())
            error = unlearning_error_from_distance(distance, lr=lr, steps=steps, singular_value=mean)
            twin = {"w": retrained}
            rows.append(
                {
                    "seed": seed, "lr": lr, "epochs": epoch, "steps": steps, "distance": distance,
                    "singular_value": mean, "error": float(error),
                    "v_original": float(verification_error({"w": original}, twin)),
                    "v_single": float(verification_error({"w": original + lr * epoch * first}, twin)),
                }
            )  # fmt: skip
    return rows
