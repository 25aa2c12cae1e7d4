"""The check of a GPU when something goes wrong with it: nothing that was found is lost, and nothing is left running."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

SCRIPT = Path(__file__).resolve().parent / "check.py"
STAGES = """
import json, subprocess, sys, time
print(json.dumps({"what": "found", "ok": True, "s_step": 0.25}), flush=True)
print("not a row", flush=True)
if sys.argv[1] == "flux":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(json.dumps({"what": "child", "ok": None, "pid": child.pid}), flush=True)
    time.sleep(60)
if sys.argv[1] == "exact":
    sys.exit("broken")
"""


@pytest.fixture(scope="module")
def check() -> Any:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stages(tmp_path: Path) -> Path:
    path = tmp_path / "stages.py"
    path.write_text(STAGES)
    return path


def is_gone(pid: int) -> bool:
    """Within seconds; nobody may have asked for its exit code yet."""
    try:
        process = psutil.Process(pid)
        for _ in range(500):
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            time.sleep(0.01)
    except psutil.NoSuchProcess:
        return True
    return False


def test_a_stage_that_hangs_is_ended_with_its_children_and_the_next_one_runs(
    check: Any, stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "LIMITS", {"flux": 0.4, "exact": 30, "fp16": 30})
    rows, plain = check.Rows(tmp_path / "out.jsonl"), subprocess.Popen.wait

    def wait(process: Any, timeout: float | None = None) -> int:
        """The limit is over when the child is there, however slow this machine is."""
        while timeout == 0.4 and len(rows.rows) < 2:
            time.sleep(0.01)
        return plain(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    check.Check(rows, script=stages).all(["flux", "exact", "fp16"], 1, 60, together=False)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["what"], row["ok"]) for row in lines] == [
        ("flux", "found", True), ("flux", "child", None), ("flux", "stage", False),
        ("exact", "found", True), ("exact", "stage", False), ("fp16", "found", True), ("fp16", "stage", True),
    ]  # fmt: skip
    assert lines[2]["why"] == "out of time (0 s)"
    assert set(lines[4]["last_lines"]) == {"not a row", "broken"}  # of two streams
    assert is_gone(lines[1]["pid"])


def test_stages_that_time_nothing_run_at_once_and_none_begins_without_time(
    check: Any, stages: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[str] = []
    monkeypatch.setattr(check.Check, "stage", lambda self, name, limit: begun.append(name))
    rows = check.Rows(None)
    check.Check(rows).all(["doctor", "sdxl-memory", "sd15", "fp16"], 1, 60, together=True)
    assert begun == ["doctor", "sdxl-memory", "fp16", "sd15"]
    check.Check(rows).all(["doctor"], 1, 10, together=False)
    assert [row["why"] for row in rows.rows] == ["no time was left for it"]


def test_a_check_that_is_told_to_end_ends_its_stage_and_prints_what_it_has(stages: Path, tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import check; from pathlib import Path\n"
    code += f"plain = check.Check\ncheck.Check = lambda *words: plain(*words, script=Path({str(stages)!r}))\n"
    code += "sys.argv = ['check.py', '--stages', 'flux']\ncheck.main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [json.loads(process.stdout.readline()) for _ in range(2)]
    process.terminate()
    _, said = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "s_step 0.25" in said
    assert is_gone(lines[1]["pid"])


def test_a_report_is_made_of_what_there_is(check: Any, tmp_path: Path) -> None:
    one, two = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    rows = [
        {"stage": "doctor", "what": "a GPU is seen", "ok": True, "name": "H200"},
        {"stage": "doctor", "what": "stage", "ok": True, "wall_s": 9.0},
        {"stage": "recorded", "what": "sdxl, eager", "ok": True, "s_step": 0.5},
        {"stage": "sd15", "what": "stage", "ok": False, "why": "exit 1"},
        {"stage": "recorded", "what": "sdxl, eager, a step", "ok": False, "waits": 2},
    ]
    one.write_text("\n".join(map(json.dumps, rows)) + '\n{"stage": "recorded", "what": "sdxl, rec')
    two.write_text(json.dumps({**rows[2], "s_step": 0.25}))
    said = check.report(check.read([one, two]))
    assert "| what | s a step | waits |" in said
    assert "| sdxl, eager (NOT OK) | 0.25 | 2 |" in said
    assert "sdxl, eager, a step" not in said
    assert "| doctor | a GPU is seen | yes | name H200 |" in said
    assert "| sd15 | stage | NO | why exit 1 |" in said
    assert "Stages that ended: doctor, sd15." in said
    assert "Cut off: recorded." in said
    assert "Not begun: sdxl, flux," in said
