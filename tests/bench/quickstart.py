"""What a newcomer gets: the quickstart from launch to picture, for three seeds, with what its LoRA has learned.

    python tests/bench/quickstart.py [--seeds 3] [--preset quickstart] [--install] [--report FILE.md]

Prints wall time, time to the first step, the CPU time of `--help` over a bare interpreter, why and where each run
ended, the held-out loss (right captions, wrong captions), and how many samples are nearest to their own held-out
picture.
`--install` measures the README's first command in an empty virtual environment too (needs the package index).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(Path(__file__).parent))


def cpu_of(command: list[str], times: int = 5) -> float:
    """Least CPU seconds of a command over some tries."""
    least = float("inf")
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        least = min(least, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return least


def one_run(preset: str, seed: int, runs: Path, extra: list[str]) -> dict[str, object]:
    """One run in a process of its own, timed from outside; `seconds_to_first_step` from launch."""
    command = [sys.executable, "-m", "emotrain", "run", preset, "--json", "--name", f"seed-{seed}"]
    command += ["--runs-dir", str(runs), "--set", f"train.seed={seed}"]
    for word in extra:
        command += ["--set", word]
    started = time.monotonic()
    first = None
    end: dict[str, object] = {}
    environment = {**os.environ, "EMOTRAIN_CACHE": str(runs / "cache")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "step" and first is None:
                first = time.monotonic() - started
            if event["event"] == "run_end":
                end = event
    if process.returncode:
        raise SystemExit(f"the run ended with exit code {process.returncode}")
    return {**end, "seconds": time.monotonic() - started, "seconds_to_first_step": first}


def main() -> None:
    """Run everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--preset", default="quickstart")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--sheet", type=Path)
    args = parser.parse_args()
    lines: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    if args.install:
        say(f"README command 1 from an empty environment: {install():.0f} s")
    bare = cpu_of([sys.executable, "-c", "pass"])
    say(f"--help: {cpu_of([sys.executable, '-m', 'emotrain', '--help']) - bare:.2f} s CPU over a bare interpreter")
    from heldout import Bench, sheet

    model = "tiny-flux" if "flux" in args.preset else "tiny-sd"
    heads = ["seed", "ended", "at step", "best step", "wall s", "to first step s", "held-out base", "right", "fall"]
    heads += ["wrong - right", "nearest own of 32"]
    say("| " + " | ".join(heads) + " |")
    say("|" + " --- |" * len(heads))
    with tempfile.TemporaryDirectory() as work:
        for seed in range(42, 42 + args.seeds):
            end = one_run(args.preset, seed, Path(work), args.set)
            bench = Bench(model)
            bench.load(Path(str(end["lora"])))
            found = bench.measure()
            gap, errors = found.caption_gap()
            hits, samples = bench.nearest_own()
            if args.sheet:
                real = bench.real()
                sheet([samples[:16], real[:16], samples[16:], real[16:]], args.sheet / f"{args.preset}-{seed}.png")
            say(
                f"| {seed} | {end['stop_reason']} | {end['step']} | {end['best_step']} | {end['seconds']:.0f} |"
                f" {end['seconds_to_first_step']:.1f} | {found.base.mean():.4f} | {found.right.mean():.4f} |"
                f" {found.fall():.1%} | {gap:+.4f} ({errors:.1f} SE) | {hits} |"
            )
    say(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if args.report:
        args.report.write_text("# Quickstart\n\n`python tests/bench/quickstart.py`\n\n" + "\n".join(lines) + "\n")


def install() -> float:
    """Seconds of the README's first command in an empty virtual environment."""
    with tempfile.TemporaryDirectory() as work:
        started = time.monotonic()
        venv = Path(work) / "venv"
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        pip = [str(venv / "bin" / "pip"), "install", "-q", "-c", str(ROOT / "constraints.txt"), str(ROOT)]
        subprocess.run(pip, check=True)
        subprocess.run([str(venv / "bin" / "emotrain"), "run", "quickstart"], check=True, cwd=work)
        return time.monotonic() - started


if __name__ == "__main__":
    main()
