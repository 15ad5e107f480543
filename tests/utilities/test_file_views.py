import errno
import gc
import mmap
import os

import pytest

from lightning_unlearn.utilities.file_views import MappedFile, RangedFile
from lightning_unlearn.utilities.files import Files


@pytest.fixture(params=["mapped", "ranged"])
def view_of(request, tmp_path):
    def view(content):
        path = tmp_path / "f"
        path.write_bytes(content)
        if request.param == "mapped":
            return MappedFile(str(path)), path
        return RangedFile("f", lambda start, stop: path.read_bytes()[start:stop], lambda: path.stat().st_size), path

    return view


def test_parts(view_of):
    view, _ = view_of(b"0123456789")
    assert bytes(view.read(0, 10)) == b"0123456789"
    assert bytes(view.read(3, 5)) == b"34"
    assert bytes(view.read(10, 10)) == b""


@pytest.mark.parametrize(("start", "stop"), [(0, 11), (10, 11), (-1, 3), (5, 4)])
def test_what_is_not_there_is_an_error(view_of, start, stop):
    view, _ = view_of(b"0123456789")
    with pytest.raises(EOFError, match=f"bytes {start} to {stop}"):
        view.read(start, stop)


def test_an_empty_file(view_of):
    view, _ = view_of(b"")
    assert bytes(view.read(0, 0)) == b""
    with pytest.raises(EOFError, match="bytes 0 to 1"):
        view.read(0, 1)


def test_a_file_that_is_cut_after_it_was_opened_is_an_error_and_no_crash(view_of):
    view, path = view_of(bytes(3 * 4096))
    os.truncate(path, 4096)
    assert len(view.read(0, 4096)) == 4096
    with pytest.raises(EOFError, match="which has 4096"):
        view.read(0, 3 * 4096)
    with pytest.raises(EOFError, match="bytes 8192 to 8200"):
        view.read(8192, 8200)


def test_what_was_read_outlives_the_view_and_the_file(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"0123456789")
    part = MappedFile(str(path)).read(2, 5)
    path.unlink()
    gc.collect()
    assert bytes(part) == b"234"
    assert part.readonly


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Files(tmp_path).view("nothing")
    with pytest.raises(FileNotFoundError):
        Files("memory://nowhere").view("nothing").read(0, 1)


def test_a_server_that_refuses_a_range_beyond_the_end_says_the_same():
    def refuse(start, stop):
        raise OSError("range not satisfiable")

    with pytest.raises(EOFError, match="bytes 5 to 11 of `f`, which has 10"):
        RangedFile("f", refuse, lambda: 10).read(5, 11)
    with pytest.raises(OSError, match="range not satisfiable"):
        RangedFile("f", refuse, lambda: 11).read(5, 11)


def test_which_file_could_not_be_opened_is_said(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    (tmp_path / "f").write_bytes(b"0")
    monkeypatch.setattr(mmap, "mmap", full)
    with pytest.raises(OSError, match=r"Too many open files: .*/f'"):
        MappedFile(str(tmp_path / "f"))
