"""What can be found out about a preset before torch is loaded: model, sizes, data, earlier LoRAs.

Nothing is trained, and nothing stays on the disk. `check` shows all of it; `run` and `plan` stop at the failures.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from emotrain.config.builtin import is_builtin
from emotrain.config.schema import Preset
from emotrain.config.source import place_of
from emotrain.dataset.balance import folder_shares
from emotrain.dataset.lint_pool import Progress
from emotrain.dataset.scan import Scan, require_pictures
from emotrain.errors import ConfigError, DatasetError, EmotrainError, ModelError, Problem
from emotrain.families.headers import read_header, read_json
from emotrain.families.memory import is_installed, unusable
from emotrain.families.ram import ram
from emotrain.families.sniff_file import refuse_incomplete
from emotrain.families.table import FAMILIES, Sniffed, sniff
from emotrain.runs.data import Pictures, Scans, pictures_of, scan_preset
from emotrain.runs.folder import named_in, refuse_place
from emotrain.runs.lint import Options, lint_scans

if TYPE_CHECKING:
    from emotrain.runs.sample_base import Other

Where = Callable[[str], str]
CLIP_LAYERS = 12  # of CLIP-L
SHOWN = 20  # errors of the data that are told one by one
SMALL_RUN, PICTURE = 4 << 30, 1 << 20  # bytes that a built-in model's run and each of its pictures never take
OPTIMIZER_TITLES = {
    "emosens": "EmoSens", "emoairy": "EmoAiry", "emocats": "EmoCats", "emonavi": "EmoNavi", "emofact": "EmoFact",
    "emolynx": "EmoLynx", "emotion": "EmoTion", "emovoid": "EmoVoid", "adamw": "AdamW", "lion": "Lion",
    "prodigy": "Prodigy", "schedulefree": "schedule-free AdamW", "adafactor": "Adafactor",
}  # fmt: skip
_PACKAGES = {"prodigy": "prodigyopt", "schedulefree": "schedulefree"}


@dataclass
class Preflight:
    """What was found: facts as (label, value), warnings, and failures in the order of the steps."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    failures: list[EmotrainError] = field(default_factory=list)
    found: Sniffed | None = None
    scan: Scan | None = None
    pictures: Pictures | None = None
    other: Other | None = None  # the model that samples are drawn on, where that is another one

    @contextmanager
    def failing(self, place: str = "") -> Iterator[None]:
        """An error from within is one of the failures, with its place in the preset where that is known."""
        try:
            yield
        except EmotrainError as error:
            self.failures.append(type(error)(f"{place}: {error.message}", error.hint) if place else error)

    def raise_first(self) -> None:
        """Raise one error that holds the problems of all failures; its kind is the first one's.

        Raises:
            EmotrainError: if there is any failure.
        """
        if not self.failures:
            return
        problems = tuple(problem for failure in self.failures for problem in failure.problems)
        first = self.failures[0]
        raise type(first)(first.message, first.hint, problems=problems)


def preflight(
    preset: Preset,
    where: Where | None = None,
    progress: Progress | None = None,
    runs_dir: Path | None = None,
    *,
    by_size: bool = False,
    pictures: Pictures | None = None,
) -> Preflight:
    """Look at everything that a preset names, every picture included.

    Args:
        preset: a loaded preset.
        where: key -> file:line, for the messages (`LoadedPreset.where`).
        progress: told (done, total) of the pictures decoded.
        runs_dir: where the run is to be made; None leaves that out.
        by_size: take public models for what their built-in sizes say; nothing of them is fetched.
        pictures: in place of those of the preset's folders, which are not looked at.
    """
    result = Preflight()
    if runs_dir is not None:
        preset = named_in(runs_dir, preset)
    at: Where = where or (lambda key: "preset")
    _look_at_model(preset, result, at, by_size)
    if result.found is not None:
        steps = (_check_network, _check_sizes, _check_clip_skip)
        for step in steps:
            problems = step(preset, result.found, at)
            if problems:
                first = problems[0]
                result.failures.append(ConfigError(first.message, first.hint, problems=tuple(problems)))
    _look_at_parts(preset, result, at)
    _look_at_parents(preset, result, at)
    _look_at_sample_base(preset, result, at, by_size)
    _look_at_likeness(preset, result, at)
    _rehearse(preset, result)
    if pictures is None:
        _look_at_data(preset, result, progress)
    result.pictures = pictures or result.pictures
    result.failures.extend(_missing_packages(preset, at))
    if runs_dir is not None:
        with result.failing():
            refuse_place(runs_dir, preset.name)
    _describe(preset, result)
    return result


def _look_at_model(preset: Preset, result: Preflight, at: Where, by_size: bool) -> None:
    model = preset.model
    try:
        found = sniff(model.base, "auto", model.revision, model.prediction, by_size=by_size)
    except EmotrainError as error:
        result.failures.append(error)
        return
    if model.family not in ("auto", found.family):
        what = f"model.family is `{model.family}`, but {model.base} is {found.describe()}"
        hint = f"write `family: {found.family}`, or leave it out"
        result.failures.append(ConfigError(f"{at('model.family')}: {what}", hint))
        return
    with result.failing():
        refuse_incomplete(found, has_vae=model.vae is not None, has_text=model.text_encoder is not None)
    result.found = found
    size = f"{found.resolution} px"
    title = FAMILIES[found.family].title
    variant = f", {found.variant}" if found.variant not in (found.family, "custom") else ""
    result.facts.append(("model", f"{model.base}: {title}{variant}, {found.prediction}, {size}"))


def _rehearse(preset: Preset, result: Preflight) -> None:
    """Put the run together without weights, where the preset or the model is such that a part could refuse it."""
    network, model = preset.network, preset.model
    told = (
        not isinstance(network.targets, str) or network.rank_pattern or network.type != "lora" or network.text_encoder,
        preset.start_from.continue_ is not None or preset.start_from.stack,
        preset.train.loss != type(preset.train.loss)() or model.prediction != "auto",
        preset.save.format != "auto" or preset.train.optimizer.name in _PACKAGES,
    )
    if result.found is None or result.failures:
        return
    if not any(told) and (is_builtin(model.base) or result.found.kind == "hub"):
        return
    from emotrain.runs.rehearsal import rehearse  # needs torch, which costs seconds

    with result.failing():
        rehearse(preset, result.found, whole=any(told))


def _look_at_encoder(preset: Preset, found: Sniffed, result: Preflight, at: Where) -> None:
    """Whether the text encoder's file or folder is what the model takes; its weights are not read."""
    separate = FAMILIES[found.family].separate_files and found.kind == "file"
    for key in ("text_encoder", "tokenizer"):
        if getattr(preset.model, key) is not None and not separate:
            message = (
                f"{at(f'model.{key}')}: model.{key} is not read: `{preset.model.base}` is no model whose parts are "
                "separate files"
            )
            result.failures.append(ConfigError(message, "leave it out"))
    if not separate:
        return
    from emotrain.families.separate import refuse_other_encoder  # needs torch, which costs seconds

    with result.failing():
        refuse_other_encoder(found, preset.model.text_encoder)


def _check_network(preset: Preset, found: Sniffed, at: Where) -> list[Problem]:
    network, most = preset.network, found.max_rank
    if network.type == "lokr":
        return _check_lokr(preset, found, at)
    reason = f"more than the {most} that the widest layer of the model has"
    hint = "8 to 64 is usual"
    problems = []
    for key, rank in (("rank", network.rank), ("conv_rank", network.conv_rank)):
        if rank > most:
            message = f"{at(f'network.{key}')}: network.{key} is {rank}, {reason}"
            problems.append(Problem(message, hint))
    for pattern, rank in network.rank_pattern.items():
        if rank > most:
            message = f"{at('network.rank_pattern')}: the rank of `{pattern}` is {rank}, {reason}"
            problems.append(Problem(message, hint))
    return problems


def _check_lokr(preset: Preset, found: Sniffed, at: Where) -> list[Problem]:
    """Refuse a layout that has q, k and v as one layer: three LoKrs are none of all three."""
    facts, format = FAMILIES[found.family].lora, preset.save.format
    if format == "auto" or not facts.joins(format):
        return []
    message = (
        f"{at('save.format')}: save.format is `{format}`, which has several layers of the model as one: "
        "no LoKr fits that"
    )
    return [Problem(message, f"write `format: {facts.layout}`, or leave it out")]


def _check_clip_skip(preset: Preset, found: Sniffed, at: Where) -> list[Problem]:
    """Refuse a layer of CLIP that the model has not, or that its family never takes."""
    skip, own = preset.model.clip_skip, FAMILIES[found.family].clip_skip
    if skip == "auto":
        return []
    words = f"{at('model.clip_skip')}: model.clip_skip is {skip}"
    if not own:
        title = FAMILIES[found.family].title
        return [Problem(f"{words}, and {title} takes no layer of CLIP before the last", "leave it out")]
    if skip < own:
        hint = f"write {own}, which is what it does by itself, or leave it out"
        return [Problem(f"{words}, and {FAMILIES[found.family].title} never takes a later one than {own}", hint)]
    config = Path(found.path) / "text_encoder" / "config.json"
    is_there = found.kind == "folder" and config.is_file()
    layers = read_json(config).get("num_hidden_layers") if is_there else CLIP_LAYERS
    if isinstance(layers, int) and skip > layers:
        return [Problem(f"{words}, and its text encoder has {layers} layers", "1 or 2 is usual")]
    return []


def _check_sizes(preset: Preset, found: Sniffed, at: Where) -> list[Problem]:
    buckets = preset.dataset.buckets
    step = buckets.step or found.bucket_step
    least = least_step(found)
    problems = []
    if step % least:
        problems.append(
            Problem(
                f"{at('dataset.buckets.step')}: dataset.buckets.step is {step}, and the model "
                f"takes multiples of {least}",
                _nearest(step, least),
            )
        )
        step = math.lcm(step, least)
    sizes = [("dataset.resolution", side, step) for side in preset.dataset.resolution]
    sizes += [("dataset.buckets.min", buckets.min or step, step)]
    sizes += [("dataset.buckets.max", buckets.max or step, step)]
    sizes += [("sample.size", preset.sample.size or least, least)]
    for key, side, multiple in sizes:
        if side % multiple:
            message = f"{at(key)}: {key} is {side}, which is not a multiple of {multiple}"
            problems.append(Problem(message, _nearest(side, multiple)))
    return problems


def least_step(found: Sniffed) -> int:
    """Pixels that the model's sides must be multiples of: its VAE's and its denoiser's halvings."""
    levels = found.denoiser_config.get("block_out_channels")
    return found.vae_scale * (2 ** (len(levels) - 1) if levels else FAMILIES[found.family].patch)


def _nearest(side: int, step: int) -> str:
    below, above = side // step * step, -(-side // step) * step
    return f"the nearest is {above}" if not below else f"the nearest are {below} and {above}"


def _look_at_parts(preset: Preset, result: Preflight, at: Where) -> None:
    """Parts of the model that lie elsewhere: there, readable, and the text encoder of the model's size."""
    for key in ("vae", "text_encoder", "tokenizer"):
        part = getattr(preset.model, key)
        if part is not None and Path(part).is_absolute() and not Path(part).exists():
            message = f"{at(f'model.{key}')}: {part} does not exist"
            result.failures.append(ModelError(message, "paths are relative to the preset's file"))
        elif part is not None and Path(part).is_file():
            with result.failing():
                read_header(Path(part))
    if result.found is not None and not result.failures and preset.model.vae is not None:
        from emotrain.families.fitting import refuse_misfit_vae  # needs torch, which costs seconds

        with result.failing():
            refuse_misfit_vae(preset.model.vae, result.found)
    if result.found is not None and not result.failures:
        _look_at_encoder(preset, result.found, result, at)


def _look_at_parents(preset: Preset, result: Preflight, at: Where) -> None:
    """The earlier LoRAs: there, readable, and of the model's family."""
    start = preset.start_from.continue_
    wanted = [(f"start_from.stack.{index}.path", item.path) for index, item in enumerate(preset.start_from.stack)]
    wanted += [("start_from.continue", start)] if start is not None else []
    if not wanted:
        return
    from emotrain.lora.file import read_lora  # needs torch, which costs seconds
    from emotrain.lora.origin import require_family
    from emotrain.runs import parents

    for key, path in wanted:
        with result.failing(at(key)):
            file = read_lora(parents.lora_of(path))
            if (line := file.left_out) is not None:
                result.warnings.append(line)
            if result.found is not None:
                require_family(file.family, result.found.family, str(file.path))
                if key == "start_from.continue" and file.is_lokr:
                    file.refuse_mixture()
                    result.failures += [ConfigError(p.message, p.hint) for p in _check_lokr(preset, result.found, at)]
            if key == "start_from.continue":
                result.facts.append(("continues", parents.continued(file)))


def _look_at_sample_base(preset: Preset, result: Preflight, at: Where, by_size: bool) -> None:
    """The model that samples are drawn on, and in how many steps."""
    sample, found = preset.sample, result.found
    if found is None or not sample.every or not sample.prompts:
        return
    if sample.base is not None and not result.failures:
        from emotrain.runs.sample_base import look  # needs torch, which costs seconds

        try:
            result.other = look(preset, found, by_size=by_size)
        except EmotrainError as error:
            place = place_of(at("sample.base"), "sample.base")
            result.failures.append(type(error)(f"{place}: {error.message}", error.hint))
            return
        found = result.other.found if result.other is not None else found
    if sample.base is not None or found.distilled:
        result.facts.append(("samples", _how_drawn(preset, found)))


def _look_at_likeness(preset: Preset, result: Preflight, at: Where) -> None:
    """The vision model that samples and pictures are compared with."""
    folder = preset.validate_.likeness
    if folder is None or not preset.sample.every or not preset.sample.prompts:
        return
    from emotrain.runs.likeness import refuse_unusable  # needs torch, which costs seconds

    with result.failing(place_of(at("validate.likeness"), "validate.likeness")):
        refuse_unusable(Path(folder))
        result.facts.append(("likeness", f"samples and pictures are compared by {Path(folder).name}"))


def _how_drawn(preset: Preset, found: Sniffed) -> str:
    """Which model draws, with what."""
    sample = preset.sample
    steps = found.steps_of_sample(sample.steps)
    scale = found.sample_guidance if sample.guidance == "auto" else sample.guidance
    guidance = "the family's guidance" if scale is None else "no guidance" if scale == 1.0 else f"guidance {scale:g}"
    kind = "distilled: " if found.distilled else ""
    return f"drawn on {found.name}, {kind}{steps} steps, {guidance}"


def _look_at_data(preset: Preset, result: Preflight, progress: Progress | None) -> None:
    with result.failing():
        scans = scan_preset(preset)
        found = result.scan = require_pictures(scans.train)
        result.facts.append(("data", found.totals()))
        pictures = result.pictures = pictures_of(preset, scans)
        result.facts.append(("epoch", _epoch(preset, pictures)))
        if len(preset.dataset.folders) > 1:
            shares = folder_shares(pictures.train, preset.dataset.folders)
            result.facts.append(("balance", ", ".join(share.describe() for share in shares)))
        if (word := preset.dataset.class_) is not None:
            result.facts.append(("class", f"`{word}` is kept near to what it was, in half of the steps"))
        if scans.held_out is not None:
            result.facts.append(("validate", require_pictures(scans.held_out).totals()))
        if result.found is not None and not result.failures:
            _lint(preset, result, scans, progress)


def _lint(preset: Preset, result: Preflight, scans: Scans, progress: Progress | None) -> None:
    """Decode every picture once: errors are failures, all warnings make one line."""
    assert result.found is not None
    report = lint_scans(preset, result.found, scans, Options(progress=progress))
    errors = [finding for finding in report.findings if finding.severity == "error"]
    if errors:
        hints = [finding.hint or "fix it, or take it out of the folder" for finding in errors[:SHOWN]]
        problems = [
            Problem(f"{finding.file} {finding.message}", hint if hint not in hints[place + 1 :] else None)
            for place, (finding, hint) in enumerate(zip(errors, hints, strict=False))
        ]
        rest = len(errors) - SHOWN
        if rest > 0:
            problems.append(Problem(f"and {rest} more files that cannot be used", "`emotrain lint` lists them all"))
        result.failures.append(DatasetError(problems[0].message, problems[0].hint, problems=tuple(problems)))
    counts = Counter(finding.code for finding in report.findings if finding.severity == "warning")
    if counts:
        listed = ", ".join(f"{count} {code}" for code, count in counts.most_common())
        result.warnings.append(
            f"the data has {counts.total()} warning{'s' * (counts.total() != 1)} ({listed}); `emotrain lint` says more"
        )


def _epoch(preset: Preset, pictures: Pictures) -> str:
    """The sum that everybody has to do in their head otherwise, in words."""
    train = preset.train
    samples = sum(example.repeats for example in pictures.train)
    repeated = f" seen {samples} times" if samples != len(pictures.train) else ""
    held = f" ({len(pictures.held_out)} more held out)" if pictures.held_out else ""
    steps = math.ceil(samples / (train.micro_batch_size * train.gradient_accumulation_steps))
    batch = f"batches of {train.micro_batch_size}"
    if train.gradient_accumulation_steps > 1:
        batch += f", {train.gradient_accumulation_steps} of them a step"
    return (
        f"{len(pictures.train)} pictures{held}{repeated} in {batch}: about {steps} steps an epoch, "
        f"at most {train.max_steps} steps"
    )


def _missing_packages(preset: Preset, at: Where) -> list[EmotrainError]:
    found: list[EmotrainError] = []
    optimizer, model = preset.train.optimizer.name, preset.model
    if optimizer in _PACKAGES and not is_installed(_PACKAGES[optimizer]):
        words = f"{at('train.optimizer')}: train.optimizer `{optimizer}` needs the package {_PACKAGES[optimizer]}"
        found.append(ConfigError(words, "pip install 'emotrain[optimizers]'"))
    for key, form in (("quantize", model.quantize), ("quantize_text_encoders", model.quantize_text_encoders)):
        if (lacking := unusable(form)) is not None:
            found.append(ConfigError(f"{at(f'model.{key}')}: model.{key} `{form}` {lacking[0]}", lacking[1]))
    return found


def look_at_ram(preset: Preset, result: Preflight) -> None:
    """Whether the computer's memory holds what a run needs of it."""
    if result.found is None or result.pictures is None or result.failures:
        return
    small = SMALL_RUN + PICTURE * len(result.pictures.all)
    if is_builtin(preset.model.base) and ram().free > small:
        return
    from emotrain.runs.build import loader_settings  # needs torch, which costs seconds
    from emotrain.runs.plan import plan_run
    from emotrain.runs.plan_ram import room

    settings = loader_settings(preset, result.found)
    _, plan = plan_run(preset, result.found, result.pictures, settings, other=result.other)
    with result.failing():
        _, tight = room(plan, ram())
        result.warnings += [tight] if tight is not None else []


def _describe(preset: Preset, result: Preflight) -> None:
    network, train = preset.network, preset.train
    targets = network.targets if isinstance(network.targets, str) else ", ".join(network.targets)
    alpha = network.alpha if network.alpha is not None else network.rank
    texts = " and the CLIP text encoders" if network.text_encoder else ""
    if preset.start_from.continue_ is None:
        kind = f"LoRA of rank {network.rank}, alpha {alpha:g}"
        if network.type == "lokr":
            kind = f"LoKr with factor {network.factor}"
        result.facts.append(("network", f"{kind}, on {targets}{texts}"))
    lr = "automatic LR" if train.lr is None else f"lr {train.lr:g}"
    stop = {"trusted": "automatic stop", "signal": "stop at the optimizer's signal", "off": "no automatic stop"}
    name = OPTIMIZER_TITLES.get(train.optimizer.name, train.optimizer.name)
    result.facts.append(("optimizer", f"{name}, {lr}, {stop[preset.stop.mode]}"))
    if preset.log.notify is not None:
        result.facts.append(("at the end", f"runs `{preset.log.notify}`"))
    if preset.dataset.trigger is None and any("[trigger]" in p for p in preset.sample.prompts):
        result.warnings.append("sample.prompts use [trigger], but dataset.trigger is not set")
    if is_builtin(preset.model.base):
        return
    if not preset.dataset.trigger:
        result.warnings.append("no dataset.trigger: the LoRA will act on every prompt")
