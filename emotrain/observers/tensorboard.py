"""TensorBoard event files, written by torch's SummaryWriter."""

from __future__ import annotations

import contextlib
import html
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from emotrain.errors import ConfigError
from emotrain.observers.text import clean
from emotrain.train.events import Event, LikenessMeasured, RunEnd, RunStart, SamplesDrawn, StepEnd, ValidationEnd

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FLUSH_S = 20


class TensorBoard:
    """Curves (the tagged fields of the events), sample sheets, and the run's facts as text.

    A resumed run writes a second file that tells TensorBoard to drop the steps after `start_step`.

    Args:
        log_dir: folder of the event files; made at `RunStart`.

    Raises:
        ConfigError: the package `tensorboard` is not installed.
    """

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._writer: SummaryWriter | None = None
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "log.tensorboard is on, but the package `tensorboard` is not installed",
                hint="`pip install tensorboard`, or set `log.tensorboard: false`",
            ) from error

    def handle(self, event: Event) -> None:
        """Write steps, validations, likenesses, sheets and facts."""
        if isinstance(event, RunStart):
            self._open(event)
        if self._writer is None:
            return
        if isinstance(event, StepEnd | ValidationEnd | LikenessMeasured):
            for tag, value in event.curves().items():
                self._writer.add_scalar(tag, value, event.step)
        elif isinstance(event, SamplesDrawn):
            self._sheet(self._writer, event)
        elif isinstance(event, RunEnd):
            self._writer.add_text("run/end", as_code([("why it ended", event.sentence)]), event.step)
            self._writer.flush()

    def close(self) -> None:
        """Write what is queued and close the file."""
        if self._writer is not None:
            with contextlib.suppress(OSError):  # of a folder that is gone: `handle` has raised the same
                self._writer.close()
            self._writer = None

    def _open(self, start: RunStart) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        self._writer = SummaryWriter(
            str(self._log_dir),
            purge_step=start.start_step + 1 if start.start_step else None,
            flush_secs=FLUSH_S,
            filename_suffix=f".{os.getpid()}-{start.start_step}",
        )
        facts = [
            ("name", start.name),
            ("optimizer", start.optimizer),
            ("device", start.device),
            ("pictures", str(start.num_images)),
            ("modules", str(start.num_modules)),
            ("parameters", f"{start.num_parameters:,}"),
            *start.facts,
        ]
        self._writer.add_text("run", as_code(facts), start.start_step)

    def _sheet(self, writer: SummaryWriter, event: SamplesDrawn) -> None:
        """The sheet as `samples`, and each prompt's own picture as `samples/1`, which has a slider over the steps."""
        own = [(f"samples/{number}", path) for number, path in enumerate(event.paths, start=1)]
        for tag, path in [("samples", event.sheet), *own]:
            try:
                with Image.open(path) as picture:
                    pixels = np.asarray(picture.convert("RGB"))  # [H, W, 3], uint8
            except OSError:
                continue  # gone or half written: a picture less, not a run less
            writer.add_image(tag, pixels, event.step, dataformats="HWC")
        prompts = [(f"prompt {i}", text) for i, text in enumerate(event.prompts, start=1)]
        writer.add_text("samples/prompts", as_code(prompts), event.step)


def as_code(rows: list[tuple[str, str]]) -> str:
    """Label and value a line, for a page that renders markdown and HTML: indented as code, angle brackets escaped."""
    return "\n".join(f"    {safe(label)}: {safe(value)}" for label, value in rows)


def safe(text: str) -> str:
    """One clean line without angle brackets."""
    return html.escape(clean(text), quote=False)
