"""What do the held-out pictures cost the LoRA? The quickstart as it is, against all its pictures for as many steps.

    python tests/bench/held_out_cost.py [--seeds 3] [--report docs/benchmarks/held_out_cost.md]

Each seed: the run that stops by itself and hands over its best step, then the run that it offers (all 32 pictures, as
many steps, no validation to choose by). Both LoRAs are measured on the 72 pictures that neither saw.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from heldout import Bench


def run(words: list[str], runs: Path) -> dict[str, object]:
    """One run in a process of its own; its last event."""
    command = [sys.executable, "-m", "emotrain", *words, "--json", "--runs-dir", str(runs), "--set", "sample.every=0"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return next(event for event in reversed(events) if event["event"] == "run_end")


def main() -> None:
    """Print one line a seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    lines = [
        "| seed | steps | 28 pictures, 4 held out | all 32 | base | gained by the 4, of the fall |",
        "|" + " --- |" * 6,
    ]
    with tempfile.TemporaryDirectory() as work:
        for seed in range(42, 42 + args.seeds):
            first = run(["run", "quickstart", "--set", f"train.seed={seed}", "--name", f"held-{seed}"], Path(work))
            second = run(shlex.split(str(first["all_command"]))[1:], Path(work))
            losses = []
            for end in (first, second):
                bench = Bench("tiny-sd")
                name = "lora.safetensors" if end is first else "lora-last.safetensors"
                bench.load(Path(str(end["lora"])).with_name(name))
                losses.append(float(bench.losses().mean()))
                with bench.adapter.off():
                    base = float(bench.losses().mean())
            part = (losses[0] - losses[1]) / (base - losses[0])
            lines.append(
                f"| {seed} | {first['best_step']} | {losses[0]:.4f} | {losses[1]:.4f} | {base:.4f} | {part:+.1%} |"
            )
            print(lines[-1], flush=True)
    if args.report:
        head = ["# What held-out pictures cost", "", "`python tests/bench/held_out_cost.py`", ""]
        text = [*head, *(__doc__ or "").splitlines()[4:], "", *lines]
        args.report.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
