"""What both scripts share: arguments, places of files, and who each training sample belongs to."""

import argparse
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, Strategy

from lightning_unlearn.demo.digits import DigitsData

SEED = 0


def parser(text: str) -> argparse.ArgumentParser:
    """Arguments of every script; they mean what they mean for a `Trainer`."""
    arguments = argparse.ArgumentParser(description=text)
    arguments.add_argument("--folder", type=Path, default=Path("distributed_run"), help="where everything goes")
    arguments.add_argument("--accelerator", default="cpu")
    arguments.add_argument("--devices", type=int, default=1, help="processes on each node")
    arguments.add_argument("--num-nodes", type=int, default=1)
    arguments.add_argument("--strategy", default="auto", help="auto is DDP where there are several processes")
    arguments.add_argument("--timeout", type=float, default=300.0, help="seconds to wait for another process (DDP)")
    return arguments


def trainer_arguments(given: argparse.Namespace) -> dict[str, Any]:
    """What makes a `Trainer` run where it was launched."""
    several = given.devices * given.num_nodes > 1
    strategy: str | Strategy = given.strategy
    if given.strategy in ("auto", "ddp") and several:
        # Half an hour, the default, is long to wait for a process that has died.
        strategy = DDPStrategy(timeout=timedelta(seconds=given.timeout))
    return {
        "accelerator": given.accelerator,
        "devices": given.devices,
        "num_nodes": given.num_nodes,
        "strategy": strategy,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


def keys_of(data: DigitsData) -> list[str]:
    """Stable key of every training image: its contributor, or a name of its own."""
    return [subject or f"image-{row}" for row, subject in enumerate(data.subjects)]


def newest_checkpoint(folder: Path) -> Path | None:
    """Where to go on: the newest of the checkpoints of each epoch and of those that a preemption left."""
    found = [*folder.glob("checkpoints/*.ckpt"), *folder.glob("hpc_ckpt_*.ckpt")]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)
