"""`emotrain runs`: list, show and compare runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emotrain.cli import output
from emotrain.cli.options import RUNS, Json, RunsDir, run_names

if TYPE_CHECKING:
    from emotrain.runs.lineage import Run

app = typer.Typer()

_DIGEST = 64  # letters of a sha256


@app.command("list")
def list_(runs_dir: RunsDir = RUNS, as_json: Json = False) -> None:
    """List all runs, the earliest first.

    Examples:
      emotrain runs list
      emotrain runs list --json
    """
    from emotrain.runs.lineage import read_runs

    runs = read_runs(runs_dir)
    if as_json:
        output.json_object([_facts(run) for run in runs])
        return
    if not runs:
        output.note(f"no runs in {runs_dir}")
        return
    rows = [(run.name, str(run.info.get("started") or "")[:16].replace("T", " "), *_numbers(run)) for run in runs]
    output.table(rows, ("run", "started (UTC)", "status", "steps", "best loss", "at step"))


@app.command()
def show(
    run: Annotated[str, typer.Argument(help="A run's folder or name", autocompletion=run_names)],
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Show one run: how it ended, what it builds on, what builds on it.

    Examples:
      emotrain runs show mika_v2
    """
    from emotrain.runs.folder import open_run
    from emotrain.runs.lineage import Family, read_run, read_runs
    from emotrain.train.checkpoint import step_folders

    folder = open_run(run, runs_dir)
    chosen = read_run(folder)
    folder.info()  # says what is wrong with a damaged one
    others = [other for other in read_runs(folder.path.parent) if other.name != chosen.name]
    family = Family([*others, chosen])
    children = [child.name for child in family.children(chosen)]
    steps = list(step_folders(folder.checkpoints_dir))
    if as_json:
        descent = [
            {**entry, "run": known.name if known else entry.get("run")} for entry, known in family.parents(chosen)
        ]
        output.json_object({**_facts(chosen), "parents": descent, "children": children, "checkpoints": steps})
        return
    output.table(_lines(chosen, steps))
    output.result("")
    for line in family.tree(chosen):
        output.result(line)
    if children:
        output.result(f"built on by {', '.join(children)}")


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Two or more runs", autocompletion=run_names)],
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Compare runs: their results, and the preset keys in which they differ.

    Losses stand side by side only where the runs were validated on the same pictures in the same way.

    Examples:
      emotrain runs compare mika_v1 mika_v2
    """
    from emotrain.errors import ConfigError
    from emotrain.runs.folder import open_run
    from emotrain.runs.lineage import LOSSES, RESULTS, differences, read_run, validated_apart

    if len(runs) < 2:
        raise ConfigError("`runs compare` takes two runs or more", "`emotrain runs list` lists them")
    chosen = [read_run(open_run(name, runs_dir)) for name in runs]
    changed = differences(chosen)
    apart = validated_apart(chosen, changed)
    if as_json:
        preset = [{"key": key, "values": values} for key, values in changed]
        output.json_object({"runs": [_facts(run) for run in chosen], "preset": preset, "validated_apart": apart})
        return
    results = [run.results() for run in chosen]
    rows = [(key, *(_text(one[key]) for one in results)) for key in RESULTS if not apart or key not in LOSSES]
    rows += [(key, *(_text(value) for value in values)) for key, values in changed]
    output.table(rows, ("", *(run.name for run in chosen)))
    if apart:
        output.note(f"note: the losses are left out: these runs were not validated alike ({', '.join(apart)})")


def _facts(run: Run) -> dict[str, Any]:
    return {**run.info, "name": run.name, "path": str(run.folder.path), "status": run.status}


def _numbers(run: Run) -> tuple[str, ...]:
    facts = run.results()
    return (*(_text(facts[key]) for key in ("status", "steps", "best_loss", "best_step")),)


def _lines(run: Run, steps: Sequence[int]) -> list[tuple[str, str]]:
    info = run.info
    lines = [("status", run.status), ("why", info.get("stop_sentence")), ("started", info.get("started"))]
    lines += [(key, info.get(key)) for key in ("finished", "steps", "best_step", "best_loss", "base_loss")]
    lines += [(key, info.get(key)) for key in ("train_s", "resumes", "skipped", "seed", "device", "family")]
    lora = info.get("lora")
    lines += [("lora", str(run.folder.path / str(lora)) if lora else None)]
    lines += [("checkpoints", ", ".join(str(step) for step in steps))]
    lines += [(key, info.get(key)) for key in ("base_sha256", "dataset_sha256", "emotrain")]
    return [(key, _text(value)) for key, value in lines if value not in (None, "")]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text[:12] if len(text) == _DIGEST and text.isalnum() else text
