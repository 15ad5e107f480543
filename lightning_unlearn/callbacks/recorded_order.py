"""Train on the batches of a recorded run again, some samples left out: its twin, whatever had shuffled the data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from lightning import LightningModule, Trainer

from lightning_unlearn.callbacks.thinned_batches import ThinnedBatches, ThinningCallback
from lightning_unlearn.exceptions import StoreMismatchError, UnsupportedStrategyError
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.rng import RngState

__all__ = ["RecordedOrder"]


class RecordedOrder(ThinningCallback):
    """Give the training loader's batches the content of recorded ones, without some samples; the rest of the run stays.

    What the loader itself would draw is drawn and thrown away, so its draws from the random state are those of the
    recorded run. A batch left empty is skipped (see `ThinnedBatches`).

    Args:
        batches: Positions in the loader's dataset of every batch of the recorded run, in order.
        left_out: Positions to leave out.
        random_states: Number of optimizer steps -> the random state that the recorded run had behind them, or `None`.
            A batch left empty makes no step: it is counted all the same.

    Raises:
        UnsupportedStrategyError: (in `setup`) several processes; or, when data is loaded, a training loader that is no
            map-style `DataLoader` with batches.
        StoreMismatchError: the Trainer's epochs are not as many as the recorded run had: when data is loaded, or at the
            end where loaders change from epoch to epoch.
    """

    def __init__(
        self,
        batches: Sequence[Sequence[int]],
        left_out: Collection[int] = (),
        random_states: Callable[[int], RngState | None] | None = None,
    ) -> None:
        super().__init__()
        self._batches = batches
        self._left_out = frozenset(int(position) for position in left_out)
        self._random_states = random_states
        self._next = self._given = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the step into the Trainer."""
        if stage != "fit":
            return
        self._given = 0
        if self._random_states is not None and trainer.accumulate_grad_batches > 1:
            rule = "1 where random states are put back, which are known between steps"
            raise UnsupportedStrategyError(
                expected("accumulate_grad_batches", rule, trainer.accumulate_grad_batches, "Replay without them.")
            )
        self.install(trainer, "replay recorded batches")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put random states back where a recorder takes them: right behind every step."""
        super().on_train_start(trainer, pl_module)
        if self._random_states is None:
            return
        if len(trainer.optimizers) != 1:
            rule, remedy = "one optimizer where random states are put back", "Replay without them."
            raise UnsupportedStrategyError(expected("configure_optimizers", rule, f"{len(trainer.optimizers)}", remedy))
        self._next = 0
        handle = trainer.optimizers[0].register_step_post_hook(lambda *args: self._behind_step())
        self._release.append(handle.remove)

    def _behind_step(self) -> None:
        # Batches and recorded steps are one to one here, but for batches left empty, which make no step.
        while self._next < len(self._batches) and self._is_empty(self._batches[self._next]):
            self._next += 1
        self._next += 1
        while self._next < len(self._batches) and self._is_empty(self._batches[self._next]):
            self._next += 1
        state = None if self._random_states is None else self._random_states(self._next)
        if state is not None:
            state.restore()

    def _is_empty(self, batch: Sequence[int]) -> bool:
        return self._left_out.issuperset(batch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that all of the recorded run was replayed, where its epochs could not be counted before.

        Raises:
            StoreMismatchError: the Trainer ended before it.
        """
        if self._given < len(self._batches):
            got = f"one that ended after {self._given}"
            rule = f"one that trains on all {len(self._batches)} recorded batches"
            raise StoreMismatchError(expected("trainer", rule, got, "Give it the epochs of the recorded run."))

    def policy(self, trainer: Trainer, loader: Any) -> ThinnedBatches:
        """The recorded batches without the samples, one for each batch that the loader draws."""
        own = loader._index_sampler
        if trainer.max_steps == -1 and not vars(trainer)["reload_dataloaders_every_n_epochs"]:
            epochs = trainer.current_epoch + -(-len(self._batches) // len(own))
            if trainer.max_epochs != epochs:
                rule = f"of {epochs} epochs, as the recorded run ({len(self._batches)} batches, {len(own)} in an epoch)"
                remedy = f"Pass max_epochs={epochs}."
                raise StoreMismatchError(expected("trainer", rule, f"max_epochs={trainer.max_epochs}", remedy))
        return ThinnedBatches(own, trainer, self._left_out, self._arrange)

    def _arrange(self, drawn: list[Any]) -> Sequence[Sequence[int]]:
        start, self._given = self._given, self._given + len(drawn)
        return self._batches[start : start + len(drawn)]
