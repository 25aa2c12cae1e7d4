"""Samples during a run: fixed prompts and seeds, PNGs and one contact sheet."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL.PngImagePlugin import PngInfo
from torch import nn

from emotrain.batch import TextEmbeds
from emotrain.config.prompts import SamplePrompt
from emotrain.families.common import DrawRequest
from emotrain.families.registry import FAMILIES
from emotrain.families.sampling import draw_sample
from emotrain.files import fsync_file, fsync_folder, replace_file
from emotrain.lora.adapter import hidden_off
from emotrain.observers.sheet import LORA, save_sheet
from emotrain.train.events import Event, Notice, Phase, SamplesDrawn
from emotrain.train.losses import text_of
from emotrain.train.memory import OutOfMemory, with_memory

if TYPE_CHECKING:
    from emotrain.families.common import LoadedFamily


class Stopped(Exception):
    """A signal came while a picture was drawn."""


class Sampler:
    """Draws every prompt with the live weights; a picture depends on weights, prompt and seed alone.

    `folder` gets `step-00000050-1.png`, `lora-1.png` and `sheet.png`; it is set once the run has one. So is `stopped`,
    which is asked before each of the denoiser's steps: a sheet takes minutes, and who presses Ctrl-C twice loses what
    was trained since the last checkpoint.

    Args:
        family: with the live weights.
        prompts: [trigger] filled in.
        encode: texts -> embeddings, one row each. In the place of an empty negative prompt the family may take
            something else (`no_negative`), as its stock pipeline does.
        size: width and height in pixels of prompts that say none.
        name: of the model that draws.
        drawing: around all pictures of a step; another model that draws gets its weights and its place there.
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
        name: str = "",
        drawing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.family, self.notify, self.name, self.drawing = family, notify, name, drawing
        self.prompts, self.negatives = tuple(p.text for p in prompts), tuple(p.negative for p in prompts)
        self.folder = Path()
        self.stopped: Callable[[], bool] = lambda: False
        self._fresh: list[Path] = []  # not yet brought to the disk
        self._strengths: dict[float, list[Path]] = {}  # pictures of the LoRA file at other strengths than 1
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

    def draw(self, step: int, best_step: int | None = None) -> list[Path]:
        """Draw all prompts at this step and bring the contact sheet up to date.

        A full disk, or too little memory, costs the pictures and not the run.

        Returns:
            A path a prompt; empty where they were not drawn.
        """
        numbers = range(1, len(self.prompts) + 1)
        paths = [self.path(step, number) for number in numbers]
        if not self._draw_all(paths, step, f"step {step}"):
            return []
        sheet = self.sheet(step, best_step)
        if sheet is not None:
            self.notify(SamplesDrawn(step, tuple(paths), self.prompts, sheet, self.name))
        return paths

    def draw_lora(self, step: int, best_step: int | None = None) -> list[Path]:
        """Draw all prompts with the LoRA file's weights, which the model must hold: the sheet's last column.

        Args:
            step: that the file is of.
            best_step: column to mark.

        Returns:
            As `draw`.
        """
        paths = self.lora_paths()
        if not self._draw_all(paths, step, LORA):
            return []
        self.sheet(None, best_step, paths)
        return paths

    def draw_strength(self, step: int, strength: float) -> None:
        """Draw all prompts with the LoRA file's weights times a strength, which the model must hold."""
        numbers = range(1, len(self.prompts) + 1)
        paths = [self.folder / f"strength-{strength:.2f}-{number}.png" for number in numbers]
        if self._draw_all(paths, step, f"strength {strength:g}", strength):
            self._strengths[strength] = paths

    def forget_lora(self) -> None:
        """Remove the pictures of an earlier LoRA file.

        Raises:
            OSError: they cannot be removed.
        """
        self._strengths = {}
        for path in (*self.lora_paths(), *self.folder.glob("strength-*.png")):
            path.unlink(missing_ok=True)

    def lora_paths(self) -> list[Path]:
        """Where the pictures of the LoRA file lie."""
        return [self.folder / f"lora-{number}.png" for number in range(1, len(self.prompts) + 1)]

    def _draw_all(self, paths: Sequence[Path], step: int, what: str, strength: float = 1.0) -> bool:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.drawing(), self._stoppable(step):
                for number, (request, path) in enumerate(zip(self.requests, paths, strict=True), 1):
                    self.notify(Phase("drawing samples", number - 1, len(paths)))
                    with_memory("while drawing samples", partial(self._draw_one, request, number, step, path, strength))
            self._fresh += paths
            self.notify(Phase("drawing samples", len(paths), len(paths)))
            return True
        except OSError as error:
            self.notify(Notice(f"samples of {what} were not written: {error.strerror}"))
        except Stopped:
            self.notify(Notice(f"samples of {what} are left out: the run stops", level="info"))
        except OutOfMemory:
            self.notify(Notice(f"samples of {what} were not drawn: out of memory; a smaller sample.size needs less"))
        return False

    def lacks(self, step: int) -> bool:
        """Whether a picture of a step is not there."""
        return not all(self.path(step, number).is_file() for number in range(1, len(self.prompts) + 1))

    @contextlib.contextmanager
    def _stoppable(self, step: int) -> Iterator[None]:
        """Let `stopped` end a picture; not before the first step, of which no checkpoint is saved."""

        def look(module: nn.Module, args: object) -> None:
            if step and self.stopped():
                raise Stopped

        hook = self.family.denoiser.register_forward_pre_hook(look)
        try:
            yield
        finally:
            hook.remove()

    def _told(self, request: DrawRequest, number: int) -> DrawRequest:
        """The request as text encoders in training understand it by now."""
        if not self.family.trained_encoders:
            return request
        with torch.no_grad():
            text = text_of(self.family, [self.prompts[number - 1]], request.text)
            said = self.negatives[number - 1]
            negative = self._negative(said, text_of(self.family, [said], request.negative))
        return replace(request, text=text, negative=negative)

    def _draw_one(self, request: DrawRequest, number: int, step: int, path: Path, strength: float) -> None:
        info = PngInfo()
        for key, text in self.describe(number, step, strength).items():
            info.add_itxt(key, text)
        with hidden_off(self.family.denoiser, *(part.encoder for part in self.family.text_encoders)):
            picture = draw_sample(self.family, self._told(request, number))
        stream = io.BytesIO()
        picture.save(stream, "PNG", pnginfo=info)
        replace_file(path, stream.getvalue(), sync=False)  # and not through a link that lies there

    def describe(self, number: int, step: int, strength: float = 1.0) -> dict[str, str]:
        """What a picture's file says of itself: `parameters` as A1111 writes and reads it, and `emotrain` in JSON."""
        request, prompt, negative = self.requests[number - 1], self.prompts[number - 1], self.negatives[number - 1]
        size = f"{request.width}x{request.height}"
        guidance = "" if request.guidance is None else f", CFG scale: {request.guidance:g}"
        lines = [prompt, *([f"Negative prompt: {negative}"] if negative else [])]
        layer = self.family.clip_skip
        skip = f", Clip skip: {layer}" if layer != FAMILIES[self.family.name].clip_skip else ""
        model = f", Model: {self.name}" if self.name else ""
        of = f"LoRA step: {step}" + (f", LoRA strength: {strength:g}" if strength != 1.0 else "")
        lines.append(f"Steps: {request.steps}{guidance}, Seed: {request.seed}, Size: {size}{skip}{model}, {of}")
        own = {
            "prompt": prompt, "negative": negative, "seed": request.seed, "steps": request.steps,
            "guidance": request.guidance, "width": request.width, "height": request.height, "step": step,
            "strength": strength, "base": self.name,
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

    def sheet(self, last_step: int | None, best_step: int | None, lora: Sequence[Path] = ()) -> Path | None:
        """The contact sheet of all steps up to `last_step` (None: of all), and of the LoRA file.

        None where it cannot be written, which costs the sheet alone.
        """
        columns = {}
        for first in sorted(self.folder.glob("step-*-1.png")):
            step = int(first.name.split("-")[1])
            if last_step is None or step <= last_step:
                columns[step] = [self.path(step, number) for number in range(1, len(self.prompts) + 1)]
        path = self.folder / "sheet.png"
        try:
            strengths = {f"strength {strength:g}": paths for strength, paths in self._strengths.items()} if lora else {}
            save_sheet(
                path, columns, self.prompts, strengths=strengths, lora=lora, best_step=best_step, drawn_on=self.name
            )
        except OSError as error:
            self.notify(Notice(f"{path.name} was not written: {error.strerror}"))
            return None
        self._fresh.append(path)
        return path
