"""Samples during a run: fixed prompts and seeds, PNGs and one contact sheet."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL.PngImagePlugin import PngInfo

from emotrain.config.prompts import SamplePrompt
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
        prompts: [trigger] filled in.
        encode: texts -> embeddings, one row each. In the place of an empty negative prompt the family may take
            something else (`no_negative`), as its stock pipeline does.
        size: width and height in pixels of prompts that say none.
    """

    def __init__(
        self,
        family: LoadedFamily,
        prompts: Sequence[SamplePrompt],
        *,
        size: tuple[int, int],
        seed: int,
        steps: int,
        guidance: float | None,
        notify: Callable[[Event], None],
    ) -> None:
        self.family, self.notify = family, notify
        self.prompts, self.negatives = tuple(p.text for p in prompts), tuple(p.negative for p in prompts)
        self.folder = Path()
        self._fresh: list[Path] = []  # not yet brought to the disk
        step = family.vae_scale * 2
        self.requests = [
            DrawRequest(
                text=family.encode_texts([prompt.text]),
                negative=self._negative(prompt.negative, family.encode_texts([prompt.negative])),
                width=(prompt.width or size[0]) // step * step,
                height=(prompt.height or size[1]) // step * step,
                seed=seed + i if prompt.seed is None else prompt.seed,
                steps=prompt.steps or steps,
                guidance=guidance if prompt.guidance is None else prompt.guidance,
            )
            for i, prompt in enumerate(prompts)
        ]

    def _negative(self, text: str, embeds: TextEmbeds) -> TextEmbeds:
        return embeds if text else self.family.no_negative(embeds)

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
            said = self.negatives[number - 1]
            negative = self._negative(said, text_of(self.family, [said], request.negative))
        return replace(request, text=text, negative=negative)

    def _draw_one(self, request: DrawRequest, number: int, path: Path) -> None:
        info = PngInfo()
        for key, text in self.describe(number, path).items():
            info.add_itxt(key, text)
        draw_sample(self.family, self._told(request, number)).save(path, pnginfo=info)

    def describe(self, number: int, path: Path) -> dict[str, str]:
        """What a picture's file says of itself: `parameters` as A1111 writes and reads it, and `emotrain` in JSON."""
        request, prompt, negative = self.requests[number - 1], self.prompts[number - 1], self.negatives[number - 1]
        size, step = f"{request.width}x{request.height}", int(path.name.split("-")[1])
        guidance = "" if request.guidance is None else f", CFG scale: {request.guidance:g}"
        lines = [prompt, *([f"Negative prompt: {negative}"] if negative else [])]
        lines.append(f"Steps: {request.steps}{guidance}, Seed: {request.seed}, Size: {size}, LoRA step: {step}")
        own = {
            "prompt": prompt, "negative": negative, "seed": request.seed, "steps": request.steps,
            "guidance": request.guidance, "width": request.width, "height": request.height, "step": step,
        }  # fmt: skip
        return {"parameters": "\n".join(lines), "emotrain": json.dumps(own)}

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
