"""One process per run folder: a lock file with pid and host, and the system's own lock on it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emotrain.errors import ResourceError
from emotrain.files import read_regular
from emotrain.train.durable import decode_json, encode_json, process_birth, process_lives

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_TRIES = 10
MAX_LOCK = 4096  # bytes


@contextlib.contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` for this process; `what` it guards goes into the error.

    A lock left by a process that is dead is taken over. Whether a process on another machine lives
    cannot be seen from here, so its lock is respected.

    Raises:
        ResourceError: another process holds it, or the file cannot be made.
    """
    try:
        descriptor = _take(path, what)
    except OSError as error:
        raise ResourceError(f"{path} cannot be made: {error.strerror}") from error
    try:
        yield
    finally:
        _release(descriptor, path)


def is_held(path: Path) -> bool:
    """Whether a process that may live holds the lock file `path`; looking does not touch it."""
    try:
        return _may_live(_holder(path))
    except OSError:
        return False


def _release(descriptor: int, path: Path) -> None:
    with contextlib.suppress(OSError):
        mine = _same_file(descriptor, path)
        if fcntl is None:  # Windows removes no open file
            os.close(descriptor)
        if mine:
            path.unlink()
    if fcntl is not None:
        os.close(descriptor)


def _take(path: Path, what: str) -> int:
    for _ in range(_TRIES):
        with contextlib.suppress(FileExistsError):
            if (descriptor := _create(path)) is not None:
                return descriptor
        with contextlib.suppress(FileNotFoundError):
            _clear_dead(path, what)
    raise ResourceError(f"{what} is being taken by another process", "try again")


def _create(path: Path) -> int | None:
    """A new lock file of this process; None where another took it for a dead one's before it was written.

    Whoever looks into it holds the system's lock for a moment: that is waited for.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    pid = os.getpid()
    holder = {"pid": pid, "host": socket.gethostname(), "birth": process_birth(pid)}
    os.write(descriptor, encode_json(holder))
    os.fsync(descriptor)
    _system_lock(descriptor, wait=True)
    if _same_file(descriptor, path):
        return descriptor
    os.close(descriptor)
    return None


def _clear_dead(path: Path, what: str) -> None:
    """Remove a dead process's lock file, or raise because the process is not known to be dead."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        free = _system_lock(descriptor)
        holder = _holder(path)
        if not free or _may_live(holder):
            raise ResourceError(
                f"{what} is in use by process {holder.get('pid')} on {holder.get('host')}",
                f"wait for it or stop it; if it surely does not run any more, delete {path}",
            )
        if _same_file(descriptor, path):
            path.unlink()
    finally:
        os.close(descriptor)


def _system_lock(descriptor: int, *, wait: bool = False) -> bool:
    """Take the system's lock, which ends with its process; True where there are no such locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # not on this file system; pid and host remain
        return True
    return True


def _holder(path: Path) -> dict[str, Any]:
    try:
        holder = decode_json(read_regular(path, MAX_LOCK))
    except FileNotFoundError:
        raise
    except (OSError, ValueError):  # cut off while it was written, or no lock of ours
        return {}
    return holder if isinstance(holder, dict) else {}


def _may_live(holder: dict[str, Any]) -> bool:
    pid, host = holder.get("pid"), holder.get("host")
    if type(pid) is not int or not 0 < pid < 2**32 or not isinstance(host, str):
        return False
    if host != socket.gethostname():
        return True
    birth = process_birth(pid)
    same = holder.get("birth") is None or birth is None or birth == holder["birth"]
    return process_lives(pid) and same


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
