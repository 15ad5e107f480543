"""The largest curvature of the loss that a training has at present, on one batch, by power iteration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_unlearn.callbacks.loss_terms import with_loss_terms
from lightning_unlearn.exceptions import MissingRequirementError, UnsupportedStrategyError
from lightning_unlearn.functional.curvature import flat_gradient, unflatten
from lightning_unlearn.functional.power_iteration import TopCurvature, top_curvature
from lightning_unlearn.methods.loss_method import as_loss
from lightning_unlearn.modules.silent import silent_step
from lightning_unlearn.utilities.batches import leading_size
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.modes import evaluating, isolated_rng, preserved_buffers

__all__ = ["LossCurvature"]


class LossCurvature:
    """Measures the Hessian of a module's training loss by the trainable parameters, during a fit.

    The loss is the user's own step with the terms that callbacks add to it, in eval mode (as in the code of Thudi et
    al.: dropout off, normalisation by running statistics) and without autocast. Modes, buffers, gradients, random state
    and log are as before afterwards. Under data parallelism the loss is the mean over all processes' samples, and every
    process has to measure.

    Args:
        max_iterations: Products with the Hessian at most.
        tolerance: Relative change of the singular value that ends the iteration.
        seed: Seed of the first vector; later measurements begin with the vector found before.
    """

    def __init__(self, *, max_iterations: int, tolerance: float, seed: int) -> None:
        self._max_iterations = max_iterations
        self._tolerance = tolerance
        self._seed = seed
        self._vector: Tensor | None = None

    def measure(self, trainer: Trainer, module: LightningModule, batch: Any) -> TopCurvature:
        """The singular value of largest magnitude at the present weights.

        Args:
            trainer: The Trainer under way.
            module: Its module.
            batch: A batch that has been through the transfer hooks.

        Raises:
            MissingRequirementError: the step gives no loss for this batch, or none that depends on a parameter.
            UnsupportedStrategyError: the loss cannot be differentiated twice.
        """
        parameters = [one for one in module.parameters() if one.requires_grad]
        with ExitStack() as stack:
            for context in (isolated_rng(self._seed), evaluating(module), preserved_buffers(module)):
                stack.enter_context(context)
            stack.enter_context(_differentiable_twice(trainer, module))
            step = stack.enter_context(silent_step(module, gradients=True, transfer=False))
            loss = as_loss(with_loss_terms(module, step)(batch, 0))
            if loss is None or not loss.requires_grad:
                rule = "giving a loss with a gradient for the batch that curvature is measured on"
                raise MissingRequirementError(expected("training_step", rule, loss))
            share = self._share(trainer, leading_size(batch) or 1, loss)
            start = self._start(parameters)
            try:
                slopes = torch.autograd.grad(
                    loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True
                )
                _check_whole(slopes)

                def product(vector: Tensor) -> Tensor:
                    pieces = unflatten(vector, parameters)
                    along = torch.stack([(one * piece).sum() for one, piece in zip(slopes, pieces, strict=True)]).sum()
                    result = flat_gradient(along, parameters, keep_graph=True) * share
                    summed = trainer.strategy.reduce(result, reduce_op="sum")
                    return summed if isinstance(summed, Tensor) else result

                found = top_curvature(product, start, max_iterations=self._max_iterations, tolerance=self._tolerance)
            except RuntimeError as error:
                remedy = "Something in it has no second derivative: leave the monitor out."
                rule = "a loss that can be differentiated twice"
                raise UnsupportedStrategyError(expected("training_step", rule, str(error), remedy)) from error
        self._vector = found.vector.detach()
        return found

    def _start(self, parameters: list[nn.Parameter]) -> Tensor:
        """Random at first; later what was found, with some noise, for another direction may have grown meanwhile."""
        length = sum(one.numel() for one in parameters)
        noise = torch.randn(length, generator=torch.Generator().manual_seed(self._seed))
        start: Tensor = (noise / torch.linalg.vector_norm(noise)).to(parameters[0].device, parameters[0].dtype)
        if self._vector is not None and self._vector.shape == start.shape:
            start = self._vector + 0.1 * start
        return start

    def _share(self, trainer: Trainer, samples: int, like: Tensor) -> float:
        """This process's share of the samples behind the loss."""
        total = trainer.strategy.reduce(torch.tensor(float(samples), device=like.device), reduce_op="sum")
        return samples / float(total)


def _check_whole(slopes: Sequence[Tensor]) -> None:
    """Refuse gradients behind which a part of the graph is missing: autograd would take its second derivative for zero.

    Raises:
        RuntimeError: something in the step says of itself that it can be differentiated once only.
    """
    waiting: list[Any] = [one.grad_fn for one in slopes if one.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.name().endswith(("::Error", "::DelayedError")):
            raise RuntimeError("a function marked with @once_differentiable")
        found = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= found
        waiting.extend(found)


@contextmanager
def _differentiable_twice(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Without what has a first derivative only: compiled code, fused attention, recurrent layers of cuDNN."""
    plugin = trainer.precision_plugin
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(part, nn.RNNBase) for part in module.modules()):  # convolutions are far slower without it
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if isinstance(plugin, HalfPrecision | DoublePrecision):  # whose constants have the weights' precision
            stack.enter_context(plugin.forward_context())
        yield
