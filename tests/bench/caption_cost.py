"""What shuffle, dropout and variants cost per step with cached embeddings.

    python tests/bench/caption_cost.py [--steps 2000] [--json FILE]

Two data sets of 64 pictures of one bucket (SDXL's shapes: latents [4, 128, 128], embeddings [77, 2048]), one with
fixed captions and one with shuffle, tag dropout, caption dropout, wildcards and 8 variants. Measured is `batch()`,
which is all that a step waits for; during the measurement every read of a file and every call of an encoder is counted.
The two are timed in turns, in CPU time (one thread), and the median of the differences within a turn is taken, so that
a busy machine changes little.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emotrain.dataset.buckets import BucketRules
from emotrain.dataset.cache import Cache
from emotrain.dataset.encode import prepare
from emotrain.dataset.examples import Example
from emotrain.dataset.loader import CachedDataset
from emotrain.dataset.scan import FolderSpec, scan
from emotrain.dataset.settings import LoaderSettings

NUM_IMAGES = 64
ROUNDS = 40


class Encoders:
    """The shapes of SDXL's encoders without their weights; `calls` counts how often they are asked."""

    vae_scale = 8
    pictures_at_once = 1

    def __init__(self) -> None:
        self.calls = 0

    def encode_images(self, pixels: Tensor) -> Tensor:
        self.calls += 1
        return torch.nn.functional.interpolate(pixels.mean(1, keepdim=True), (128, 128)).expand(-1, 4, -1, -1)

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        self.calls += 1
        seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) for text in texts]
        rows = [torch.randn(77, 2048, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        stacked = torch.stack(rows).half().float()
        return {"prompt_embeds": stacked, "pooled_prompt_embeds": stacked[:, 0, :1280].clone()}

    def vae_identity(self) -> str:
        return "bench"

    def text_identity(self) -> str:
        return "bench"


def make_pictures(folder: Path) -> tuple[Example, ...]:
    """Small pictures with captions of 20 tags and a wildcard."""
    from PIL import Image

    for index in range(NUM_IMAGES):
        Image.new("RGB", (64, 64), (index, 2 * index, 3 * index)).save(folder / f"{index}.png")
        tags = ", ".join(f"tag {(index * 7 + i) % 50}" for i in range(20))
        (folder / f"{index}.txt").write_text(f"a {{red|blue}} cat, {tags}", encoding="utf-8")
    return scan([FolderSpec(path=str(folder))]).examples


def seconds_per_batch(data: CachedDataset, first: int, steps: int) -> float:
    """Mean CPU time of one `batch()` over some steps."""
    started = time.process_time()
    for step in range(first, first + steps):
        data.batch(step)
    return (time.process_time() - started) / steps


def measure(steps: int) -> dict[str, Any]:
    """Times of both data sets, in microseconds."""
    reads: list[str] = []
    watching = False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open":
            reads.append(str(arguments[0]))

    sys.addaudithook(watch)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pictures").mkdir()
        examples = make_pictures(Path(folder) / "pictures")
        encoders, cache = Encoders(), Cache(Path(folder) / "cache")
        rules = BucketRules((64,), 8)
        plain = prepare(encoders, examples, LoaderSettings(rules, dropout=0.0, variants=1), cache)
        words = LoaderSettings(rules, trigger="mika", shuffle=True, keep_tokens=1, tag_dropout=0.1)
        varied = prepare(encoders, examples, words, cache)
        calls = encoders.calls
        plain_s: list[float] = []
        varied_s: list[float] = []
        watching = True
        for number in range(ROUNDS):
            part = steps // ROUNDS
            turns = [(plain, plain_s), (varied, varied_s)]
            for data, seconds in turns if number % 2 else reversed(turns):
                seconds.append(seconds_per_batch(data, number * part, part))
        watching = False
        texts = {text for step in range(10 * varied.batches_per_epoch) for text in varied.batch(step).texts}
    fixed, full = statistics.median(plain_s), statistics.median(varied_s)
    differences = [many - one for one, many in zip(plain_s, varied_s, strict=True)]
    return {
        "images": NUM_IMAGES,
        "steps": steps,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fixed_captions_us": round(fixed * 1e6, 1),
        "varied_captions_us": round(full * 1e6, 1),
        "difference_us": round(statistics.median(differences) * 1e6, 1),
        "texts_seen_in_10_epochs": len(texts),
        "files_read": len(reads),
        "encoder_calls": encoders.calls - calls,
        "memory_mib": round(varied.nbytes() / 2**20, 1),
    }


def main() -> int:
    """Print the figures; 1 where a step reads, encodes or waits longer than 100 microseconds more."""
    parser = argparse.ArgumentParser(description="cost per step of varied captions")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = measure(options.steps)
    for name, value in result.items():
        print(f"{name:24} {value}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    ok = not result["files_read"] and not result["encoder_calls"] and result["difference_us"] <= 100
    print("ok" if ok else "NOT ok")
    return 0 if ok else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
