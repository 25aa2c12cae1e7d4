"""A run that is killed at many points without being started anew for each."""

from __future__ import annotations

import ctypes
import os
import random
import signal
from collections.abc import Iterator


def wait(pid: int) -> int:
    """Exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Succession:
    """One run that is killed at many points: ahead of each kill it forks, and the copy goes on in its place.

    So every kill is a real SIGKILL of a process that has done all of the run up to there, and no step is done twice
    to get to the next point. The copy waits until the folder has been looked at. The caller waits for processes that
    are not its own children, for which it becomes their reaper (Linux).
    """

    REAPER = 36  # PR_SET_CHILD_SUBREAPER, prctl(2)

    def __init__(self, points: set[int]) -> None:
        self.points = points
        self._told, self._tell = os.pipe()
        self._go, self._let_go = os.pipe()
        self._alone = False
        ctypes.CDLL(None).prctl(self.REAPER, 1, 0, 0, 0)

    def die(self) -> None:
        """In the run: leave a copy and be killed; returns in the copy, once it is let go."""
        state = random.getstate()
        if os.fork():
            os.kill(os.getpid(), signal.SIGKILL)
        random.setstate(state)  # Python seeds it anew in a fork
        if not self._alone:
            os.close(self._let_go)  # so that a caller that dies is seen
            self._alone = True
        os.write(self._tell, os.getpid().to_bytes(4, "little"))
        if not os.read(self._go, 1):
            os._exit(98)

    def deaths(self, first: int) -> Iterator[int]:
        """The caller's side: yields minus the signal of each death, at last the exit code of the copy that ended."""
        pid = first
        while (code := wait(pid)) == -signal.SIGKILL:
            pid = int.from_bytes(os.read(self._told, 4), "little")
            yield code
            os.write(self._let_go, b"!")
        yield code

    def close(self) -> None:
        """Give the pipes back."""
        for descriptor in (self._told, self._tell, self._go, self._let_go):
            os.close(descriptor)
