"""Public models with few blocks and random weights, at their real widths, and the stock pipelines around them.

Nothing but the number of blocks is smaller, and the VAE, whose widths no number depends on; the text encoders are left
out, for embeddings are random. A denoiser without weights only notes what it is given.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from emotrain.families.common import LoadedFamily, Parts
from emotrain.families.loading import family_class
from emotrain.families.registry import FAMILIES, configs, family_of_variant
from emotrain.families.sniff import latent_channels

VARIANTS = [variant for spec in FAMILIES.values() for variant in spec.variants]
FEW = {
    "num_layers": 1, "num_single_layers": 1, "n_layers": 1, "n_refiner_layers": 1, "layers_per_block": 1,
    "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
}  # fmt: skip
MODULAR = ("anima", "qwen21", "flux3")
PIPELINES = {"flux2-dev": "Flux2Pipeline"}  # where a variant has another one than its family
INITIALISERS = ("kaiming_uniform_", "uniform_", "normal_", "xavier_uniform_", "trunc_normal_")


class Output(NamedTuple):
    """What a denoiser returns, by name or by place."""

    sample: Any


def few_blocks(config: dict[str, Any]) -> dict[str, Any]:
    """The config with one block of each kind; SD3's last block is another kind than those before."""
    small = {key: FEW.get(key, value) for key, value in config.items()}
    if "transformer_layers_per_block" in config:
        small["transformer_layers_per_block"] = 1
    if "caption_projection_dim" in config:
        small["num_layers"] = 2
    if "dual_attention_layers" in config:
        small["dual_attention_layers"] = [0]
    return small


@contextmanager
def left_empty() -> Iterator[None]:
    """Modules are built without drawing their weights, which takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        for name in INITIALISERS:
            patch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)
        yield


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Random weights of a size that keeps activations near 1; none is zero, or nothing would depend on anything."""
    noise = torch.randn((1 << 22) + 1, generator=torch.Generator().manual_seed(3))
    for name, parameter in module.named_parameters():
        flat = parameter.view(-1)
        for start in range(0, len(flat), len(noise)):
            flat[start : start + len(noise)] = noise[: len(flat) - start]
        if parameter.ndim > 1:
            flat.mul_((len(flat) / parameter.shape[0]) ** -0.5)
        else:
            flat.mul_(0.1).add_(0.0 if name.endswith("bias") else 1.0)


def narrow_vae(family: str) -> Any:
    """A VAE of the public one's scales, shifts, channels and depth, a few channels wide."""
    import diffusers

    spec, config = FAMILIES[family], dict(configs(family)["vae"])
    if "block_out_channels" in config:
        config |= {"block_out_channels": [8] * len(config["block_out_channels"]), "norm_num_groups": 4}
    config |= {"layers_per_block": 1} if "layers_per_block" in config else {"base_dim": 8, "num_res_blocks": 1}
    config |= {"decoder_base_dim": 8} if "decoder_base_dim" in config else {}
    torch.manual_seed(12)
    vae = getattr(diffusers, spec.vae_class).from_config(config)
    if hasattr(vae, "bn"):
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
    return vae.eval()


def denoiser_of(variant: str, weights: bool = True) -> Any:
    """The denoiser of a public model with few blocks, float32; without weights on the meta device."""
    import diffusers

    name = str(family_of_variant(variant))
    with torch.device("cpu" if weights else "meta"), left_empty():
        config = few_blocks(configs(name)["denoiser"][variant])
        denoiser = getattr(diffusers, FAMILIES[name].denoiser_class).from_config(config)
    if weights:
        fill(denoiser)
    return denoiser


def build(variant: str, weights: bool = True, **scheduler: Any) -> LoadedFamily:
    """The family of a public model with few blocks, float32; without weights the denoiser lies on the meta device.

    `scheduler` are words of the scheduler's config in place of the public ones.
    """
    import diffusers

    name = str(family_of_variant(variant))
    spec, public = FAMILIES[name], configs(name)
    denoiser = denoiser_of(variant, weights)
    kind, words = public["scheduler"][variant]
    words = {**words, **scheduler}
    family = family_class(name)(
        Parts(
            name=name, variant=variant, prediction="flow" if spec.flow else words["prediction_type"], denoiser=denoiser,
            vae=narrow_vae(name), text_encoders=[], scheduler=getattr(diffusers, kind)(**words),
            device=torch.device("cpu"), dtype=torch.float32,
        )
    )  # fmt: skip
    family._placed = True  # a denoiser without weights cannot be moved
    return family


def text_of(family: LoadedFamily, tokens: int = 20) -> dict[str, Tensor]:
    """Random embeddings of one caption."""
    generator = torch.Generator().manual_seed(1)
    shapes = family.text_shapes(family.denoiser.config, tokens)
    return {name: torch.randn(1, *shape, generator=generator) for name, shape in shapes.items()}


def latents_of(family: LoadedFamily, width: int, height: int) -> Tensor:
    """Random latents of a picture of that size in pixels, [1, C, H, W]."""
    shape = (1, latent_channels(family.name, family.vae.config), height // family.vae_scale, width // family.vae_scale)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


class Call(NamedTuple):
    """What a stock pipeline gave its denoiser (arguments by name), and what came back."""

    given: dict[str, Any]
    output: Any


class Seen(NamedTuple):
    """One run of a stock pipeline whose scheduler leaves the latents as they are."""

    calls: list[Call]
    raw_latents: Tensor  # what its VAE was given to decode
    pixels: Tensor  # in -1..1


@contextmanager
def overheard(denoiser: Any, answer: Any = None) -> Iterator[list[Call]]:
    """The denoiser's calls; with `answer` it says that (a function of its arguments) and does not work.

    Meanwhile pipelines take the CPU for the place of all their parts, where a denoiser without weights has none.
    """
    from diffusers import DiffusionPipeline, ModularPipeline

    inner, calls = denoiser.forward, []
    names = inspect.signature(inner)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = dict(names.bind(*args, **kwargs).arguments)
        output = inner(*args, **kwargs) if answer is None else Output(answer(given))
        calls.append(Call(given, output[0]))
        return output

    forward.__signature__ = names  # type: ignore[attr-defined]  # modular blocks look at it
    with pytest.MonkeyPatch.context() as patch:
        for kind, name in itertools.product((DiffusionPipeline, ModularPipeline), ("device", "_execution_device")):
            patch.setattr(kind, name, torch.device("cpu"))
        patch.setattr(denoiser, "forward", forward)
        yield calls


def nothing(given: dict[str, Any]) -> Any:
    """Zeros in the shape of the latents."""
    if "x" in given:
        return [torch.zeros_like(picture) for picture in given["x"]]
    if "img_mask" in given:  # the texts' places are answered too
        return after_texts(given, torch.zeros_like(given["hidden_states"]))
    return torch.zeros_like(given.get("sample", given.get("hidden_states")))


def after_texts(given: dict[str, Any], tokens: Tensor) -> Tensor:
    """Qwen-Image 2.1's answer: of the caption's places and of the picture's."""
    return torch.cat(
        [tokens.new_zeros(len(tokens), given["encoder_hidden_states"].shape[1], tokens.shape[2]), tokens], 1
    )


def anima_pipeline(family: LoadedFamily, embeds: Tensor) -> Any:
    """diffusers' blocks after the text encoder; the conditioner's answer is `embeds`.

    The resize of its padding mask asks for torchvision, and is stood in for.
    """
    import diffusers.models.transformers.transformer_cosmos as cosmos
    from diffusers import ClassifierFreeGuidance
    from diffusers.modular_pipelines import SequentialPipelineBlocks
    from diffusers.modular_pipelines.anima.modular_blocks_anima import AnimaCoreDenoiseStep, AnimaDecodeStep

    class Conditioner(nn.Module):
        dtype = torch.float32

        def forward(self, **_: Any) -> Tensor:
            return nn.functional.pad(embeds, (0, 0, 0, 512 - embeds.shape[1]))

    class Transforms:
        class InterpolationMode:
            NEAREST = "nearest"

        class functional:  # noqa: N801
            @staticmethod
            def resize(mask: Tensor, size: list[int], interpolation: str) -> Tensor:
                return nn.functional.interpolate(mask, size, mode=interpolation)

    cosmos.transforms = getattr(cosmos, "transforms", Transforms)
    blocks = {"denoise": AnimaCoreDenoiseStep(), "decode": AnimaDecodeStep()}
    pipeline = SequentialPipelineBlocks.from_blocks_dict(blocks).init_pipeline()
    pipeline.update_components(
        transformer=family.denoiser, vae=family.vae, scheduler=family.fresh_scheduler(),
        text_conditioner=Conditioner(), guider=ClassifierFreeGuidance(guidance_scale=1.0),
    )  # fmt: skip
    return pipeline


def modular_pipeline(family: LoadedFamily, guidance: float = 1.0) -> Any:
    """diffusers' blocks after the text encoder, of the families that have no other pipeline."""
    from diffusers import ClassifierFreeGuidance
    from diffusers.modular_pipelines import SequentialPipelineBlocks
    from diffusers.modular_pipelines.flux3 import decoders as flux3
    from diffusers.modular_pipelines.flux3.modular_blocks_flux3 import Flux3CoreDenoiseStep
    from diffusers.modular_pipelines.qwenimage21 import decoders as qwen
    from diffusers.modular_pipelines.qwenimage21.modular_blocks_qwenimage21 import QwenImage21CoreDenoiseStep

    denoise, decode = {
        "qwen21": (QwenImage21CoreDenoiseStep, qwen.QwenImage21DecodeStep),
        "flux3": (Flux3CoreDenoiseStep, flux3.Flux3DecodeStep),
    }[family.name]
    blocks = {"denoise": denoise(), "decode": decode()}
    pipeline = SequentialPipelineBlocks.from_blocks_dict(blocks).init_pipeline()
    pipeline.update_components(
        transformer=family.denoiser, vae=family.vae, scheduler=family.fresh_scheduler(),
        guider=ClassifierFreeGuidance(guidance_scale=guidance),
    )  # fmt: skip
    return pipeline


def stock_pipeline(family: LoadedFamily, text: dict[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """diffusers' own pipeline around the family's modules, and the words that tell it `text` without guidance."""
    import diffusers

    embeds = text["prompt_embeds"]
    if family.name == "anima":
        told = dict.fromkeys(("qwen_prompt_embeds", "qwen_attention_mask", "t5_input_ids", "t5_attention_mask"), embeds)
        return anima_pipeline(family, embeds), told
    real = torch.ones(embeds.shape[:2], dtype=torch.bool)
    if family.name in MODULAR:
        told = {"prompt_embeds": embeds}
        if family.name == "qwen21":
            told |= {"prompt_embeds_mask": real, "image_pad_mask": ~real, "use_kv_cache": False}
        return modular_pipeline(family), told
    words: dict[str, Any] = {
        "zimage": {"prompt_embeds": list(embeds), "guidance_scale": 0.0},
        "flux2": {"prompt_embeds": embeds, "guidance_scale": 1.0},
        "krea2": {"prompt_embeds": embeds, "prompt_embeds_mask": real, "guidance_scale": 0.0},
        "qwen": {"prompt_embeds": embeds, "prompt_embeds_mask": real, "true_cfg_scale": 1.0},
        "chroma": {"prompt_embeds": embeds, "prompt_attention_mask": real, "guidance_scale": 1.0},
    }.get(family.name, {**text, "guidance_scale": 1.0})
    built = {FAMILIES[family.name].denoiser: family.denoiser, "vae": family.vae, "scheduler": family.fresh_scheduler()}
    cls = getattr(diffusers, PIPELINES.get(family.variant, FAMILIES[family.name].pipeline))
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name not in built and name != "self" and parameter.default is inspect.Parameter.empty:
            built[name] = None
    if family.name in ("sd15", "sd21"):
        built["requires_safety_checker"] = False
    return cls(**built), words


def packed(family: LoadedFamily, pipeline: Any, latents: Tensor) -> Tensor:
    """Latents [B, C, H, W] as the pipeline's call takes them, by its own packing."""
    if family.name in ("flux", "krea2", "qwen", "chroma"):
        return pipeline._pack_latents(latents, *latents.shape)
    if family.name == "qwen21":
        return latents.flatten(2).transpose(1, 2)
    return latents[:, :, None] if family.name == "anima" else latents


@torch.no_grad()
def listen(
    family: LoadedFamily, latents: Tensor, text: dict[str, Tensor], answer: Any = None, steps: int = 3,
    stand: bool = True, decoded: bool = True, **more: Any,
) -> Seen:  # fmt: skip
    """Let the stock pipeline run from `latents` with its denoiser overheard; where they `stand`, they never change.

    Without `decoded` its picture is black, and the VAE does nothing.
    """
    pipeline, words = stock_pipeline(family, text)
    height, width = (side * family.vae_scale for side in latents.shape[-2:])
    if stand:
        pipeline.scheduler.step = lambda output, t, latents, **_: (latents,)
    raw: list[Tensor] = []
    decode = family.vae.decode

    def heard(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        raw.append(z)
        return decode(z, *args, **kwargs) if decoded else DecoderOutput(z.new_zeros(z.shape[0], 3, *z.shape[2:]))

    with pytest.MonkeyPatch.context() as patch, overheard(family.denoiser, answer) as calls:
        patch.setattr(family.vae, "decode", heard)
        if family.name == "anima":  # ours sets it aside, and adds the mask's zeros itself
            family.denoiser.register_to_config(concat_padding_mask=True)
        if family.name in MODULAR:
            more = {**more, "output": "images"}
        else:
            pipeline.set_progress_bar_config(disable=True)
        pixels = pipeline(
            **words, latents=packed(family, pipeline, latents), width=width, height=height, num_inference_steps=steps,
            output_type="pt", **more,
        )  # fmt: skip
    pixels = pixels if isinstance(pixels, Tensor) else pixels.images
    return Seen(calls, raw[0], pixels * 2 - 1)


def oracle(family: LoadedFamily, clean: Tensor, text: dict[str, Tensor]) -> Any:
    """The answer of a denoiser that knows the picture, to arguments in the model's own form.

    By the definitions of what is predicted, and not by our objectives: a flow's n - x0 = (x - x0) / sigma, epsilon from
    x = a x0 + s n, v = a n - s x0. Z-Image is asked at 1 - sigma for the negative of its flow.
    """
    pipeline, _ = stock_pipeline(family, text)
    tokens = family.name in ("flux2", "flux3")
    native = clean.flatten(2).transpose(1, 2) if tokens else packed(family, pipeline, clean)
    alphas = getattr(family.scheduler, "alphas_cumprod", None)

    def answer(given: dict[str, Any]) -> Any:
        if family.name == "zimage":
            noisy, sigma = torch.stack(given["x"]), 1 - given["t"]
            return list(-(noisy - native[:, :, None]) / sigma.view(-1, 1, 1, 1, 1))
        noisy = given["sample"] if "sample" in given else given["hidden_states"]
        time = torch.as_tensor(given["timestep"]).reshape(1)
        if alphas is None:
            noisy = noisy[:, :16] if family.name == "anima" else noisy
            velocity = (noisy - native) / (time / 1000 if family.name == "sd3" else time)
            return after_texts(given, velocity) if "img_mask" in given else velocity
        a, s = alphas[time.long()].sqrt(), (1 - alphas[time.long()]).sqrt()
        noise = (noisy - a * native) / s
        return noise if family.prediction == "epsilon" else a * noise - s * native

    return answer
