"""Samples during a run: fixed prompts and seeds, PNGs and one contact sheet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from emotrain.families.base import DrawRequest, TextEmbeds
from emotrain.families.sampling import draw_sample
from emotrain.observers.sheet import save_sheet
from emotrain.train.durable import fsync_file, fsync_folder
from emotrain.train.events import Event, Notice, Phase, SamplesDrawn
from emotrain.train.losses import text_of
from emotrain.train.memory import OutOfMemory, with_memory

if TYPE_CHECKING:
    from emotrain.families.common import LoadedFamily


class Sampler:
    """Draws every prompt with the live weights; a picture depends on weights, prompt and seed alone.

    `folder` gets `step-00000050-1.png` and `sheet.png`; it is set once the run has one.

    Args:
        family: with the live weights.
        prompts: as shown, [trigger] filled in.
        texts: cached embeddings of the prompts, one row each; `negative` those of the empty text, in whose
            place the family may take something else (`no_negative`), as its stock pipeline does.
        size: width and height in pixels.
    """

    def __init__(
        self,
        family: LoadedFamily,
        prompts: Sequence[str],
        texts: TextEmbeds,
        negative: TextEmbeds,
        *,
        size: tuple[int, int],
        seed: int,
        steps: int,
        guidance: float | None,
        notify: Callable[[Event], None],
    ) -> None:
        self.family, self.prompts, self.notify = family, tuple(prompts), notify
        self.folder = Path()
        self._fresh: list[Path] = []  # not yet brought to the disk
        self.requests = [
            DrawRequest(
                text={key: value[i : i + 1] for key, value in texts.items()},
                negative={key: value[:1] for key, value in family.no_negative(negative).items()},
                width=size[0],
                height=size[1],
                seed=seed + i,
                steps=steps,
                guidance=guidance,
            )
            for i in range(len(prompts))
        ]

    def path(self, step: int, number: int) -> Path:
        """Where the picture of one step and prompt (counted from 1) lies."""
        return self.folder / f"step-{step:08d}-{number}.png"

    def draw(self, step: int, best_step: int | None = None) -> None:
        """Draw all prompts at this step and bring the contact sheet up to date.

        A full disk, or too little memory, costs the pictures and not the run.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            paths = []
            for number, request in enumerate(self.requests, 1):
                self.notify(Phase("drawing samples", number - 1, len(self.requests)))
                paths.append(self.path(step, number))
                with_memory("while drawing samples", partial(self._draw_one, request, number, paths[-1]))
            sheet = self.sheet(step, best_step)
            self._fresh += [*paths, sheet]
            self.notify(Phase("drawing samples", len(paths), len(paths)))
        except OSError as error:
            self.notify(Notice(f"samples of step {step} were not written: {error.strerror}"))
            return
        except OutOfMemory:
            self.notify(
                Notice(f"samples of step {step} were not drawn: out of memory; a smaller sample.size needs less")
            )
            return
        self.notify(SamplesDrawn(step, tuple(paths), self.prompts, sheet))

    def _told(self, request: DrawRequest, number: int) -> DrawRequest:
        """The request as text encoders in training understand it by now."""
        if not self.family.trained_encoders:
            return request
        with torch.no_grad():
            text = text_of(self.family, [self.prompts[number - 1]], request.text)
            negative = self.family.no_negative(text_of(self.family, [""], request.negative))
        return replace(request, text=text, negative=negative)

    def _draw_one(self, request: DrawRequest, number: int, path: Path) -> None:
        draw_sample(self.family, self._told(request, number)).save(path)

    def sync(self) -> None:
        """Bring the pictures drawn since the last call to the disk.

        Raises:
            OSError: the disk refuses.
        """
        fresh, self._fresh = dict.fromkeys(self._fresh), []
        for path in fresh:
            with contextlib.suppress(FileNotFoundError):  # its user may have taken it away
                fsync_file(path)
        for folder in (self.folder, self.folder.parent) if fresh else ():
            fsync_folder(folder)

    def sheet(self, last_step: int, best_step: int | None = None) -> Path:
        """The contact sheet of all steps up to `last_step`."""
        columns = {}
        for first in sorted(self.folder.glob("step-*-1.png")):
            step = int(first.name.split("-")[1])
            if step <= last_step:
                columns[step] = [self.path(step, number) for number in range(1, len(self.prompts) + 1)]
        return save_sheet(self.folder / "sheet.png", columns, self.prompts, best_step=best_step)
