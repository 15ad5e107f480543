"""A recorded training, run as a script, in which signals arrive (or processes fail) at chosen places.

    python signalled.py FOLDER '{"devices": 2, "events": [{"rank": 1, "batch": 4, "where": "half", "what": "SIGUSR1"}]}'

Events happen in a first run only, not in one that is resumed. Places: `start` of a batch, `before` an optimizer step
(in its pre-hook), `half` way through the update of the weights, `after` it, `end` of a batch, `validation`.
"""

import errno
import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.callbacks.subject_grouping import SubjectGrouping
from tests.helpers.recorded import BATCH, ROWS, XYClassifier, datasets


class HalfwaySGD(torch.optim.SGD):
    """Momentum SGD that calls `halfway` when it has changed some of the weights and not the others."""

    halfway = staticmethod(lambda: None)

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for number, parameter in enumerate(parameters):
            if number == 1:
                self.halfway()
            momentum = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
            parameter.sub_(momentum.mul_(0.9).add_(parameter.grad), alpha=self.param_groups[0]["lr"])
        return loss


class Module(XYClassifier):
    def configure_optimizers(self):
        return HalfwaySGD([p for p in self.parameters() if p.requires_grad], lr=0.05)

    def validation_step(self, batch, batch_idx):
        self(batch[0])


class Events(Callback):
    """Has the events of this process happen, and says on which batches checkpoints were saved."""

    def __init__(self, events):
        self.events = events

    def happen(self, where):
        for event in self.events:
            if (event["rank"], event["batch"], event["where"]) == (self.trainer.global_rank, self.batch, where):
                if event["what"] == "ENOSPC":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if event["what"] == "hang":
                    signal.pause()
                os.kill(os.getpid(), getattr(signal, event["what"]))

    def on_train_start(self, trainer, pl_module):
        self.trainer, self.batch = trainer, trainer.global_step
        optimizer = trainer.optimizers[0]
        optimizer.register_step_pre_hook(lambda *args: self.happen("before"))
        optimizer.register_step_post_hook(lambda *args: self.happen("after"))
        optimizer.halfway = lambda: self.happen("half")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batch += 1
        self.happen("start")

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.happen("end")

    def on_validation_batch_end(self, trainer, pl_module, *args):
        if not trainer.sanity_checking:
            self.happen("validation")


def main(folder, settings):
    checkpoints = [*folder.glob("checkpoints/*.ckpt"), *folder.glob("hpc_ckpt_*.ckpt")]
    newest = max(checkpoints, key=lambda path: path.stat().st_mtime_ns, default=None)
    events = [] if newest or settings.get("resumed") else settings.get("events", [])
    devices = settings.get("devices", 1)
    seed_everything(0, verbose=False)
    train, test = datasets()
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=devices,
        strategy=DDPStrategy(timeout=timedelta(seconds=settings.get("timeout", 60))) if devices > 1 else "auto",
        default_root_dir=folder,
        callbacks=[
            SubjectGrouping([row // 4 for row in range(ROWS)]),
            DeltaRecorder(folder / "store", keep=1.0, value_dtype="float32"),
            Events(events),
            ModelCheckpoint(folder / "checkpoints", filename="epoch", enable_version_counter=False),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    loaders = DataLoader(train, BATCH // devices, shuffle=True), DataLoader(test, 64)
    module = Module()
    trainer.fit(module, *loaders, ckpt_path=newest)
    trainer.save_checkpoint(folder / "trained.ckpt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
