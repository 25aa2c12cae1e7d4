"""Run folders: made once, inside their place, one trainer at a time."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from emotrain.config.source import parse
from emotrain.errors import CheckpointError, ConfigError, ExitCode, ResourceError
from emotrain.files import encode_json
from emotrain.runs import folder, lock
from emotrain.runs.folder import RunFolder, create_run, list_runs, open_run, refuse_foreign_parts, safe_name

PRESET = {"name": "mika", "model": {"base": "builtin:tiny-sd"}, "note": "caf\u00e9: yes"}

BAD_NAMES = (
    "", " ", ".", "..", "../x", "a/b", "a\\b", "/etc/x", "C:\\x", "C:x", "nul", "CON", "com1.txt",
    "LPT\u00b9", "a\0b", "a\nb", "\x1b[31m", "a.", "a ", " a", ".hidden", "-rf", "a*", "a?",
    "x" * 201, "\u00e9" * 101, "a\u202eb", "a\u200bb", "\ud800",
)  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_could_leave_its_folder_or_break_a_screen_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        create_run(tmp_path / "runs", name, PRESET)
    assert caught.value.exit_code == ExitCode.USAGE
    assert caught.value.message.isascii()
    assert caught.value.message.isprintable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["mika_v1", "a.b-c 2", "\u30df\u30ab", "console", "x" * 200])
def test_a_harmless_name_is_taken_as_it_is(name: str) -> None:
    assert safe_name(name) == name


def test_a_new_run_has_its_preset_and_its_description(tmp_path: Path) -> None:
    parent = {"kind": "continue", "run": "old", "path": "old/lora.safetensors", "sha256": "ab"}
    run = create_run(tmp_path / "runs", "mika", PRESET, seed=42, device="cpu", parents=(parent,), extra=[1])
    assert sorted(path.name for path in run.path.iterdir()) == ["preset.yaml", "run.json"]
    assert "caf\u00e9" in run.preset_path.read_text(encoding="utf-8")
    info = run.info()
    assert (info["name"], info["seed"], info["device"], info["extra"]) == ("mika", 42, "cpu", [1])
    assert info["parents"] == [parent]
    assert info["finished"] is None
    assert info["started"].endswith("+00:00")
    assert {"torch", "safetensors"} <= info["libraries"].keys()
    assert str(tmp_path) not in run.info_path.read_text()


def test_texts_that_look_like_numbers_come_back_as_texts(tmp_path: Path) -> None:
    texts = ["1e4", "1e-4", "1.e5", "12:30", "no", "null", "", "007", "a\x85b", "a\u2028b", " a\n\nb\r "]
    run = create_run(tmp_path, "mika", {"texts": texts, "numbers": [1e-8, 1e16, 3]})
    node, _ = parse(run.preset_path.read_text(encoding="utf-8"), "preset.yaml")
    assert node.plain() == {"texts": texts, "numbers": [1e-8, 1e16, 3]}


@pytest.mark.parametrize("kind", ["saved run", "run", "empty folder", "file", "dangling link"])
def test_nothing_that_exists_is_written_over(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "mika"
    if kind.endswith("run"):
        (run := create_run(tmp_path, "mika", PRESET)).checkpoints_dir.mkdir()
        if kind == "saved run":
            (run.checkpoints_dir / "step-00000004").mkdir()
    elif kind == "empty folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    before = os.lstat(target)
    with pytest.raises(CheckpointError, match="exists already") as caught:
        create_run(tmp_path, "mika", {})
    assert caught.value.exit_code == ExitCode.CHECKPOINT
    more = {
        "saved run": "; `emotrain resume mika` resumes that run",
        "run": "; that run was not saved yet, and cannot be resumed",
    }
    assert caught.value.hint == "`--name mika-2` is free" + more.get(kind, "")
    assert os.lstat(target).st_mtime_ns == before.st_mtime_ns
    assert [path.name for path in tmp_path.iterdir()] == ["mika"]


def test_a_folder_that_cannot_be_made_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ResourceError, match="cannot be made"):
        create_run(tmp_path / "runs", "mika", PRESET)


def test_a_run_that_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "fsync_folder", refuse)
    with pytest.raises(ResourceError, match="No space left"):
        create_run(tmp_path, "mika", PRESET)
    assert list(tmp_path.iterdir()) == []


def test_its_description_changes_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create_run(tmp_path, "mika", PRESET, seed=1)
    run.update_info(steps=250, best_loss=0.1 + 0.2)
    assert (run.info()["steps"], run.info()["best_loss"], run.info()["seed"]) == (250, 0.1 + 0.2, 1)

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(ResourceError, match="No space left"):
        run.update_info(steps=500)
    assert run.info()["steps"] == 250
    assert sorted(path.name for path in run.path.iterdir()) == ["preset.yaml", "run.json"]


def test_a_changed_preset_takes_the_place_of_the_old_one_and_an_equal_one_is_not_written(
    tmp_path: Path,
) -> None:
    run = create_run(tmp_path, "mika", PRESET)
    before = run.preset_path.stat()
    run.write_preset(PRESET)
    assert run.preset_path.stat().st_ino == before.st_ino
    run.write_preset(PRESET | {"train": {"max_steps": 4000}})
    assert "max_steps: 4000" in run.preset_path.read_text(encoding="utf-8")


def test_a_run_is_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create_run(tmp_path / "runs", "mika", PRESET)
    assert open_run("mika", tmp_path / "runs").path == run.path
    assert open_run(run.path, tmp_path / "other").path == run.path
    monkeypatch.chdir(run.path)
    assert open_run(".", tmp_path / "other").name == "mika"
    monkeypatch.chdir(tmp_path)
    assert open_run("mika").path == Path("runs/mika")


def test_a_run_that_is_not_there_is_named_with_the_likely_one(tmp_path: Path) -> None:
    create_run(tmp_path, "mika_v1", PRESET)
    with pytest.raises(CheckpointError, match="no run `mika_v2`") as caught:
        open_run("mika_v2", tmp_path)
    assert caught.value.hint == "did you mean `mika_v1`?"


def test_runs_are_listed_in_the_order_they_started_and_other_things_are_not(tmp_path: Path) -> None:
    for name, started in (("b", "2026-01-02"), ("a", "2026-01-03"), ("c", "2026-01-01")):
        create_run(tmp_path, name, PRESET).update_info(started=started)
    create_run(tmp_path, "broken", PRESET).info_path.write_text("{")
    (tmp_path / "not-a-run").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / ".new-x-1").mkdir()
    (tmp_path / ".new-x-1" / "run.json").write_text("{}")
    assert [run.name for run in list_runs(tmp_path)] == ["c", "b", "a", "broken"]
    assert list_runs(tmp_path / "nowhere") == []
    with pytest.raises(CheckpointError, match=r"run\.json cannot be read"):
        open_run("broken", tmp_path).info()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return create_run(tmp_path, "mika", PRESET)


def child(work: Callable[[], object]) -> int:
    """Fork; the child works and then waits to be killed. Returns its pid once it has worked."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os.write(writing, b"x")
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    return pid


def test_a_live_process_keeps_its_run_and_a_killed_one_gives_it_back(run: RunFolder) -> None:
    held = run.lock()
    pid = child(held.__enter__)
    try:
        with pytest.raises(ResourceError, match=f"`mika` is in use by process {pid}") as caught:
            run.lock().__enter__()
        assert caught.value.exit_code == ExitCode.RESOURCES
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with run.lock():
        assert lock.is_held(run.path / ".lock")
    assert not lock.is_held(run.path / ".lock")


def test_one_process_cannot_take_a_run_twice(run: RunFolder) -> None:
    with run.lock(), pytest.raises(ResourceError, match="in use"):
        run.lock().__enter__()
    with run.lock():
        pass


@pytest.mark.parametrize(
    "content", [b"", b'{"pi', b'{"pid": 1, "host": "elsewhere", "birth": "x/1"}', b"[1]", b"\0\xff"]
)
def test_a_lock_file_that_nobody_holds_is_free_whatever_it_says(run: RunFolder, content: bytes) -> None:
    path = run.path / ".lock"
    path.write_bytes(content)
    assert not lock.is_held(path)
    with run.lock():
        assert lock.is_held(path)
    assert not lock.is_held(path)


@pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
def test_a_lock_that_the_system_holds_is_respected_whatever_the_file_says(run: RunFolder) -> None:
    import fcntl

    path = run.path / ".lock"
    path.write_bytes(encode_json({"pid": 2**22 + 1, "host": lock.socket.gethostname()}))
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert lock.is_held(path)
        with pytest.raises(ResourceError, match="in use"):
            run.lock().__enter__()
    finally:
        os.close(descriptor)
    with run.lock():
        pass


def test_to_look_whether_a_run_is_held_does_not_make_its_lock(run: RunFolder) -> None:
    assert not lock.is_held(run.path / ".lock")
    assert not (run.path / ".lock").exists()


def test_whoever_looks_at_the_lock_keeps_no_run_from_starting(run: RunFolder) -> None:
    with run.lock():
        pass
    looking = FileLock(run.path / ".lock", thread_local=False)
    looking.acquire()
    threading.Timer(0.1, looking.release).start()
    with run.lock():
        pass


def test_the_lock_goes_when_the_run_fails(run: RunFolder) -> None:
    with pytest.raises(KeyError), run.lock():
        raise KeyError
    assert not lock.is_held(run.path / ".lock")


@pytest.mark.parametrize("again", range(3))
def test_of_many_that_start_at_once_one_gets_the_run(again: int, run: RunFolder) -> None:
    (run.path / ".lock").write_bytes(encode_json({"pid": 2**22 + 1, "host": ""}))  # left by a dead one
    hear, say = os.pipe()
    for _ in range(12):
        if os.fork() == 0:
            code = 1
            try:
                with run.lock():
                    os.read(hear, 1)  # until all the others have tried
                code = 0
            except ResourceError:
                code = 6
            finally:
                os._exit(code)
    codes: list[int] = []
    until = time.monotonic() + 60
    while len(codes) < 11 and time.monotonic() < until:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes.append(os.waitstatus_to_exitcode(status))
        else:
            time.sleep(0.01)
    os.write(say, b"." * 12)
    while len(codes) < 12:
        codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
    os.close(hear)
    os.close(say)
    assert sorted(codes) == [0] + 11 * [6]


@pytest.mark.parametrize("place", ["samples", "tensorboard", "checkpoints/step-00000002"])
@pytest.mark.parametrize("kind", ["link", "link to a folder", "pipe"])
def test_a_run_folder_with_something_foreign_far_inside_is_not_resumed(run: RunFolder, place: str, kind: str) -> None:
    """A sample or an old checkpoint would be written, or deleted, through it."""
    below = run.path / place
    below.mkdir(parents=True)
    (below / "own.png").write_bytes(b"own")
    refuse_foreign_parts(run)
    foreign = below / "step-00000004-1.png"
    if kind == "pipe":
        os.mkfifo(foreign)
    else:
        theirs = run.path.parent / "theirs"
        theirs.mkdir() if "folder" in kind else theirs.write_bytes(b"theirs")
        foreign.symlink_to(theirs)
    with pytest.raises(CheckpointError, match="which a run does not make") as refused:
        refuse_foreign_parts(run)
    assert str(foreign) in refused.value.message


def test_a_run_of_a_newer_version_is_refused_and_one_of_an_older_is_read(tmp_path: Path) -> None:
    one = create_run(tmp_path, "one", {})
    assert one.info()["schema_version"] == folder.SCHEMA_VERSION
    older = {key: value for key, value in one.info().items() if key != "schema_version"}
    one.info_path.write_bytes(encode_json(older))
    assert one.info() == older
    newer = older | {"schema_version": folder.SCHEMA_VERSION + 1, "emotrain": "9.0"}
    one.info_path.write_bytes(encode_json(newer))
    with pytest.raises(CheckpointError, match=r"was written by emotrain 9\.0 in a format") as caught:
        one.info()
    assert caught.value.hint == "upgrade emotrain"
