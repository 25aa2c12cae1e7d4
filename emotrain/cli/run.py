"""`emotrain run`: train a LoRA, or several, one after another."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emotrain.cli import output
from emotrain.cli.launch import Gpus, begun_before, joined, launch, wants_launch
from emotrain.cli.options import RUNS, EventsAsJson, Overrides, Plain, RunName, RunsDir, preset_names
from emotrain.cli.resume import go_on
from emotrain.errors import ConfigError, EmotrainError, ExitCode, Problem
from emotrain.runs.folder import RunFolder, how_done

if TYPE_CHECKING:
    from emotrain.config.load import LoadedPreset
    from emotrain.families.kept import KeptBase
    from emotrain.ranks import Ranks

ENDED_BY_HAND = (ExitCode.INTERRUPTED, ExitCode.TERMINATED)


def run(
    context: typer.Context,
    presets: Annotated[
        list[str],
        typer.Argument(metavar="PRESET...", help="Preset files, or names of shipped ones", autocompletion=preset_names),
    ],
    overrides: Overrides = None,
    name: RunName = None,
    runs_dir: RunsDir = RUNS,
    plain: Plain = False,
    as_json: EventsAsJson = False,
    fail_fast: Annotated[
        bool, typer.Option("--fail-fast", help="Of several runs, stop at the first that fails")
    ] = False,
    gpus: Gpus = None,
) -> None:
    """Train a LoRA.

    Reads the preset, checks data and model, trains until the stop rule says that the run is done, and prints the
    path of the LoRA. Ctrl-C saves; the command to resume is printed.

    Several presets are run one after another; a base model that two in a row share stays loaded. One that fails does
    not stop the next, Ctrl-C does; the exit code is that of the first failure.

    Examples:
      emotrain run quickstart
      emotrain run my.yaml --set network.rank=32 --name second-try
      emotrain run mika.yaml girls.yaml style.yaml
      emotrain run my.yaml --gpus 2
    """
    if gpus is not None and wants_launch(gpus):
        raise typer.Exit(launch(context.obj, gpus))
    with joined(gpus) as ranks:
        with ranks.together():
            loaded = _load_all(presets, overrides or (), name)
        if len(loaded) == 1:
            _one(loaded[0], runs_dir, plain, as_json, ranks)
            return
        codes = _queue(loaded, runs_dir, plain, as_json, fail_fast, ranks)
        if failed := [code for code in codes if code]:
            raise typer.Exit(failed[0])


def _one(
    loaded: LoadedPreset, runs_dir: Path, plain: bool, as_json: bool, ranks: Ranks, kept: KeptBase | None = None
) -> None:
    from emotrain.cli.training import show

    preset = loaded.preset
    if begun_before(ranks, runs_dir / preset.name):
        with ranks.together():
            folder = RunFolder(runs_dir / preset.name)
            how = ranks.told((how_done(folder, preset.train.max_steps) or "") if ranks.first else None)
        if how:  # before the restart
            if ranks.first:
                output.note(how)
            return
        go_on(ranks, str(runs_dir / preset.name), runs_dir, plain=plain, as_json=as_json)
        return
    with show(preset, loaded.notes, plain=plain, as_json=as_json, ranks=ranks) as training:
        training.run(runs_dir, loaded.where, loaded.extends, kept)


def _load_all(presets: Sequence[str], overrides: Sequence[str], name: str | None) -> list[LoadedPreset]:
    """All presets of a queue; what is wrong with any of them is told before the first run starts.

    Raises:
        ConfigError: with every problem; two runs of one name; or `--name` for several runs.
    """
    from emotrain.config.load import load

    if name is not None and len(presets) > 1:
        raise ConfigError(f"--name is one name, and there are {len(presets)} presets", "each preset has a `name:`")
    loaded: list[LoadedPreset] = []
    problems: list[Problem] = []
    for preset in presets:
        try:
            loaded.append(load(preset, overrides, name))
        except ConfigError as error:
            problems += error.problems
    names = Counter(one.preset.name for one in loaded)
    problems += [
        Problem(f"{count} of the runs would be named `{double}`", "give each preset a `name:` of its own")
        for double, count in names.items()
        if count > 1
    ]
    if problems:
        raise ConfigError(problems[0].message, problems[0].hint, problems=tuple(problems))
    return loaded


def _queue(
    loaded: Sequence[LoadedPreset], runs_dir: Path, plain: bool, as_json: bool, fail_fast: bool, ranks: Ranks
) -> list[int]:
    """Run one after another; the exit codes of those that were begun."""
    from emotrain.families.kept import WORDS, KeptBase

    def work(one: LoadedPreset) -> int:
        try:
            _one(one, runs_dir, plain, as_json, ranks, kept)
        except typer.Exit as ending:
            return ending.exit_code
        return ExitCode.OK

    tell = output.note if ranks.first else lambda line: None
    if ranks.first:
        _warn(loaded, runs_dir)
    codes: list[int] = []
    kept = KeptBase(ranks.local_world)
    for number, one in enumerate(loaded, 1):
        kept.next = tuple(getattr(after.preset.model, word) for after in loaded[number : number + 1] for word in WORDS)
        tell(f"run {number} of {len(loaded)}: {one.preset.name}")
        codes.append(_code_of(partial(work, one), as_json, ranks))
        _free()
        if codes[-1] in ENDED_BY_HAND or (fail_fast and codes[-1]):
            break
    rest = [one.preset.name for one in loaded[len(codes) :]]
    tell(f"{codes.count(0)} of {len(loaded)} runs ended well" + (f"; not begun: {', '.join(rest)}" if rest else ""))
    return codes


def _code_of(work: Callable[[], int], as_json: bool, ranks: Ranks) -> int:
    """The exit code of one of several runs, its failure told.

    Raises:
        BaseException: this process alone failed: the others wait for it in that run, and will not be at the next.
    """
    from emotrain.cli.app import guarded

    if ranks.world == 1:
        return guarded(work, as_json=as_json)
    try:
        return work()
    except EmotrainError as failure:
        if failure.of_rank is None:
            raise
        shared = failure

    def fail() -> int:
        raise shared

    return guarded(fail, as_json=as_json)


def _warn(loaded: Sequence[LoadedPreset], runs_dir: Path) -> None:
    """Say at once what would be refused hours later; a run may wait for what one before it makes."""
    from emotrain.runs.preflight import preflight

    for one in loaded[1:]:
        try:
            preflight(one.preset, one.where, None, runs_dir).raise_first()
        except EmotrainError as error:
            output.warning(f"{one.preset.name} would be refused as things are: {error.message}")


def _free() -> None:
    """Give back what a run held, before the next one looks at how much is free."""
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
