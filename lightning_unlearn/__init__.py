"""Machine unlearning for PyTorch Lightning."""
