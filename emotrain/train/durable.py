"""Writing so that a power cut cannot take it back; asking whether a process lives (no torch)."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Stage = Callable[[str], None]


def no_stage(name: str) -> None:
    """The usual stage hook: nothing happens. Fault tests hand in one that ends the process."""


def fsync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk; nothing where folders cannot be opened (Windows)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Bring a file's bytes to the disk; its folder's entry is the caller's to sync.

    Raises:
        OSError: it is not there, or the disk refuses.
    """
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes, stage: Stage = no_stage) -> None:
    """Write a new file and bring its bytes to the disk; the folder entry is the caller's to sync.

    Raises:
        OSError: no space, no permission, or `path` exists.
    """
    with path.open("xb") as file:
        stage(f"opened {path.name}")
        file.write(content)
        file.flush()
        stage(f"written {path.name}")
        os.fsync(file.fileno())
    stage(f"synced {path.name}")


def replace_synced(path: Path, content: bytes) -> None:
    """Put `content` in the place of `path`: a reader sees the old bytes or the new, never a mix.

    Raises:
        OSError: no space or no permission; the old file is then as it was.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        write_synced(temporary, content)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def encode_json(value: Any) -> bytes:
    """JSON that gives every float back exactly.

    Infinities become `{"$float": "inf"}`, tuples become lists.

    Raises:
        ValueError: a NaN, a key that is not a string, or a type that JSON has no word for.
    """
    text = json.dumps(_to_json(value, "$"), ensure_ascii=True, allow_nan=False, indent=1)
    return (text + "\n").encode()


def decode_json(content: bytes) -> Any:
    """What `encode_json` was given.

    Raises:
        ValueError: not JSON, or JSON with a NaN in it.
    """
    try:
        return json.loads(content, object_hook=_from_json, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} in JSON")


def _from_json(value: dict[str, Any]) -> Any:
    return float(value["$float"]) if value.keys() == {"$float"} else value


def _to_json(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if value != value:
            raise ValueError(f"{where} is NaN")
        return {"$float": repr(value)} if value in (float("inf"), float("-inf")) else float(value)
    if isinstance(value, list | tuple):
        return [_to_json(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"{where} has the key {wrong[0]!r}, which is not a string")
        return {key: _to_json(item, f"{where}.{key}") for key, item in value.items()}
    raise ValueError(f"{where} is a {type(value).__name__}, which JSON cannot hold")


def process_lives(pid: int) -> bool:
    """Whether a process of that number runs on this machine; asking never disturbs it."""
    if pid <= 0:
        return False
    if sys.platform == "win32":  # there os.kill(pid, 0) would end it
        import ctypes

        kernel = ctypes.windll.kernel32
        handle = kernel.OpenProcess(0x00100000, False, pid)  # SYNCHRONIZE
        if not handle:
            return False
        running: bool = kernel.WaitForSingleObject(handle, 0) == 0x102  # WAIT_TIMEOUT
        kernel.CloseHandle(handle)
        return running
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return isinstance(pid, int) and pid < 2**31
    return True


def process_birth(pid: int) -> str | None:
    """Boot and start time, which tell a process from a later one of that pid; None if unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return f"{boot}/{stat.rpartition(')')[2].split()[19]}"  # field 22: starttime, proc(5)
