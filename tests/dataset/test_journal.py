"""Captions are written so that every write can be taken back, also one that was cut off."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from emotrain.dataset.journal import JOURNALS, Change, undo, why_not, write
from emotrain.errors import CheckpointError, DatasetError


class Crash(Exception):
    """The process ends here."""


def folder(tmp_path: Path) -> list[Change]:
    """Three captions, one of them in a subfolder and one not there yet."""
    (tmp_path / "sub").mkdir()
    changes = [
        Change(tmp_path / "a.txt", b"old a\r\n", b"new a\r\n"),
        Change(tmp_path / "sub" / "b é.txt", b"\xff not text", b"new b"),
        Change(tmp_path / "c.txt", None, b"new c"),
    ]
    for change in changes:
        if change.before is not None:
            change.path.write_bytes(change.before)
    return changes


def contents(changes: list[Change]) -> list[bytes | None]:
    return [change.path.read_bytes() if change.path.exists() else None for change in changes]


def test_undo_brings_the_bytes_back(tmp_path: Path) -> None:
    changes = folder(tmp_path)
    (tmp_path / "a.txt").chmod(0o640)
    write(changes, tmp_path)
    assert contents(changes) == [change.after for change in changes]
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640
    assert undo(tmp_path).num_restored == 3
    assert contents(changes) == [change.before for change in changes]
    assert not (tmp_path / JOURNALS).exists()
    with pytest.raises(CheckpointError, match="no changes"):
        undo(tmp_path)


def test_undo_goes_back_write_by_write(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"0")
    for step in range(12):
        write([Change(path, str(step).encode(), str(step + 1).encode())], tmp_path)
    for step in reversed(range(12)):
        undo(tmp_path)
        assert path.read_bytes() == str(step).encode()


@pytest.mark.parametrize("at", range(6))
def test_a_crash_anywhere_leaves_old_or_new_files_and_a_way_back(tmp_path: Path, at: int) -> None:
    changes = folder(tmp_path)
    stages: list[str] = []

    def stage(name: str) -> None:
        stages.append(name)
        if len(stages) == at + 1:
            raise Crash

    with pytest.raises(Crash):
        write(changes, tmp_path, stage)
    changed = [now == change.after for now, change in zip(contents(changes), changes, strict=True)]
    assert all(now in (change.before, change.after) for now, change in zip(contents(changes), changes, strict=True))
    assert sum(changed) == max(at - 3, 0)  # the journal's three stages come first
    if at >= 2:
        undo(tmp_path)
    assert contents(changes) == [change.before for change in changes]


def test_a_journal_that_was_cut_off_is_refused_and_stays(tmp_path: Path) -> None:
    changes = folder(tmp_path)
    journal = write(changes, tmp_path)
    journal.write_bytes(journal.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="cannot be used"):
        undo(tmp_path)
    assert contents(changes) == [change.after for change in changes]


def test_what_was_changed_since_is_left_alone_and_its_original_kept(tmp_path: Path) -> None:
    changes = folder(tmp_path)
    write(changes, tmp_path)
    (tmp_path / "a.txt").write_bytes(b"mine")
    done = undo(tmp_path)
    assert done.left_alone == (tmp_path / "a.txt",)
    assert contents(changes) == [b"mine", changes[1].before, None]
    (tmp_path / "a.txt").write_bytes(changes[0].after)
    assert undo(tmp_path).left_alone == ()
    assert (tmp_path / "a.txt").read_bytes() == changes[0].before


def test_nothing_is_written_where_one_file_cannot_be(tmp_path: Path) -> None:
    changes = folder(tmp_path)
    changes[1].path.chmod(0o444)
    with pytest.raises(DatasetError, match="is read-only"):
        write(changes, tmp_path)
    assert contents(changes) == [change.before for change in changes]
    assert not (tmp_path / JOURNALS).exists()


def test_a_file_that_changed_since_it_was_read_stops_the_write(tmp_path: Path) -> None:
    changes = folder(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"other")
    with pytest.raises(DatasetError, match="in the meantime"):
        write(changes, tmp_path)
    assert (tmp_path / "c.txt").exists() is False


def test_links_pipes_and_files_elsewhere_are_not_written_to(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (tmp_path / "outside.txt").write_text("a")
    (root / "link.txt").symlink_to(tmp_path / "outside.txt")
    os.mkfifo(root / "pipe.txt")
    assert "is a link" in str(why_not(root / "link.txt", root))
    assert "not a regular file" in str(why_not(root / "pipe.txt", root))
    assert "outside" in str(why_not(tmp_path / "outside.txt", root))


@pytest.mark.parametrize(
    "entry",
    [
        {"path": "../outside.txt", "before": "YQ==", "after": "x"},
        {"path": "/etc/passwd", "before": "YQ==", "after": "x"},
        {"path": "linked/a.txt", "before": "YQ==", "after": "x"},
        {"path": "a.txt", "before": "no base64!", "after": "x"},
        {"path": "a.txt", "before": 3, "after": "x"},
        {"path": "a.txt", "before": "YQ=="},
        "a.txt",
    ],
)
def test_a_strangers_journal_writes_nowhere_else(tmp_path: Path, entry: object) -> None:
    root, outside = tmp_path / "data", tmp_path / "outside"
    (root / JOURNALS).mkdir(parents=True)
    outside.mkdir()
    (root / "linked").symlink_to(outside)
    (root / JOURNALS / "000001.json").write_text(json.dumps({"version": 1, "files": [entry]}))
    with pytest.raises(CheckpointError, match="cannot be used"):
        undo(root)
    assert list(outside.iterdir()) == []
