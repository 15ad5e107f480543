import os
import stat
import uuid

import pytest
from fsspec.registry import known_implementations

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.utilities.files import TEMPORARY_PREFIX, Files
from tests.helpers.stores import Killed, Killer


@pytest.fixture(params=["local", "memory"])
def files(request, tmp_path):
    return Files(tmp_path / "store" if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def test_publish_read_list_delete(files):
    assert files.names() == []
    assert not files.exists("a/x")
    files.publish("a/x", b"0123456789")
    files.publish("a/y", [b"ab", b"", b"cd"])
    files.publish("a/x", b"new content")
    assert files.read("a/x") == b"new content"
    assert files.read("a/y", 1, 3) == b"bc"
    assert files.read("a/y", 2) == b"cd"
    assert files.read("a/y", 0, 99) == b"abcd"
    assert files.size("a/y") == 4
    assert files.names("a") == ["x", "y"]
    assert files.names() == ["a"]
    files.delete("a/x")
    files.delete("a/x")
    assert files.names("a") == ["y"]
    with pytest.raises(FileNotFoundError):
        files.read("a/x")
    with pytest.raises(FileNotFoundError):
        files.size("a/x")


def test_exclusive_publication_has_one_winner(files):
    files.publish("x", b"first", exclusive=True)
    with pytest.raises(FileExistsError):
        files.publish("x", b"second", exclusive=True)
    assert files.read("x") == b"first"
    assert files.names() == ["x"]


def test_the_url_finds_the_same_directory_again(files):
    files.publish("x", b"1")
    assert Files(files.url).read("x") == b"1"


def test_sibling(files):
    parent, name = files.sibling(".key")
    parent.publish(name, b"secret", exclusive=True, mode=0o600)
    assert Files(files.url + ".key").exists("")
    assert files.names() == []
    if files.is_local:
        assert stat.S_IMODE(os.stat(files.url + ".key").st_mode) == 0o600


@pytest.mark.parametrize("exclusive", [False, True])
def test_killed_anywhere_the_old_or_the_new_content_is_there(tmp_path, monkeypatch, exclusive):
    outcomes = []
    for survive in range(10):
        files = Files(tmp_path / str(survive))
        if not exclusive:
            files.publish("x", b"old")
        killer = Killer(survive, torn=True)
        with monkeypatch.context() as patch:
            killer.install(patch)
            try:
                files.publish("x", b"new", exclusive=exclusive)
            except Killed:
                assert killer.struck
            else:
                break
        outcomes.append(files.read("x") if files.exists("x") else None)
        assert all(name == "x" or name.startswith(TEMPORARY_PREFIX) for name in files.names())
    old = None if exclusive else b"old"
    assert set(outcomes) == {old, b"new"}
    assert outcomes == sorted(outcomes, key=lambda content: content == b"new")


def test_urls_that_nothing_installed_can_reach_are_named(monkeypatch):
    with pytest.raises(MissingRequirementError, match=r"'nosuch://bucket' \(Protocol not known: nosuch\)"):
        Files("nosuch://bucket")
    # as with s3 without its package
    monkeypatch.setitem(known_implementations, "nothere", {"class": "no_such_package.System", "err": "Install nothere"})
    with pytest.raises(MissingRequirementError, match=r"'nothere://bucket' \(Install nothere\).*Install the package"):
        Files("nothere://bucket")
