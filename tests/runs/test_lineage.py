"""`runs list | show | compare`: what became of runs, and who descends from whom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emotrain.cli.app import main
from emotrain.config.load import load
from emotrain.runs.folder import RunFolder, create_run, named_in
from emotrain.runs.lineage import Family, file_digest, read_run, read_runs


def make(runs_dir: Path, name: str, lora: bytes, parents: tuple[dict[str, Any], ...] = (), **info: Any) -> RunFolder:
    preset = {"name": name, "network": {"rank": len(lora)}, "train": {"seed": 1}}
    run = create_run(runs_dir, name, preset, seed=1, device="cpu", parents=parents)
    run.lora_path.write_bytes(lora)
    ended = {"started": f"2026-01-0{len(lora)}T10:00:00+00:00", "stop_reason": "signal", "steps": 100 * len(lora)}
    run.update_info(**ended, **info)
    return run


def parent(kind: str, run: RunFolder | None, sha256: str = "", **words: Any) -> dict[str, Any]:
    digest = file_digest(run.lora_path) if run is not None else sha256
    return {"kind": kind, "sha256": digest, **words}


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    v1 = make(folder, "v1", b"1", best_loss=0.5, best_step=90)
    style = make(folder, "style", b"22")
    v2 = make(folder, "v2", b"333", (parent("continue", v1),))
    parents = (parent("continue", v2), parent("stack", style, weight=0.8), parent("stack", None, "f" * 64, weight=1.0))
    make(folder, "v3", b"4444", parents)
    return folder


def test_show_draws_the_line_of_descent(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "show", "v3", "--runs-dir", str(runs_dir)]) == 0
    printed = capsys.readouterr().out
    drawing = printed[printed.index("\n\n") + 2 :].splitlines()
    assert drawing == [
        "v3  2026-01-04  done  400 steps",
        "├─ continues v2  2026-01-03  done  300 steps",
        "│  └─ continues v1  2026-01-01  done  100 steps  best 0.5000 at 90",
        "├─ on top of 0.8 x style  2026-01-02  done  200 steps",
        f"└─ on top of 1.0 x a LoRA file  sha256 {'f' * 12}  (not among these runs)",
    ]


def test_show_names_the_runs_that_build_on_it(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "show", "v2", "--runs-dir", str(runs_dir), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["children"] == ["v3"]
    assert facts["parents"][0]["run"] == "v1"
    assert facts["checkpoints"] == []


def test_a_parent_is_found_by_name_once_its_file_has_changed(runs_dir: Path) -> None:
    make(runs_dir, "v4", b"55555", ({"kind": "continue", "sha256": "0" * 64, "run": "v3"},))
    family = Family(read_runs(runs_dir))
    v4 = next(run for run in family.runs if run.name == "v4")
    assert [known.name for _, known in family.parents(v4) if known] == ["v3"]


def test_a_circle_of_runs_is_drawn_once(tmp_path: Path) -> None:
    first = make(tmp_path, "a", b"1", ({"kind": "continue", "sha256": "x", "run": "b"},))
    make(tmp_path, "b", b"22", (parent("continue", first),))
    family = Family(read_runs(tmp_path))
    assert len(list(family.tree(family.runs[0]))) == 3


def test_list_gives_a_line_per_run_and_json_for_programs(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create_run(runs_dir, "broken", {}).info_path.write_text("{")
    assert main(["runs", "list", "--runs-dir", str(runs_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "v1", "style", "v2", "v3", "broken"]
    assert "damaged" in lines[-1]
    assert main(["runs", "list", "--runs-dir", str(runs_dir), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [(run["name"], run["status"]) for run in facts][0] == ("v1", "done")
    assert main(["runs", "list", "--runs-dir", str(runs_dir / "none"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_compare_shows_results_and_the_keys_that_differ(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "compare", "v1", "v2", "--runs-dir", str(runs_dir)]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows["steps"] == ["100", "300"]
    assert rows["best_loss"] == ["0.5", "-"]
    assert rows["network.rank"] == ["1", "3"]
    assert "train.seed" not in rows


def test_a_single_run_cannot_be_compared_and_a_missing_one_is_exit_5(
    runs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", "compare", "v1", "--runs-dir", str(runs_dir)]) == 2
    assert main(["runs", "compare", "v1", "v9", "--runs-dir", str(runs_dir)]) == 5
    assert "no run `v9`" in capsys.readouterr().err


def test_a_run_that_neither_ended_nor_runs_has_crashed(tmp_path: Path) -> None:
    run = create_run(tmp_path, "a", {})
    assert read_run(run).status == "crashed"
    with run.lock():
        assert read_run(run).status == "running"
    run.update_info(stop_reason="interrupted")
    assert read_run(run).status == "interrupted"


def test_a_run_that_has_not_ended_shows_the_steps_that_its_log_tells_of(tmp_path: Path) -> None:
    run = create_run(tmp_path / "runs", "x", {"name": "x"})
    assert read_run(run).results()["steps"] == 0
    run.metrics_path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo', encoding="utf-8")
    found = read_run(run).results()
    assert (found["status"], found["steps"]) == ("crashed", 2)


def test_names_of_earlier_runs_are_those_beside_the_new_one(runs_dir: Path) -> None:
    values = {
        "model": "org/model",
        "dataset": "./a",
        "start_from": {"continue": "v1", "stack": ["style", "x/v1", "v9"]},
    }
    (runs_dir / "p.yaml").write_text(json.dumps(values))
    found = named_in(runs_dir, load(runs_dir / "p.yaml").preset).start_from
    assert found.continue_ == str(runs_dir / "v1")
    assert [item.path for item in found.stack] == [str(runs_dir / "style"), str(runs_dir / "x/v1"), "v9"]
