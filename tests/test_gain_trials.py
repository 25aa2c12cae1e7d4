"""The report on the unit of LR 1.0 says what its rows say."""

from pathlib import Path
from typing import Any

import gain_rows
from by_hand import SAID

REPORT = Path(__file__).parents[1] / "docs" / "benchmarks" / "gain_trials.md"


def row(policy: str, chosen: int, **more: Any) -> dict[str, Any]:
    values = {"task": "tiny-sd:ink:32", "seed": 0, "policy": policy, "ceiling": 400, "chosen": chosen}
    return {**values, "steps": 400, **more}


def test_the_report_s_tables_follow_from_its_rows():
    tables = gain_rows.tables(list(gain_rows.kept(gain_rows.KEPT).values()))
    above = REPORT.read_text(encoding="utf-8").partition(SAID)[0]
    assert above.endswith("\n".join(["", "", *tables, "", ""]))


def test_a_row_that_the_ceiling_has_cut_is_trained_again_under_a_higher_one():
    still_falling, fell = row("adamw 0.001", 320), row("adamw 0.003", 200, steps=300)
    ran_out, ended = row("gain auto", 400, ended=False), row("gain fixed", 400, ended=True)
    schedule = row("adamw, cosine", 400)
    rows = [still_falling, fell, ran_out, ended, schedule]
    assert gain_rows.whole(rows, 1000) == [fell, ended, schedule]
    assert gain_rows.whole(rows, 400) == rows
