"""Text encoders in int8, fp8 or nf4: near the whole ones, the same from every kind of file, and chosen by memory."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from newer_models import pipeline_of, separate_files, text_model
from safetensors.torch import save_file

from emotrain.families import quantize
from emotrain.families.loading import load_family
from emotrain.families.memory import EncoderNeeds, Needs, choose_memory, place_encoders
from emotrain.families.registry import FAMILIES, encoder_configs
from emotrain.families.table import Sniffed, sniff
from emotrain.families.texts import encoder_parameters, quantizable_parameters, wide_parameters

BITS = importlib.util.find_spec("bitsandbytes") is not None
NF4 = pytest.param("nf4", marks=pytest.mark.skipif(not BITS, reason="bitsandbytes is not installed"))
PROMPTS = ["a red apple", "a very much longer caption, of a pear on a table near a window"]
FAR = {"int8": 0.06, "fp8": 0.2, "nf4": 0.6}  # of the embeddings, relative: narrow layers of random weights


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of these models are narrower than what is worth the trouble."""
    monkeypatch.setattr(quantize, "SMALLEST", 16)


@pytest.fixture(scope="module", params=["zimage", "flux2", "krea2", "qwen"])
def newer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """Name of the family, its stock pipeline, and the folder that it was saved in."""
    pipeline = pipeline_of(request.param)
    folder = tmp_path_factory.mktemp("fewer") / request.param
    pipeline.save_pretrained(folder)
    return request.param, pipeline, folder


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of two sets of embeddings."""
    pairs = [(one[key].float(), other[key].float()) for key in one if one[key].is_floating_point()]
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


def swapped(model: Any) -> int:
    return sum(type(module).__name__ in ("RoundedLinear", "Linear4bit") for module in model.modules())


@pytest.mark.parametrize("kind", ["int8", "fp8", NF4])
def test_embeddings_are_near_those_of_the_whole_encoder(newer: tuple[str, Any, Path], kind: str) -> None:
    _, _, folder = newer
    plain = load_family(str(folder), device="cpu", dtype="fp32")
    small = load_family(str(folder), device="cpu", dtype="fp32", quantize_text_encoders=kind)
    assert swapped(small.text_encoders[0].encoder) >= 14
    far = apart(small.encode_texts(PROMPTS), plain.encode_texts(PROMPTS))
    assert 0 < far < FAR[kind]


@pytest.mark.parametrize("kind", ["int8", "fp8", NF4])
def test_a_t5_is_given_numbers_and_not_its_own_weights_dtype(flux_folder: Path, kind: str) -> None:
    """transformers' T5 casts what goes into `wo` to that layer's dtype, which would be whole numbers."""
    plain = load_family(str(flux_folder), device="cpu", dtype="fp32")
    small = load_family(str(flux_folder), device="cpu", dtype="fp32", quantize_text_encoders=kind)
    clip, t5 = (part.encoder for part in small.text_encoders)
    assert swapped(t5) == 7 * 2
    assert swapped(clip) == 0  # it may be trained
    ours, theirs = small.encode_texts(PROMPTS), plain.encode_texts(PROMPTS)
    assert torch.equal(ours["pooled_prompt_embeds"], theirs["pooled_prompt_embeds"])
    assert 0 < apart(ours, theirs) < FAR[kind]


def test_captions_are_cached_by_what_encoded_them_and_a_resumed_run_asks_for_the_files_alone(flux_folder: Path) -> None:
    kinds = ["none", "int8", "fp8"]
    families = [load_family(str(flux_folder), device="cpu", quantize_text_encoders=kind) for kind in kinds]
    assert len({family.text_identity() for family in families}) == 3
    assert len({family.text_identity(as_encoded=False) for family in families}) == 1
    assert families[0].text_identity() == load_family(str(flux_folder), device="cpu").text_identity()


def test_folder_single_file_and_scaled_fp8_file_are_quantised_alike(
    newer: tuple[str, Any, Path], tmp_path: Path
) -> None:
    kind, pipeline, folder = newer
    files = separate_files(kind, pipeline, tmp_path / "files")
    words = {"vae": str(files["vae"]), "tokenizer": str(files["tokenizer"]), "device": "cpu", "dtype": "bf16"}
    words |= {"quantize_text_encoders": "int8"}
    from_folder = load_family(str(folder), device="cpu", dtype="bf16", quantize_text_encoders="int8")
    whole = load_family(str(folder), device="cpu", dtype="bf16").encode_texts(PROMPTS)
    from_file = load_family(str(files["denoiser"]), text_encoder=str(files["text_encoder"]), **words)
    expected = from_folder.encode_texts(PROMPTS)
    assert apart(from_file.encode_texts(PROMPTS), expected) == 0
    scaled = tmp_path / "files" / "text_encoder_fp8_scaled.safetensors"
    tensors = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, value in text_model(pipeline).state_dict().items():
        if value.dim() == 2 and "embed" not in name:
            scale = value.abs().max() / 448
            tensors[f"model.{name}"] = (value / scale).to(torch.float8_e4m3fn)
            tensors[f"model.{name.removesuffix('weight')}scale_weight"] = scale.float()
        else:
            tensors[f"model.{name}"] = value.contiguous()
    save_file(tensors, scaled)
    config = files["text_encoder"].with_suffix("") / "config.json"
    (scaled.with_suffix("")).mkdir()
    (scaled.with_suffix("") / "config.json").write_text(config.read_text())
    from_scaled = load_family(str(files["denoiser"]), text_encoder=str(scaled), **words)
    assert swapped(from_scaled.text_encoders[0].encoder) == swapped(from_folder.text_encoders[0].encoder) >= 14
    assert apart(from_scaled.encode_texts(PROMPTS), whole) < FAR["fp8"]


def test_one_that_is_8_bits_in_its_file_is_counted_so_and_needs_no_int8() -> None:
    whole = EncoderNeeds("text_encoder", 4_000_000_000, 3_600_000_000)
    stored = EncoderNeeds("text_encoder", 4_000_000_000, 3_600_000_000, 3_600_000_000)
    assert whole.gib("none", 2) - stored.gib("none", 2) == pytest.approx(3.6e9 / 2**30)
    forms = [
        place_encoders(Needs(1, 2, (0.0, 0.0), 0.0, encoders=(one,)), 5.0, backends=frozenset({"nf4"}))
        for one in (whole, stored)
    ]
    assert forms == [{"text_encoder": "int8"}, {"text_encoder": "none"}]


PUBLIC = [
    (name, variant)
    for name, spec in FAMILIES.items()
    for variant in spec.variants
    if any(encoder.quantizable for encoder in spec.text_encoders)
]


@pytest.mark.parametrize(("family", "variant"), PUBLIC)
def test_what_a_form_takes_is_what_its_layers_are(family: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(quantize, "SMALLEST", 256)
    found = Sniffed.__new__(Sniffed)
    for name, value in {"family": family, "variant": variant, "kind": "hub", "path": "x/y"}.items():
        object.__setattr__(found, name, value)
    for name, linear in quantizable_parameters(found).items():
        kind, words = encoder_configs(family, variant)[name]
        model_class = getattr(transformers, kind)
        with torch.device("meta"):
            model = model_class(model_class.config_class(**words))
        layers = [layer for _, _, layer in quantize.base_linears(model)]
        counted = sum(layer.weight.numel() for layer in layers if quantize.is_large(layer.weight.shape))
        assert linear == pytest.approx(counted, rel=0.005)
        assert encoder_parameters(found)[name] == sum(p.numel() for p in model.parameters())
        wide = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
        of_float32 = [p.numel() for path, p in model.named_parameters() if wide & {*path.split(".")}]
        assert wide_parameters(found).get(name, 0) == sum(of_float32)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_t5_takes_what_is_counted_with_its_float32_beside_float16(flux_folder: Path, dtype: str) -> None:
    family, found = load_family(str(flux_folder), device="cpu", dtype=dtype), sniff(str(flux_folder))
    wide = wide_parameters(found) if dtype == "fp16" else {}
    assert dtype != "fp16" or wide["text_encoder_2"] > 0
    for part in family.text_encoders:
        linear = quantizable_parameters(found).get(part.name, 0)
        needs = EncoderNeeds(part.name, encoder_parameters(found)[part.name], linear, 0, wide.get(part.name, 0))
        held = sum(p.nbytes for p in part.encoder.parameters()) / 2**30
        assert needs.gib("none", family.dtype.itemsize) == pytest.approx(held, rel=0.01)


def test_what_of_a_t5_is_in_8_bits_is_not_float32_too() -> None:
    """T5-XXL in float16: 8.9 GiB, and 1.9 for its float32; of a file in fp8 nothing is float32."""
    numbers = ("t5", 4_762_310_656, 4_630_511_616)
    assert EncoderNeeds(*numbers, 0, 1_006_632_960).gib("none", 2) == pytest.approx(8.87 + 1.88, abs=0.01)
    stored = EncoderNeeds(*numbers, 4_630_511_616, 1_006_632_960)
    assert stored.gib("none", 2) == EncoderNeeds(*numbers, 4_630_511_616).gib("none", 2)
    assert EncoderNeeds(*numbers, 0, 1_006_632_960).gib("int8", 2) == EncoderNeeds(*numbers).gib("int8", 2)


ENCODERS = (EncoderNeeds("clip", 120_000_000), EncoderNeeds("t5", 4_760_000_000, 4_630_000_000))
NEEDS = Needs(2_600_000_000, 2, (12.0, 1.0), trained=0.5, encoders=ENCODERS, encode=(2.5, 0.63))


@pytest.mark.parametrize(
    ("room", "expected"), [(None, "none"), (9.2, "none"), (9.0, "int8"), (5.0, "int8"), (4.0, "nf4"), (2.0, "cpu")]
)
def test_the_form_that_changes_least_and_fits_is_taken(room: float | None, expected: str) -> None:
    assert place_encoders(NEEDS, room, backends=frozenset({"nf4"})) == {"clip": "none", "t5": expected}


def test_without_bitsandbytes_a_large_encoder_is_in_int8_or_on_the_cpu() -> None:
    assert place_encoders(NEEDS, 5.0)["t5"] == "int8"
    assert place_encoders(NEEDS, 4.0)["t5"] == "cpu"


@pytest.mark.parametrize(("wanted", "expected"), [("none", "cpu"), ("fp8", "fp8"), ("nf4", "nf4")])
def test_what_the_preset_sets_is_the_only_form(wanted: str, expected: str) -> None:
    assert place_encoders(NEEDS, 5.0, wanted=wanted)["t5"] == expected
    assert place_encoders(NEEDS, None, wanted=wanted)["t5"] == wanted


def test_plan_and_run_say_it() -> None:
    plan = choose_memory(NEEDS, free_gib=8.0)
    assert dict(plan.stages)["encode"] < 8.0
    assert "captions encoded in int8" in plan.sentence
    assert plan.means()["text_encoders"] == {"t5": "int8"}
    assert plan.encoder_forms == {"t5": "int8"}
    on_cpu = choose_memory(NEEDS, free_gib=4.0, quantize_text_encoders="none")
    assert "captions encoded on the CPU" in on_cpu.sentence
    assert on_cpu.encoder_forms == {}
    assert json.dumps(plan.means())
