"""A run's folder, read for its page: whatever is missing or damaged is said on the page and costs nothing else."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from emotrain.config.load import load
from emotrain.config.schema import Preset
from emotrain.dataset.examples import Example
from emotrain.dataset.images import open_picture
from emotrain.dataset.lint_pictures import preview_of
from emotrain.dataset.lint_types import PictureRow
from emotrain.dataset.ranking import PictureScore
from emotrain.errors import EmotrainError, first_line
from emotrain.families.headers import read_header
from emotrain.files import is_regular, replace_file, strict_json
from emotrain.observers.sheet import LORA, choose_steps
from emotrain.observers.text import duration
from emotrain.report.ranking import RANKED
from emotrain.report.run_page import compare_page, run_page
from emotrain.report.run_view import Curves, Gallery, LoraFacts, Points, PromptRow, RunView, Settings
from emotrain.runs.changes import flat
from emotrain.runs.data import scan_preset
from emotrain.runs.folder import RunFolder
from emotrain.runs.lineage import Run, differences, file_digest, read_run
from emotrain.runs.pictures import actions_of, rank_pictures
from emotrain.train.events import Event, Notice, Phase

Rows = Sequence[Mapping[str, Any]]  # of a log
PAGE = "report.html"
SAMPLE_SIDE, PICTURE_SIDE = 384, 112  # pixels of the pictures on the page
MOST_SAMPLES = 240  # pictures: with more, evenly spaced steps are shown
TINY = 128  # pixels: smaller samples are enlarged without smoothing
_SAMPLE = re.compile(r"step-(\d{1,12})-(\d{1,4})\.png")
_STRENGTH = re.compile(r"strength-(\d{1,2}\.\d{2})-\d{1,4}\.png")


def write_at_end(folder: RunFolder, examples: Sequence[Example], notify: Callable[[Event], None]) -> Path | None:
    """Write the page of a run that has just ended. A page is no reason to fail: whatever goes wrong is a notice.

    Returns:
        Its path, or None where it could not be written.
    """
    notify(Phase("writing the page"))
    if reason := write_page(folder, examples):
        notify(Notice(f"{PAGE} was not written: {reason}"))
    notify(Phase("writing the page", 1, 1))
    return None if reason else folder.path / PAGE


def write_page(
    folder: RunFolder, examples: Sequence[Example], previews: Previews | None = None, refresh_s: int = 0
) -> str:
    """Put the page of a run, see `page_of`, in the place of an earlier one; why it was not, "" where it was."""
    try:
        replace_file(folder.path / PAGE, page_of(folder, examples, previews, refresh_s).encode("utf-8"))
    except Exception as error:  # decoders and templates raise anything, and the LoRA is worth more than its page
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def page_of(
    folder: RunFolder, examples: Sequence[Example] | None = None, previews: Previews | None = None, refresh_s: int = 0
) -> str:
    """The page of one run.

    Args:
        folder: of a run in whatever state.
        examples: its pictures where they are already known.
        previews: those of an earlier page of it.
        refresh_s: seconds after which the open page loads itself again; 0: never.
    """
    return run_page(view(folder, examples, previews=previews), refresh_s)


def page_of_several(folders: Sequence[RunFolder], beside: Path) -> str:
    """The page that sets runs side by side, or lists many; its links are relative to the folder `beside`."""
    views = [view(folder, (), brief=True) for folder in folders]
    links = [_link(folder.path / PAGE, beside) for folder in folders]
    try:
        rows = differences([read_run(folder) for folder in folders])
    except EmotrainError:  # the run's own view says which preset cannot be read
        rows = []
    return compare_page(views, [(key, [_text(value) for value in values]) for key, values in rows], links)


def _link(page: Path, beside: Path) -> str:
    """A page as another one links to it; empty where it is not there, or on another drive."""
    try:
        return quote(Path(os.path.relpath(page, beside)).as_posix()) if is_regular(page) else ""
    except ValueError:
        return ""


class Previews:
    """Small JPEGs, kept from one page of a run to the next.

    Args:
        seconds: how long one page may make new ones, from `begin` on; pictures that come later wait for the next page.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        self._seconds = seconds
        self._made: dict[tuple[str, int, int, int], bytes] = {}
        self._until = math.inf

    def begin(self) -> None:
        """A new page."""
        self._until = time.monotonic() + self._seconds

    def of(self, path: Path, side: int) -> bytes:
        """A JPEG of at most `side` pixels; empty where there is no picture that can be read, or no time is left."""
        try:
            found = path.stat()
            key = (str(path), found.st_mtime_ns, found.st_size, side)
            if key not in self._made and is_regular(path) and time.monotonic() < self._until:
                self._made[key] = preview_of(open_picture(path), side)
            return self._made.get(key, b"")
        except (EmotrainError, OSError):
            return b""


def view(
    folder: RunFolder,
    examples: Sequence[Example] | None = None,
    *,
    brief: bool = False,
    previews: Previews | None = None,
) -> RunView:
    """Everything that a page shows of a run.

    Args:
        folder: of a run in whatever state.
        examples: the pictures; None scans the preset's folders for them, empty shows none.
        brief: one sample of each prompt is enough: the LoRA's own, or the best or last step's.
        previews: those of an earlier page of the run.
    """
    previews = previews or Previews()
    previews.begin()
    run, missing = read_run(folder), list[str]()
    info, status = run.info, _status(run)
    steps, validations = (_rows(folder.path / name, missing) for name in ("metrics.jsonl", "validation.jsonl"))
    preset = _preset(folder, missing)
    likenesses = _rows(path, missing) if is_regular(path := folder.path / "likeness.jsonl") else []
    curves = _curves(steps, validations, likenesses)
    base_loss = _number(info.get("base_loss")) or _last(validations, "base_loss")
    best_loss, best_step = _number(info.get("best_loss")), _number(info.get("best_step"))
    if best_loss is None or best_step is None:  # run.json says it at the end alone
        best_loss, best_step = _last(validations, "best_loss"), _last(validations, "best_step")
    last_step = int(curves.loss[-1][0]) if curves.loss else None
    ranking = _ranking(folder, missing)
    why, command = _why(folder, info, status, last_step)
    return RunView(
        name=folder.name,
        path=str(folder.path),
        status=status,
        why=why,
        command=command,
        facts=_facts(info, preset, steps, last_step, len(ranking)),
        last_step=last_step,
        best_step=None if best_step is None else int(best_step),
        best_loss=best_loss,
        base_loss=base_loss,
        likeness=_held_against(likenesses),
        same_validation=_same_validation(info, base_loss),
        curves=curves,
        gallery=_gallery(folder, preset, None if best_step is None else int(best_step), status, brief, previews),
        settings=_settings(info, preset, missing),
        ranking=ranking,
        actions=actions_of(info),
        pictures=_pictures(ranking[:RANKED], preset, examples, missing, previews),
        lora=_lora(folder, info, preset, missing),
        missing=tuple(dict.fromkeys(missing)),
    )


def _status(run: Run) -> str:
    """How it ended; while it still holds its lock, run.json may already say so."""
    reason = run.info.get("stop_reason")
    return run.status if not run.info or reason is None else str(reason)


def _why(folder: RunFolder, info: Mapping[str, Any], status: str, last_step: int | None) -> tuple[str, str]:
    """The reason in a sentence, and how the run is resumed."""
    words = {
        "running": "the page shows what was written up to now",
        "crashed": "its process ended without handing over a LoRA",
        "damaged": "what it says of the run cannot be read",
    }
    why = words.get(status) or str(info.get("stop_sentence") or "")
    if status in ("running", "crashed") and last_step is not None:
        why += f"; the last step in its log is {last_step}"
    goes_on = status in ("interrupted", "crashed") and folder.has_checkpoint
    command = f"emotrain resume {shlex.quote(str(folder.path))}" if goes_on else ""
    return why, command


def _rows(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    """The JSON lines of a log. The half line that a running or crashed process leaves is no fault."""
    if path.is_symlink() or not is_regular(path):
        missing.append(f"{path.name}, which is not there")
        return []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        missing.append(f"{path.name}, which cannot be read ({error.strerror})")
        return []
    rows, bad = [], 0
    for number, line in enumerate(lines, 1):
        try:
            row = strict_json(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(_number(row.get("step")), float):
            rows.append(row)
        elif number < len(lines):
            bad += 1
    if bad:
        missing.append(f"{bad} lines of {path.name}, which are damaged")
    return sorted(rows, key=lambda row: float(row["step"]))


def _number(value: object) -> float | None:
    """A finite number as a float, None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 else None


def _last(rows: Rows, key: str) -> float | None:
    return _number(rows[-1].get(key)) if rows else None


def _points(rows: Rows, key: str) -> Points:
    pairs = ((float(row["step"]), _number(row.get(key))) for row in rows)
    return tuple((step, value) for step, value in pairs if value is not None)


def _curves(steps: Rows, validations: Rows, likenesses: Rows) -> Curves:
    own = {name: _points(steps, name) for name in ("loss", "scalar", "trust", "pulse")}
    return Curves(validation=_points(validations, "loss"), likeness=_points(likenesses, "likeness"), **own)


def _held_against(likenesses: Rows) -> tuple[tuple[str, float], ...]:
    """What the likeness is held against, as the last row of its log says it."""
    names = (("without", "base_likeness"), ("pictures", "among_pictures"))
    return tuple((label, value) for label, key in names if (value := _last(likenesses, key)) is not None)


def _same_validation(info: Mapping[str, Any], base_loss: float | None) -> object:
    """Equal for runs that were validated alike: the base's own loss tells pictures, noise and sizes apart."""
    base = info.get("base_sha256")
    if base_loss is None or not isinstance(base, str):
        return None
    return base, json.dumps(info.get("held_out"), sort_keys=True), f"{base_loss:.4g}"


def _facts(
    info: Mapping[str, Any], preset: Preset | None, steps: Rows, last: int | None, ranked: int
) -> tuple[tuple[str, str], ...]:
    seconds = math.fsum(value for _, value in _points(steps, "step_s"))
    facts = [("steps", "" if last is None else str(last))]
    facts.append(("training time", duration(seconds)))
    facts.append(("pictures", str(ranked) if ranked else ""))
    facts.append(("likeness of the LoRA", _likeness_of_lora(info)))
    if preset is not None:
        facts.append(("base model", Path(preset.model.base).name))
        facts.append(("optimizer", preset.train.optimizer.name))
    facts += [(word, str(info.get(key) or "")) for word, key in (("family", "family"), ("device", "device"))]
    facts.append(("seed", "" if info.get("seed") is None else str(info.get("seed"))))
    facts.append(("started (UTC)", str(info.get("started") or "")[:16].replace("T", " ")))
    facts.append(("emotrain", str(info.get("emotrain") or "")))
    return tuple((label, value) for label, value in facts if value)


def _likeness_of_lora(info: Mapping[str, Any]) -> str:
    found = info.get("likeness")
    value, base = (_number(found.get(key)) for key in ("lora", "base")) if isinstance(found, dict) else (None, None)
    if value is None:
        return ""
    return f"{value:.3f}" + ("" if base is None else f" (without: {base:.3f})")


def _preset(folder: RunFolder, missing: list[str]) -> Preset | None:
    try:
        return load(folder.preset_path).preset
    except (EmotrainError, OSError) as error:
        missing.append(f"preset.yaml, which cannot be read: {first_line(error)}")
        return None


def _settings(info: Mapping[str, Any], preset: Preset | None, missing: list[str]) -> Settings:
    if preset is None:
        return Settings()
    own = dict(flat(preset.to_share()))
    least = {"model": {"base": preset.model.base}, "dataset": {"folders": preset.dataset.folders}}
    name, base = "the defaults", Preset.model_validate(least)
    extends = info.get("extends")
    if isinstance(extends, str):
        try:
            name, base = extends, load(extends).preset
        except (EmotrainError, OSError) as error:
            missing.append(f"what differs from `{extends}`, which cannot be read: {first_line(error)}")
    there = dict(flat(base.to_dict()))
    keys = [key for key in dict.fromkeys([*own, *there]) if key != "name" and own.get(key) != there.get(key)]
    changed = tuple((key, _text(own[key]) if key in own else "–", _text(there.get(key))) for key in keys)
    return Settings(name, changed, tuple((key, _text(value)) for key, value in own.items()))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _ranking(folder: RunFolder, missing: list[str]) -> tuple[PictureScore, ...]:
    try:
        return rank_pictures(folder)
    except EmotrainError as error:
        missing.append(f"the ranking of the pictures: {first_line(error)}")
        return ()


def _pictures(
    ranking: Sequence[PictureScore],
    preset: Preset | None,
    examples: Sequence[Example] | None,
    missing: list[str],
    previews: Previews,
) -> dict[str, PictureRow]:
    """The ranked pictures with their captions and a preview, as far as they are still there."""
    if examples is None and preset is not None and ranking:
        try:
            scans = scan_preset(preset)
            examples = (*scans.train.examples, *(scans.held_out.examples if scans.held_out else ()))
        except (EmotrainError, OSError) as error:
            missing.append(f"the pictures themselves: {first_line(error)}")
    known = {one.id: one for one in examples or ()}
    rows = {}
    for score in ranking:
        one = known.get(score.id)
        if one is not None:
            preview = previews.of(one.path, PICTURE_SIDE)
            rows[one.id] = PictureRow(one.id, one.width, one.height, one.captions, preview=preview)
    return rows


def _gallery(
    folder: RunFolder, preset: Preset | None, best: int | None, status: str, brief: bool, previews: Previews
) -> Gallery:
    """The samples; the LoRA file's own last, once the run has ended well."""
    try:
        names = sorted(path.name for path in folder.samples_dir.iterdir() if not path.is_symlink())
    except OSError:
        return Gallery()
    drawn = {(int(found[1]), int(found[2])): name for name in names if (found := _SAMPLE.fullmatch(name))}
    own = [name for name in names if re.fullmatch(r"lora-\d{1,4}\.png", name)]
    own = own if status in ("signal", "max_steps") else []
    strengths = sorted({found[1] for name in names if own and (found := _STRENGTH.fullmatch(name))}, key=float)
    numbers = sorted({number for _, number in drawn} | {int(name[5:-4]) for name in own})
    if not numbers:
        return Gallery()
    most = max(2, MOST_SAMPLES // len(numbers) - bool(own) - len(strengths))
    steps = choose_steps(sorted({step for step, _ in drawn}), most, best)
    if brief:
        steps = [] if own else [best] if best in steps else steps[-1:]
        strengths = []
    rows, sides = [], []
    for number in numbers:
        files = [folder.samples_dir / drawn.get((step, number), "-") for step in steps]
        files += [folder.samples_dir / f"strength-{strength}-{number}.png" for strength in strengths]
        files += [folder.samples_dir / f"lora-{number}.png"] if own else []
        row, side = _prompt_row(files, preset, number, previews)
        rows.append(row)
        sides.append(side)
    labels = [f"step {step}" + (" (best)" if step == best else "") for step in steps]
    labels += [*(f"strength {float(strength):g}" for strength in strengths), *([LORA] if own else [])]
    return Gallery(tuple(labels), tuple(rows), lora=bool(own), pixelated=max(sides) <= TINY)


def _prompt_row(files: Sequence[Path], preset: Preset | None, number: int, previews: Previews) -> tuple[PromptRow, int]:
    """One prompt's pictures, what their files say of it, and the longest side in pixels."""
    said: dict[str, Any] = {}
    side = 0
    for path in reversed(files):
        try:
            with Image.open(path, formats=("PNG",)) as picture:
                side = max(side, *picture.size)
                text = strict_json(str(picture.info.get("emotrain", "{}")))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
        said = said or (text if isinstance(text, dict) else {})
    prompts = preset.sample.prompts if preset else ()
    fallback = str(prompts[number - 1]) if number <= len(prompts) else f"prompt {number}"
    prompt, negative = said.get("prompt", fallback), said.get("negative", "")
    numbers = {key: _number(said.get(key)) for key in ("seed", "steps", "guidance", "width", "height")}
    words = {"seed": "seed {}", "steps": "{} steps", "guidance": "guidance {}"}
    details = [text.format(f"{numbers[key]:.12g}") for key, text in words.items() if numbers[key] is not None]
    if numbers["width"] is not None and numbers["height"] is not None:
        details.append(f"{numbers['width']:g} × {numbers['height']:g}")
    if isinstance(base := said.get("base"), str) and base:
        details.append(f"on {base}")
    pictures = tuple(previews.of(path, SAMPLE_SIDE) for path in files)
    return PromptRow(str(prompt), str(negative), ", ".join(details), pictures), side


def _lora(folder: RunFolder, info: Mapping[str, Any], preset: Preset | None, missing: list[str]) -> LoraFacts | None:
    path = folder.lora_path
    if not is_regular(path):
        return None
    try:
        header = read_header(path)
    except (EmotrainError, OSError) as error:
        missing.append(f"the LoRA: {first_line(error)}")
        return None
    words = header.metadata
    modules = sum(name.endswith(("lora_down.weight", "lora_A.weight", "lokr_w1")) for name in header.shapes)
    kinds = sorted({kind for name, kind in header.dtypes.items() if not name.endswith("alpha")})
    facts = [
        ("for", words.get("modelspec.architecture", "")),
        ("of step", words.get("emotrain.step", "")),
        ("rank, alpha", ", ".join(words[key] for key in ("ss_network_dim", "ss_network_alpha") if key in words)),
        ("modules", str(modules)),
        ("numbers", ", ".join(kinds)),
        ("size", f"{path.stat().st_size / 1e6:.1f} MB"),
        ("sha256", file_digest(path) or ""),
    ]
    trigger = preset.dataset.trigger if preset else words.get("modelspec.trigger_phrase")
    return LoraFacts(str(path), tuple((label, value) for label, value in facts if value), trigger or "")
