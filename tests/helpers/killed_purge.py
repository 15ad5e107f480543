"""A purge whose process is killed before it touches the disk for the n-th time: `STORE N IDS STEPS`."""

import json
import os
import signal
import sys

from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.utilities.files import Files


def main(store, survive, ids, steps):
    left = [survive]

    def counted(operation):
        def wrapped(*args, **kwargs):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return operation(*args, **kwargs)

        return wrapped

    Files.publish, Files.delete = counted(Files.publish), counted(Files.delete)
    DeltaStore.open(store).purge(ids, steps)


if __name__ == "__main__":
    main(sys.argv[1], *map(json.loads, sys.argv[2:]))
