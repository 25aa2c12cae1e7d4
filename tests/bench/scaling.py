"""Two processes against one on the CPU, the same pictures in every step: speed, time in communication, bytes sent.

    python tests/bench/scaling.py [--model builtin:tiny-sd] [--batch 8] [--steps 30] [--rounds 3] [--json]

One process takes two micro-batches a step (gradient accumulation), two take one each; each has one thread. Rounds of
the two alternate. `times_less_work` is the ratio of processor seconds that a process needs for a step, which other
programs on the machine do not change much. `exchange` is the all-reduce alone, begun when both are there; `waiting` is
what one waits for the other before it. Bytes are the kernel's own count of what the process sent over its TCP
connections (TCP_INFO).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from processes import together

from emotrain.config.load import load as load_preset_file
from emotrain.ranks import ALONE, Ranks
from emotrain.runs.folder import RunFolder
from emotrain.runs.loaded import load
from emotrain.runs.training import Outputs, limits, loop_parts
from emotrain.train.events import Observers
from emotrain.train.loop import train_step
from emotrain.train.losses import LossBaseline
from emotrain.train.signals import StopSignals
from emotrain.train.state import TrainState

PRESET = """
model: {model}
dataset: {{folders: [{{path: "builtin:example"}}], trigger: inkmoji}}
train: {{micro_batch_size: {batch}, gradient_accumulation_steps: {accumulation}}}
sample: {{every: 0}}
"""
WARM_UP = 3
BYTES_SENT = 200  # of struct tcp_info


def bytes_sent() -> int:
    """What this process has sent over all its TCP connections."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                info = one.getsockopt(socket.IPPROTO_TCP, 11, 256)
            total += struct.unpack_from("Q", info, BYTES_SENT)[0] if len(info) >= BYTES_SENT + 8 else 0
        except OSError:  # closed by now, or no TCP connection
            continue
    return total


class Timed:
    """Ranks whose exchange is timed, after both have come to it."""

    def __init__(self, ranks: Ranks) -> None:
        self.exchange_s, self.waiting_s, self.sent = 0.0, 0.0, 0
        plain = ranks.sum_gradients

        def sum_gradients(*words: Any) -> None:
            start = time.perf_counter()
            torch.distributed.barrier()
            begun, before = time.perf_counter(), bytes_sent()
            plain(*words)
            self.exchange_s += time.perf_counter() - begun
            self.sent += bytes_sent() - before
            self.waiting_s += begun - start

        ranks.sum_gradients = sum_gradients  # type: ignore[method-assign]


def measure(ranks: Ranks, args: argparse.Namespace) -> dict[str, float]:
    """Seconds and bytes of a step, as this process sees them."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.yaml"
        path.write_text(PRESET.format(model=args.model, batch=args.batch, accumulation=2 // ranks.world))
        preset = load_preset_file(str(path)).preset
    loaded = load(preset, lambda event: None, ranks=ranks)
    state = TrainState(micro_batches=2)
    outputs = Outputs(loaded, RunFolder(Path(folder)), [], Observers(()), state)
    parts = loop_parts(loaded, state, LossBaseline(), outputs, StopSignals())
    for _ in range(WARM_UP):
        train_step(parts, limits(loaded, state), state)
    timed = Timed(ranks) if ranks.world > 1 else None
    start, worked, samples = time.perf_counter(), time.process_time(), state.samples_seen
    for _ in range(args.steps):
        train_step(parts, limits(loaded, state), state)
    each = (time.perf_counter() - start) / args.steps
    numbers = sum(parameter.numel() for parameter in loaded.model.adapter.parameters())
    worked = (time.process_time() - worked) / args.steps
    found = {
        "step_s": each,
        "cpu_s": worked,
        "samples": (state.samples_seen - samples) / args.steps,
        "gradient_bytes": 4.0 * numbers,
    }
    if timed is not None:
        found |= {"exchange_s": timed.exchange_s / args.steps, "waiting_s": timed.waiting_s / args.steps}
        found["sent_bytes"] = timed.sent / args.steps
    return found


def main() -> None:
    """Measure in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny-sd")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rounds = []
    for _ in range(args.rounds):
        (one,) = together(lambda ranks: measure(ranks, args), 1)
        two = together(lambda ranks: measure(ranks, args))
        rounds.append((one, two))
    ratios = [one["step_s"] / max(each["step_s"] for each in two) for one, two in rounds]
    first = [two[0] for _, two in rounds]
    report = {
        "model": args.model, "batch": args.batch, "steps": args.steps, "rounds": args.rounds, "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "one_step_s": statistics.median(one["step_s"] for one, _ in rounds),
        "two_step_s": statistics.median(each["step_s"] for each in first),
        "times_as_fast": statistics.median(ratios), "times_as_fast_range": [min(ratios), max(ratios)],
        "times_less_work": statistics.median(one["cpu_s"] / max(each["cpu_s"] for each in two) for one, two in rounds),
        "exchange_share": statistics.median(each["exchange_s"] / each["step_s"] for each in first),
        "waiting_share": statistics.median(each["waiting_s"] / each["step_s"] for each in first),
        "exchange_ms": 1000 * statistics.median(each["exchange_s"] for each in first),
        "gradient_bytes": first[0]["gradient_bytes"],
        "sent_bytes": [statistics.median(two[rank]["sent_bytes"] for _, two in rounds) for rank in (0, 1)],
        "samples": first[0]["samples"],
    }  # fmt: skip
    print(json.dumps(report) if args.json else "\n".join(f"{key}: {value}" for key, value in report.items()))


if __name__ == "__main__":
    assert ALONE.world == 1
    main()
