"""Pure tensor mathematics: no Trainer, no state."""
