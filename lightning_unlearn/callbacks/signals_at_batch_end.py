"""What Lightning does on a signal, put off to the end of a batch, and done by all processes at the same one."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from lightning_unlearn.callbacks.batch_agreement import BatchAgreement
from lightning_unlearn.exceptions import LightningUnlearnError
from lightning_unlearn.utilities.checks import expected

__all__ = ["SignalsAtBatchEnd", "nothing_to_take_back", "put_off_signals"]

REQUEUE, TERMINATE = "_slurm_sigusr_handler_fn", "_sigterm_notifier_fn"
"""What `Trainer._signal_connector` registers for the signal before a job is requeued, and for SIGTERM."""

_SAME_NOTICE = 30.0
"""Seconds after acting on a signal during which the same one is the same notice, come later to this process."""


def signals_put_off(trainer: Trainer) -> tuple[str, ...]:
    """Names of the handlers that cannot run at any moment; none where no signal does anything that could do harm.

    A requeue saves a checkpoint. For SIGTERM Lightning only sets a flag where there is one process, but talks to the
    others where there are several.
    """
    environment = trainer._accelerator_connector.cluster_environment
    requeues = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
    return (*((REQUEUE,) if requeues else ()), *((TERMINATE,) if trainer.world_size > 1 else ()))


class SignalsAtBatchEnd(Callback):
    """Puts off what Lightning does on a signal to the end of the batch, on all processes at the same batch.

    On SLURM with automatic requeueing, Lightning saves a checkpoint from within the signal's handler: in the middle of
    an optimizer step, where weights are half updated, and with several processes while others are elsewhere, so that
    they wait for each other in different places. Its handler for SIGTERM also talks to the other processes at once.
    With this callback a signal sets a flag. At the end of every batch, of a validation and of the training the
    processes agree on which signals any of them has received, and then all of them do what Lightning would have done:
    save and requeue, or end cleanly.

    `DeltaRecorder` adds one by itself where it matters, so this is for trainings without a recorder. It belongs at the
    end of the list of callbacks: what stands behind it has not yet seen the batch that a checkpoint is saved after.

    The agreement starts with a batch and is looked at when it ends, on the host, over a group of its own (gloo, also
    where gradients travel otherwise): no accelerator waits for it. A signal that comes during a batch is acted on at
    the end of that batch or of the next one, so the notice that a cluster gives must be longer than two batches, and
    longer than a validation. If a process fails, the others are told in the same way, at the end of their batch.

    Handlers of others are not put off. What was received and not acted on when a fit ends is delivered then.

    Raises:
        LightningUnlearnError: (in `fit`, at the end of a batch) another process has failed; (before training) this
            version of Lightning handles signals in a way that is not known here.
    """

    def __init__(self) -> None:
        super().__init__()
        self._received: dict[str, int] = {}
        self._acted: dict[str, float] = {}
        self._handlers: dict[str, Callable[[int, Any], None]] = {}
        self._connector: Any = None
        self._agreement: BatchAgreement | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stand before Lightning's handlers, which it registers after this."""
        if stage != "fit":
            return
        self._restore()
        self._received, self._acted = {}, {}
        connector = trainer._signal_connector
        for name in signals_put_off(trainer):
            handler = getattr(connector, name, None)
            if not callable(handler):
                rule, remedy = "a version whose signal handlers are known", "Use lightning 2.6."
                raise LightningUnlearnError(expected("lightning", rule, f"one without `{name}`", remedy))
            self._handlers[name] = handler
            vars(connector)[name] = partial(self._note, name)
        self._connector = connector

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Meet the other processes."""
        self._agreement = BatchAgreement.of(trainer, len(self._handlers))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Tell the others what has been received; the answer has the whole batch to arrive."""
        if self._agreement is not None:
            self._agreement.begin(self._flags())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Act on what any process has received."""
        if self._agreement is not None:
            self._act(self._agreement.end(self._flags()))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act on what was received during a validation."""
        if self._agreement is not None and not trainer.sanity_checking:
            self._act(self._agreement.now(self._flags()))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act on what was received since the last batch."""
        if self._agreement is not None:
            self._act(self._agreement.now(self._flags()))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell the others, wait for nobody, and give the handlers back."""
        self._received = {}  # the run is ending as it is
        agreement, self._agreement = self._agreement, None
        if agreement is not None:
            first = agreement.fail(exception)
            if first is not None:
                exception.add_note(first)
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the handlers back, and deliver to them what came too late."""
        if stage != "fit":
            return
        agreement, self._agreement = self._agreement, None
        if agreement is not None:
            agreement.close()
        self._restore()
        received, self._received = self._received, {}
        for signum in received.values():
            signal.raise_signal(signum)

    def _note(self, name: str, signum: int, frame: Any) -> None:
        if time.monotonic() - self._acted.get(name, -_SAME_NOTICE) >= _SAME_NOTICE:
            self._received[name] = int(signum)

    def _flags(self) -> tuple[int, ...]:
        return tuple(self._received.get(name, 0) for name in self._handlers)

    def _act(self, agreed: tuple[int, ...]) -> None:
        for (name, handler), signum in zip(self._handlers.items(), agreed, strict=True):
            if signum:
                handler(signum, None)
                self._acted[name] = time.monotonic()
                self._received.pop(name, None)

    def _restore(self) -> None:
        for name in self._handlers:
            vars(self._connector).pop(name, None)
        self._handlers, self._connector = {}, None


def nothing_to_take_back() -> None:
    """What `put_off_signals` returns where it has added nothing; by name, so that who keeps it can be pickled."""


def put_off_signals(trainer: Trainer) -> Callable[[], None]:
    """Add a `SignalsAtBatchEnd` to the Trainer, last, where it is needed and the user has none; for use in `setup`.

    Returns:
        A function that takes it away again; it may be called several times.
    """
    # The list is a plain attribute that Lightning documents but does not annotate.
    callbacks: list[Callback] = vars(trainer)["callbacks"]
    if not signals_put_off(trainer) or any(isinstance(one, SignalsAtBatchEnd) for one in callbacks):
        return nothing_to_take_back
    added = SignalsAtBatchEnd()
    callbacks.append(added)  # the Trainer is going over this list, so its `setup` is called as well

    def remove() -> None:
        # A list of its own: the Trainer may be going over the old one.
        vars(trainer)["callbacks"] = [one for one in vars(trainer)["callbacks"] if one is not added]

    return remove
