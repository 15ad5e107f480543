"""Training in shards and slices: who is where, what is on disk, and each stage of it as an ordinary fit."""
