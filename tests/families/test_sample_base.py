"""Samples on another model than the one that is trained: its stock pipeline's pictures with the LoRA's file."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stock
import torch
from newer_models import pipeline_of, qwen, separate_files, with_head
from PIL import Image
from safetensors.torch import load_file, save_file

from emotrain.cli.app import main
from emotrain.config.load import load_preset
from emotrain.errors import EmotrainError
from emotrain.families.memory import Needs, choose_memory
from emotrain.families.registry import FAMILIES
from emotrain.families.sniff import is_distilled, name_of
from emotrain.families.table import ASSETS, sniff
from emotrain.lora.file import save_lora
from emotrain.runs import loaded as stage
from emotrain.runs import start
from emotrain.runs.folder import RunFolder
from emotrain.runs.sample_base import SampleBase
from emotrain.runs.verify import compare

pytestmark = pytest.mark.usefixtures("counted_once")

KINDS = ("zimage", "krea2", "flux2", "flux", "sd3", "sdxl")
QUICK = ("zimage", "flux2")  # a name and a flag tell what is distilled
SHORT = {"max_sequence_length": 24}
SHALLOW: dict[str, dict[str, Any]] = {"flux2": {"text_encoder_out_layers": (1, 2, 3)}, "flux": SHORT, "sd3": SHORT}
DATA = "dataset: {trigger: rkt, resolution: 64, buckets: {step: 64, min: 64}, folders: [{path: ./pictures}]}\n"
REST = "network: {rank: 2}\ntrain: {max_steps: 2}\nvalidate: {every: 2, probe_images: 1}\nsave: {every: 2}\n"
PROMPT = "a red apple"
SAMPLE = f'prompts: ["{PROMPT} --w 64 --h 96"], seed: 7'


def other_of(folder: Path, place: Path, *parts: str) -> Path:
    """A copy of a model with other weights of its denoiser and of some more parts."""
    shutil.copytree(folder, place)
    generator = torch.Generator().manual_seed(5)
    for part in ("transformer", "unet", *parts):
        for file in (place / part).glob("*.safetensors"):
            tensors = load_file(file)
            for value in tensors.values():
                if value.ndim > 1:
                    value += 0.3 * value.float().std() * torch.randn(value.shape, generator=generator)
            save_file(tensors, file, metadata={"format": "pt"})
    return place


THIN = {"intermediate_size": 16, "head_dim": 8}  # inner sizes of a language model that is as wide as the public one


WIDE = {"zimage-wide": "z-image", "flux2-wide": "klein-4b"}


def wide_pipeline(kind: str) -> Any:
    """A public denoiser with one block of each sort, and a text encoder of its width and depth."""
    family = family_of(kind)
    pipeline = pipeline_of(family)
    encoder = qwen(2560, **THIN) if family == "zimage" else with_head(qwen(2560, 28, **THIN))
    denoiser, vae = stock.denoiser_of(WIDE[kind]), stock.narrow_vae(family)
    pipeline.register_modules(transformer=denoiser, vae=vae, text_encoder=encoder)
    return pipeline


def family_of(kind: str) -> str:
    return kind.removesuffix("-wide")


@pytest.fixture(
    scope="module",
    params=[one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in (*KINDS, *WIDE)],
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A kind of models, one of it, and a distilled one."""
    kind, place = str(request.param), tmp_path_factory.mktemp("pair")
    if kind in ("flux", "sdxl", "sd3"):
        base = request.getfixturevalue(f"{kind}_folder")
    else:
        base = place / "base"
        (wide_pipeline(kind) if kind in WIDE else pipeline_of(kind)).save_pretrained(base)
    turbo = other_of(base, place / f"{kind}-turbo", *(["text_encoder"] if kind == "sdxl" else []))
    if family_of(kind) in ("flux2", "krea2"):
        turbo = turbo.rename(place / "quick")  # which says it in its model_index.json alone
        index = turbo / "model_index.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), "is_distilled": True}))
    return kind, base, turbo


def pictures(place: Path) -> None:
    """Three captioned pictures in a folder of that name."""
    (place / "pictures").mkdir(exist_ok=True)
    for index in range(3):
        Image.new("RGB", (64, 64), (80 * index, 90, 9)).save(place / "pictures" / f"{index}.png")
        (place / "pictures" / f"{index}.txt").write_text(f"a square, number {index}")


def preset_of(path: Path, base: Path, more: str = "", rest: str = REST) -> Any:
    pictures(path.parent)
    path.write_text(f"model: {base}\n{DATA}{rest}sample: {{{SAMPLE}{more}}}\n")
    return load_preset(path)


def loaded_of(path: Path, base: Path, turbo: Path, rest: str = REST, size: float = 0.3) -> stage.Loaded:
    """A run up to its first step, with a LoRA of random weights of that size."""
    loaded = stage.load(preset_of(path, base, f", base: {turbo}", rest), lambda event: None)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in loaded.model.adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return loaded


def stock_pictures(kind: str, turbo: Path, lora: Path) -> list[np.ndarray]:
    """Without the LoRA and with it."""
    import diffusers

    family = family_of(kind)
    pipeline = getattr(diffusers, FAMILIES[family].pipeline).from_pretrained(turbo)
    pipeline.set_progress_bar_config(disable=True)
    steps = 8 if family in ("zimage", "krea2") else 4
    off = 0.0 if family in ("zimage", "krea2") else 1.0
    words = {"prompt": PROMPT, "width": 64, "height": 96, "num_inference_steps": steps, "guidance_scale": off}
    pictures = []
    for loaded in (False, True):
        if loaded:
            pipeline.load_lora_weights(str(lora))
        picture = pipeline(generator=torch.Generator().manual_seed(7), **words, **SHALLOW.get(kind, {})).images[0]
        pictures.append(np.asarray(picture, dtype=int))
    return pictures


def test_it_draws_what_the_stock_pipeline_draws_with_the_loras_file(
    pair: tuple[str, Path, Path], tmp_path: Path
) -> None:
    """In the distilled model's own number of steps, guidance and shift; the slow model is as wide as the public one."""
    kind, base, turbo = pair
    family = family_of(kind)
    size = 0.05 if kind in WIDE else 0.3  # products grow with width
    loaded = loaded_of(tmp_path / "p.yaml", base, turbo, size=size)
    assert loaded.sampler is not None
    loaded.sampler.folder = tmp_path / "samples"
    loaded.sampler.draw(1)
    adapter, path = loaded.model.adapter, tmp_path / "lora.safetensors"
    save_lora(path, adapter.file_state(), alphas=adapter.file_alphas(), family=family, dtype="fp32", metadata={})
    del adapter, loaded  # the large ones do not fit into memory beside two of the stock pipeline
    gc.collect()
    file = Image.open(tmp_path / "samples" / "step-00000001-1.png")
    ours, (without, theirs) = np.asarray(file, dtype=int), stock_pictures(kind, turbo, path)
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(theirs - without).max() > 1
    told = json.loads(file.text["emotrain"])
    assert (told["base"], told["steps"]) == (turbo.name, 8 if family in ("zimage", "krea2") else 4)
    assert f"Model: {turbo.name}" in file.text["parameters"]


@pytest.mark.parametrize(
    "rest",
    [
        "text_encoder: true, rank: 2, targets: attn",
        "type: lokr, factor: 4, targets: [mid_block]",
        pytest.param("targets: all, rank: 2", marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_lora_is_carried_over(sdxl_folder: Path, rest: str, tmp_path: Path) -> None:
    turbo = other_of(sdxl_folder, tmp_path / "turbo")
    loaded = loaded_of(tmp_path / "p.yaml", sdxl_folder, turbo, REST.replace("rank: 2", rest, 1))
    base, trained = loaded.sample_base, loaded.model.adapter
    assert base is not None
    before = {name: tensor.clone() for name, tensor in loaded.model.family.denoiser.state_dict().items()}
    with base.drawing():
        ours, theirs = dict(base.adapter.named_parameters()), dict(trained.named_parameters())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) and ours[key] is not theirs[key] for key in ours)
    assert all(torch.equal(value, before[key]) for key, value in loaded.model.family.denoiser.state_dict().items())
    assert not any(parameter.requires_grad for parameter in base.adapter.parameters())
    assert all(parameter.requires_grad for parameter in trained.parameters())


@pytest.fixture(scope="module")
def tiny_turbo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return other_of(ASSETS / "tiny-sd", tmp_path_factory.mktemp("tiny") / "tiny-turbo")


def quickstart(name: str, runs: Path, *words: str) -> Any:
    from emotrain.config.load import load

    few = ["train.max_steps=2", "validate.probe_images=1", "validate.every=1", "sample.every=1", "sample.steps=2",
           "save.every=1", "network.targets=[mid_block.*to_q]", "train.loss.baseline=raw",
           "sample.prompts=['[trigger], rocket']"]  # fmt: skip
    preset = load("quickstart", [*few, *words], name).preset
    return start.run(preset, runs_dir=runs, observers=()).folder


@pytest.fixture(scope="module")
def straight(tiny_turbo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, RunFolder]:
    """The same run without and with another model for its samples."""
    runs = tmp_path_factory.mktemp("runs")
    return quickstart("plain", runs), quickstart("drawn", runs, f"sample.base={tiny_turbo}")


def test_training_is_the_same_to_the_last_bit(straight: tuple[RunFolder, RunFolder]) -> None:
    plain, drawn = straight
    assert not [one.what for one in compare(plain, drawn, 2) if not one.equal]
    for name in ("step-00000000-1.png", "step-00000002-1.png", "lora-1.png"):
        ours, theirs = (np.asarray(Image.open(folder.samples_dir / name), dtype=int) for folder in straight)
        assert np.abs(ours - theirs).max() > 3  # and yet another model drew
    assert plain.info()["sample_base"] is None
    assert drawn.info()["sample_base"]["name"] == "tiny-turbo"


@pytest.mark.slow
def test_a_resumed_run_draws_and_trains_as_the_straight_one(
    straight: tuple[RunFolder, RunFolder], tiny_turbo: Path, tmp_path: Path
) -> None:
    half = quickstart("half", tmp_path, f"sample.base={tiny_turbo}", "train.max_steps=1")
    preset = load_preset(half.preset_path)
    longer = preset.model_copy(update={"train": preset.train.model_copy(update={"max_steps": 2})})
    start.resume(half, longer, observers=())
    pictures = ("step-00000002-1.png", "lora-1.png")
    for name in pictures:
        ours, theirs = (Image.open(folder.samples_dir / name).tobytes() for folder in (half, straight[1]))
        assert ours == theirs
    weights = [load_file(folder.path / "lora.safetensors") for folder in (half, straight[1])]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])


def smaller(folder: Path, place: Path) -> Path:
    """The same family with fewer layers."""
    shutil.copytree(folder, place)
    config = place / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "n_layers": 1}))
    (file,) = (place / "transformer").glob("*.safetensors")
    kept = {key: value for key, value in load_file(file).items() if not key.startswith("layers.1.")}
    save_file(kept, file, metadata={"format": "pt"})
    return place


@pytest.fixture(scope="module")
def zimage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zimage") / "base"
    pipeline_of("zimage").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("harm", "words", "code"),
    [
        ("missing", "does not exist", 4),
        ("family", "sd15 (Stable Diffusion", 4),
        ("smaller", "lacks 7 of the layers that the LoRA is put on", 4),
        ("quantised", "holds weights in a quantised form", 4),
        ("lora", "is a LoRA, not a model", 4),
        ("builtin", "is not a built-in model", 2),
    ],
)
def test_check_and_run_refuse_the_same(
    zimage: Path, harm: str, words: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other: Path | str = tmp_path / "other"
    if harm == "family":
        other = ASSETS / "tiny-sd"
    elif harm == "smaller":
        smaller(zimage, tmp_path / "other")
    elif harm in ("quantised", "lora"):
        tensors = load_file(separate_files("zimage", pipeline_of("zimage"), tmp_path / "comfy")["denoiser"])
        extra = {"layers.0.attention.out.weight.absmax": torch.zeros(1)}
        other = tmp_path / "other.safetensors"
        save_file({**tensors, **extra} if harm == "quantised" else {"x.lora_down.weight": torch.zeros(2, 2)}, other)
    elif harm == "builtin":
        other = "builtin:turbo"
    pictures(tmp_path)
    (tmp_path / "p.yaml").write_text(f"model: {zimage}\n{DATA}{REST}sample: {{{SAMPLE}, base: '{other}'}}\n")
    errors = []
    for command in ("check", "run"):
        assert main([command, str(tmp_path / "p.yaml"), "--runs-dir", str(tmp_path / "runs")]) == code
        errors.append(capsys.readouterr().err.split("error: ")[1])
        assert words in errors[-1]
    assert errors[0] == errors[1]
    assert not (tmp_path / "runs").exists()
    assert main(["plan", str(tmp_path / "p.yaml")]) == code
    assert words in capsys.readouterr().err


def test_a_file_of_the_denoiser_alone_takes_the_other_parts_of_the_model_that_is_trained(
    zimage: Path, tmp_path: Path
) -> None:
    """Z-Image as a folder, Turbo as ComfyUI's single file: text encoder and VAE are loaded once."""
    files = separate_files("zimage", pipeline_of("zimage"), tmp_path / "comfy")
    turbo = files["denoiser"].rename(files["denoiser"].with_name("z_image_turbo.safetensors"))
    (tmp_path / "comfy" / "denoiser").rename(turbo.with_suffix(""))
    loaded = stage.load(preset_of(tmp_path / "p.yaml", zimage, f", base: {turbo}"), lambda event: None)
    base = loaded.sample_base
    assert base is not None
    assert base.family.vae is loaded.model.family.vae
    assert loaded.sampler is not None
    assert [(one.steps, one.guidance) for one in loaded.sampler.requests] == [(8, 1.0)]


def test_what_the_stack_needs_is_asked_of_the_other_model_too(zimage: Path, tmp_path: Path) -> None:
    from emotrain.families.loading import load_family
    from emotrain.lora.adapter import add_adapter
    from emotrain.runs.sample_base import look

    adapter = add_adapter(
        load_family(str(zimage), device="cpu").denoiser, rank=2, targets="all", family="zimage", seed=0
    )
    path = tmp_path / "adapter.safetensors"
    save_lora(path, adapter.file_state(), alphas=adapter.file_alphas(), family="zimage", metadata={})
    other = smaller(zimage, tmp_path / "other")
    for shown, refused in (("true", True), ("false", False)):
        rest = f"network: {{targets: ['layers.0.attention.to_q']}}\nstart_from: {{stack: [{{path: {path}, "
        preset = preset_of(tmp_path / "p.yaml", zimage, f", base: {other}", f"{rest}sample: {shown}}}]}}\n")
        if refused:
            with pytest.raises(EmotrainError, match="modules are not in this transformer"):
                look(preset, sniff(zimage))
        else:
            assert look(preset, sniff(zimage)) is not None


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_layers_may_leave_and_come_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An int8 layer has its weights under two names, before its first pass and after it: they stay one tensor."""
    pytest.importorskip("bitsandbytes")
    from emotrain.families import turns
    from emotrain.families.quantize import quantize_linears

    model = torch.nn.Sequential(torch.nn.Linear(256, 256)).to(torch.bfloat16).requires_grad_(False)
    quantize_linears(model, kind, torch.device("cpu"))
    x, outputs = torch.randn(2, 256, dtype=torch.bfloat16), []
    real = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args: real(self, *args).clone())  # elsewhere, on one device
    for _ in range(3):
        places = turns.leave(model, torch.device("cpu"), ())
        assert (model[0], "weight") in places
        assert len({getattr(owner, name).data_ptr() for owner, name in places if name in ("weight", "CB")}) == 1
        turns.come_back(places, torch.device("cpu"))
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "to", real)
            outputs.append(model(x))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    ("family", "name", "distilled"),
    [
        ("zimage", "Z-Image-Turbo", True),
        ("zimage", "z_image_turbo_bf16", True),
        ("zimage", "zimage-wide-turbo", True),
        ("zimage", "z-image-de-turbo", False),
        ("zimage", "Z-Image-DeTurbo", False),
        ("zimage", "zimage_deturbo_v2", False),
        ("zimage", "z_image_turbo_with_training_adapter", False),
        ("zimage", "z_image_bf16", False),
        ("flux", "FLUX.1-schnell", True),
        ("flux", "flux.1-dev-hyper-8step", True),
        ("flux", "hyperflux_8steps", True),
        ("flux", "flux-dev-de-distill", False),
        ("flux2", "FLUX.2-klein-4B", True),
        ("flux2", "flux-2-klein-base-9b", False),
        ("flux2", "flux-2-klein-base-9b-turbo", True),
        ("flux2", "klein-4b-undistilled", False),
        ("krea2", "Krea-2-Turbo", True),
        ("krea2", "Krea-2-Raw", False),
        ("qwen", "Qwen-Image-Lightning-8steps", True),
        ("qwen", "qwen_image_distill_full_fp8", True),
        ("chroma", "Chroma1-HD-Flash", True),
        ("chroma", "Chroma1-HD", False),
        ("sdxl", "dreamshaperXL_lightning4Step", True),
        ("sdxl", "realvisxlV40_v40LightningBakedvae", True),
        ("sdxl", "Hyper-SDXL-1step-Unet", True),
        ("sdxl", "juggernautXL_v8Hyper", True),
        ("sdxl", "bigaspDMD2_v1", True),
        ("sdxl", "sd_xl_base_1.0", False),
        ("sdxl", "hyperrealism_v2", False),
        ("sdxl", "Hyper-Realistic-XL", False),
        ("sd15", "dreamshaper_8LCM", True),
        ("sd15", "lcmania", False),
        ("sd21", "sd-turbo", True),
    ],
)
def test_distilled_models_are_known_by_their_names(family: str, name: str, distilled: bool) -> None:
    assert is_distilled(family, name) is distilled
    assert is_distilled(family, name, said=not distilled) is not distilled
    assert is_distilled("flux", "x", "flux1-schnell")
    assert not is_distilled("flux", "schnell-de-distilled", "flux1-schnell")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("./loras/x-turbo.safetensors", "x-turbo"),
        ("Tongyi-MAI/Z-Image-Turbo", "Z-Image-Turbo"),
        (f"hub/models--Tongyi-MAI--Z-Image-Turbo/snapshots/{'0a' * 20}", "Z-Image-Turbo"),
        ("sdxl-turbo/unet/diffusion_pytorch_model.fp16.safetensors", "sdxl-turbo"),
        ("Z-Image-Turbo/transformer/diffusion_pytorch_model-00001-of-00003.safetensors", "Z-Image-Turbo"),
        ("turbo/my-model.safetensors", "my-model"),
        ("model.safetensors", "model"),
    ],
)
def test_what_is_called_as_all_are_has_the_name_of_its_folder(path: str, name: str) -> None:
    assert name_of(path) == name


NEEDS = Needs(6_000_000_000, 2.0, (9.0, 2.0), 1.0, validate=1.0, sample=1.0, decode=(1.0, 0.5))


@pytest.mark.parametrize(("budget", "in_turn"), [(40.0, False), (36.0, False), (23.0, True), (16.5, True)])
def test_both_stay_where_that_changes_nothing_else_and_take_turns_where_it_would(budget: float, in_turn: bool) -> None:
    """Another base never makes training another: quantisation and checkpointing are what they are without it."""
    from dataclasses import replace

    without = choose_memory(NEEDS, free_gib=budget, backends=frozenset(("int8", "nf4")))
    needs = replace(NEEDS, other_parameters=6_000_000_000, other_trained=0.3)
    plan = choose_memory(needs, free_gib=budget, backends=frozenset(("int8", "nf4")))
    assert plan.in_turn is in_turn
    assert (plan.quantize, plan.gradient_checkpointing, plan.offload) == (
        without.quantize, without.gradient_checkpointing, without.offload,
    )  # fmt: skip
    stages, plain = dict(plan.stages), dict(without.stages)
    beside = 0.3 if in_turn else 0.3 + 6e9 * 2 / 2**30
    assert stages["train"] == pytest.approx(plain["train"] + beside)
    assert stages["sample"] == pytest.approx(plain["sample"] + beside)
    assert plan.needed_gib <= budget


def test_nothing_of_it_is_left_on_the_device_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its turn ends as it began, whatever happens in it."""
    import emotrain.runs.sample_base as module

    log: list[str] = []
    base = SampleBase.__new__(SampleBase)
    denoisers = {"ours": torch.nn.Linear(1, 1), "theirs": torch.nn.Linear(1, 1)}
    adapter = type("Adapter", (), {"parameters": list, "half_weights": [], "part": "unet", "named_parameters": list})

    class Family:
        device = torch.device("cpu")

        def __init__(self, name: str) -> None:
            self.denoiser = denoisers[name]

    base.family, base.training = Family("theirs"), Family("ours")  # type: ignore[assignment]
    base.adapter = base.trained = adapter()
    base.in_turn, base._moved = True, []
    names = {id(value): key for key, value in denoisers.items()}
    monkeypatch.setattr(module, "leave", lambda model, *_: log.append(f"{names[id(model)]} leaves") or [])
    monkeypatch.setattr(module, "come_back", lambda *_: log.append("theirs comes"))
    import contextlib

    @contextlib.contextmanager
    def away(model: torch.nn.Module, *_: Any) -> Iterator[None]:
        log.append(f"{names[id(model)]} leaves")
        try:
            yield
        finally:
            log.append(f"{names[id(model)]} comes")

    monkeypatch.setattr(module, "away", away)

    def draw() -> None:
        with base.drawing():
            log.append("draws")
            raise KeyError

    with pytest.raises(KeyError):
        draw()
    assert log == ["ours leaves", "theirs comes", "draws", "theirs leaves", "ours comes"]
