"""`check`, `presets`, `doctor`, and the reference that is built from the code."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest

from emotrain.cli.app import main
from emotrain.config.builtin import shipped_presets
from emotrain.config.load import load
from emotrain.config.reference import SCHEMA_LINE
from emotrain.config.schema import Preset
from emotrain.runs.preflight import preflight

Captured = pytest.CaptureFixture[str]
REPOSITORY = Path(__file__).parents[2]


def test_check_tells_what_a_run_would_do(capsys: Captured) -> None:
    assert main(["check", "quickstart"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert lines[0].split() == ["preset", "quickstart.yaml:", "run", "`quickstart`"]
    assert "builtin:tiny-sd: Stable Diffusion 1.x, v_prediction, 64 px" in lines[1]
    assert "28 pictures (4 more held out) in batches of 4: about 7 steps an epoch" in captured.out
    assert lines[-1] == "ok"


def test_check_json_is_one_object(capsys: Captured) -> None:
    assert main(["check", "quickstart", "--json", "--set", "network_dim=4"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema_version"] == 1
    assert report["preset"]["network"]["rank"] == 4
    assert report["facts"]["network"] == "LoRA of rank 4, alpha 8, on all"
    assert report["notes"] == ["--set network_dim: `network_dim` is read as `network.rank`"]
    assert main(["check", "quickstart", "--json", "--set", "network_dim=0"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == 2
    assert error["message"].startswith("--set network_dim: network.rank is `0`")


@pytest.mark.parametrize("name", ["quickstart", "quickstart-flux"])
def test_check_passes_on_the_quickstarts(name: str, capsys: Captured) -> None:
    assert main(["check", name]) == 0


@pytest.mark.parametrize(
    "name",
    [
        "sd15",
        "sdxl",
        "sd3",
        "flux",
        "zimage",
        "zimage-turbo",
        "klein-4b",
        "klein-9b",
        "flux2-dev",
        "chroma",
        "qwen-image-2.1",
        "flux3-klein",
        "krea2",
        "illustrious",
        "noobai-vpred",
        "pony",
    ],
)
def test_check_passes_on_the_others_up_to_the_missing_model_file(
    name: str, capsys: Captured, pictures_dir: Path, tmp_path: Path
) -> None:
    arguments = ["--set", f"dataset.folders=[{pictures_dir}]", "--set", "dataset.trigger=x"]
    missing = tmp_path / "model.safetensors"
    assert main(["check", name, *arguments, "--set", f"model={missing}"]) == 4
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 1
    assert str(missing) in captured.err


def test_notes_and_warnings_go_to_stderr(capsys: Captured, tmp_path: Path, pictures_dir: Path) -> None:
    (pictures_dir / "red.txt").unlink()
    path = tmp_path / "p.yaml"
    path.write_text("model: builtin:tiny-sd\ndataset: ./pictures\nnetwork_dim: 4\n")
    assert main(["check", str(path)]) == 0
    captured = capsys.readouterr()
    assert "network_dim" not in captured.out
    assert "p.yaml:3: `network_dim` is read as `network.rank`" in captured.err
    assert "1 caption-missing" in captured.err
    assert "dataset.trigger is not set" in captured.err


def preset_of(tmp_path: Path, text: str) -> tuple[Preset, list[str]]:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    loaded = load(path)
    found = preflight(loaded.preset, loaded.where)
    problems = [f"{problem.message} | {problem.hint}" for failure in found.failures for problem in failure.problems]
    return loaded.preset, [problem.replace(f"{tmp_path}/", "") for problem in problems]


def test_ranks_above_the_layers_and_sizes_off_the_step_are_refused(tmp_path: Path) -> None:
    _, problems = preset_of(
        tmp_path,
        "model: builtin:tiny-sd\n"
        "dataset: {path: builtin:example, resolution: [64, 70], buckets: {step: 12, max: 100}}\n"
        "network: {rank: 97, conv_rank: 500, rank_pattern: {attn1: 300}}\n"
        "sample: {size: 60}\n",
    )
    most = "more than the 96 that the widest layer of the model has | 8 to 64 is usual"
    assert problems == [
        f"p.yaml:3: network.rank is 97, {most}",
        f"p.yaml:3: network.conv_rank is 500, {most}",
        f"p.yaml:3: the rank of `attn1` is 300, {most}",
        "p.yaml:2: dataset.buckets.step is 12, and the model takes multiples of 8 | the nearest are 8 and 16",
        "p.yaml:2: dataset.resolution is 64, which is not a multiple of 24 | the nearest are 48 and 72",
        "p.yaml:2: dataset.resolution is 70, which is not a multiple of 24 | the nearest are 48 and 72",
        "p.yaml:2: dataset.buckets.max is 100, which is not a multiple of 24 | the nearest are 96 and 120",
        "p.yaml:4: sample.size is 60, which is not a multiple of 8 | the nearest are 56 and 64",
    ]


def test_the_largest_rank_and_sizes_on_the_step_pass(tmp_path: Path) -> None:
    _, problems = preset_of(
        tmp_path,
        "model: builtin:tiny-sd\ndataset: {path: builtin:example, resolution: 72}\nnetwork: {rank: 96}\n",
    )
    assert problems == []


def test_earlier_loras_and_vaes_that_are_missing_are_named(tmp_path: Path) -> None:
    _, problems = preset_of(
        tmp_path,
        "model: {base: builtin:tiny-sd, vae: ./v.safetensors}\ndataset: builtin:example\n"
        "start_from:\n  continue: ./c.safetensors\n  stack: [./s.safetensors]\n",
    )
    said = [problem.split(" | ")[0] for problem in problems]
    assert [(line.split(": ")[0], "does not exist" in line or "no such LoRA" in line) for line in said] == [
        ("p.yaml:1", True), ("p.yaml:5", True), ("p.yaml:4", True),
    ]  # fmt: skip


def test_presets_list_names_all_with_a_line_each(capsys: Captured) -> None:
    assert main(["presets", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_presets())
    assert all(len(line.split()) > 3 for line in lines)
    assert main(["presets", "list", "--json"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} == set(shipped_presets())


def test_presets_show_prints_the_file_or_every_key(capsys: Captured, tmp_path: Path) -> None:
    assert main(["presets", "show", "sdxl"]) == 0
    written = shipped_presets()["sdxl"].read_text(encoding="utf-8")
    assert capsys.readouterr().out == written
    assert main(["presets", "show", "quickstart", "--resolved"]) == 0
    path = tmp_path / "quickstart.yaml"
    path.write_text(capsys.readouterr().out)
    assert load(path).preset == load("quickstart").preset


def test_presets_copy_writes_once_and_never_over(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["presets", "copy", "quickstart"]) == 0
    assert capsys.readouterr().out == "quickstart.yaml\n"
    copied = Path("quickstart.yaml")
    assert copied.read_text() == SCHEMA_LINE + shipped_presets()["quickstart"].read_text()
    assert load(copied).preset == load("quickstart").preset
    copied.write_text("mine")
    assert main(["presets", "copy", "quickstart"]) == 5
    assert copied.read_text() == "mine"
    assert main(["presets", "copy", "quickstart", "other.yaml"]) == 0
    assert os.path.exists("other.yaml")
    assert main(["presets", "copy", "quikstart"]) == 2
    assert "did you mean `quickstart`?" in capsys.readouterr().err


def test_presets_schema_knows_the_sections_and_short_forms(capsys: Captured) -> None:
    assert main(["presets", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) >= {"extends", "model", "dataset", "train", "validate"}
    assert {"type": "string"} in schema["properties"]["model"]["anyOf"]
    assert schema["additionalProperties"] is False


def test_doctor_reports_versions_devices_and_disk(capsys: Captured, tmp_path: Path) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert re.fullmatch(r"\d+\.\d+.*", report["torch"])
    assert report["devices"][0]["name"] == "cpu"
    assert report["fsync"] is True
    assert report["disk_free_gib"] > 0
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert str(Path.home()) not in shown.replace(str(tmp_path), "")
    assert "fsync" in shown


@pytest.mark.parametrize("installed", [True, False])
def test_doctor_says_what_run_will_not_take_on_this_gpu(
    installed: bool, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from emotrain.families import memory

    card = {
        "is_available": True, "device_count": 1, "mem_get_info": (7 * 2**30, 8 * 2**30), "get_device_name": "RTX",
        "get_device_capability": (7, 5),
    }  # fmt: skip
    for name, value in card.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(memory, "is_installed", lambda module: installed)
    monkeypatch.setitem(sys.modules, "bitsandbytes.cextension", None)
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = {"name": "cuda:0 RTX", "memory_gib": 8.0, "free_gib": 7.0, "bf16": False}
    assert report["devices"][1] == found
    assert installed == ("is installed without what this GPU needs" in report["warnings"][0])
    assert report["warnings"][0].startswith("nf4, which small GPUs take for large models, needs `bitsandbytes`")


def test_the_reference_is_what_the_code_says() -> None:
    spec = importlib.util.spec_from_file_location("reference", REPOSITORY / "docs/build_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.stale() == [], "run python docs/build_reference.py"
    page = module.pages()[module.HERE / "preset.md"]
    for key in ("keep_tokens", "min_snr_gamma", "gradient_accumulation_steps", "network_dim"):
        assert f"`{key}`" in page
