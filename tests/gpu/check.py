"""The check of a GPU in ten minutes: every stage in a process of its own, with its own time limit.

    python tests/gpu/check.py [--out FILE] [--stages a,b] [--budget SECONDS] [--together] [--tiny]
    python tests/gpu/check.py --report FILE [FILE...]

Prints a line of JSON as soon as something is known, and a table at the end; a stage that fails or takes too long does
not stop the next, and is ended with all that it has started. `--report` makes Markdown of such lines, of a check that
was killed too; of equal ones in several files the last counts. `--tiny` takes tiny models, so that the check is itself
tested on pretend CUDA (`python tests/gpu/pretend_cuda.py run tests/gpu/check.py --tiny`). Exit 1 where anything was not
as it should be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
LIMITS = {  # seconds, of a data-centre GPU; in the order of the questions that are open, the first with a cold disk
    "doctor": 90, "recorded": 90, "sdxl": 120, "sd15": 50, "flux": 150, "exact": 120, "sdxl-memory": 110,
    "flux-memory": 130, "quickstart": 130, "ranks": 45, "flux-kinds": 120, "fp16": 60, "kernels": 40, "compiled": 240,
    "newer": 150,
}  # fmt: skip
TOGETHER = ("sdxl-memory", "flux-memory", "quickstart", "ranks", "flux-kinds", "fp16")  # nothing in them is timed
TINY_FACTOR = 8  # on two shared CPU cores, where libraries alone take ten seconds to load
LEAST = 20  # seconds that a stage needs to say anything
TIMES = {  # what the rows with a time say of it, and the head of their column
    "s_step": "s a step", "warm_up_s": "first three, s", "launches": "launches", "waits": "waits",
    "peak_gib": "peak GiB", "of_plan": "of plan", "times_eager": "times plain", "times_bare": "times the bare loop",
    "target_s": "target, s",
}  # fmt: skip


class Rows:
    """Everything that was said: on stdout, in a file, and for the table."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.rows, self.lock = path, list[dict[str, Any]](), threading.Lock()

    def add(self, row: dict[str, Any]) -> None:
        """Take one and pass it on at once."""
        line = json.dumps(row)
        with self.lock:
            self.rows.append(row)
            print(line, flush=True)
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(line + "\n")

    def table(self) -> str:
        """One line for each row: what, whether it is as it should be, the numbers."""
        lines = []
        for row in self.rows:
            mark = {True: "ok", False: "NOT OK", None: ""}[row["ok"]]
            lines.append(f"{row['stage']:<12} {row['what'][:44]:<44} {mark:<7}{_numbers(row)}")
        return "\n".join(lines)


def _numbers(row: dict[str, Any], besides: Iterable[str] = ()) -> str:
    left_out = {"stage", "what", "ok", *besides}
    return ", ".join(f"{key} {_short(value)}" for key, value in row.items() if key not in left_out)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:200]


class Check:
    """Runs stages; `script` is called with a stage's name."""

    def __init__(self, rows: Rows, words: Sequence[str] = (), script: Path = HERE / "stages.py") -> None:
        self.rows, self.words, self.script = rows, words, script
        self.running = set[subprocess.Popen[str]]()

    def stage(self, name: str, limit: float) -> None:
        """One stage; its last row says how it ended."""
        started, tail = time.monotonic(), list[str]()
        process = subprocess.Popen(
            [sys.executable, str(self.script), name, *self.words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
        )  # fmt: skip
        self.running.add(process)
        assert process.stdout is not None
        assert process.stderr is not None
        readers = [
            threading.Thread(target=self._read, args=(stream, name, tail), daemon=True)
            for stream in (process.stdout, process.stderr)
        ]
        for reader in readers:
            reader.start()
        why = None
        try:
            if code := process.wait(limit):
                why = f"exit {code}"
        except subprocess.TimeoutExpired:
            why = f"out of time ({limit:.0f} s)"
        end(process)
        self.running.discard(process)
        for reader in readers:
            reader.join(5)
        row: dict[str, Any] = {"stage": name, "what": "stage", "ok": why is None, "wall_s": time.monotonic() - started}
        self.rows.add(row | ({"why": why, "last_lines": tail[-3:]} if why else {}))

    def _read(self, stream: IO[str], name: str, tail: list[str]) -> None:
        for line in stream:
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            if isinstance(found, dict) and "what" in found:
                self.rows.add({"stage": name, **found})
            elif line.strip():
                tail.append(line.rstrip())
                del tail[:-8]

    def all(self, names: Sequence[str], factor: float, budget: float, together: bool) -> None:
        """The stages one after another; those of `TOGETHER`, if they may, at once where the first of them stands."""
        started, left = time.monotonic(), list(names)
        while left:
            now = [name for name in left if name in TOGETHER] if together and left[0] in TOGETHER else left[:1]
            left = [name for name in left if name not in now]
            time_left = budget * factor - (time.monotonic() - started)
            if time_left < LEAST:
                for name in now:
                    self.rows.add({"stage": name, "what": "stage", "ok": False, "why": "no time was left for it"})
                continue
            limits = [min(LIMITS[name] * factor, time_left) for name in now]
            threads = [threading.Thread(target=self.stage, args=pair) for pair in zip(now, limits, strict=True)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def stop(self) -> None:
        """End what runs."""
        for process in list(self.running):
            end(process)


def end(process: subprocess.Popen[str]) -> None:
    """A process and all that it has started; one that hangs in the driver is left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of JSON-lines files, of equal ones the last; a line that was cut off is none."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                row = json.loads(line)
                key = row["stage"], row["what"]
                rows.pop(key, None)
                rows[key] = row
    return list(rows.values())


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: what was timed, what was found, which stages did not come to their end."""
    beside = {(row["stage"], row["what"]): row for row in rows}
    timed = []
    for row in [row for row in rows if "s_step" in row]:
        more = [beside.pop((row["stage"], row["what"] + words), {}) for words in (", a step", ", peak of plan")]
        is_wrong = any(one.get("ok") is False for one in (row, *more))
        timed.append(more[0] | more[1] | row | ({"ok": False} if is_wrong else {}))
        del beside[row["stage"], row["what"]]
    heads = [key for key in TIMES if any(key in row for row in timed)]
    lines = [f"| what | {' | '.join(TIMES[key] for key in heads)} |", "| --- " * (len(heads) + 1) + "|"]
    for row in timed:
        cells = [_short(row[key]) if key in row else "" for key in heads]
        lines.append(f"| {row['what']}{' (NOT OK)' * (row['ok'] is False)} | {' | '.join(cells)} |")
    lines += ["", "| stage | what | as it should be | found |", "| --- | --- | --- | --- |"]
    for row in beside.values():
        if row["what"] != "stage" or not row["ok"]:
            mark = {True: "yes", False: "NO", None: ""}[row["ok"]]
            lines.append(f"| {row['stage']} | {row['what']} | {mark} | {_numbers(row, ['last_lines', 'wall_s'])} |")
    said = {row["stage"] for row in rows if row["what"] == "stage"}
    lines += ["", f"Stages that ended: {', '.join(name for name in LIMITS if name in said) or 'none'}."]
    if cut := [name for name in LIMITS if name not in said and any(row["stage"] == name for row in rows)]:
        lines.append(f"Cut off: {', '.join(cut)}.")
    if never := [name for name in LIMITS if not any(row["stage"] == name for row in rows)]:
        lines.append(f"Not begun: {', '.join(never)}.")
    return "\n".join(lines)


def main() -> None:
    """All stages, or some; or a report of what was found before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--stages", default=",".join(LIMITS))
    parser.add_argument("--budget", type=float, default=560.0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--together", action="store_true", help="stages that time nothing at once: needs 64 GiB")
    parser.add_argument("--report", type=Path, nargs="+")
    args = parser.parse_args()
    if args.report:
        print(report(read(args.report)))
        return
    names = args.stages.split(",")
    if unknown := [name for name in names if name not in LIMITS]:
        parser.error(f"no stage `{unknown[0]}`: {', '.join(LIMITS)}")
    rows = Rows(args.out)
    check = Check(rows, ["--tiny"] if args.tiny else [])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        check.all(names, TINY_FACTOR if args.tiny else 1, args.budget, args.together)
    finally:
        check.stop()
        print(rows.table(), file=sys.stderr)
    sys.exit(any(row["ok"] is False for row in rows.rows))


if __name__ == "__main__":
    main()
