"""A pass of a method that trains, on several processes, in which one of them may die: `FOLDER SETTINGS`."""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightning_unlearn.api import unlearn
from lightning_unlearn.methods.fine_tune import FineTune
from tests.helpers.recorded import BATCH, datasets
from tests.helpers.signalled import Events, Module


def main(folder, settings):
    module = Module.load_from_checkpoint(folder / "trained.ckpt")
    devices = settings["devices"]
    result = unlearn(
        module,
        list(range(4)),
        method=FineTune(max_steps=6),
        data=DataLoader(datasets()[0], BATCH // devices, shuffle=True),
        store=folder / "store",
        trainer={
            "accelerator": "cpu",
            "devices": devices,
            "strategy": DDPStrategy(timeout=timedelta(seconds=30)),
            "callbacks": [Events(settings.get("events", []))],
            "logger": False,
            "enable_progress_bar": False,
            "enable_checkpointing": False,
        },
        seed=0,
    )
    print(f"steps of the pass: {result.stages[0].steps}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
