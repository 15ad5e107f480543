"""`python -m lightning_unlearn` is `lightning-unlearn`."""

from lightning_unlearn.cli import main

if __name__ == "__main__":
    main()
