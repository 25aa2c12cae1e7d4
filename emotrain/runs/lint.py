"""Lint for a preset or a bare folder: the preset's words and the model's sizes become lint's settings (no torch)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from emotrain.config.builtin import is_builtin
from emotrain.config.schema import Folder, Preset
from emotrain.dataset.buckets import BucketRules
from emotrain.dataset.lint import LintSettings, lint
from emotrain.dataset.lint_pool import Progress
from emotrain.dataset.lint_sizes import USUAL, usual_resolution
from emotrain.dataset.lint_tokens import TokenCounter, estimator, tokenizer_in
from emotrain.dataset.lint_types import Report
from emotrain.dataset.scan import scan
from emotrain.dataset.settings import settings_from
from emotrain.families.table import FAMILIES, Sniffed, sniff
from emotrain.runs.data import Scans, as_shown, scan_preset


@dataclass(frozen=True)
class Options:
    """How lint runs: thumbnails for a page, processes (None: one a core), progress of the pictures decoded."""

    previews: int = 0
    workers: int | None = None
    progress: Progress | None = None


def lint_folder(path: str, options: Options | None = None) -> Report:
    """Lint one folder by itself: no trigger, a CLIP encoder, and the largest usual resolution that half of it reaches.

    `builtin:example` is made for the built-in models, and is held against theirs.

    Raises:
        DatasetError: there is no such folder.
        ConfigError: an unknown `builtin:` name.
    """
    options = options or Options()
    found = scan((Folder(path=path),))
    if is_builtin(path):
        model = sniff("builtin:tiny-sd")
        rules = BucketRules((model.resolution,), model.bucket_step)
        assumed = f"held against {model.resolution} px, the size of the built-in models"
    else:
        reached = usual_resolution(found.examples)
        rules = BucketRules((reached or USUAL[-1],))
        why = "the largest of 1024, 768 and 512 that half reach" if reached else "which more than half do not reach"
        assumed = f"held against {reached or USUAL[-1]} px, {why}"
    settings = LintSettings(previews=options.previews, rules=rules)
    report = lint(found, settings, workers=options.workers, progress=options.progress)
    return replace(report, assumed=assumed)


def lint_preset(preset: Preset, options: Options | None = None) -> Report:
    """Lint the data of a preset as its model will see it, with its held-out folder where it names one.

    Raises:
        DatasetError: a folder is missing.
        ModelError: the model is missing or not known.
        ConfigError: sizes that contradict each other.
    """
    found = sniff(preset.model.base, preset.model.family, preset.model.revision, preset.model.prediction)
    return lint_scans(preset, found, scan_preset(preset), options)


def lint_scans(preset: Preset, found: Sniffed, scans: Scans, options: Options | None = None) -> Report:
    """As `lint_preset`, where the folders are scanned and the model is known.

    Raises:
        ConfigError: sizes that contradict each other.
    """
    options = options or Options()
    loader = settings_from(preset.dataset, resolution=found.resolution, step=found.bucket_step)
    settings = LintSettings(
        trigger=loader.trigger,
        rules=loader.rules,
        tokens=token_counter(found),
        prefix=loader.prefix,
        suffix=loader.suffix,
        background=loader.background,
        previews=options.previews,
    )
    return lint(
        as_shown(preset, scans), settings, held_out=scans.held_out, workers=options.workers, progress=options.progress
    )


def token_counter(found: Sniffed) -> TokenCounter:
    """Counts with the model's own CLIP tokenizer where its folder holds one; T5 and others are estimated."""
    spec = FAMILIES[found.family]
    places = spec.max_tokens
    if found.kind == "folder" and all(encoder.kind == "clip" for encoder in spec.text_encoders):
        return tokenizer_in(Path(found.path) / "tokenizer") or estimator(places)
    return estimator(places)
