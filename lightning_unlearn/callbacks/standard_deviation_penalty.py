"""The standard-deviation loss of Thudi et al., added to an existing training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from lightning_unlearn.callbacks.penalty import Penalty, PenaltySchedule
from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.functional.standard_deviation_penalty import PenaltyForm, standard_deviation_penalty
from lightning_unlearn.utilities.batch_adapter import logits_in
from lightning_unlearn.utilities.checks import check_choice, check_positive, expected, shorten
from lightning_unlearn.utilities.loss_tap import LossTap

__all__ = ["StandardDeviationPenalty"]


class StandardDeviationPenalty(Penalty):
    r"""Adds :math:`\gamma` times the standard deviation of the logits to the loss of every training step.

    The training objective of Thudi et al. against large changes of weights: a term that holds logits together keeps the
    gradients of late steps, and with them unlearning error and verification error, small; accuracy is what may be paid.
    How much of either, on one's own model, is to be measured: `UnlearningErrorMonitor`, `train_twins`. Heuristic:
    nothing is guaranteed about a later deletion. Have it on from the start: switched on for a fine-tuning alone it
    raised both errors, and what gamma helps depends on the task (measured, docs/thudi2021.md).

    It works with any strategy, precision, accumulation, clipping and compiled modules, for the penalty is part of the
    loss. Not with manual optimization, where the step has to add
    `lightning_unlearn.functional.standard_deviation_penalty.standard_deviation_penalty` itself.

    Args:
        gamma: Weight of the penalty, at least 0.
        form: Unit of `gamma`: `"paper"`, or `"code"` for that of the authors' code (see `convert_gamma`).
        logits: Where the logits are. `None`: whatever the step gives to PyTorch's cross-entropy, negative
            log-likelihood or binary cross-entropy with logits. Else the name of a submodule that gives them
            (`"net.head"`; `""` is the module itself), as a tensor or under `logits`.
        select: Takes the logits out of that submodule's output, where they are found in another way.
        class_dim: Which dimension of the logits has the classes.
        calls: What several sets of logits in one step (views, heads, several forward calls) mean: `"mean"` over all
            samples of all of them, their `"sum"`, or only the `"last"`. What needs no gradient, such as a teacher's
            answer, never counts.
        schedule: Factor of `gamma`, asked before every step with the Trainer: any function, such as
            `divided_every(10, by=2)`.
        name: Name of the term in the log, `None` for no log. With a schedule the weight is logged as well.

    Raises:
        ValueError: an argument is out of range.
        UnsupportedStrategyError: in `fit`, before training: manual optimization.
        MissingRequirementError: in `fit`, before training, there is no submodule of that name; in the first step, no
            logits were found.

    Source: Thudi, Deza, Chandrasekaran, Papernot 2022, arXiv 2109.13398.

    >>> from lightning import Trainer
    >>> trainer = Trainer(callbacks=[StandardDeviationPenalty(gamma=0.5)], max_epochs=1, logger=False)
    """

    functional_form = "lightning_unlearn.functional.standard_deviation_penalty.standard_deviation_penalty"

    def __init__(
        self,
        gamma: float,
        *,
        form: PenaltyForm = "paper",
        logits: str | None = None,
        select: Callable[[Any], Tensor] | None = None,
        class_dim: int = 1,
        calls: Literal["mean", "sum", "last"] = "mean",
        schedule: PenaltySchedule | None = None,
        name: str | None = "standard_deviation_penalty",
    ) -> None:
        super().__init__(check_positive("gamma", gamma, zero=True), schedule=schedule, name=name)
        self._form: PenaltyForm = check_choice("form", form, ("paper", "code"))
        if select is not None and logits is None:
            rule, remedy = "given with the name of a submodule in `logits`", "Name the one whose output it takes."
            raise ValueError(expected("select", rule, select, remedy))
        self._where, self._select = logits, select or logits_in
        self._class_dim = class_dim
        self._calls = check_choice("calls", calls, ("mean", "sum", "last"))
        self._found: list[Tensor] = []
        self._listening = False
        self._unhook: Callable[[], None] | None = None

    @property
    def state_key(self) -> str:
        """Tells several of them in one Trainer apart."""
        return self._generate_state_key(name=self.name, logits=self._where)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the submodule; not earlier, for it may be built in `configure_model`."""
        if self._where is not None:
            self._unhook = self._listen(pl_module, self._where)
        super().on_train_start(trainer, pl_module)

    def watching(self) -> AbstractContextManager[Any]:
        """Around the user's step: note the logits."""
        self._found.clear()
        return self._noting() if self._where is not None else LossTap(self._found.append)

    def penalty(self, weight: float) -> Tensor:
        """The penalty over the logits that were found.

        Raises:
            MissingRequirementError: there were none.
        """
        found = list(self._found)
        self._found.clear()  # they hold the graph of the step
        if not found:
            raise MissingRequirementError(self._nothing_found())
        if self._calls == "last":
            found = found[-1:]
        values = [standard_deviation_penalty(one, weight, form=self._form, class_dim=self._class_dim) for one in found]
        if self._calls == "sum" or len(values) == 1:
            return torch.stack(values).sum()
        samples = [one.numel() / one.shape[self._class_dim] for one in found]
        shares = [value * (count / sum(samples)) for value, count in zip(values, samples, strict=True)]
        return torch.stack(shares).sum()

    def _listen(self, module: LightningModule, name: str) -> Callable[[], None]:
        try:
            submodule = module.get_submodule(name)
        except AttributeError as error:
            known = shorten(key for key, _ in module.named_modules() if key)
            remedy = f"There are {known}."
            raise MissingRequirementError(expected("logits", "the name of a submodule", name, remedy)) from error
        handle = submodule.register_forward_hook(self._hear)
        compiled = _is_compiled(module)

        def unhook() -> None:
            handle.remove()
            if compiled:
                torch.compiler.reset()

        if compiled:  # code that was compiled before does not look whether there are hooks now
            torch.compiler.reset()
        return unhook

    @contextmanager
    def _noting(self) -> Iterator[None]:
        self._listening = True
        try:
            yield
        finally:
            self._listening = False

    def _hear(self, submodule: nn.Module, args: Any, output: Any) -> None:
        # Outside a step others call the module: validation, and data parallelism, which runs the step through it.
        if self._listening:
            logits = self._select(output)
            if isinstance(logits, Tensor) and logits.requires_grad:
                self._found.append(logits)

    def _nothing_found(self) -> str:
        if self._where is None:
            rule = "given to a loss function of PyTorch in `training_step`, where they are found"
            remedy = f"Name a submodule: `logits='head'`; or add `{self.functional_form}` to your loss."
            return expected("logits", rule, "none", remedy)
        rule = f"what `{self._where}` gives in `training_step`, of shape (N, C, ...) and with a gradient"
        remedy = "Name another submodule, or pass `select` to take them out of its output."
        return expected("logits", rule, "none", remedy)

    def _uninstall(self) -> None:
        super()._uninstall()
        if self._unhook is not None:
            self._unhook()
        self._unhook = None
        self._found.clear()


def _is_compiled(module: LightningModule) -> bool:
    """Whether calls of the module, its step or a part of it may run code that was compiled earlier."""
    if "training_step" in module.__dict__:
        return True
    parts = module.modules()
    return any(part._compiled_call_impl is not None or hasattr(part, "_orig_mod") for part in parts)
