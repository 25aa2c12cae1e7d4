"""`emotrain lora`: results on stdout, everything else on stderr, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import weights

from emotrain.cli.app import main
from emotrain.lora.file import read_lora, save_lora

Run = Any


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in ("lora", *arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def flux_path(tmp_path: Path) -> Path:
    path = tmp_path / "flux.safetensors"
    state, alphas = weights("flux", "attn")
    save_lora(
        path, state, alphas=alphas, family="flux", dtype="fp32",
        metadata={"emotrain.parents": json.dumps([{"kind": "stack", "sha256": "ab", "weight": 0.5}])},
    )  # fmt: skip
    return path


def test_keys_lists_names_on_stdout_and_counts_on_stderr(run: Run) -> None:
    code, out, err = run("keys", "flux", "--format", "kohya", "--targets", "attn")
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"
    assert len(lines) == 3 * (19 * 4 + 38)
    assert "114 modules" in err


def test_keys_as_json_has_keys_and_modules(run: Run) -> None:
    code, out, _ = run("keys", "sdxl", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["modules"] == 722
    assert len(found["keys"]) == 722 * 3


def test_an_unknown_family_is_a_usage_error_that_names_the_known_ones(run: Run) -> None:
    code, out, err = run("keys", "sd4")
    assert (code, out) == (2, "")
    assert "sd15, sd21, sdxl, anima" in err


def test_inspect_shows_ranks_strength_blocks_and_parents(run: Run, flux_path: Path) -> None:
    code, out, _ = run("inspect", flux_path, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["format"], found["family"], found["dtype"], found["modules"]) == ("diffusers", "flux", "fp32", 22)
    assert (found["ranks"], found["strengths"]) == ({"4": 22}, {"1": 22})
    assert found["parents"] == [{"kind": "stack", "sha256": "ab", "weight": 0.5}]
    assert found["sha256"] == read_lora(flux_path).sha256
    assert len(found["blocks"]) == 4
    assert sum(size**2 for size in found["blocks"].values()) == pytest.approx(found["norm"] ** 2)
    state, alphas = weights("flux", "attn")
    name = "transformer.transformer_blocks.0"
    expected = sum(
        float((state[f"{m}.lora_B.weight"] @ state[f"{m}.lora_A.weight"] * a / 4).norm()) ** 2
        for m, a in alphas.items() if m.startswith(f"{name}.")
    )  # fmt: skip
    assert found["blocks"][name] == pytest.approx(expected**0.5, rel=1e-5)
    assert str(flux_path.parent) not in out
    code, out, _ = run("inspect", flux_path)
    assert code == 0
    assert "transformer.single_transformer_blocks.1" in out
    assert "parent (stack)" in out


def test_hostile_metadata_cannot_reach_the_terminal(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    state, alphas = weights("sd15", "attn")
    save_lora(path, state, alphas=alphas, family="sd15", metadata={"ss_output_name": "\x1b[2J\u202e[red]x[/red]"})
    _, out, _ = run("inspect", path)
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "[red]x[/red]" in out


def test_convert_there_and_back_gives_the_same_weights(run: Run, flux_path: Path, tmp_path: Path) -> None:
    kohya, back = tmp_path / "kohya.safetensors", tmp_path / "back.safetensors"
    code, out, _ = run("convert", flux_path, "--to", "kohya", "-o", kohya)
    assert (code, out.strip()) == (0, str(kohya))
    assert read_lora(kohya).format == "kohya"
    assert run("convert", kohya, "--to", "diffusers", "-o", back)[0] == 0
    first, last = read_lora(flux_path), read_lora(back)
    assert all(torch.equal(first.state[key], last.state[key]) for key in first.state | last.state)
    assert last.metadata["emotrain.converted_from"] == read_lora(kohya).sha256


def test_an_existing_file_is_written_over_only_with_yes(run: Run, flux_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"mine")
    code, _, err = run("convert", flux_path, "--to", "kohya", "-o", out)
    assert code == 5
    assert "--yes" in err
    assert out.read_bytes() == b"mine"
    assert run("convert", flux_path, "--to", "kohya", "-o", out, "--yes")[0] == 0
    assert read_lora(out).format == "kohya"


def test_merge_takes_weights_and_says_the_error_of_a_rank(run: Run, flux_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    code, text, _ = run("merge", f"{flux_path}:0.8", f"{flux_path}:-0.3", "-o", out, "--json")
    found = json.loads(text)
    assert code == 0
    assert found["ranks"] == [8]
    assert found["sha256"] == read_lora(out).sha256
    small = tmp_path / "small.safetensors"
    code, text, err = run("merge", f"{flux_path}:1", "-o", small, "--rank", "2")
    assert (code, text.strip()) == (0, str(small))
    assert "rank 2 leaves out" in err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("inspect", "none.safetensors"), 4),
        (("convert", "none.safetensors", "--to", "kohya", "-o", "x.safetensors"), 4),
        (("convert", "none.safetensors", "--to", "ldm", "-o", "x.safetensors"), 2),
        (("merge", "a.safetensors:heavy", "-o", "x.safetensors"), 2),
        (("merge", "a.safetensors:nan", "-o", "x.safetensors"), 4),
        (("keys", "sd15", "--targets", "everything"), 2),
    ],
)
def test_exit_codes(
    run: Run, arguments: tuple[str, ...], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments)[0] == code
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("run", ["mika", "mika_v1.5"])
def test_a_run_s_name_stands_for_its_lora_wherever_a_file_is_asked_for(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside a folder of that name too, which is where its pictures mostly are."""
    from emotrain.cli.app import main
    from emotrain.runs.folder import create_run

    monkeypatch.chdir(tmp_path)
    name = "transformer.transformer_blocks.0.attn.to_q"
    lora = {f"{name}.lora_A.weight": torch.ones(2, 3072), f"{name}.lora_B.weight": torch.ones(3072, 2)}
    save_file(lora, create_run(Path("runs"), run, {"name": run}).lora_path)
    Path(run).mkdir()
    assert main(["lora", "inspect", run]) == 0
    assert main(["lora", "convert", f"runs/{run}", "--to", "kohya", "-o", "a.safetensors"]) == 0
    assert main(["lora", "merge", f"{run}:0.5", "a.safetensors:0.5", "-o", "b.safetensors"]) == 0
    capsys.readouterr()
    assert main(["lora", "inspect", "nobody"]) == 4
    assert "neither a LoRA file nor a run" in capsys.readouterr().err
    assert main(["lora", "inspect", "x" * 300]) == 4
