"""Train and record on one process or many, and go on from the newest checkpoint when it is called again.

Start it as `python train.py --devices 2`, as `torchrun --standalone --nproc-per-node 2 train.py --devices 2`, or with
`sbatch job.sbatch`.
"""

from common import SEED, keys_of, newest_checkpoint, parser, trainer_arguments
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_unlearn import DeltaRecorder, SubjectGrouping
from lightning_unlearn.demo.digits import DigitsCNN, DigitsData


def main() -> None:
    """Train for `--epochs` in total."""
    arguments = parser("Train and record.")
    arguments.add_argument("--epochs", type=int, default=20)
    arguments.add_argument("--batch-size", type=int, default=32, help="of each process")
    given = arguments.parse_args()

    seed_everything(SEED, workers=True, verbose=False)  # every process starts with the same weights
    data = DigitsData(SEED, batch_size=given.batch_size)
    trainer = Trainer(
        max_epochs=given.epochs,
        # On SLURM, Lightning saves here what a requeued job goes on from.
        default_root_dir=given.folder,
        callbacks=[
            # The order depends on the epoch alone, so a run that was interrupted goes on where it was.
            SubjectGrouping(data.subjects, seed=SEED),
            DeltaRecorder(given.folder / "store", keep=1.0, value_dtype="float32", sample_keys=keys_of(data)),
            ModelCheckpoint(given.folder / "checkpoints", filename="epoch", enable_version_counter=False),
        ],
        **trainer_arguments(given),
    )
    model = DigitsCNN()
    trainer.fit(model, datamodule=data, ckpt_path=newest_checkpoint(given.folder))
    trainer.save_checkpoint(given.folder / "trained.ckpt")
    if trainer.is_global_zero:
        print(f"Trained {trainer.global_step} steps on {trainer.world_size} processes.")


if __name__ == "__main__":
    main()
