"""Callbacks of an ordinary Trainer: recording, grouping of batches."""
