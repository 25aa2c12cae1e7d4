"""The check of a GPU in ten minutes: every stage in a process of its own, with its own time limit.

    python tests/gpu/check.py [--out FILE] [--stages a,b] [--budget SECONDS] [--together] [--tiny]

Prints a line of JSON as soon as something is known, and a table at the end; a stage that fails or takes too long does
not stop the next. `--tiny` takes tiny models, so that the check itself is tested on pretend CUDA
(`python tests/gpu/pretend_cuda.py run tests/gpu/check.py --tiny`). Exit 1 where anything was not as it should be.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LIMITS = {  # seconds, of a data-centre GPU; in the order of the questions that are open
    "recorded": 75, "sd15": 40, "flux": 80, "sdxl-memory": 100, "flux-memory": 120, "exact": 110, "doctor": 40,
    "sdxl": 90, "quickstart": 120, "flux-kinds": 120, "fp16": 60, "kernels": 40, "newer": 150, "compiled": 150,
}  # fmt: skip
TOGETHER = ("doctor", "quickstart", "flux-kinds", "fp16", "sdxl-memory", "flux-memory")  # nothing in them is timed
TINY_FACTOR = 8  # on two shared CPU cores, where libraries alone take ten seconds to load


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
            numbers = ", ".join(f"{k} {_short(v)}" for k, v in row.items() if k not in ("stage", "what", "ok"))
            mark = {True: "ok", False: "NOT OK", None: ""}[row["ok"]]
            lines.append(f"{row['stage']:<12} {row['what'][:44]:<44} {mark:<7}{numbers}")
        return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:200]


def run_stage(name: str, limit: float, tiny: bool, rows: Rows) -> None:
    """One stage; its last row says how it ended."""
    command = [sys.executable, str(HERE / "stages.py"), name, *(["--tiny"] if tiny else [])]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    tail: list[str] = []

    def keep(line: str) -> None:
        tail.append(line.rstrip())
        del tail[:-8]

    assert process.stdout is not None
    assert process.stderr is not None
    errors = threading.Thread(target=lambda: [keep(line) for line in process.stderr or ()], daemon=True)
    late = threading.Timer(limit, process.kill)
    errors.start()
    late.start()
    seen = []
    for line in process.stdout:
        try:
            seen.append(json.loads(line))
        except ValueError:
            keep(line)
        else:
            rows.add({"stage": name, **seen[-1]})
    code = process.wait()
    in_time = late.is_alive()
    late.cancel()
    errors.join(1)
    row: dict[str, Any] = {"stage": name, "what": "stage", "ok": code == 0, "wall_s": time.monotonic() - started}
    if code:
        row |= {"why": "out of time" if not in_time else f"exit {code}", "last_lines": tail[-3:]}
    rows.add(row)


def main() -> None:
    """All stages, or some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--stages", default=",".join(LIMITS))
    parser.add_argument("--budget", type=float, default=570.0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--together", action="store_true", help="stages that time nothing at once: needs 64 GiB")
    args = parser.parse_args()
    rows, started = Rows(args.out), time.monotonic()
    factor = TINY_FACTOR if args.tiny else 1
    names = args.stages.split(",")
    if args.together:
        together = [name for name in names if name in TOGETHER]
        names = [name for name in names if name not in TOGETHER]
        threads = [
            threading.Thread(target=run_stage, args=(name, LIMITS[name] * factor, args.tiny, rows)) for name in together
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for name in names:
        left = args.budget * factor - (time.monotonic() - started)
        if left < 10:
            rows.add({"stage": name, "what": "stage", "ok": False, "why": "no time was left for it"})
        else:
            run_stage(name, min(LIMITS[name] * factor, left), args.tiny, rows)
    print(rows.table(), file=sys.stderr)
    sys.exit(any(row["ok"] is False for row in rows.rows))


if __name__ == "__main__":
    main()
