"""Qwen-Image 2.1 and FLUX.3 klein, which diffusers has as modular blocks alone, against these blocks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from newer_models import denoiser_of, modular_pipeline_of, qwen_tokenizer, save_folder
from safetensors.torch import load_file, save_file
from stock import modular_pipeline
from torch import Tensor

from emotrain.batch import Conditioning
from emotrain.cli.app import main
from emotrain.errors import ModelError
from emotrain.families.common import DrawRequest
from emotrain.families.fitting import refuse_misfit
from emotrain.families.loading import load_family
from emotrain.families.registry import FAMILIES, configs
from emotrain.families.sampling import draw_sample
from emotrain.families.table import sniff

KINDS = ["qwen21", "flux3"]
PROMPTS = ["a red apple", "a very much longer caption, of a pear on a table near a window " * 2, ""]
NO_SIZES = Conditioning(*[torch.zeros(1, 2, dtype=torch.int64)] * 3)


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """Name of the family, its stock pipeline, and the folder that it was saved in, as the public ones look."""
    kind, pipeline = request.param, modular_pipeline_of(request.param)
    folder = tmp_path_factory.mktemp("modular") / kind
    return kind, pipeline, save_folder(kind, pipeline, folder)


def stock_embeds(kind: str, pipeline: Any, prompt: str) -> Tensor:
    from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep
    from diffusers.modular_pipelines.qwenimage21.encoders import get_qwenimage21_prompt_embeds

    tokenizer = qwen_tokenizer()
    if kind == "flux3":
        return Flux3TextEncoderStep._get_qwen3_vl_prompt_embeds(
            pipeline.text_encoder,
            SimpleNamespace(tokenizer=tokenizer, apply_chat_template=tokenizer.apply_chat_template),
            prompt, hidden_states_layers=tuple(range(1, 9)),
        )[0]  # fmt: skip

    class Processor:
        """What the blocks ask of the real one, by its tokenizer."""

        def __init__(self) -> None:
            self.tokenizer = tokenizer

        def __call__(self, **words: Any) -> Any:
            return tokenizer(**words)

        def apply_chat_template(self, messages: Any, **_: Any) -> Any:
            said = messages[0]["content"][0]["text"]
            return [tokenizer(f"<|im_start|>system\n{said}<|im_end|>\n").input_ids]

    tokenizer.add_tokens(["<|image_pad|>"], special_tokens=True)
    embeds, mask, _ = get_qwenimage21_prompt_embeds(pipeline.text_encoder, Processor(), [prompt])
    return embeds[0][mask[0].bool()]


def test_its_folder_is_recognised(model: tuple[str, Any, Path]) -> None:
    kind, _, folder = model
    found = sniff(folder)
    assert (found.family, found.prediction, found.variant, found.missing) == (kind, "flow", "custom", ())
    assert (found.vae_scale, found.latent_channels) == {"qwen21": (16, 8), "flux3": (16, 16)}[kind]


def test_its_parts_fit_each_other(model: tuple[str, Any, Path]) -> None:
    assert refuse_misfit(sniff(model[2])).name == model[0]


def test_prompts_are_encoded_as_by_the_stock_blocks(model: tuple[str, Any, Path]) -> None:
    kind, pipeline, folder = model
    family = load_family(str(folder), device="cpu")
    embeds = family.encode_texts(PROMPTS)
    for row, mask, prompt in zip(embeds["prompt_embeds"], embeds["prompt_mask"], PROMPTS, strict=True):
        with torch.no_grad():
            expected = stock_embeds(kind, pipeline, prompt)
        assert int(mask.sum()) == len(expected)
        assert torch.equal(row[mask], expected)
        assert kind != "flux3" or len(expected) % 80 == 0


def test_captions_of_different_lengths_in_one_batch(model: tuple[str, Any, Path]) -> None:
    _, _, folder = model
    family = load_family(str(folder), device="cpu")
    channels = family.denoiser.config.in_channels
    latents = torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(1))
    sigmas = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        both = family.predict(latents, sigmas, family.encode_texts(PROMPTS[:2]), NO_SIZES)
        for i in range(2):
            alone = family.predict(latents[i : i + 1], sigmas[i : i + 1], family.encode_texts([PROMPTS[i]]), NO_SIZES)
            assert torch.allclose(both[i], alone[0], atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_sample_is_the_stock_pipelines_picture(model: tuple[str, Any, Path], guidance: float) -> None:
    kind, _, folder = model
    family = load_family(str(folder), device="cpu")
    text, negative = family.encode_texts(PROMPTS[:1]), family.encode_texts([""])
    words: dict[str, Any] = {
        "prompt_embeds": text["prompt_embeds"],
        "negative_prompt_embeds": negative["prompt_embeds"],
    }
    if kind == "qwen21":
        for name, told in (("", text), ("negative_", negative)):
            mask = told["prompt_mask"]
            words |= {f"{name}prompt_embeds_mask": mask, f"{name}image_pad_mask": torch.zeros_like(mask)}
    picture = modular_pipeline(family, guidance)(
        **words, width=64, height=96, num_inference_steps=4, generator=torch.Generator().manual_seed(7),
        output="images", output_type="pil",
    )[0].convert("RGBA").convert("RGB")  # fmt: skip
    family.free_encoders()  # as during a run
    request = DrawRequest(text=text, negative=negative, width=64, height=96, seed=7, steps=4, guidance=guidance)
    ours = draw_sample(family, request)
    difference = np.abs(np.asarray(ours, dtype=int) - np.asarray(picture, dtype=int))
    assert difference.max() <= 1
    assert np.asarray(picture).std() > 1


def test_a_file_of_the_denoiser_is_the_same_model(model: tuple[str, Any, Path], tmp_path: Path) -> None:
    """As ComfyUI has it: FLUX.3 under its own names, Qwen-Image 2.1 with two layers in one."""
    kind, _, folder = model
    state = denoiser_of(kind).state_dict()
    save_file(original(kind, state), tmp_path / "denoiser.safetensors")
    beside = tmp_path / "denoiser"
    for part in ("transformer", "vae"):
        (beside / part).mkdir(parents=True)
        for file in (folder / part).iterdir():
            (beside / part / file.name).write_bytes(file.read_bytes())
    (beside / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    qwen_tokenizer().save_pretrained(beside / "tokenizer")
    language = {
        key.removeprefix("model.language_model."): value
        for key, value in load_file(folder / "text_encoder" / "model.safetensors").items()
        if key.startswith("model.language_model.")
    }
    save_file(language, tmp_path / "text.safetensors")
    (tmp_path / "text").mkdir()
    words = json.loads((folder / "text_encoder" / "config.json").read_text())["text_config"]
    (tmp_path / "text" / "config.json").write_text(json.dumps(words))
    found = sniff(tmp_path / "denoiser.safetensors")
    assert (found.family, found.variant) == (kind, "custom")
    files = {"text_encoder": str(tmp_path / "text.safetensors")}
    family = load_family(str(tmp_path / "denoiser.safetensors"), device="cpu", **files)
    assert {k: v.tolist() for k, v in family.denoiser.state_dict().items()} == {k: v.tolist() for k, v in state.items()}
    whole = load_family(str(folder), device="cpu")
    one, other = family.encode_texts(PROMPTS), whole.encode_texts(PROMPTS)
    assert torch.equal(one["prompt_embeds"], other["prompt_embeds"])


def original(kind: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The denoiser's tensors under the names of ComfyUI's files."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        path, _, last = key.rpartition(".")
        if kind == "qwen21":
            if path.endswith(".gate_layer"):
                up = state[f"{path.removesuffix('gate_layer')}proj.{last}"]
                out[f"{path.removesuffix('gate_layer')}gate_up.{last}"] = torch.cat([value, up])
            elif not path.endswith("img_mlp.proj"):
                out[key] = value.clone()
            continue
        if path.endswith(("attn.norm_q", "attn.norm_k")):
            block = FAMILIES[kind].lora.originals.to_original(f"{path.rsplit('.', 1)[0]}.to_q")
            assert block is not None
            norm = "query_norm" if path.endswith("norm_q") else "key_norm"
            out[f"{block.name.removesuffix('q_proj')}norm.{norm}.scale"] = value
            continue
        group = FAMILIES[kind].lora.originals.to_original(path)
        assert group is not None, path
        out[f"{group.name}.{last}"] = torch.cat(value.chunk(2)[::-1]) if group.swaps else value.clone()
    return out


def test_the_distilled_flux3_is_refused_by_name(tmp_path: Path) -> None:
    state = original("flux3", denoiser_of("flux3").state_dict())
    save_file({**state, "ref_time_in.in_layer.weight": torch.ones(4, 4)}, tmp_path / "turbo.safetensors")
    with pytest.raises(ModelError, match="klein distilled to few steps"):
        sniff(tmp_path / "turbo.safetensors")


def test_training_shifts_as_the_public_models_do() -> None:
    assert configs("flux3")["scheduler"]["flux3-klein"][1]["shift"] == 6.93


@pytest.mark.slow
def test_a_whole_run(model: tuple[str, Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from emotrain.lora.file import read_lora

    kind, _, folder = model
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(
        f"model: {folder}\n"
        "dataset: {trigger: rkt, resolution: 64, buckets: {step: 64, min: 64}, folders: [{path: builtin:example}]}\n"
        "network: {rank: 2}\ntrain: {max_steps: 2}\nvalidate: {every: 2}\nsave: {every: 2}\n"
        'sample: {every: 2, steps: 2, prompts: ["a [trigger]"]}\nstop: {mode: "off"}\n'
    )
    assert main(["check", "p.yaml"]) == 0
    assert main(["run", "p.yaml", "--plain"]) == 0
    assert read_lora(tmp_path / "runs" / "p" / "lora.safetensors").family == kind
