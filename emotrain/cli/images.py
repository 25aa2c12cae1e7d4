"""`emotrain images`: which pictures a run could not learn."""

from __future__ import annotations

from typing import Annotated

import typer

from emotrain.cli import output
from emotrain.cli.options import RUNS, OneJson, RunsDir, run_names


def images(
    run: Annotated[str, typer.Argument(help="A run's folder or name", autocompletion=run_names)],
    runs_dir: RunsDir = RUNS,
    show_all: Annotated[bool, typer.Option("--all", help="Every picture, with the numbers behind the words")] = False,
    as_json: OneJson = False,
) -> None:
    """Show which pictures a run could not learn.

    Those that stand out, each with what it means. `--all` shows every picture: losses are compared at the same place on
    the noise scale and held against the other pictures; `early` and `late` are the halves of the run, in robust
    standard deviations (above 0: worse than the others). `caption`: how its own caption matches a picture in comparison
    with those of others, in standard deviations (-3: far better; 0: no better, so it may be wrong).

    Examples:
      emotrain images mika_v2
      emotrain images mika_v2 --all
      emotrain images mika_v2 --json
    """
    from emotrain.dataset.ranking import MEANINGS
    from emotrain.runs.folder import open_run
    from emotrain.runs.pictures import actions_of, rank_pictures

    folder = open_run(run, runs_dir)
    scores, actions = rank_pictures(folder), actions_of(folder.info())
    said = {score.id: "; ".join([MEANINGS[score.verdict], *actions.get(score.id, ())]).strip("; ") for score in scores}
    if as_json:
        pictures = [{**score.to_dict(), "actions": actions.get(score.id, [])} for score in scores]
        output.json_object({"schema_version": output.SCHEMA_VERSION, "run": folder.name, "pictures": pictures})
        return
    if not show_all:
        outliers = [score for score in scores if score.verdict not in ("normal", "unseen") or score.id in actions]
        if not outliers:
            output.result(f"nothing stands out among {len(scores)} pictures (`--all` shows them)")
            return
        output.table([(score.verdict, score.id, said[score.id]) for score in outliers])
        return
    rows = [
        (
            score.verdict, f"{score.z_early:.1f}", f"{score.z_late:.1f}",
            "-" if score.z_contrast is None else f"{score.z_contrast:.1f}", score.visits, score.id,
            said[score.id],
        )
        for score in scores
    ]  # fmt: skip
    output.table(rows, ("", "early", "late", "caption", "seen", "picture", ""))
