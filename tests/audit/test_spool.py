"""The spool: whole or not at all, and never believed when damaged."""

import pytest

from audit import spool
from audit.spool import Record

RECORD = Record("cell", "k" * 64, "W int8", metrics={"accuracy": 0.5}, started=1.0)
FILES = {"a/b.txt": b"one", "c.bin": b"\0two"}


def test_what_is_committed_is_read_back(tmp_path):
    written = spool.commit(tmp_path / "cell" / "k", RECORD, FILES)
    assert spool.read(tmp_path / "cell" / "k") == written
    assert (tmp_path / "cell" / "k" / "files" / "a" / "b.txt").read_bytes() == b"one"
    assert list(written.files) == ["a/b.txt", "c.bin"]


def test_the_first_of_two_commits_stays(tmp_path):
    spool.commit(tmp_path / "k", RECORD, FILES)
    spool.commit(tmp_path / "k", RECORD, {"c.bin": b"other"})
    assert (tmp_path / "k" / "files" / "c.bin").read_bytes() == b"\0two"
    assert not list(tmp_path.glob(".unfinished*"))


@pytest.mark.parametrize("name", ["record.json", "files/a/b.txt", "files/c.bin"])
@pytest.mark.parametrize("damage", ["changed", "removed"])
def test_a_damaged_record_is_no_record(tmp_path, name, damage):
    spool.commit(tmp_path / "k", RECORD, FILES)
    path = tmp_path / "k" / name
    path.unlink() if damage == "removed" else path.write_bytes(b"{}")
    assert spool.read(tmp_path / "k") is None
    spool.discard_damaged(tmp_path / "k")
    assert not (tmp_path / "k").exists()
    assert list(tmp_path.glob("k.damaged-*"))


def test_what_a_killed_process_left_is_removed(tmp_path):
    leftover = tmp_path / "cell" / ".unfinished-123-k"
    (leftover / "files").mkdir(parents=True)
    spool.sweep_unfinished(tmp_path)
    assert not leftover.exists()


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool, "_write", full)
    with pytest.raises(OSError, match="No space"):
        spool.commit(tmp_path / "k", RECORD, FILES)
    assert list(tmp_path.iterdir()) == []
