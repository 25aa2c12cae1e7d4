"""`emotrain plan`: from a preset to numbers, without weights."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

import emotrain.runs.plan as planning
from emotrain.cli.app import main
from emotrain.config.load import load_preset
from emotrain.errors import ModelError
from emotrain.families.table import sniff
from emotrain.lora.adapter import add_adapter
from emotrain.lora.file import save_lora
from emotrain.ranks import Ranks
from emotrain.runs.activation_memory import ActivationMemory, build_on_meta
from emotrain.runs.adapters import check_modules

UNET = "model.diffusion_model."
PUBLIC = ("sd15", "flux", "zimage", "krea2", "qwen-image", "illustrious")


pytestmark = pytest.mark.usefixtures("counted_once")


def header_only(path: Path, shapes: dict[str, list[int]]) -> Path:
    """A safetensors file whose numbers are a hole in the file."""
    entries: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + end)
    return path


def large_preset(folder: Path, text_width: int) -> Path:
    """Of a checkpoint of Stable Diffusion's real size, told by the width of its text: 768 is 1.5, 2048 is XL."""
    header_only(
        folder / "base.safetensors",
        {
            f"{UNET}input_blocks.0.0.weight": [320, 4, 3, 3],
            f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": [640, text_width],
        },
    )
    preset = folder / "a.yaml"
    preset.write_text(
        "model: ./base.safetensors\n"
        "dataset:\n"
        "  trigger: t\n"
        "  folders: [{path: builtin:example, repeats: 3}]\n"
        "  buckets: {upscale: true}\n"
        "train: {micro_batch_size: 2, gradient_accumulation_steps: 2, max_steps: 100}\n"
        "validate: {fraction: 0.0}\n",
        encoding="utf-8",
    )
    return preset


@pytest.fixture(scope="module")
def sdxl_preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_preset(tmp_path_factory.mktemp("sdxl"), 2048)


@pytest.fixture(scope="module")
def sdxl_plan(sdxl_preset: Path, counted_once: None) -> planning.Plan:
    return planning.make_plan(load_preset(sdxl_preset))


@pytest.fixture(scope="module")
def sd15_plan(tmp_path_factory: pytest.TempPathFactory, counted_once: None) -> planning.Plan:
    return planning.make_plan(load_preset(large_preset(tmp_path_factory.mktemp("sd15"), 768)))


def counted(plan: planning.Plan, modules: int, parameters: int, base_gib: float) -> tuple[dict[str, float], ...]:
    """The parts and the stages of a plan that has counted this much."""
    assert (plan.num_modules, plan.num_parameters) == (modules, parameters)
    assert (plan.work.samples, plan.work.steps_per_epoch) == (96, 24)
    parts, stages = dict(plan.parts), dict(plan.memory.stages)
    assert parts["frozen base"] == pytest.approx(base_gib, abs=0.01)
    assert parts["LoRA weights and gradients"] == pytest.approx(plan.num_trained * 12 / 2**30)
    assert stages["train"] == pytest.approx(sum(parts.values()))
    assert plan.needed == max(stages.values())
    return parts, stages


def test_a_real_sized_model_is_planned_from_its_header(sd15_plan: planning.Plan) -> None:
    plan = sd15_plan
    assert plan.found.family == "sd15"
    _, stages = counted(plan, 192, 859_520_964, 1.60)
    assert stages["encode"] == pytest.approx(1.78, abs=0.02)
    assert dict(plan.verdicts)[8].fits
    assert dict(plan.savings)["model.quantize: nf4"] == pytest.approx(1.60 - 1.24, abs=0.01)  # its convolutions stay


@pytest.mark.slow
def test_a_model_that_a_small_card_must_quantise_is_planned_from_its_header(sdxl_plan: planning.Plan) -> None:
    plan = sdxl_plan
    assert plan.found.family == "sdxl"
    parts, stages = counted(plan, 722, 2_567_463_684, 4.78)
    assert stages["encode"] == pytest.approx(0.6 + 0.33 + 2.5 + 1.52, abs=0.02)  # encoders, VAE, its pass over 1,024 px
    assert stages["sample"] - stages["save"] == pytest.approx(3.0 * 1.08 - parts["optimizer state"] - 0.25, abs=0.01)
    by_size = dict(plan.verdicts)
    assert by_size[24].fits
    assert by_size[8].needed_gib < by_size[24].needed_gib


def test_checkpointing_keeps_less_and_a_block_is_part_of_the_whole(
    sd15_plan: planning.Plan, counted: dict[str, ActivationMemory]
) -> None:
    one = next(one for one in counted.values() if one.latents == (2, 4, 64, 64))
    assert 0 < one.block < one.saved
    assert one.checkpointed < 0.4 * one.plain
    assert one.saved / 2**30 == pytest.approx(1.81, rel=0.1)  # float32 norms and LoRA inputs would make it a third more


def test_a_second_gpu_doubles_the_step_and_sends_the_gradients(sd15_plan: planning.Plan) -> None:
    plan = sd15_plan
    second = planning.second_gpu(plan)
    assert second.samples == 2 * plan.batch * round(plan.work.batches_per_epoch / plan.work.steps_per_epoch)
    assert second.steps_per_epoch == plan.work.steps_per_epoch / 2
    assert second.more_gib * 2**30 == 4 * plan.num_trained
    assert second.exchange_s["a network of 1 Gbit/s"] == pytest.approx(4 * plan.num_trained / 1.25e8)


def test_the_fullest_of_several_gpus_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process sees 0.75 GiB, another one 0.5: the plan is that of 0.5, less what is exchanged."""

    class Two(Ranks):
        world = 2

        def meet(self, value: Any) -> list[Any]:
            return [value, 0.5]

    preset = load_preset("quickstart", ["train.micro_batch_size=16", "network.rank=64"])
    monkeypatch.setattr(planning, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(planning, "planned_dtype", lambda dtype, device: torch.bfloat16)
    monkeypatch.setattr(planning, "free_gib", lambda device: 0.75)
    found = planning.sniffed(preset)
    words = (preset, found, planning.read_pictures(preset), planning.loader_settings(preset, found))
    together = planning.plan_run(*words, Two())
    trained = planning.make_plan(preset).num_trained
    monkeypatch.setattr(planning, "free_gib", lambda device: 0.5 - planning.exchanged_gib(trained))
    assert together == planning.plan_run(*words)


@pytest.mark.parametrize("words", [[], ["train.micro_batch_size=16", "network.rank=64"]])
def test_run_fits_by_the_numbers_of_plan(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    preset = load_preset("quickstart", words)
    monkeypatch.setattr(planning, "free_gib", lambda device: 0.75)
    monkeypatch.setattr(planning, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(planning, "planned_dtype", lambda dtype, device: torch.bfloat16)
    said = planning.make_plan(preset)
    found = planning.sniffed(preset)
    settings = planning.loader_settings(preset, found)
    pictures = planning.read_pictures(preset)
    assert planning.plan_run(preset, found, pictures, settings) == (said.memory, said.ram)
    monkeypatch.setattr(planning, "choose_device", lambda name: torch.device("cpu"))
    on_gpu, ram = planning.plan_run(preset, found, pictures, settings)
    assert on_gpu is None
    assert 0.0 < ram.needed() < 1.0


def test_a_bigger_batch_needs_more() -> None:
    one = planning.make_plan(load_preset("quickstart", ["train.micro_batch_size=1"]))
    eight = planning.make_plan(load_preset("quickstart", ["train.micro_batch_size=8"]))
    assert dict(eight.parts)["activations"] > 7 * dict(one.parts)["activations"]
    assert "train.micro_batch_size: 1" in dict(eight.savings)
    assert "train.micro_batch_size: 1" not in dict(one.savings)


def test_plan_prints_json_and_writes_nothing(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "quickstart", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["network"]["modules"] > 0
    assert said["data"]["pictures"] + said["data"]["held_out"] == 32
    assert set(said["verdicts"]) == {"8gb", "12gb", "16gb", "24gb"}
    for size, verdict in said["verdicts"].items():
        weights = said["model"]["parameters"] * {"none": 2, "int8": 1, "nf4": 0.5}[verdict["quantize"]] / 2**30
        assert not verdict["fits"] or verdict["offload"] or weights < verdict["needed_gib"] < int(size[:-2])
    assert not said["verdicts"]["8gb"]["fits"] or said["verdicts"]["24gb"]["fits"]
    assert list(tmp_path.iterdir()) == []


def test_plan_says_exit_6_where_it_does_not_fit(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(planning, "free_gib", lambda device: 0.3)
    assert main(["plan", "quickstart", "--set", "train.micro_batch_size=64"]) == 6
    said = capsys.readouterr()
    assert "GPU memory are free" in said.err
    assert "hint: `" in said.err
    assert "8 GB" in said.out
    assert "\nswitch " in said.out


def test_plan_names_no_switch_where_none_saves(monkeypatch: Any, capsys: Any) -> None:
    few = ("--set", "train.micro_batch_size=1", "--set", "dataset.resolution=32", "--set", "dataset.buckets.min=32")
    assert main(["plan", "quickstart", *few]) == 0
    said = capsys.readouterr().out
    assert "\nswitch " not in said
    assert " in 1 bucket, " in said


def test_optimizer_state_is_counted_by_looking(sdxl_preset: Path) -> None:
    for ema, wanted in (("false", 8.0), ("true", 12.0)):
        adamw = load_preset(sdxl_preset, ["train.optimizer=adamw", "train.lr=1e-4", f"train.ema={ema}"])
        assert planning.state_bytes_per_number(adamw) == pytest.approx(wanted, rel=0.01)


def test_a_half_covered_model_is_refused(sdxl_preset: Path) -> None:
    found = sniff(str(sdxl_preset.parent / "base.safetensors"))
    check_modules(found, "attn-mlp", 722)
    with pytest.raises(ModelError, match="88 modules instead of 722"):
        check_modules(found, "attn-mlp", 88)
    check_modules(found, ("to_q",), 70)


@pytest.mark.slow
def test_trained_text_encoders_are_counted_and_stay(sdxl_preset: Path, sdxl_plan: planning.Plan) -> None:
    without = sdxl_plan
    plan = planning.make_plan(load_preset(sdxl_preset, ["network.text_encoder=true"]))
    assert (plan.num_modules, plan.text_modules) == (722, 72 + 192)
    assert plan.num_trained - without.num_trained == 72 // 6 * 16 * (4 * 2 * 768 + 2 * (768 + 3072)) + 192 // 6 * 16 * (
        4 * 2 * 1280 + 2 * (1280 + 5120)
    )
    parts, before = dict(plan.parts), dict(without.parts)
    assert parts["text encoders"] == pytest.approx((123_060_480 + 694_659_840) * 2 / 2**30)
    assert "text encoders" not in before
    assert parts["activations"] > before["activations"]
    assert dict(plan.savings)["network.text_encoder: false"] > 1.5
    assert dict(plan.disk)["cached captions"] == 0


@pytest.mark.parametrize(
    ("name", "known"), [("sd15", True), *(pytest.param(name, False, marks=pytest.mark.slow) for name in PUBLIC)]
)
def test_will_it_fit_my_card_is_answered_without_a_model_or_pictures(
    name: str,
    known: bool,
    sd15_plan: planning.Plan,
    counted: dict[str, ActivationMemory],
    capsys: Any,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    if known:
        one = next(one for one in counted.values() if one.latents == (2, 4, 64, 64))
        monkeypatch.setattr(planning, "measure", lambda *_, **__: one)
    assert main(["plan", name, "--json"]) == 0
    streams = capsys.readouterr()
    said = json.loads(streams.out)
    assert set(said["verdicts"]) == {"8gb", "12gb", "16gb", "24gb"}
    for size, verdict in said["verdicts"].items():
        weights = said["model"]["parameters"] * {"none": 2, "int8": 1, "nf4": 0.5}[verdict["quantize"]] / 2**30
        assert not verdict["fits"] or verdict["offload"] or weights < verdict["needed_gib"] < int(size[:-2])
    assert not said["verdicts"]["8gb"]["fits"] or said["verdicts"]["24gb"]["fits"]
    assert said["data"]["pictures"] == 30
    assert len(said["data"]["assumed"]) == (2 if name == "illustrious" else 1)  # its sizes are SDXL's
    assert "planned for 30 pictures" in streams.err


def test_a_preset_of_one_s_own_is_never_planned_with_pictures_that_are_not_there(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "p.yaml").write_text("extends: sdxl\ndataset: ./none\n", encoding="utf-8")
    assert main(["plan", str(tmp_path / "p.yaml")]) == 3
    assert "does not exist" in capsys.readouterr().err


def test_a_lora_that_is_continued_is_counted_by_its_own_ranks(tmp_path: Path) -> None:
    """The preset's rank does not matter: it is the file's modules that are trained."""
    found = sniff("builtin:tiny-sd")
    model = build_on_meta("sd15", found.denoiser_config, torch.float32)
    made = add_adapter(model, family="sd15", seed=0, rank=8, alpha=8, targets=("mid_block.*to_q",))
    zeros = {name: torch.zeros(parameter.shape) for name, parameter in made.named_parameters()}
    save_lora(tmp_path / "earlier.safetensors", zeros, alphas=made.alphas(), family="sd15", metadata={})
    words = ["network.rank=2", f"start_from.continue={tmp_path / 'earlier.safetensors'}"]
    plan = planning.make_plan(load_preset("quickstart", words))
    assert (plan.rank, plan.num_modules, plan.num_trained) == (8, made.num_modules, made.num_parameters)
    assert not {"half the rank", "twice the factor"} & {name for name, _ in plan.savings}
    with pytest.raises(ModelError, match="is a LoRA for sd15, the model is flux"):
        planning.make_plan(load_preset("quickstart-flux", words))
