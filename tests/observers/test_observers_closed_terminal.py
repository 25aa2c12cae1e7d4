"""A run in a real terminal that is closed: the kernel sends SIGHUP, and every write to the terminal fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pty = pytest.importorskip("pty")


def take_terminal() -> None:
    """Make stdin's terminal the session's, so that closing it hangs the session up (also under `nohup`)."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.login_tty(0)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "login_tty"), reason="no way to make a terminal the controlling one")
def test_a_closed_terminal_saves_the_run_and_ends_it_with_143(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    words = ["sample.at_start=false", "stop.mode=off", "validate.every=1000", "log.tensorboard=false"]
    words += ["train.loss.baseline=raw", "network.targets=[mid_block.*to_q]", "validate.probe_images=1"]
    command = [sys.executable, "-m", "emotrain", "run", "quickstart", "--runs-dir", str(tmp_path)]
    command += [word for each in words for word in ("--set", each)]
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", "CI": ""},
        preexec_fn=take_terminal,
    )
    os.close(theirs)
    log, shown = tmp_path / "quickstart" / "metrics.jsonl", b""
    deadline = time.monotonic() + 120.0
    while b"emoPulse" not in shown or log.read_text(encoding="utf-8").count("\n") < 3:
        assert process.poll() is None, shown.decode(errors="replace")
        assert time.monotonic() < deadline, shown.decode(errors="replace")
        shown += os.read(ours, 65536)
    os.close(ours)
    assert process.wait(timeout=120) == 143
    info = json.loads((tmp_path / "quickstart" / "run.json").read_text(encoding="utf-8"))
    assert info["stop_reason"] == "interrupted"
    steps = log.read_text(encoding="utf-8").count("\n")
    assert 3 <= steps < 600
    assert (tmp_path / "quickstart" / "checkpoints" / f"step-{steps:08d}").is_dir()
