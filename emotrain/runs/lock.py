"""One process per run folder: the system's own lock on a file that names its holder."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from emotrain.errors import ResourceError
from emotrain.files import decode_json, encode_json, read_regular

MAX_LOCK = 4096  # bytes
WAIT_S = 0.5  # whoever looks whether the lock is free holds it for a moment


@contextlib.contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` for this process; `what` it guards goes into the error.

    The system gives a dead process's lock back by itself. The file stays: who waits for it has it open.

    Raises:
        ResourceError: another process holds it, or the file cannot be made.
    """
    lock = FileLock(path, timeout=WAIT_S, is_singleton=False)
    try:
        lock.acquire()
    except Timeout as error:
        holder = _holder(path)
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        raise ResourceError(f"{what} is in use by {who}", "wait for it or stop it") from error
    except OSError as error:
        raise ResourceError(f"{path} cannot be made: {error.strerror}") from error
    try:
        _name_holder(path)
        yield
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Whether a process holds the lock file `path`; one that is not there is not made."""
    if not path.is_file() or path.is_symlink():
        return False
    lock = FileLock(path, timeout=0, is_singleton=False)
    try:
        with lock:
            return False
    except Timeout:
        return True
    except OSError:
        return False


def _name_holder(path: Path) -> None:
    """Write who holds the lock into its file, for the error of another process.

    Not where the file is the lock itself (a file system without locks), nor where it cannot be written (Windows).
    """
    with contextlib.suppress(OSError):
        content = path.read_bytes()
        if not content or content.startswith(b"{"):
            path.write_bytes(encode_json({"pid": os.getpid(), "host": socket.gethostname()}))


def _holder(path: Path) -> dict[str, Any] | None:
    """Process and host in the lock file; None where it does not say."""
    try:
        holder = decode_json(read_regular(path, MAX_LOCK))
        return {"pid": int(holder["pid"]), "host": str(holder["host"])[:100]}
    except (OSError, ValueError, LookupError, TypeError):
        return None
