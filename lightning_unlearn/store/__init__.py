"""What is on disk: the format of segments, documents and commits, writing, reading and repairing them."""
