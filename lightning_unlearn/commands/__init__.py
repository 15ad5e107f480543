"""What `lightning-unlearn tune`, `unlearn` and `plan-recording` do: a call of the package each, with its files."""

from lightning_unlearn.commands.recording import plan_recording_command
from lightning_unlearn.commands.tuning import tune_command
from lightning_unlearn.commands.unlearning import unlearn_command

__all__ = ["plan_recording_command", "tune_command", "unlearn_command"]
