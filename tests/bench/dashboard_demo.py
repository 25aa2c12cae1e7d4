"""Look at the dashboard without a model: plays a made-up run.

    python tests/bench/dashboard_demo.py [--steps 400] [--step-s 0.05] [--plain | --json]
        [--hostile] [--baseline] [--cost]

`--cost` plays 20,000 steps without waiting and prints the processor time that an event and a frame
take.
"""

from __future__ import annotations

import argparse
import io
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from emotrain.observers.board import Board
from emotrain.observers.choose import display_observers
from emotrain.observers.dashboard import BYTES_PER_S, FASTEST_S, SHARE, Dashboard, make_console
from emotrain.pulse.signal import Reading
from emotrain.train.events import (
    Event,
    Notice,
    Phase,
    RunEnd,
    RunStart,
    SamplesDrawn,
    Saved,
    StepEnd,
    ValidationEnd,
)

HOSTILE = "\x1b[2J\x07evil[/bold] \u202eأهلا\u202c 日本語の名前がとても長い\n\tü" + "a\u0301" * 30


def emotion(losses: Iterator[float]) -> Iterator[tuple[float, Reading]]:
    """The sensors of generation 3.9, enough for curves that look real."""
    short = medium = long = None
    noise, d, hist, c = 1.0, 0.02, 1.0, 0.0
    for loss in losses:
        short = loss if short is None else 0.3 * loss + 0.7 * short
        medium = loss if medium is None else 0.05 * loss + 0.95 * medium
        long = loss if long is None else 0.01 * loss + 0.99 * long
        scalar = math.tanh((long - short) / max(long, 1e-5))
        trust = math.copysign(1.0 - abs(scalar), scalar)
        noise, d = 0.97 * noise + 0.03 * abs(scalar), 0.97 * d + 0.03 * abs(trust)
        x = ((abs(noise - d) + 0.1) / (abs(scalar - trust) + 0.1)) ** 2
        if x >= hist and trust >= 0.5:
            hist = min(x, 1.5 * hist)
        elif -0.5 <= trust <= 0.5:
            hist = 0.8 * x
        c = 0.7 * c + 0.3 * scalar
        pulse = min(max(hist * max(100.0**c, 1e-2) * 1e-4, 1e-8), 3e-3)
        yield loss, Reading(scalar, trust, pulse, 1.0, short, medium, long, noise, d)


def made_up_run(steps: int, step_s: float, *, hostile: bool, baseline: bool) -> Iterator[Event]:
    """Phases, steps with validations, samples, saves and a warning, and an end."""
    rng = random.Random(7)
    name = HOSTILE if hostile else "mika_v1"
    run_dir = Path("runs") / ("x" * 300 if hostile else name)
    facts = (("base", "builtin:tiny-sd"), ("trigger", HOSTILE if hostile else "mika_ch"))
    yield Phase("load the model")
    time.sleep(min(1.0, 10 * step_s))
    yield RunStart(name, run_dir, 0, 2 * steps, 8.0, "emosens 3.9", 32, 192, 6_780_000, "cpu", facts)
    for done in range(33):
        yield Phase(HOSTILE if hostile else "cache latents", done, 32)
        time.sleep(step_s / 2)

    def losses() -> Iterator[float]:
        for step in range(steps):
            yield (0.55 + 0.95 * math.exp(-step / 60.0)) * math.exp(rng.gauss(0.0, 0.22))

    for step, (loss, reading) in enumerate(emotion(losses()), start=1):
        time.sleep(step_s)
        share = step / steps
        yield StepEnd(
            step=step,
            epoch=step / 8.0,
            loss=loss,
            observed_loss=0.9 * loss + 0.05 if baseline else loss,
            reading=reading,
            ready=share > 0.9,
            grad_norm=0.4 + 0.2 * rng.random(),
            lr=reading.pulse,
            step_s=max(step_s, 1e-3) * (0.9 + 0.2 * rng.random()),
            stop_meter=min(1.0, share**2),
            expected_end=(steps, int(1.3 * steps)) if share > 0.4 else None,
            memory_gib=1.37,
        )
        if step % 25 == 0:
            validation = 0.53 + math.exp(-step / 50.0)
            forecast = f"1 of 2 validations without improvement; ends at step {steps} if the next is no better"
            yield ValidationEnd(step, validation, 0.02, 1.53, 0.001, step, validation, forecast if share > 0.4 else "")
        if step % 50 == 0:
            yield SamplesDrawn(step, (), ("a fox", "a ship"), run_dir / "samples" / "sheet.png")
            yield Saved(step, run_dir / "checkpoints" / f"step-{step:08d}", best=step % 100 == 0)
        if step in (60, 130):
            text = HOSTILE if hostile else "2 captions are longer than 77 tokens and were cut"
            yield Notice(f"{text} (step {step})")
        if step == 90:
            sys.stderr.write("a library writes to stderr and does not ask\n")
    yield RunEnd(
        steps,
        "signal",
        "the validation loss has not fallen for 3 validations while the scalar stayed below zero",
        run_dir / "lora.safetensors",
        steps - 25,
        0.5431,
        steps * step_s,
    )


def cost() -> None:
    """Processor time of an event and of a frame at three sizes."""
    events = list(made_up_run(20_000, 0.0, hostile=False, baseline=True))
    board = Board(time.monotonic)
    began = time.process_time()
    for event in events:
        board.note(event)
    each = (time.process_time() - began) / len(events)
    sys.stdout.write(f"an event: {1e6 * each:.1f} us\n")
    for columns, rows in ((80, 24), (120, 40), (200, 50), (400, 120)):
        stream = io.StringIO()
        console = make_console(stream, {"TERM": "xterm-256color"}, width=columns, height=rows)
        dashboard = Dashboard(console, thread=False, capture_stderr=False)
        for event in events[:-1]:
            dashboard.handle(event)
        dashboard.refresh()
        before, began = len(stream.getvalue().encode()), time.process_time()
        for _ in range(50):
            dashboard.refresh()
        each, sent = (time.process_time() - began) / 50, (len(stream.getvalue().encode()) - before) / 50
        wait = max(FASTEST_S, each / SHARE, sent / BYTES_PER_S)
        sys.stdout.write(
            f"a frame of {columns}x{rows}: {1e3 * each:.1f} ms, {sent / 1e3:.1f} kB, at most every {wait:.2f} s: "
            f"{each / wait:.2%} of a core, {sent / wait / 1e3:.1f} kB/s\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--step-s", type=float, default=0.05)
    for flag in ("--plain", "--json", "--hostile", "--baseline", "--cost"):
        parser.add_argument(flag, action="store_true")
    args = parser.parse_args()
    if args.cost:
        return cost()
    observers = display_observers(plain=args.plain, json=args.json)
    events = made_up_run(args.steps, args.step_s, hostile=args.hostile, baseline=args.baseline)
    try:
        for event in events:
            for observer in observers:
                observer.handle(event)
    finally:
        for observer in observers:
            observer.close()


if __name__ == "__main__":
    main()
