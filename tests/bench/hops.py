"""Files that one training step crosses: how far a reader has to go.

    python tests/bench/hops.py [--preset quickstart] [--markdown]

One step of a real run (forward, backward, optimizer, observers) is watched by `sys.setprofile`. A hop is a call from
one of our files into another. Calls inside the libraries do not count.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import emotrain
from emotrain.config.load import load_preset
from emotrain.runs import start
from emotrain.train import loop

PACKAGE = str(Path(emotrain.__file__).parent) + "/"


class Watch:
    """Counts calls between our files while it is on."""

    def __init__(self) -> None:
        self.files: Counter[str] = Counter()
        self.functions: set[tuple[str, str]] = set()
        self.changes = 0
        self._stack: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """What `sys.setprofile` calls."""
        path = frame.f_code.co_filename
        if not path.startswith(PACKAGE):
            return
        name = path.removeprefix(PACKAGE)
        if event == "call":
            self.files[name] += 1
            self.functions.add((name, frame.f_code.co_qualname))
            self.changes += bool(self._stack) and self._stack[-1] != name
            self._stack.append(name)
        elif event == "return" and self._stack:
            self._stack.pop()


def measure(preset: str, step: int = 3) -> Watch:
    """Watch step `step` of a run without validation, sample or save at that step."""
    watch, plain = Watch(), loop.train_step
    settings = ("train.max_steps=4", "validate.every=99", "save.every=99", "sample.every=0", "log.tensorboard=false")

    def watched(parts: Any, limits: Any, state: Any) -> Any:
        sys.setprofile(watch if state.step == step - 1 else None)  # until the next step begins
        return plain(parts, limits, state)

    loop.train_step = watched
    with tempfile.TemporaryDirectory() as folder:
        start.run(load_preset(preset, settings, "hops"), runs_dir=Path(folder), observers=())
    loop.train_step = plain
    return watch


def main() -> None:
    """Print the files by calls."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="quickstart")
    watch = measure(parser.parse_args().preset)
    print(f"{len(watch.files)} files, {len(watch.functions)} functions, {watch.changes} changes of file")
    for name, count in watch.files.most_common():
        print(f"{count:6} {name}")


if __name__ == "__main__":
    main()
