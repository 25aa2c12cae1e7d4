"""The computer's memory: what is free of it, what a run takes of it, and what happens where that is too much."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from newer_models import pipeline_of, separate_files
from original_files import in_scaled_fp8
from safetensors.torch import load_file, save_file

from emotrain.cli.app import main
from emotrain.config.load import load_preset
from emotrain.config.schema import ModelSection
from emotrain.errors import ResourceError
from emotrain.families import quantize, ram
from emotrain.families.loading import DTYPES, load_family
from emotrain.families.memory import GIB
from emotrain.families.offload import offload_blocks
from emotrain.families.ram import Ram
from emotrain.families.registry import FAMILIES
from emotrain.families.sniff_file import public_model
from emotrain.families.table import sniff
from emotrain.runs import loaded, plan, preflight
from emotrain.runs.plan_ram import RamPlan, Weights, plan_ram, plan_without_gpu, room, weights_of

pytestmark = pytest.mark.usefixtures("counted_once")
MEMORY = SimpleNamespace(total=64 * GIB, available=48 * GIB)


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A system's own files."""
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


V2 = "sys/fs/cgroup/"
V1 = "sys/fs/cgroup/memory/"
CONTAINER = {
    V2 + "memory.max": str(16 * GIB), V2 + "memory.current": str(10 * GIB), V2 + "memory.swap.max": "0",
    V2 + "memory.stat": f"anon 5\ninactive_file {3 * GIB}\nactive_file {GIB}\nfile {6 * GIB}",
}  # fmt: skip
SERVICE = {
    V2 + "user/memory.max": "max", V2 + "user/memory.current": "9",
    V2 + "user/run/memory.max": str(8 * GIB), V2 + "user/run/memory.current": str(9 * GIB),
}  # fmt: skip
OLD = {
    V1 + "memory.limit_in_bytes": str(12 * GIB), V1 + "memory.usage_in_bytes": str(7 * GIB),
    V1 + "memory.stat": f"inactive_file 1\ntotal_inactive_file {2 * GIB}\ntotal_active_file 0",
}  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "files", "wanted"),
    [
        ("0::/", {}, (64, 48, 4)),
        ("0::/", CONTAINER, (16, 10, 0)),
        ("0::/user/run", SERVICE, (8, 0, 4)),
        ("3:cpuset:/\n4:memory:/docker/1f\n0::/", OLD, (12, 7, 4)),
        ("4:memory:/", {V1 + "memory.limit_in_bytes": "9223372036854771712"}, (64, 48, 4)),
    ],
)
def test_a_container_has_less_than_the_machine(
    groups: str, files: dict[str, str], wanted: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: MEMORY)
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=4 * GIB))
    found = ram.ram(machine(tmp_path, groups, files))
    assert tuple(round(size / GIB) for size in (found.total, found.free, found.swap)) == wanted


def mapped(model: torch.nn.Module, folder: Path) -> set[str]:
    """Parameters that lie in pages of a file of that folder."""
    lines = re.findall(r"^(\w+)-(\w+) .* (/\S.*)$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    places = [(int(a, 16), int(b, 16)) for a, b, file in lines if file.startswith(str(folder))]
    there = {name: p.data_ptr() for name, p in model.named_parameters()}
    return {name for name, at in there.items() if any(a <= at < b for a, b in places)}


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system which pages are a file's")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("flux_folder", "fp32"),
        ("flux_folder", "bf16"),
        ("flux_folder", "fp16"),
        ("flux_folder", "fp8"),
        ("scaled", "bf16"),
    ],
)
def test_what_is_not_mapped_from_its_file_is_counted_as_copied(
    kind: str, dtype: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "scaled":
        monkeypatch.setattr(quantize, "SMALLEST", 32)
        files = separate_files("qwen", pipeline_of("qwen"), tmp_path)
        save_file(in_scaled_fp8(load_file(files["denoiser"]))[0], files["denoiser"])
        words = {name: str(files[name]) for name in ("vae", "text_encoder", "tokenizer")}
        base, folder = files["denoiser"], tmp_path
    else:
        base = folder = request.getfixturevalue(kind)
        words = {}
    if dtype == "fp8":  # a folder's numbers without scales, which the libraries convert
        base = folder = Path(shutil.copytree(folder, tmp_path / "fp8"))
        for file in folder.glob("*/*.safetensors"):
            save_file({name: value.to(torch.float8_e4m3fn) for name, value in load_file(file).items()}, file)
        monkeypatch.setattr(quantize, "SMALLEST", 16)
        dtype = "bf16"
    family = load_family(str(base), device="cpu", dtype=dtype, **words)
    counted = weights_of(sniff(str(base)), ModelSection(base=str(base), **words), DTYPES[dtype])
    copied = {"text": 0}
    for part, model in (("denoiser", family.denoiser), *(("text", part.encoder) for part in family.text_encoders)):
        there = mapped(model, folder)
        apart = sum(p.nbytes for name, p in model.named_parameters() if name not in there)
        copied[part] = copied.get(part, 0) + apart
    sizes = {part: round(counted.copied.get(part, 0.0) * GIB) for part in copied}
    assert sizes == pytest.approx(copied, abs=0.01 * counted.whole * GIB)
    assert (copied["denoiser"] == 0) == (dtype == "fp32")
    held = [family.denoiser, family.vae, *(part.encoder for part in family.text_encoders)]
    assert counted.whole * GIB == pytest.approx(sum(p.nbytes for one in held for p in one.parameters()), rel=0.02)


def test_what_of_the_hub_is_not_here_counts_by_its_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a GPU a model of 24 GB would be fetched, and then not be loaded."""
    public = public_model("stabilityai/stable-diffusion-xl-base-1.0")
    assert public is not None
    found, section = replace(public, kind="hub"), ModelSection(base=str(public.path))
    texts, vae = 123_060_480 + 694_659_840, 0.32 * GIB
    counted = weights_of(found, section, torch.float32)
    assert counted.whole * GIB == pytest.approx(4 * (2_567_463_684 + texts) + vae, rel=1e-6)
    assert not counted.copied
    (tmp_path / "unet").mkdir()
    save_file({"conv_in.weight": torch.zeros(1000, dtype=torch.float16)}, tmp_path / "unet" / "a.safetensors")
    monkeypatch.setattr("emotrain.runs.plan_ram.fetched_folder", {str(public.path): tmp_path}.get)
    counted = weights_of(found, section, torch.float32)
    assert counted.whole * GIB == pytest.approx(4 * (1000 + texts) + vae, rel=1e-6)
    assert counted.copied["denoiser"] * GIB == 4000
    other = replace(
        found, path="a/b", variant="custom", denoiser_config={**public.denoiser_config, "layers_per_block": 1}
    )
    drawn = weights_of(replace(found, kind="folder", path=tmp_path), section, torch.float32, other).whole
    assert 1.5e9 * 4 < drawn * GIB < 2.5e9 * 4


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The numbers of the small FLUX, and a plan in which its blocks wait in the computer's memory."""
    monkeypatch.setattr(plan, "planned_dtype", lambda dtype, device: torch.float32)
    seen: list[Any] = []
    monkeypatch.setattr(plan, "plan_ram", lambda memory, *rest: seen.append(memory) or plan_ram(memory, *rest))
    made = plan.make_plan(load_preset("quickstart-flux"))
    return seen[0], replace(made.memory, offload=True, budget_gib=None, quantize="none")


def test_the_blocks_that_wait_are_counted_as_the_arena_that_holds_them(small: tuple[Any, Any]) -> None:
    memory, chosen = small
    family = load_family("builtin:tiny-flux", device="cpu", dtype="fp32")
    moving = offload_blocks(family.denoiser, torch.device("cpu"), FAMILIES["flux"].blocks)
    assert moving is not None
    arena = sum(home.packed.numel() for home in moving.homes) / GIB
    assert memory.blocks_at_home(chosen) == pytest.approx(arena, rel=0.01)
    assert memory.blocks_at_home(replace(chosen, offload=False)) == 0.0
    largest = max(gib for name, gib in chosen.stages if name != "encode")
    some = replace(chosen, budget_gib=1.1 * largest + arena / 4)
    assert memory.blocks_at_home(some) == pytest.approx(0.75 * arena, rel=0.01)


def test_each_stage_holds_what_is_there_at_that_time(small: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    memory, chosen = small
    weights = Weights(40.0, {"denoiser": 22.0, "text": 9.0, "vae": 0.3, "other": 22.0})
    on_cpu = replace(chosen, encoders=(("text_encoder_2", "cpu"),), in_turn=True)
    made = plan_ram(memory, on_cpu, weights, 2.0)
    stages = {name: round(gib, 1) for name, gib in made.stages}
    assert stages == {"load": 32.8, "encode": 25.5, "place": 47.5, "train": 3.5}
    assert made.locked == memory.blocks_at_home(on_cpu) > 0
    assert (round(made.copied, 1), round(made.beside, 1)) == (31.3, 46.0)  # without the base for samples; of "place"
    bare = plan_without_gpu(weights)
    assert (bare.copied, bare.beside, bare.needed()) == (pytest.approx(31.3), 40.0, pytest.approx(40.7))
    monkeypatch.setattr(type(memory), "other_base", lambda self, chosen: 11.0)
    turns = dict(plan_ram(memory, on_cpu, weights, 2.0).stages)
    assert (round(turns["train"], 1), round(turns["draw"], 1)) == (14.5, 25.5)  # both wait while they change places


LOADS = RamPlan((("load", 8.0), ("encode", 7.0), ("place", 7.0), ("train", 2.0)))
WAITS = RamPlan((("load", 2.0), ("encode", 2.0), ("place", 24.0), ("train", 25.0), ("draw", 30.0)), locked=20.0)


def gib(free: float, swap: float = 0.0) -> Ram:
    return Ram(64 * GIB, int(free * GIB), int(swap * GIB))


def test_processes_load_one_after_another_where_that_fits() -> None:
    assert [LOADS.needed(n) for n in (1, 2)] == [8.0, 16.0]
    assert [LOADS.needed(n, in_turn=True) for n in (2, 8)] == [10.0, 22.0]
    assert [WAITS.needed(n) for n in (1, 2)] == [30.0, 55.0]  # one alone draws
    assert room(LOADS, gib(18), 2) == (False, None)
    assert room(LOADS, gib(16), 2) == (True, None)
    assert room(LOADS, gib(10.5), 2)[0]
    assert "2 processes need about 10.0 GiB of the computer's memory, of 10.5" in (room(LOADS, gib(10.5), 2)[1] or "")


@pytest.mark.parametrize(
    ("planned", "free", "processes", "says"),
    [
        (LOADS, gib(7.2), 1, "the run needs about 8.0 GiB of the computer's memory, and 7.2 GiB are free"),
        (LOADS, gib(9.0), 2, "2 processes need about 10.0 GiB"),
        (WAITS, gib(18.0, 40.0), 1, "30.0 GiB of the computer's memory, 20.0 of it for blocks that wait there"),
    ],
)
def test_too_little_is_refused_in_one_line(planned: RamPlan, free: Ram, processes: int, says: str) -> None:
    with pytest.raises(ResourceError) as refused:
        room(planned, free, processes)
    assert says in refused.value.message
    assert refused.value.hint


def test_what_goes_to_the_swap_or_was_kept_is_room_too() -> None:
    assert "may get slow" in (room(LOADS, gib(6.5, 1.0))[1] or "")
    assert room(LOADS, gib(3.0), kept=8 * GIB) == (False, None)


def test_a_count_that_may_be_off_by_a_tenth_refuses_nothing() -> None:
    assert "about 8.0 GiB of the computer's memory, of 7.5" in (room(LOADS, gib(7.5))[1] or "")
    assert "20.0 of it for blocks that wait there, of 19.0" in (room(WAITS, gib(19.0, 40.0))[1] or "")


def own_preset(folder: Path, model: Path | str) -> Path:
    path = folder / "p.yaml"
    words = 'dataset: {trigger: t, resolution: 64, buckets: {step: 64, min: 64}, folders: [{path: "builtin:example"}]}'
    path.write_text(f"model: {{base: {model}}}\n{words}\nsample: {{every: 0}}\n")
    return path


@pytest.mark.parametrize("kind", ["folder", "built in"])
def test_run_and_check_refuse_where_nothing_could_be_loaded(
    kind: str, sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own_preset(tmp_path, sd_folder if kind == "folder" else "builtin:tiny-sd")
    monkeypatch.chdir(tmp_path)
    for module in (preflight, loaded):
        monkeypatch.setattr(module, "ram", lambda: gib(0.1))
    assert main(["check", str(path)]) == 6
    assert "error: the run needs about 0.7 GiB of the computer's memory, and 0.1" in capsys.readouterr().err
    assert main(["run", str(path), "--plain"]) == 6
    assert "error: the run needs about 0.7 GiB" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "p").exists()


def test_plan_says_exit_6_where_the_blocks_have_no_room(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "free_gib", lambda device: 8.0)
    monkeypatch.setattr(plan, "ram", lambda: gib(1.0))
    assert main(["plan", "quickstart"]) == 6
    said = capsys.readouterr()
    assert "GiB of the computer's memory, and 1.0 GiB are free" in said.err
    assert "place" in said.out


def test_check_of_a_built_in_model_counts_where_memory_is_short_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(plan, "plan_run", lambda *_, **__: asked.append("counted") or (None, LOADS))
    preset = load_preset("quickstart")
    found = preflight.preflight(preset)
    monkeypatch.setattr(preflight, "ram", lambda: gib(4.1))
    preflight.look_at_ram(preset, found)
    assert not asked
    monkeypatch.setattr(preflight, "ram", lambda: gib(3.9))
    preflight.look_at_ram(preset, found)
    assert asked == ["counted"]
    assert [type(one) for one in found.failures] == [ResourceError]
