"""What `lightning-unlearn tune` and `lightning-unlearn unlearn` do: a call of the package each, with its files."""

from lightning_unlearn.commands.tuning import tune_command
from lightning_unlearn.commands.unlearning import unlearn_command

__all__ = ["tune_command", "unlearn_command"]
