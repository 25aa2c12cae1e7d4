"""Pictures a second that lint decodes in full, hashes and measures: JPEGs of 1,024 x 1,024 pixels.

    python tests/bench/lint_speed.py [--pictures 200] [--workers 2]

Scan (header and SHA-256 of every byte) and measuring (full decode, sharpness, look for copies) are timed
apart and together; the CPU seconds are those of all processes, so that a busy machine can be told from a slow
program.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from emotrain.config.schema import Folder
from emotrain.dataset.lint import lint
from emotrain.dataset.lint_pictures import Job
from emotrain.dataset.lint_pool import measure_all
from emotrain.dataset.scan import scan


def make(folder: Path, count: int, originals: int = 4) -> int:
    """Write `count` pictures with the detail of photographs; all bytes of them together."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(1024), np.fft.fftfreq(1024))) + 1 / 1024
    for k in range(originals):
        field = np.real(np.fft.ifft2(np.fft.fft2(rng.normal(size=(3, 1024, 1024))) / frequency**1.3))
        field = np.moveaxis(field / field.std() * 44 + 128, 0, 2).clip(0, 255).astype(np.uint8)
        Image.fromarray(field).save(folder / f"{k:04}.jpg", quality=88)
    for k in range(originals, count):  # a byte behind the end makes another file of the same work
        data = (folder / f"{k % originals:04}.jpg").read_bytes()
        (folder / f"{k:04}.jpg").write_bytes(data + b"\0" * (k // originals))
    return sum(path.stat().st_size for path in folder.iterdir())


def cpu() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    count = options.pictures
    with tempfile.TemporaryDirectory() as name:
        size = make(Path(name), count)
        print(f"{count} JPEGs of 1,024 x 1,024, {size / count / 1000:.0f} kB each; load {os.getloadavg()[0]:.1f}")
        start, busy = time.perf_counter(), cpu()
        found = scan((Folder(path=name),))
        scanned, scan_busy = time.perf_counter() - start, cpu() - busy
        jobs = [Job(example.path) for example in found.examples]
        start, busy = time.perf_counter(), cpu()
        measured = measure_all(jobs, workers=options.workers)
        decoded, decode_busy = time.perf_counter() - start, cpu() - busy
        assert len(measured) == count
        assert all(one.problem is None for one in measured)
        chosen = random.Random(0).sample(jobs, 3)
        assert all(Image.open(job.path).size == (1024, 1024) for job in chosen)
        for what, wall, used in (
            ("header and SHA-256", scanned, scan_busy),
            (f"decode and measure, {options.workers} processes", decoded, decode_busy),
            ("both", scanned + decoded, scan_busy + decode_busy),
        ):
            print(f"{what:<32} {count / wall:6.1f} a second; {count / used:6.1f} a second of CPU")
        start = time.perf_counter()
        report = lint(found, workers=options.workers)
        whole = time.perf_counter() - start
        print(f"lint as a whole, with copies ({len(report.findings)} findings): {count / whole:.1f} a second")


if __name__ == "__main__":
    main()
