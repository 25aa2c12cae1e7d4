"""What lint costs per picture, stage by stage, and pictures a second: JPEGs of 1,024 x 1,024 pixels.

    python tests/bench/lint_speed.py [--pictures 200] [--workers 2] [--report FILE]

Each picture is read, hashed (SHA-256 of every byte), decoded in full and measured. The stages are timed in CPU
milliseconds of this process, best and median of all pictures: on a busy machine the best is what the work costs, and
the median shows how much slower shared caches and cores make it. The same decoding is then timed while another
process does it too: how much slower a picture gets says how much of a second core there is. At last the whole, in
pictures a wall-clock second, with the time that the worker processes take to start.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, features

from emotrain.config.schema import Folder
from emotrain.dataset.duplicates import look_of
from emotrain.dataset.images import load_picture, read_header
from emotrain.dataset.lint import lint
from emotrain.dataset.lint_pictures import Job, edge_sharpness, measure
from emotrain.dataset.lint_pool import measure_all
from emotrain.dataset.scan import scan


def make(folder: Path, count: int, fields: int = 4) -> int:
    """Write `count` different pictures with the detail of photographs; all bytes of them together."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(1024), np.fft.fftfreq(1024))) + 1 / 1024
    made = []
    for _ in range(fields):
        field = np.real(np.fft.ifft2(np.fft.fft2(rng.normal(size=(3, 1024, 1024))) / frequency**1.3))
        made.append(np.moveaxis(field / field.std() * 44 + 128, 0, 2).clip(0, 255).astype(np.uint8))
    for k in range(count):  # shifted round, turned and recoloured: as much work, and no copies
        field = np.roll(made[k % fields], tuple(rng.integers(0, 1024, 2)), (0, 1))
        field = np.rot90(field, int(rng.integers(4)))[:, :, rng.permutation(3)]
        Image.fromarray(np.ascontiguousarray(field)).save(folder / f"{k:04}.jpg", quality=88)
    return sum(path.stat().st_size for path in folder.iterdir())


def cpu() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def milliseconds(work: Callable[[Path], object], paths: Sequence[Path]) -> tuple[float, float]:
    """Best and median CPU time of one picture."""
    taken = []
    for path in paths:
        start = time.process_time()
        work(path)
        taken.append(1000 * (time.process_time() - start))
    return min(taken), statistics.median(taken)


def stages(paths: Sequence[Path]) -> dict[str, tuple[float, float]]:
    """CPU milliseconds of every stage by itself, and of all together."""
    data = {path: path.read_bytes() for path in paths}
    pictures = {path: load_picture(path).image for path in paths[:8]}
    few = [path for path in paths for _ in range(len(paths) // 8) if path in pictures]
    work: dict[str, tuple[Callable[[Path], object], Sequence[Path]]] = {
        "read the file": (lambda path: path.read_bytes(), paths),
        "SHA-256": (lambda path: hashlib.sha256(data[path]).hexdigest(), paths),
        "header": (lambda path: read_header(data[path], path=path), paths),
        "decode (Pillow alone)": (lambda path: Image.open(io.BytesIO(data[path])).load(), paths),
        "read and decode as lint does": (load_picture, paths),
        "sharpness": (lambda path: edge_sharpness(pictures[path]), few),
        "look for copies": (lambda path: look_of(pictures[path]), few),
        "read, decode and measure": (lambda path: measure(Job(path)), paths),
    }
    return {name: milliseconds(*parts) for name, parts in work.items()}


def beside_another(paths: Sequence[Path]) -> tuple[float, float]:
    """As "read, decode and measure", while another process does the same."""
    code = "import sys; from tests.bench.lint_speed import burn; burn(sys.argv[1])"
    where = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", code, str(paths[0])], env=where) as other:
        time.sleep(2)  # until it is at work
        try:
            return milliseconds(lambda path: measure(Job(path)), paths)
        finally:
            other.kill()


def burn(path: str) -> None:
    """Decode one picture until killed."""
    while True:
        measure(Job(Path(path)))


def whole(folder: str, paths: Sequence[Path], workers: int) -> dict[str, tuple[float, float]]:
    """Pictures a wall-clock second and a CPU second: of the scan, of measuring, of all of lint."""
    found = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        start, busy = time.perf_counter(), cpu()
        work()
        found[name] = len(paths) / (time.perf_counter() - start), len(paths) / (cpu() - busy)

    jobs = [Job(path) for path in paths]
    scanned = scan((Folder(path=folder),))
    timed("scan (header and SHA-256)", lambda: scan((Folder(path=folder),)))
    timed("measure, one process", lambda: measure_all(jobs, workers=1))
    timed(f"measure, {workers} processes with their start", lambda: measure_all(jobs, workers=workers))
    timed("measure and find copies, all of lint but the scan", lambda: lint(scanned, workers=workers))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    count = options.pictures
    with tempfile.TemporaryDirectory() as name:
        size = make(Path(name), count)
        paths = sorted(Path(name).iterdir())
        load = os.getloadavg()[0]
        alone, beside = stages(paths), beside_another(paths)
        rates = whole(name, paths, options.workers)
    one, several = (used for stage, (_, used) in rates.items() if stage.startswith("measure, "))
    start = (count / several - count / one) / options.workers
    lines = [
        "# Speed of lint",
        "",
        f"`python tests/bench/lint_speed.py --pictures {count} --workers {options.workers}`",
        "",
        f"{count} JPEGs of 1,024 x 1,024 pixels, {size / count / 1000:.0f} kB each; {platform.machine()}, "
        f"{os.cpu_count()} cores, load {load:.1f} before the start; Pillow {PIL.__version__}, libjpeg-turbo "
        f"{features.version('libjpeg_turbo')}.",
        "",
        "| CPU milliseconds a picture | best | median |",
        "| --- | --- | --- |",
        *(f"| {stage} | {best:.2f} | {median:.2f} |" for stage, (best, median) in alone.items()),
        f"| the same beside another process | {beside[0]:.2f} | {beside[1]:.2f} |",
        "",
        "| pictures a second | of wall clock | of CPU |",
        "| --- | --- | --- |",
        *(f"| {stage} | {wall:.0f} | {used:.0f} |" for stage, (wall, used) in rates.items()),
        "",
        f"A worker process takes about {start:.1f} s of CPU to start, which is why {options.workers} of them make "
        f"fewer pictures a CPU second: {1000 * options.workers * start / count:.1f} ms of each of {count}.",
        "",
        f"Without start and other load, {options.workers} cores would make "
        f"{1000 * options.workers / alone['read, decode and measure'][0]:.0f} a second at the best time, "
        f"{1000 * options.workers / beside[1]:.0f} at the median beside another process.",
        "",
    ]
    text = "\n".join(lines)
    print(text)
    if options.report is not None:
        options.report.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
