"""`network.text_encoder: true`: whole runs in which the CLIP encoders are trained, of every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from emotrain.config.load import load
from emotrain.config.schema import Preset
from emotrain.errors import ConfigError
from emotrain.families.common import LoadedFamily
from emotrain.families.loading import load_family
from emotrain.lora.file import LoraFile, read_lora, save_lora
from emotrain.lora.merge import merge
from emotrain.runs import start
from emotrain.runs.adapters import build_adapter
from emotrain.runs.folder import RunFolder
from emotrain.runs.parents import apply_stack
from emotrain.train.losses import text_of

PRESET = """
model: MODEL
dataset: {folders: [{path: ./pictures}], resolution: 64, buckets: {step: 16, min: 64, max: 64}}
network: {rank: 4, alpha: 2, targets: [transformer_blocks.0.*to_q], text_encoder: true}
train: {max_steps: 4, micro_batch_size: 2, optimizer: adamw, lr: 1e-2, loss: {baseline: raw}}
save: {every: 2, dtype: fp32}
validate: {every: 2, probe_images: 1}
sample: {every: 4, at_start: false, steps: 2, prompts: ["a square, number 3"], guidance: 2.0}
stop: {mode: "off"}
log: {tensorboard: false}
"""
PROMPT = "a square, number 3"
MODULES = {  # of the small models in conftest.py: 6 in each layer of CLIP
    "sd": {"text_encoder": 12},
    "sdxl": {"text_encoder": 12, "text_encoder_2": 18},
    "sd3": {"text_encoder": 18, "text_encoder_2": 18},
    "flux": {"text_encoder": 12},
}


class Quiet:
    def __init__(self) -> None:
        self.facts: dict[str, str] = {}

    def handle(self, event: Any) -> None:
        if hasattr(event, "facts"):
            self.facts = dict(event.facts)

    def close(self) -> None:
        pass


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMOTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "pictures").mkdir()
    for index in range(4):
        Image.new("RGB", (64, 64), (60 * index, 255 - 60 * index, 90)).save(folder / "pictures" / f"{index}.png")
        (folder / "pictures" / f"{index}.txt").write_text(f"a square, number {index}")
    return folder


Make = Callable[..., Preset]


@pytest.fixture
def preset(place: Path, request: pytest.FixtureRequest) -> Make:
    def make(kind: str, *overrides: str, name: str = "run") -> Preset:
        path = place / f"{kind}.yaml"
        path.write_text(PRESET.replace("MODEL", str(request.getfixturevalue(f"{kind}_folder"))))
        return load(str(path), overrides, name).preset

    return make


@pytest.fixture(scope="module")
def finished(place: Path) -> dict[str, RunFolder]:
    return {}


@pytest.fixture
def run_of(preset: Make, place: Path, finished: dict[str, RunFolder]) -> Callable[[str], RunFolder]:
    """The run of a family, trained once."""

    def run(kind: str) -> RunFolder:
        if kind not in finished:
            watch = Quiet()
            result = start.run(preset(kind, name=kind), runs_dir=place / "runs", observers=(watch,))
            assert result.exit_code == 0
            for part, count in MODULES[kind].items():
                assert f"{count} {part}" in watch.facts["LoRA"]
            finished[kind] = result.folder
        return finished[kind]

    return run


def picture(folder: Path, lora: Path | None) -> np.ndarray:
    """As a user of diffusers would: from_pretrained, load_lora_weights, a prompt."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(str(lora))
    words: dict[str, Any] = {"guidance_scale": 2.0}
    if "Flux" in type(pipeline).__name__:
        words = {"guidance_scale": 0.0, "true_cfg_scale": 2.0, "negative_prompt": "", "max_sequence_length": 24}
    if "3" in type(pipeline).__name__:
        words["max_sequence_length"] = 24
    out = pipeline(
        PROMPT, width=64, height=64, num_inference_steps=2,
        generator=torch.Generator().manual_seed(42), **words,
    )  # fmt: skip
    return np.asarray(out.images[0].convert("RGB"), int)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in ("sd3", "sdxl") else kind for kind in MODULES]
)
def test_the_file_draws_the_live_picture_in_a_fresh_pipeline(
    kind: str, run_of: Callable[[str], RunFolder], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder, run = request.getfixturevalue(f"{kind}_folder"), run_of(kind)
    live = np.asarray(Image.open(run.samples_dir / "step-00000004-1.png").convert("RGB"), int)
    fresh = picture(folder, run.lora_last_path)
    assert np.abs(live - fresh).max() <= 1
    weights = load_file(run.lora_last_path)
    counts = {part: len([path for path in read_lora(run.lora_last_path).alphas if path.startswith(part + ".")])
              for part in MODULES[kind]}  # fmt: skip
    assert counts == MODULES[kind]
    bare = {key: value for key, value in weights.items() if not key.startswith(("text_encoder", "lora_te"))}
    assert len(bare) < len(weights)
    save_file(bare, tmp_path / "bare.safetensors")
    assert np.abs(live - picture(folder, tmp_path / "bare.safetensors")).max() > 1, "CLIP's part does nothing"


@pytest.mark.parametrize("kind", ["sdxl", pytest.param("sd3", marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_same_bits(
    kind: str, run_of: Callable[[str], RunFolder], preset: Make, tmp_path: Path
) -> None:
    straight = run_of(kind)
    half = start.run(preset(kind, "train.max_steps=2", name=kind), runs_dir=tmp_path, observers=()).folder
    again = start.resume(half, preset(kind, name=kind), observers=()).folder
    one, two = load_file(straight.lora_last_path), load_file(again.lora_last_path)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(".text_encoder_2." in f".{key}" or "lora_te2" in key for key in one)
    for stem in ("adapter", "optimizer", "best"):
        name = f"step-00000004/{stem}.safetensors"
        one, two = (load_file(run.checkpoints_dir / name) for run in (straight, again))
        assert all(torch.equal(one[key], two[key]) for key in one)
    one, two = (validations(run) for run in (straight, again))
    assert one == two


def validations(run: RunFolder) -> list[dict[str, Any]]:
    """Without the forecast: the first half of a resumed run knew of an earlier end."""
    rows = [json.loads(line) for line in (run.path / "validation.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "forecast"} for row in rows]


def embeds(family: LoadedFamily, cached: bool = True) -> dict[str, torch.Tensor]:
    """What the encoders make of the prompt now."""
    with torch.no_grad():
        return family.encode_texts([PROMPT]) if cached else text_of(family, [PROMPT], {})


@pytest.mark.parametrize("kind", list(MODULES))
def test_off_is_the_base_and_both_parts_get_gradients(kind: str, preset: Make) -> None:
    chosen = preset(kind)
    family = load_family(chosen.model.base, device="cpu")
    base = embeds(family)
    adapter = build_adapter(chosen, family)
    assert adapter.num_modules_by_part().items() >= MODULES[kind].items()
    texts = {k: p for k, p in adapter.named_parameters() if k.startswith("text_encoder") and "lora_B" in k}
    with torch.no_grad():
        for parameter in texts.values():
            parameter.fill_(0.05)
    assert any(not torch.equal(value, base[key]) for key, value in embeds(family).items())
    with adapter.off():
        assert all(torch.equal(value, base[key]) for key, value in embeds(family).items())
    live = text_of(family, [PROMPT], base if kind in ("sd3", "flux") else {})
    sum(value.sum() for value in live.values()).backward()
    idle = {k.split(".layers.")[0] + k.split(".layers.")[1][:1] for k, p in texts.items() if p.grad is None}
    # SDXL takes its first encoder's layer before the last, and nothing that comes after it
    assert idle == ({"text_encoder.text_model.encoder1"} if kind == "sdxl" else set())
    fresh = embeds(family)
    assert all(torch.allclose(live[key].float(), fresh[key], atol=1e-5) for key in fresh)


def test_a_t5_is_freed_and_its_cached_tokens_are_used(preset: Make) -> None:
    chosen = preset("flux")
    family = load_family(chosen.model.base, device="cpu")
    cached = embeds(family)
    build_adapter(chosen, family)
    family.free_encoders()
    assert [part.name for part in family.text_encoders] == ["text_encoder"]
    live = text_of(family, [PROMPT], cached)
    assert torch.equal(live["prompt_embeds"], cached["prompt_embeds"])
    assert live["pooled_prompt_embeds"].requires_grad


def test_a_run_goes_on_from_a_lora_with_text_encoders(
    run_of: Callable[[str], RunFolder], preset: Make, tmp_path: Path
) -> None:
    first = run_of("sdxl")
    words = (f"start_from.continue={first.lora_path}", "train.max_steps=1", "sample.every=0",
             "train.optimizer=emosens", "train.lr=1.0")  # fmt: skip
    with pytest.raises(ConfigError, match="network.text_encoder is off"):
        start.run(preset("sdxl", *words, "network.text_encoder=false", name="a"), runs_dir=tmp_path, observers=())
    second = start.run(preset("sdxl", *words, name="b"), runs_dir=tmp_path, observers=()).folder
    assert second.info()["base_loss"] == pytest.approx(first.info()["best_loss"], rel=1e-3)


@pytest.mark.parametrize("trained", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["sdxl", pytest.param("sd3", marks=pytest.mark.slow)])
def test_a_stack_reaches_the_text_encoders(
    kind: str, trained: bool, run_of: Callable[[str], RunFolder], preset: Make, tmp_path: Path
) -> None:
    first = run_of(kind)
    stack = f"start_from.stack=[{{path: {first.lora_path}, weight: 1.0}}]"
    chosen = preset(
        kind, stack, "train.max_steps=1", "sample.every=0", f"network.text_encoder={str(trained).lower()}", name="s"
    )
    second = start.run(chosen, runs_dir=tmp_path, observers=()).folder
    assert second.info()["base_loss"] == pytest.approx(first.info()["best_loss"], rel=1e-3)
    assert len(read_lora(second.lora_path).parts) == (3 if trained else 1)


def test_a_stacked_encoder_has_another_identity(run_of: Callable[[str], RunFolder], preset: Make) -> None:
    first = run_of("sd")
    chosen = preset("sd", f"start_from.stack=[{{path: {first.lora_path}, weight: 1.0}}]")
    plain, stacked = (load_family(chosen.model.base, device="cpu") for _ in range(2))
    apply_stack(chosen, stacked)
    assert plain.text_identity() != stacked.text_identity()  # or cached captions of the base would be used
    assert not torch.equal(embeds(plain)["prompt_embeds"], embeds(stacked)["prompt_embeds"])


def test_merging_adds_up_text_encoders_too(run_of: Callable[[str], RunFolder], preset: Make, tmp_path: Path) -> None:
    lora = read_lora(run_of("sdxl").lora_path)
    merged = merge([(lora, 0.75), (lora, 0.25)])
    assert merged.state.keys() == lora.state.keys()
    path = tmp_path / "merged.safetensors"
    save_lora(path, merged.state, alphas=merged.alphas, family=merged.family, dtype="fp32", metadata={})
    for name in ("text_encoder", "text_encoder_2", "unet"):
        ours, theirs = delta(read_lora(path), name), delta(lora, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in ours)


def delta(lora: LoraFile, part: str) -> dict[str, torch.Tensor]:
    state, alphas = lora.of_part(part)
    return {
        path: state[f"{path}.lora_B.weight"].flatten(1) @ state[f"{path}.lora_A.weight"].flatten(1)
        * (alpha / state[f"{path}.lora_A.weight"].shape[0])
        for path, alpha in alphas.items()
    }  # fmt: skip
