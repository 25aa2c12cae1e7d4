"""`emotrain check`: validate a preset, its data and files."""

from __future__ import annotations

from emotrain.cli import output
from emotrain.cli.options import RUNS, OneJson, Overrides, PresetName, RunName, RunsDir


def check(
    preset: PresetName,
    overrides: Overrides = None,
    name: RunName = None,
    runs_dir: RunsDir = RUNS,
    as_json: OneJson = False,
) -> None:
    """Validate a preset, its data and files.

    Everything that `run` with the same words would refuse is told at once, each with file and line; every picture is
    decoded, the computer's memory compared with what the run needs of it, and a small file written where the run will
    be, and removed. Nothing is trained, and nothing stays.

    Examples:
        emotrain check quickstart
        emotrain check my.yaml --set network.rank=32
    """
    from emotrain.config.load import load
    from emotrain.runs.preflight import look_at_ram, preflight

    loaded = load(preset, overrides or (), name)
    with output.progress("looking at pictures") as tell:
        found = preflight(loaded.preset, loaded.where, tell, runs_dir)
        look_at_ram(loaded.preset, found)
    if not as_json:
        for line in loaded.notes:
            output.note(f"note: {line}")
        for line in found.warnings:
            output.warning(line)
    found.raise_first()
    facts = [("preset", f"{loaded.path.name}: run `{loaded.preset.name}`"), *found.facts]
    if as_json:
        output.json_object(
            {
                "schema_version": output.SCHEMA_VERSION,
                "preset": loaded.preset.to_dict(),
                "facts": dict(facts),
                "warnings": found.warnings,
                "notes": list(loaded.notes),
            }
        )
    else:
        output.table(facts)
        output.result("ok")
