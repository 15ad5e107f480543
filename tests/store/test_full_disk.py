"""A disk that is full, at every possible byte: the error has a name, the store is sound, and it can go on."""

import errno
import gc
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from lightning_unlearn.exceptions import UnlearningWarning
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.utilities.files import Files
from lightning_unlearn.utilities.rng import capture_rng
from tests.helpers.stores import Plain, Steps, holds_step, make_store

STEPS = Steps()


class SmallDisk:
    """Lets `room` more bytes be written; a file that does not fit stays there in part, as on a real disk."""

    def __init__(self, monkeypatch, room):
        self.room, self.hit = room, False
        real = Files.perform

        def perform(files, primitive, *args):
            if primitive.__name__ == "_write_synced":
                path, chunks, _ = args
                data = b"".join(map(bytes, chunks))
                if len(data) > self.room:
                    self.hit = True
                    with open(path, "xb") as stream:
                        stream.write(data[: self.room])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
                self.room -= len(data)
            real(files, primitive, *args)

        monkeypatch.setattr(Files, "perform", perform)


def record(writer):
    """Two publications, the second one with an anchor."""
    STEPS.fill(writer, 2)
    writer.flush()
    STEPS.fill(writer, 2)
    writer.anchor({"b": torch.arange(8.0)}, [], None)
    writer.close()


def error_of(function, *arguments):
    try:
        function(*arguments)
    except OSError as error:
        return error
    return None


def sizes(url):
    return sum(path.stat().st_size for path in url.rglob("*") if path.is_file())


@pytest.mark.parametrize("background", [False, "auto", True])
def test_at_every_possible_number_of_bytes(tmp_path, monkeypatch, background):
    whole = make_store(tmp_path / "whole")
    record(whole.writer())
    total = 3 * sizes(tmp_path / "whole")
    outcomes = set()
    for number, room in enumerate(range(0, total, 131)):
        url = tmp_path / str(number)
        store = make_store(url)
        writer = store.writer(background=background)
        with monkeypatch.context() as patch:
            disk = SmallDisk(patch, room)
            error = error_of(record, writer)
            writer.abandon()
        assert (error is not None) == disk.hit
        assert error is None or (error.errno == errno.ENOSPC and "rank-00000" in str(error.filename))
        assert not list(url.rglob(".tmp-*"))  # what cannot be used does not take the last room
        reopened = DeltaStore.open(url)
        assert reopened.verify().ok
        assert (reopened.n_steps, reopened.anchors) in ((0, []), (2, []), (4, [4]))
        assert all(holds_step(reopened, step, STEPS[step]) for step in range(reopened.n_steps))
        outcomes.add(reopened.n_steps)
        with reopened.writer() as again:  # there is room again
            STEPS.fill(again, 1)
        reopened.refresh()
        assert reopened.verify().ok
        assert not reopened.verify().orphans
        if not disk.hit:
            break
    assert not disk.hit
    assert outcomes == {0, 2, 4}


@pytest.mark.parametrize("background", [False, "auto"])
def test_a_checkpoint_of_the_lineage_that_does_not_fit_changes_nothing(tmp_path, monkeypatch, background):
    store = make_store(tmp_path / "s")
    with store.writer(background=background) as writer:
        STEPS.fill(writer, 2)
    store.refresh()
    before = store.lineage
    with monkeypatch.context() as patch:
        SmallDisk(patch, 10)
        with pytest.raises(OSError, match="lineage"):
            store.begin_run("fit", [])
    assert DeltaStore.open(store.url).lineage == before
    assert store.verify().ok


LIMITED = """
import resource, sys
from lightning_unlearn.store.delta_store import DeltaStore
from tests.helpers.stores import Steps
store = DeltaStore.open(sys.argv[1])
writer = store.writer(background={background!r}, segment_bytes=40_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # the kernel writes short, and then not at all
try:
    Steps(keep=1.0).fill(writer, 40)
    writer.close()
except OSError as error:
    writer.abandon()
    print(error.errno, error.filename)
"""


@pytest.mark.parametrize("background", [False, "auto", True])
def test_a_real_limit_on_the_size_of_files(tmp_path, background):
    store, steps = make_store(tmp_path / "s"), Steps(keep=1.0)
    with store.writer() as writer:
        steps.fill(writer, 3)
    script = textwrap.dedent(LIMITED).format(background=background)
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", script, store.url], capture_output=True, text=True, check=True, timeout=120
    )
    number, _, path = done.stdout.strip().partition(" ")
    assert int(number) == errno.EFBIG
    assert "rank-00000" in path
    reopened = DeltaStore.open(store.url)
    assert reopened.n_steps == 3
    assert reopened.verify().ok
    with reopened.writer() as again:
        steps.fill(again, 40)
    reopened.refresh()
    assert all(holds_step(reopened, step, steps[step]) for step in range(43))
    assert not reopened.verify().orphans


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)  # noqa: S603
    except OSError as error:
        pytest.skip(f"a small file system cannot be mounted here ({error})")
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here ({done.stderr.strip()})")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=20)  # noqa: S603, S607


@pytest.mark.parametrize("background", [False, "auto"])
def test_a_merge_that_does_not_fit_is_left_out_and_recording_goes_on(tmp_path, monkeypatch, background):
    """Steps fit on the disk one by one, and only the eight of a merge do not."""
    store = make_store(tmp_path / "s")
    writer = store.writer(background=background)
    with monkeypatch.context() as patch:
        disk = SmallDisk(patch, 10**9)

        def fill():
            for _ in range(20):
                disk.room = 8_000
                STEPS.fill(writer, 1)
                writer.flush()

        with pytest.warns(UnlearningWarning, match="Small segments are no longer merged.*No space left") as caught:
            fill()
        assert disk.hit
        assert len(caught) == 1
    writer.close()
    assert not list((tmp_path / "s").rglob(".tmp-*"))
    reopened = DeltaStore.open(store.url)
    assert len(reopened.reader.commits[0].segments) == 20
    assert all(holds_step(reopened, step, STEPS[step]) for step in range(20))
    assert reopened.verify().ok
    assert not reopened.verify().orphans
    with reopened.writer() as again:  # there is room again
        STEPS.fill(again, 1)
    reopened.refresh()
    assert len(reopened.reader.commits[0].segments) < 20
    assert all(holds_step(reopened, step, STEPS[step]) for step in range(21))


@pytest.mark.filterwarnings("ignore:Small segments are no longer merged")
@pytest.mark.parametrize("background", [False, "auto", True])
def test_a_real_full_disk(small_disk, background):
    store, steps = make_store(small_disk / "s"), Steps(keep=1.0)
    writer = store.writer(background=background, segment_bytes=20_000)
    with pytest.raises(OSError, match="No space left") as caught:
        steps.fill(writer, 2000)
    assert "rank-00000" in str(caught.value.filename)
    writer.abandon()
    del caught, writer  # with the error go the mapped files of a merge, which keep their room even when removed
    reopened = DeltaStore.open(store.url)
    assert 0 < reopened.n_steps < 2000
    assert reopened.verify().ok
    assert all(holds_step(reopened, step, steps[step]) for step in range(reopened.n_steps))
    reopened.refresh()
    gc.collect()
    with reopened.writer() as again:  # what was half written is gone, so there is room for dropping steps
        again.truncate(2)
    with reopened.writer() as again:
        steps.fill(again, 10)
    reopened.refresh()
    assert all(holds_step(reopened, step, steps[step]) for step in range(12))
    assert not reopened.verify().orphans


def test_an_anchor_that_does_not_fit_leaves_the_steps_before_it(tmp_path, monkeypatch):
    store = make_store(tmp_path / "s")
    writer = store.writer()
    STEPS.fill(writer, 2)
    writer.flush()
    with monkeypatch.context() as patch:
        SmallDisk(patch, 500)
        writer.anchor(dict(Plain().named_parameters()), [], capture_rng())
        with pytest.raises(OSError, match="anchor"):
            writer.close()
    store.refresh()
    assert (store.n_steps, store.anchors) == (2, [])
    assert store.verify().ok
