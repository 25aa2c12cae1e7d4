"""SD3 and FLUX in one file, in the original layout: written here from diffusers models, read back, compared."""

from __future__ import annotations

import copy
import math
import os
import shutil
from pathlib import Path
from typing import Any

import make_assets as maker
import pytest
import torch
from original_files import (
    clip_of,
    clip_tensors,
    in_scaled_fp8,
    same,
    same_weights,
    save_configs,
    small_vae,
    vae_tensors,
)
from safetensors.torch import save_file
from torch import Tensor

from emotrain.batch import Conditioning
from emotrain.cli.app import main
from emotrain.config.load import load_preset
from emotrain.config.schema import ModelSection
from emotrain.errors import ModelError
from emotrain.families import quantize
from emotrain.families.encoder_file import build_encoder
from emotrain.families.fitting import refuse_misfit_file
from emotrain.families.headers import read_header
from emotrain.families.kept import KeptBase
from emotrain.families.loading import DTYPES, load_family
from emotrain.families.memory import GIB
from emotrain.families.registry import FAMILIES, encoder_configs
from emotrain.families.single import as_published
from emotrain.families.stored import kept_names, stored_parameters
from emotrain.families.table import sniff
from emotrain.lora.adapter import add_adapter
from emotrain.runs.plan import make_plan
from emotrain.runs.plan_ram import weights_of

FLOW_TOP = {
    "time_text_embed.timestep_embedder.linear_1": ("t_embedder.mlp.0", "time_in.in_layer"),
    "time_text_embed.timestep_embedder.linear_2": ("t_embedder.mlp.2", "time_in.out_layer"),
    "time_text_embed.text_embedder.linear_1": ("y_embedder.mlp.0", "vector_in.in_layer"),
    "time_text_embed.text_embedder.linear_2": ("y_embedder.mlp.2", "vector_in.out_layer"),
    "time_text_embed.guidance_embedder.linear_1": ("", "guidance_in.in_layer"),
    "time_text_embed.guidance_embedder.linear_2": ("", "guidance_in.out_layer"),
    "context_embedder": ("context_embedder", "txt_in"),
    "x_embedder": ("", "img_in"),
    "pos_embed.proj": ("x_embedder.proj", ""),
    "proj_out": ("final_layer.linear", "final_layer.linear"),
}
SD3_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
    "attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q", "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q", "attn2.norm_k": "x_block.attn2.ln_k",
}  # fmt: skip
SD3_FUSED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}
DOUBLE = {
    "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
}  # fmt: skip
DOUBLE_FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
DOUBLE_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm", "attn.norm_added_k": "txt_attn.norm.key_norm",
}  # fmt: skip
SINGLE_FUSED = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}


def halves_swapped(value: Tensor) -> Tensor:
    scale, shift = value.chunk(2)
    return torch.cat([shift, scale])


class Renamed:
    """Takes tensors out of a model's state one by one and puts them under other names."""

    def __init__(self, model: Any) -> None:
        self.left = dict(model.state_dict())
        self.tensors: dict[str, Tensor] = {}

    def move(self, ours: str, theirs: str, *, swap: bool = False) -> None:
        for kind in ("weight", "bias"):
            if (value := self.left.pop(f"{ours}.{kind}", None)) is not None:
                self.tensors[f"{theirs}.{kind}"] = halves_swapped(value) if swap else value

    def fuse(self, parts: list[str], theirs: str) -> None:
        for kind in ("weight", "bias"):
            if f"{parts[0]}.{kind}" in self.left:
                self.tensors[f"{theirs}.{kind}"] = torch.cat([self.left.pop(f"{part}.{kind}") for part in parts])

    def move_norm(self, ours: str, theirs: str) -> None:
        self.tensors[f"{theirs}.scale"] = self.left.pop(f"{ours}.weight")

    def done(self) -> dict[str, Tensor]:
        assert not self.left, sorted(self.left)[:5]
        return {f"model.diffusion_model.{name}": value for name, value in self.tensors.items()}


def sd3_tensors(model: Any) -> dict[str, Tensor]:
    """As the MMDiT checkpoints have them."""
    todo, last = Renamed(model), model.config.num_layers - 1
    todo.tensors["pos_embed"] = todo.left.pop("pos_embed.pos_embed")
    for ours, (theirs, _) in FLOW_TOP.items():
        todo.move(ours, theirs)
    todo.move("norm_out.linear", "final_layer.adaLN_modulation.1", swap=True)
    for i in range(last + 1):
        here, there = f"transformer_blocks.{i}.", f"joint_blocks.{i}."
        for ours, theirs in SD3_BLOCK.items():
            todo.move(here + ours, there + theirs, swap=i == last and ours == "norm1_context.linear")
        for theirs, parts in SD3_FUSED.items():
            todo.fuse([here + part for part in parts], there + theirs)
    return todo.done()


def flux_tensors(model: Any) -> dict[str, Tensor]:
    """As Black Forest Labs' checkpoints have them."""
    todo = Renamed(model)
    for ours, (_, theirs) in FLOW_TOP.items():
        todo.move(ours, theirs)
    todo.move("norm_out.linear", "final_layer.adaLN_modulation.1", swap=True)
    for i in range(model.config.num_layers):
        here, there = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        for ours, theirs in DOUBLE.items():
            todo.move(here + ours, there + theirs)
        for theirs, parts in DOUBLE_FUSED.items():
            todo.fuse([here + part for part in parts], there + theirs)
        for ours, theirs in DOUBLE_NORMS.items():
            todo.move_norm(here + ours, there + theirs)
    for i in range(model.config.num_single_layers):
        here, there = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
        todo.move(here + "norm.linear", there + "modulation.lin")
        todo.move(here + "proj_out", there + "linear2")
        for theirs, parts in SINGLE_FUSED.items():
            todo.fuse([here + part for part in parts], there + theirs)
        todo.move_norm(here + "attn.norm_q", there + "norm.query_norm")
        todo.move_norm(here + "attn.norm_k", there + "norm.key_norm")
    return todo.done()


T5 = "text_encoders.t5xxl.transformer."


def t5_tensors(t5: Any, tied: bool = False) -> dict[str, Tensor]:
    """As the T5's shared files have them, with or without the second name of its word embeddings."""
    state = {name: value for name, value in t5.state_dict().items() if name != "encoder.embed_tokens.weight"}
    if tied:
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
    return {f"{T5}{name}": value for name, value in state.items()}


def clips(parts: dict[str, Any]) -> dict[str, Tensor]:
    named = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    tensors: dict[str, Tensor] = {}
    for part, name in named.items():
        if part in parts and "CLIP" in type(parts[part]).__name__:
            state = clip_tensors(parts[part], f"text_encoders.{name}.transformer.")
            tensors |= {key.replace("text_model.text_projection", "text_projection"): t for key, t in state.items()}
    return tensors


def write(path: Path, parts: dict[str, Any], *tensors: dict[str, Tensor], vae: str = "first_stage_model.") -> Path:
    """The file, and beside it a folder with configs and tokenizers but no weights."""
    whole: dict[str, Tensor] = {}
    for some in (*tensors, {k.replace("first_stage_model.", vae): v for k, v in vae_tensors(parts["vae"]).items()}):
        whole |= some
    save_file({name: value.contiguous().clone() for name, value in whole.items()}, path)
    save_configs(path.with_suffix(""), parts)
    return path


def flow_vae() -> Any:
    """Without the 1x1 convolutions around the latents, as SD3 and FLUX have it."""
    return small_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.2)


def sd3_parts(tokenizers: dict[str, Any], **words: Any) -> dict[str, Any]:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    clip_l, clip_g = clip_of(48, tokenizers["clip"], True), clip_of(64, tokenizers["clip"], True)
    with torch.no_grad():
        clip_l.text_projection.weight.copy_(torch.eye(48))  # as in the public model, whose file leaves it out
    return {
        "transformer": SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=128, caption_projection_dim=32, pooled_projection_dim=112,
            pos_embed_max_size=24, **words,
        ),
        "vae": flow_vae(), "text_encoder": clip_l, "text_encoder_2": clip_g,
        "text_encoder_3": maker.build_t5(tokenizers["t5"]), "tokenizer": tokenizers["clip"],
        "tokenizer_2": tokenizers["clip"], "tokenizer_3": tokenizers["t5"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ("sd3-medium", {}),
        ("sd35-medium", {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}),
        ("sd35-large", {"qk_norm": "rms_norm"}),
    ],
)
def test_an_sd3_file_is_read_back_tensor_by_tensor(
    tmp_path: Path, tokenizers: dict[str, Any], variant: str, words: dict[str, Any]
) -> None:
    parts = sd3_parts(tokenizers, **words)
    t5 = t5_tensors(parts["text_encoder_3"], tied=variant == "sd35-large")
    path = write(tmp_path / "model.safetensors", parts, sd3_tensors(parts["transformer"]), clips(parts), t5)
    found = sniff(str(path))
    assert (found.family, found.variant, found.prediction) == ("sd3", variant, "flow")
    family = load_family(str(path), device="cpu")
    same(family.denoiser, parts["transformer"])
    same(family.vae, parts["vae"])
    assert [part.name for part in family.text_encoders] == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    for part in family.text_encoders:
        same(part.encoder, parts[part.name])
    assert (family.latent_scale, family.latent_shift) == (0.3, 0.2)
    embeds = family.encode_texts(["tiger"])
    assert embeds["prompt_embeds"].shape == (1, 32 + 24, 128)
    assert embeds["pooled_prompt_embeds"].shape == (1, 112)


def in_plain_fp8(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All of a file in fp8 as it is, without scales, as `flux1-dev-fp8`; and the bf16 numbers that these are."""
    stored = {key: value.to(torch.float8_e4m3fn) for key, value in tensors.items()}
    return stored, {key: value.to(torch.bfloat16) for key, value in stored.items()}


@pytest.mark.parametrize("store", [in_scaled_fp8, in_plain_fp8])
def test_an_fp8_file_is_kept_as_it_is_also_where_its_layers_are_pieces_or_swapped_halves(
    store: Any, tmp_path: Path, tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "SMALLEST", 32)
    parts = sd3_parts(tokenizers)
    families = []
    for name, tensors in zip(("stored", "plain"), store(sd3_tensors(parts["transformer"])), strict=True):
        path = write(tmp_path / f"{name}.safetensors", parts, tensors, clips(parts))
        families.append(load_family(str(path), device="cpu", dtype="bf16"))
    kept = same_weights(families[0].denoiser, families[1].denoiser)
    assert kept > 20
    numbers = sum(p.numel() for p in families[0].denoiser.parameters() if p.dtype == torch.float8_e4m3fn)
    file = tmp_path / "stored.safetensors"
    assert numbers == sum(math.prod(read_header(file).shapes[name]) for name in kept_names(read_header(file)))


@pytest.mark.parametrize(
    ("store", "dtype"),
    [(in_scaled_fp8, "bf16"), (in_plain_fp8, "bf16"), (in_plain_fp8, "fp16")],
)
def test_a_t5_in_a_checkpoint_stays_in_8_bits_as_one_in_a_file_of_its_own(
    store: Any, dtype: str, tmp_path: Path, tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `sd3.5_large_fp8_scaled` and `flux1-dev-fp8`; in float16 what a T5 adds to its tokens would overflow."""
    monkeypatch.setattr(quantize, "SMALLEST", 32)
    parts, families = sd3_parts(tokenizers), []
    for name, tensors in zip(("stored", "plain"), store(t5_tensors(parts["text_encoder_3"])), strict=True):
        texts = {**clips(parts), **tensors, "text_encoders.t5xxl.logit_scale": torch.ones(())}
        path = write(tmp_path / f"{name}.safetensors", parts, sd3_tensors(parts["transformer"]), texts)
        families.append(load_family(str(path), device="cpu", dtype=dtype))
        if name == "stored":
            save_file({key.removeprefix(T5): value for key, value in tensors.items()}, tmp_path / "t5.safetensors")
    ours, theirs = families
    t5 = ours.text_encoders[2].encoder
    assert same_weights(t5, theirs.text_encoders[2].encoder) == 2 * 7
    assert {layer.wo.layer.plain_dtype for layer in t5.modules() if hasattr(layer, "wo")} == {
        torch.float32 if dtype == "fp16" else DTYPES[dtype]
    }
    words = parts["text_encoder_3"].config.to_dict()
    spec = FAMILIES["sd3"].encoder("text_encoder_3")
    apart = build_encoder(tmp_path / "t5.safetensors", spec, "T5EncoderModel", words, DTYPES[dtype])
    same(t5, apart)
    assert ours.text_identity() == theirs.text_identity()
    found = sniff(str(tmp_path / "stored.safetensors"))
    refuse_misfit_file(found)
    eights = [one.weight.numel() for one in t5.modules() if isinstance(one, quantize.RoundedLinear)]
    assert stored_parameters(found) == {"": 0, "text_encoder_3": sum(eights)}
    counted = weights_of(found, ModelSection(base=str(found.path)), DTYPES[dtype])
    if dtype == "bf16":
        held = [p for part in ours.text_encoders for p in part.encoder.parameters() if p.element_size() > 1]
        assert counted.copied["text"] * GIB == pytest.approx(sum(p.nbytes for p in held), rel=0.01)
    with_t5 = ours.encode_texts(["tiger"])
    assert all(torch.equal(value, with_t5[key]) for key, value in theirs.encode_texts(["tiger"]).items())


@pytest.mark.slow
@torch.no_grad()
def test_a_layer_of_t5_xxl_in_a_checkpoint_takes_a_byte_a_number(tmp_path: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    words = {**encoder_configs("flux", "flux1-dev")["text_encoder_2"][1], "num_layers": 1, "vocab_size": 100}
    with torch.device("meta"):
        plain = T5EncoderModel(T5Config(**words))
    plain = patterned(plain.to(torch.bfloat16).to_empty(device="cpu").eval())
    plain.set_input_embeddings(plain.get_input_embeddings())  # `to_empty` makes two tables of one
    for parameter in plain.parameters():
        parameter.copy_(parameter.to(torch.float8_e4m3fn))
    tensors = {key: value.to(torch.float8_e4m3fn) for key, value in t5_tensors(plain).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    spec = FAMILIES["flux"].encoder("text_encoder_2")
    read = build_encoder(
        tmp_path / "model.safetensors", spec, "T5EncoderModel", words, torch.float32, inside=True
    )  # in float32: products of the CPU in bf16 take long
    assert same_weights(read, plain.float()) == 7
    numbers = sum(p.numel() for p in read.parameters())
    assert sum(p.nbytes for p in read.parameters()) < 1.01 * numbers > 190e6
    ids = torch.tensor([[5, 3, 7, 1]])
    assert torch.equal(read(ids).last_hidden_state, plain(ids).last_hidden_state)


def test_a_t5_with_a_tensor_that_it_does_not_have_is_refused_by_check_too(
    tmp_path: Path, tokenizers: dict[str, Any]
) -> None:
    parts = sd3_parts(tokenizers)
    t5 = t5_tensors(parts["text_encoder_3"]) | {f"{T5}encoder.block.9.layer.0.layer_norm.weight": torch.ones(4)}
    path = write(tmp_path / "model.safetensors", parts, sd3_tensors(parts["transformer"]), clips(parts), t5)
    with pytest.raises(ModelError, match="has 1 tensors that its text_encoder_3 does not have"):
        refuse_misfit_file(sniff(str(path)))
    with pytest.raises(ModelError, match="is no tensor of it"):
        load_family(str(path), device="cpu")


def test_a_clip_in_scaled_fp8_is_refused(tmp_path: Path, tokenizers: dict[str, Any]) -> None:
    parts = sd3_parts(tokenizers)
    texts = in_scaled_fp8(clips(parts))[0]
    path = write(tmp_path / "model.safetensors", parts, sd3_tensors(parts["transformer"]), texts)
    with pytest.raises(ModelError, match="holds a CLIP or VAE in scaled fp8") as refused:
        sniff(str(path))
    assert str(refused.value.hint).endswith(f"in `{path.with_suffix('')}`")


def test_an_sd3_file_without_the_t5_goes_without_it(tmp_path: Path, tokenizers: dict[str, Any]) -> None:
    """As the smaller of the two official files, which holds the CLIPs alone."""
    parts = sd3_parts(tokenizers)
    path = write(tmp_path / "model.safetensors", parts, sd3_tensors(parts["transformer"]), clips(parts))
    kept = KeptBase()
    kept.next = (str(path), "auto", None, None, None, None, "auto", "auto")
    family = load_family(str(path), device="cpu", kept=kept)
    os.utime(path.with_suffix("") / "tokenizer", ns=(1, 1))
    load_family(str(path), device="cpu", kept=kept)
    assert not kept.reused  # something beside the file has changed
    load_family(str(path), device="cpu", kept=kept)
    assert kept.reused
    assert [part.name for part in family.text_encoders] == ["text_encoder", "text_encoder_2"]
    tokens = family.encode_texts(["tiger"])["prompt_embeds"][:, 32:]
    assert tokens.shape == (1, 256, 128)
    assert not tokens.any()


def test_a_bare_sd3_file_takes_its_encoders_from_the_folder_beside_it(
    tmp_path: Path, tokenizers: dict[str, Any]
) -> None:
    """As sd3.5_large.safetensors, which holds no text encoder."""
    parts = sd3_parts(tokenizers)
    path = write(tmp_path / "model.safetensors", parts, sd3_tensors(parts["transformer"]))
    with pytest.raises(ModelError) as refused:
        load_family(str(path), device="cpu")
    assert "does not hold text_encoder and text_encoder_2" in refused.value.message
    assert "a folder `model` beside it" in str(refused.value.hint)
    assert refused.value.exit_code == 4
    for name in ("text_encoder", "text_encoder_2"):
        parts[name].save_pretrained(tmp_path / "model" / name)
    family = load_family(str(path), device="cpu")
    same(family.text_encoders[1].encoder, parts["text_encoder_2"])


def patterned(model: Any) -> Any:
    """Weights that differ in every row and column, and are quickly made: real initialisation takes half a minute."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            rows = torch.rand(parameter.shape[0], generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(rows[:, None] + torch.rand(parameter.shape[1], generator=generator)[None])
            else:
                parameter.copy_(rows)
    return model


@pytest.fixture(scope="module")
def flux_parts(tokenizers: dict[str, Any]) -> dict[str, Any]:
    """FLUX at its real width, which diffusers' converter assumes, with one block of each kind, in bf16."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=128,
            pooled_projection_dim=48, guidance_embeds=True,
        ).to(torch.bfloat16)  # fmt: skip
    return {
        "transformer": patterned(transformer.to_empty(device="cpu")), "vae": flow_vae(),
        "text_encoder": clip_of(48, tokenizers["clip"], False).bfloat16(), "tokenizer": tokenizers["clip"],
        "text_encoder_2": maker.build_t5(tokenizers["t5"]).bfloat16(), "tokenizer_2": tokenizers["t5"],
    }  # fmt: skip


@pytest.mark.slow
def test_a_flux_file_is_read_back_tensor_by_tensor(tmp_path: Path, flux_parts: dict[str, Any]) -> None:
    """As ComfyUI's files with everything in them: the VAE under `vae.`, a projection in CLIP that nobody uses.

    What newer ComfyUI saves (merges, for one) has other names of the norms: here the double blocks have them.
    """
    extra = {"text_encoders.clip_l.transformer.text_projection.weight": torch.eye(48)}
    t5 = t5_tensors(flux_parts["text_encoder_2"])
    named = flux_tensors(flux_parts["transformer"])
    old = [key for key in named if key.endswith("_norm.scale")]
    newer = {key: key.replace("_norm.scale", "_norm.weight") for key in old if "double_blocks" in key}
    assert 0 < len(newer) < len(old)
    named = {newer.get(key, key): value for key, value in named.items()}
    path = write(tmp_path / "flux.safetensors", flux_parts, named, clips(flux_parts), t5, extra, vae="vae.")
    found = sniff(str(path))
    refuse_misfit_file(found)
    assert (found.family, found.variant, found.prediction) == ("flux", "flux1-dev", "flow")
    family = load_family(str(path), device="cpu", dtype="bf16")
    same(family.denoiser, flux_parts["transformer"])
    same(family.vae, flux_parts["vae"])
    assert [part.name for part in family.text_encoders] == ["text_encoder", "text_encoder_2"]
    for part in family.text_encoders:
        same(part.encoder, flux_parts[part.name])


PRESET = """
model: ./stored.safetensors
dataset: {trigger: rkt, resolution: 64, buckets: {step: 64, min: 64}, folders: [{path: "builtin:example"}]}
network: {rank: 2, targets: [".*attn.to_[qkv]"]}
"""


@pytest.mark.slow
@pytest.mark.parametrize("scale", [None, 1 / 8])
def test_flux_in_fp8_stays_so_at_its_real_width_from_the_file_to_two_steps(
    scale: float | None, tmp_path: Path, flux_parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `flux1-dev-fp8`, all of it in fp8 without scales, and with a scale, which the widened numbers need not round.

    In float32: products of the CPU in bf16 take minutes here.
    """
    monkeypatch.chdir(tmp_path)
    plain = copy.deepcopy(flux_parts["transformer"])
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_((parameter / 64).to(torch.float8_e4m3fn))
    tensors = {}
    for key, value in flux_tensors(plain).items():
        by = scale if scale is not None and value.ndim == 2 else 1.0
        tensors[key] = (value / by).to(torch.float8_e4m3fn)
        if by != 1.0:
            tensors[key.removesuffix("weight") + "scale_weight"] = torch.tensor(by)
    t5 = {key: value.to(torch.float8_e4m3fn) for key, value in t5_tensors(flux_parts["text_encoder_2"]).items()}
    write(tmp_path / "stored.safetensors", flux_parts, tensors, clips(flux_parts), t5, vae="vae.")
    plain.float()
    stored = load_family("stored.safetensors", device="cpu", dtype="fp32")
    large = [one for one in plain.modules() if type(one) is torch.nn.Linear and min(one.weight.shape) > 256]
    assert same_weights(stored.denoiser, plain) == len(large) > 20
    state = stored.text_encoders[1].encoder.state_dict()  # whose layers are too small to be kept
    assert all(torch.equal(state[key.removeprefix(T5)], t5[key].float()) for key in t5)
    numbers = sum(one.weight.numel() for one in large)
    rest = sum(p.numel() for p in plain.parameters()) - numbers
    Path("p.yaml").write_text(PRESET, encoding="utf-8")
    parts = dict(make_plan(load_preset("p.yaml")).parts)  # for a GPU, in bf16
    assert parts["frozen base, in 8 bits as its file has it"] == pytest.approx((numbers + 2 * rest) / 2**30, rel=0.01)
    noise, text = torch.randn(1, 4, 8, 8), stored.encode_texts(["a cat"])
    sizes = Conditioning(torch.tensor([[64, 64]]), torch.tensor([[0, 0]]), torch.tensor([[64, 64]]))
    kept = stored.denoiser
    with torch.no_grad():
        stored.denoiser = plain
        widened = stored.predict(noise, torch.tensor([500.0]), text, sizes)
        stored.denoiser = kept
    adapter = add_adapter(kept, rank=2, targets=[".*attn.to_[qkv]"], family="flux", seed=0)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for step in range(3):
        predicted = stored.predict(noise, torch.tensor([500.0]), text, sizes)
        if not step:
            torch.testing.assert_close(predicted.detach(), widened, rtol=1e-4, atol=1e-4)
        loss = (predicted - noise).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[2] < losses[1] < losses[0]


def test_the_guidance_layer_of_chroma_has_its_makers_names_again() -> None:
    names = (
        "distilled_guidance_layer.norms.0",
        "single_blocks.0.norm.key_norm",
        "double_blocks.0.txt_attn.norm.query_norm",
    )
    tensors = {f"{name}.weight": torch.ones(1) for name in (*names, "final_layer.linear")}
    found = as_published("chroma", {f"model.diffusion_model.{name}": value for name, value in tensors.items()})
    assert list(found) == [*(f"{name}.scale" for name in names), "final_layer.linear.weight"]


def test_the_transformer_of_flux_alone_needs_the_rest_beside_it(tmp_path: Path, flux_parts: dict[str, Any]) -> None:
    """As flux1-dev.safetensors of Black Forest Labs: no prefix, and nothing but the transformer."""
    bare = {key.removeprefix("model.diffusion_model."): t for key, t in flux_tensors(flux_parts["transformer"]).items()}
    path, beside = tmp_path / "flux.safetensors", tmp_path / "flux"
    save_file({name: value.contiguous() for name, value in bare.items()}, path)
    save_configs(beside, flux_parts)
    with pytest.raises(ModelError) as refused:
        load_family(str(path), device="cpu")
    assert "does not hold vae and text_encoder and text_encoder_2" in refused.value.message
    assert refused.value.exit_code == 4
    for name in ("vae", "text_encoder", "text_encoder_2"):
        flux_parts[name].save_pretrained(beside / name)
    family = load_family(str(path), device="cpu", dtype="bf16")
    same(family.denoiser, flux_parts["transformer"])
    same(family.vae, flux_parts["vae"])
    same(family.text_encoders[1].encoder, flux_parts["text_encoder_2"])


@pytest.mark.parametrize(
    ("name", "source"), [("tokenizer", "stable-diffusion-xl-base"), ("tokenizer_3", "t5-v1_1-xxl")]
)
def test_without_network_and_tokenizer_the_error_says_what_to_do(
    tmp_path: Path, tokenizers: dict[str, Any], name: str, source: str
) -> None:
    parts = sd3_parts(tokenizers)
    t5 = t5_tensors(parts["text_encoder_3"])
    path = write(tmp_path / "model.safetensors", parts, sd3_tensors(parts["transformer"]), clips(parts), t5)
    shutil.rmtree(tmp_path / "model" / name)
    with pytest.raises(ModelError) as refused:
        load_family(str(path), device="cpu")
    assert "needs a tokenizer" in refused.value.message
    assert source in refused.value.message
    assert f"go online once, or put a folder `model/{name}` beside the model" in str(refused.value.hint)
    assert refused.value.exit_code == 4


def test_the_command_line_says_it_too(
    tmp_path: Path, tokenizers: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    parts = sd3_parts(tokenizers)
    path = write(tmp_path / "model.safetensors", parts, sd3_tensors(parts["transformer"]), clips(parts))
    shutil.rmtree(tmp_path / "model" / "tokenizer_2")
    preset = tmp_path / "p.yaml"
    preset.write_text(
        f"model: {path}\ndataset: {{folders: [{{path: builtin:example}}], trigger: t}}\n", encoding="utf-8"
    )
    assert main(["run", str(preset), "--runs-dir", str(tmp_path / "runs"), "--plain"]) == 4
    said = capsys.readouterr()
    assert "needs a tokenizer" in said.err
    assert "hint: go online once" in said.err
    assert said.out == ""
