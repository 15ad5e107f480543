import uuid

import pytest

from lightning_unlearn.exceptions import StoreCorruptedError, StoreMismatchError
from lightning_unlearn.store.commits import Commit, CommitLog, commit_numbers, read_commit
from lightning_unlearn.store.documents import to_document
from lightning_unlearn.store.segment import SegmentRef
from lightning_unlearn.utilities.files import Files

REFS = (SegmentRef("segment-a", 0, 3, 10, 5, "d"), SegmentRef("segment-b", 3, 4, 10, 5, "e"))


@pytest.fixture(params=["local", "memory"])
def files(request, tmp_path):
    return Files(tmp_path / "s" if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def test_the_newest_commit_counts(files):
    assert read_commit(files, "id", 0) == Commit(0, ())
    log = CommitLog(files, "id", 0)
    assert read_commit(files, "id", 0) == Commit(1, ())  # beginning is a commit
    log.commit(REFS[:1])
    log.commit(REFS)
    assert read_commit(files, "id", 0) == log.head == Commit(3, REFS)
    assert log.head.n_steps == 4
    assert commit_numbers(files.names("rank-00000")) == [3]
    log.release()


def test_numbers_are_compared_as_numbers():
    names = ["commit-99999999.json", "commit-100000000.json", "commit-1.json", "commit-00000002.json.x"]
    assert commit_numbers(names) == [99999999, 100000000]


def test_cleaning_removes_what_is_not_listed(files):
    log = CommitLog(files, "id", 0)
    for name in ("segment-a", "segment-b", "segment-c", ".tmp-x"):
        files.publish(f"rank-00000/{name}", b"")
    log.commit(REFS)
    log.clean()
    assert {"segment-a", "segment-b"} <= set(files.names("rank-00000")) <= {
        "segment-a", "segment-b", "commit-00000002.json", "writer.lock",
    }  # fmt: skip
    log.release()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"store_id": "other"}, StoreMismatchError),
        ({"rank": 1}, StoreMismatchError),
        (
            {"segments": [{"name": "s", "start": 1, "stop": 2, "bytes": 1, "head_bytes": 1, "digest": ""}]},
            StoreCorruptedError,
        ),
    ],
)
def test_a_commit_that_does_not_belong(files, change, error):
    body = {"store_id": "id", "rank": 0, "number": 1, "segments": [], **change}
    files.publish("rank-00000/commit-00000001.json", to_document("commit", body))
    with pytest.raises(error, match=r"commit-00000001\.json"):
        read_commit(files, "id", 0)
    with pytest.raises(error, match=r"commit-00000001\.json"):
        CommitLog(files, "id", 0)
    assert len(commit_numbers(files.names("rank-00000"))) == 1


def test_a_reader_survives_that_a_writer_moves_on(files, monkeypatch):
    log = CommitLog(files, "id", 0)
    real, calls = Files.read, []

    def read(self, name, start=0, stop=None):
        calls.append(name)
        if len(calls) == 1:
            log.commit(REFS)  # between the listing and the reading
        return real(self, name, start, stop)

    monkeypatch.setattr(Files, "read", read)
    assert read_commit(files, "id", 0).segments == REFS
    assert len(calls) == 2
    log.release()
