"""Fits under strategies that shard the model: what can run so, and the whole model that comes back."""

from __future__ import annotations

from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn

from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.utilities.checks import expected
from lightning_unlearn.utilities.whole_modules import filled, skeleton_of
from lightning_unlearn.utilities.whole_weights import is_sharded, share_buffers, whole_tensors

__all__ = ["WholeAgain", "check_unsharded_training", "check_whole"]


def check_whole(model: nn.Module) -> None:
    """Refuse a model that is in pieces on several processes before a pass has begun.

    Raises:
        UnsupportedStrategyError: it is.
    """
    if is_sharded(model):
        rule, got = "whole: a pass shards a copy of it itself, as its Trainer says", "one that is sharded already"
        remedy = "Load it from its checkpoint into a new module (`load_weights`), outside the Trainer that sharded it."
        raise UnsupportedStrategyError(expected("model", rule, got, remedy))


def check_unsharded_training(strategy: Strategy, name: str) -> None:
    """Refuse a strategy that shards the model for a method that needs whole weights after its fits.

    Args:
        strategy: Of a Trainer that has not run.
        name: The method.

    Raises:
        UnsupportedStrategyError: it shards.
    """
    if _shards(strategy):
        rule, got = f"one that keeps the model whole for {name}, such as DDP", type(strategy).__name__
        remedy = "Methods with a loss of their own run under FSDP, such as FineTune and NegGradPlus."
        raise UnsupportedStrategyError(expected("strategy", rule, got, remedy))


def _shards(strategy: Strategy) -> bool:
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


class WholeAgain:
    """Brings the whole model out of a fit that may shard it.

    Make it before the fit, and call `model_of` after it, on every process.

    Args:
        trainer: The Trainer of the fit.
        module: The module, whole; the fit trains (and may shard) this object.

    Raises:
        UnsupportedStrategyError: DeepSpeed with sharded parameters (stage 3).
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
            rule, remedy = "FSDP, or DeepSpeed below stage 3", "Its parameters cannot be gathered by this package."
            raise UnsupportedStrategyError(expected("strategy", rule, "DeepSpeed stage 3", remedy))
        # A sharded module cannot be copied any more; nor is it one that the user could save or run alone.
        self._skeleton = skeleton_of(module) if _shards(strategy) else None
        self._module = module
        self._together = int(getattr(strategy, "world_size", 1)) > 1

    def model_of(self, trained: LightningModule) -> LightningModule:
        """The module of the fit, or where that was sharded a new one of its class with the trained weights, on the CPU.

        Parameters and buffers are the trained ones, on every process; modes, hyper-parameters and other attributes are
        those from before the fit. Buffers are the first process', as in a checkpoint: running statistics differ from
        process to process, and so would what a probe says.

        Args:
            trained: The module, or the wrapper around it, as the Trainer has left it.

        Raises:
            UnsupportedStrategyError: something else than the Trainer's strategy has sharded it.
            ValueError: the fit (as by `configure_model`) has given the module other parameters than it had.
        """
        if not is_sharded(trained):
            if self._together:
                share_buffers(self._module)
            return self._module
        if self._skeleton is None:
            rule, remedy = "FSDPStrategy or ModelParallelStrategy for a sharded model", "Shard in `configure_model`."
            got = "a module that was sharded under another one"
            raise UnsupportedStrategyError(expected("strategy", rule, got, remedy))
        return filled(self._skeleton, whole_tensors(trained))
