"""How large the page of a large run is, how long it takes to write and to open.

    python tests/bench/report_page.py [--pictures 1000] [--steps 50] [--prompts 4] [--report FILE]

A run's folder as 3,000 steps leave it: so many pictures of 2,000 x 1,500 pixels (blurred noise, as JPEGs), which all
were ranked, and so many steps with samples of 1,024 x 1,024 pixels (blurred noise, as PNGs). The first page makes every
preview, a later one those that are new, as while the run goes on. "Opens" is the time of headless Chromium from the
address to the page's load event, the best and the slowest of five, at two widths; Chromium runs already.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from PIL.PngImagePlugin import PngInfo

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))

from browser import CHROMIUM, Browser

from emotrain.config.load import load_preset
from emotrain.runs.folder import RunFolder, create_run
from emotrain.runs.report import Previews, page_of

RUN_STEPS = 3000


def picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Blurred noise: about as many bytes as a photograph."""
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    return noise.filter(ImageFilter.GaussianBlur(3)).point(lambda value: max(0, min(255, (value - 128) * 5 + 128)))


def make_pictures(folder: Path, count: int) -> list[str]:
    """Pictures with captions; a few are drawn, the others are copies with another byte at their end."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(8):
        path = folder / "drawn.jpg"
        picture(rng, 2000, 1500).save(path, quality=90)
        drawn.append(path.read_bytes())
        path.unlink()
    names = [f"{k:05d}.jpg" for k in range(count)]
    for k, name in enumerate(names):
        (folder / name).write_bytes(drawn[k % len(drawn)] + bytes([k % 256, k // 256]))
        (folder / name).with_suffix(".txt").write_text(f"mika_ch, standing at place {k}", encoding="utf-8")
    return names


def make_run(work: Path, pictures: int, steps: int, prompts: int) -> RunFolder:
    """The folder of a run that ended well."""
    names = make_pictures(work / "mika", pictures)
    words = (f"dataset.folders=[{{path: {work / 'mika'}}}]", "dataset.trigger=mika_ch")
    preset = load_preset("quickstart", words, "large")
    folder = create_run(work / "runs", "large", preset.to_dict(), seed=42, device="cpu", extends="quickstart")
    folder.update_info(stop_reason="max_steps", steps=RUN_STEPS, best_step=2400, best_loss=0.5, base_loss=0.8)
    rng = random.Random(2)
    rows = [
        {"step": k, "loss": rng.random(), "scalar": rng.random(), "trust": 0.9, "pulse": 1e-4, "step_s": 0.5}
        for k in range(1, RUN_STEPS + 1)
    ]
    losses = [
        {"step": k, "samples": [[f"mika/{rng.choice(names)}", rng.random(), rng.random()] for _ in range(4)]}
        for k in range(1, RUN_STEPS + 1)
    ]
    checks = [{"step": k, "loss": 0.8 - k / 1e4, "base_loss": 0.8} for k in range(0, RUN_STEPS + 1, 50)]
    for name, written in (("metrics", rows), ("picture_losses", losses), ("validation", checks)):
        (folder.path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written), "utf-8")
    folder.samples_dir.mkdir()
    draws = np.random.default_rng(3)
    for k in range(steps):
        sample = picture(draws, 1024, 1024)
        for number in range(1, prompts + 1):
            info = PngInfo()
            info.add_itxt("emotrain", json.dumps({"prompt": f"mika_ch, prompt {number}", "seed": 42, "steps": 20}))
            path = folder.samples_dir / f"step-{(k + 1) * RUN_STEPS // steps:08d}-{number}.png"
            sample.save(path, pnginfo=info, compress_level=1)
            if k == steps - 1:
                sample.save(folder.samples_dir / f"lora-{number}.png", pnginfo=info, compress_level=1)
    return folder


def opened(page: Path, width: int, work: Path) -> list[float]:
    """Seconds until the page has loaded, five times in a running browser."""
    browser = Browser(work / f"profile-{width}")
    try:
        seconds = []
        for _ in range(5):
            browser.call("Page.navigate", url="about:blank")
            begun = time.perf_counter()
            browser.open(page, width, "light")
            seconds.append(time.perf_counter() - begun)
        assert browser.run("document.images.length") > 0
        return seconds
    finally:
        browser.close()


def main() -> None:
    """Write the run's folder, its pages, and open them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start"
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = make_run(work, args.pictures, args.steps, args.prompts)
        previews, times = Previews(), []
        for _ in range(2):
            begun = time.perf_counter()
            page = page_of(folder, None, previews)
            times.append(time.perf_counter() - begun)
        path = work / "report.html"
        path.write_text(page, encoding="utf-8")
        lines = [
            "# The page of a large run", "", "`python tests/bench/report_page.py`", "", about, "", f"{machine}.", "",
            f"{args.pictures} pictures, {args.steps} steps of {args.prompts} samples.", "",
            "| | |", "| --- | --- |",
            f"| size | {path.stat().st_size / 1e6:.1f} MB |",
            f"| written, every preview made | {times[0]:.1f} s |",
            f"| written again | {times[1]:.1f} s |",
        ]  # fmt: skip
        for width in (1280, 420) if CHROMIUM else ():
            seconds = opened(path, width, work)
            lines.append(f"| opens at {width} px | {min(seconds):.2f} to {max(seconds):.2f} s |")
    print("\n".join(lines))
    if args.report:
        args.report.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
