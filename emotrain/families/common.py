"""What all families share: VAE, devices, identities, freeing the encoders.

Shape letters: B batch, C latent channels, H W latent height and width, S tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from emotrain.batch import Conditioning, TextEmbeds
from emotrain.errors import ModelError
from emotrain.families.memory import TILE, MemoryPlan
from emotrain.families.offload import offload_blocks
from emotrain.families.quantize import RoundedLinear, WithoutWeight, make_plain, quantize_linears
from emotrain.families.quiet import quiet
from emotrain.families.registry import FAMILIES
from emotrain.families.tiles import in_tiles

# Of samples of small models such as the built-in ones, looked at with 1, 2, 3 and 5: at 1 shapes are
# a little ragged, and above 2 the colours of what the model knows less well run together.
SMALL_MODEL_GUIDANCE = 2.0
SAMPLED_VALUES = 65_536  # per tensor, evenly spread: enough to notice any retrained or merged tensor


@dataclass
class TextEncoderPart:
    """One text encoder with its tokenizer; `name` as in the diffusers folder: text_encoder, text_encoder_2, ..."""

    name: str
    encoder: nn.Module
    tokenizer: Any
    max_tokens: int


@dataclass(frozen=True)
class DrawRequest:
    """One sample: text embeddings (positive and negative), size in pixels, seed."""

    text: TextEmbeds
    negative: TextEmbeds
    width: int
    height: int
    seed: int
    steps: int = 20
    guidance: float | None = None
    extras: dict[str, Any] = field(default_factory=dict)


@dataclass
class Parts:
    """The pieces of a model as loaded; `memory` is what was decided to fit into the GPU."""

    name: str
    variant: str
    prediction: Literal["epsilon", "v_prediction", "flow"]
    denoiser: Any
    vae: Any
    text_encoders: list[TextEncoderPart]
    scheduler: Any
    device: torch.device
    dtype: torch.dtype
    memory: MemoryPlan | None = None
    force_zeros: bool = True  # SDXL's force_zeros_for_empty_prompt
    distilled: bool = False


def digest_module(module: nn.Module, *extra: Any) -> str:
    """sha256 over config, names, shapes, dtypes and evenly sampled values of all tensors, and `extra`.

    Weights that are kept as numbers times a scale count as what they stand for.
    """
    digest = hashlib.sha256("".join(json.dumps(one, sort_keys=True, default=str) for one in extra).encode())
    rounded = {path: layer for path, layer in module.named_modules() if isinstance(layer, RoundedLinear)}
    inside = {f"{path}.layer" for path, layer in module.named_modules() if isinstance(layer, WithoutWeight)}
    rows = []
    for name, tensor in module.state_dict().items():
        path, _, last = name.rpartition(".")
        shown = f"{path.removesuffix('.layer')}.{last}" if path in inside else name
        rows.append((shown, path, last, tensor))
    for name, path, last, tensor in sorted(rows, key=lambda row: row[0]):
        if path in rounded and last == "scale":
            continue
        stride = max(1, tensor.numel() // SAMPLED_VALUES)
        stored = path in rounded and last == "weight"
        values = rounded[path].sampled(stride) if stored else tensor.detach().reshape(-1)[::stride]
        digest.update(f"{name} {tuple(tensor.shape)} {values.dtype}".encode())
        digest.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def config_values(config: Any) -> dict[str, Any]:
    """A model config without the keys that say where it was loaded from or by which version."""
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    skip = ("dtype", "torch_dtype", "transformers_version", "architectures")
    return {k: v for k, v in plain.items() if not k.startswith("_") and k not in skip}


def digest_encoder(part: TextEncoderPart) -> str:
    """sha256 over a text encoder and its tokenizer."""
    vocabulary = sorted(part.tokenizer.get_vocab().items())
    encoder: Any = part.encoder
    return digest_module(encoder, [part.name, part.max_tokens, config_values(encoder.config), vocabulary])


class LoadedFamily(ABC):
    """A loaded model, all of its parameters frozen; the LoRA is added to `denoiser` by `lora.adapter`.

    Attributes:
        vae: None once freed.
        text_encoders: empty once freed.
        trained_encoders: names of those that carry a LoRA; they are never freed.
        dtype: of the denoiser's arithmetic.
        vae_scale: pixels per latent: 8 on most models.
    """

    def __init__(self, parts: Parts) -> None:
        self.name = parts.name
        self.variant = parts.variant
        self.prediction = parts.prediction
        self.denoiser: Any = parts.denoiser  # nn.Module with a diffusers config
        self.vae: Any = parts.vae  # the same, or None
        self.text_encoders = parts.text_encoders
        self.trained_encoders: frozenset[str] = frozenset()
        self.scheduler = parts.scheduler
        self.scheduler_config: dict[str, Any] = dict(parts.scheduler.config)
        self.device = parts.device
        self.dtype = parts.dtype
        self.force_zeros = parts.force_zeros
        self.distilled = parts.distilled
        self.clip_skip = FAMILIES[parts.name].clip_skip
        self.memory = parts.memory
        self.placement = parts.memory.sentence if parts.memory else ""
        self._placed = False  # see `place_denoiser`
        self.vae_in_tiles = False  # whether it works on pieces of large pictures
        config = parts.vae.config
        levels = getattr(config, "block_out_channels", None) or config.dim_mult
        self.vae_scale = 2 ** (len(levels) - 1) * FAMILIES[parts.name].vae_patch
        self.latent_scale = float(getattr(config, "scaling_factor", None) or 1.0)
        self.latent_shift = float(getattr(config, "shift_factor", None) or 0.0)
        self._identities: dict[str, str] = {}
        self._plain_digests: dict[str, str] = {}
        if self.device.type == "cuda":
            # cuDNN's backward pass of attention, torch 2.11's choice on Hopper cards, fails on FLUX's shapes or gives
            # NaN (seen on an H100; pytorch issue 196678 is another such case). torch has kernels of its own.
            torch.backends.cuda.enable_cudnn_sdp(False)
        for module in (self.denoiser, parts.vae, *(part.encoder for part in self.text_encoders)):
            module.requires_grad_(False)
            module.eval()

    # ------------------------------------------------------------ pictures

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """float32 [B, 3, H*vae_scale, W*vae_scale] in -1..1 -> scaled latents float32 [B, C, H, W].

        The posterior's mean, on the CPU.
        """
        assert self.vae is not None
        weight = next(self.vae.parameters())
        pixels = pixels.to(weight.device, weight.dtype)
        mean = self._pass(lambda piece: self.vae.encode(piece).latent_dist.mean, pixels, TILE, self.vae_scale)
        return self.normalised(mean.float()).cpu()

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, H, W] -> pixels float32 [B, 3, H*vae_scale, W*vae_scale] on the CPU, about -1..1."""
        assert self.vae is not None
        weight = next(self.vae.parameters())
        raw = self.unnormalised(latents.float().to(weight.device))
        side = TILE // (self.vae_scale // FAMILIES[self.name].vae_patch)
        pixels = self._pass(lambda piece: self.vae.decode(piece).sample, raw.to(weight.dtype), side, 1)
        return pixels.float().cpu()

    def _pass(self, work: Callable[[Tensor], Tensor], whole: Tensor, side: int, step: int) -> Tensor:
        """A pass of the VAE, in one piece or in tiles."""
        return in_tiles(work, whole, side, step) if self.vae_in_tiles else work(whole)

    def normalised(self, raw: Tensor) -> Tensor:
        """The VAE's latents as the denoiser takes them, of about the size of its noise."""
        return (raw - self.latent_shift) * self.latent_scale

    def unnormalised(self, latents: Tensor) -> Tensor:
        """The inverse of `normalised`."""
        return latents / self.latent_scale + self.latent_shift

    @property
    def pictures_at_once(self) -> int:
        """How many of the largest pictures `encode_images` is given at once."""
        return self.memory.pictures_at_once if self.memory is not None else 1

    # ------------------------------------------------------------ texts

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> TextEmbeds:
        """Texts -> embeddings float32 on the CPU, a row per text; as the pipeline's `encode_prompt`."""

    @abstractmethod
    def encode_with_grad(self, texts: list[str], frozen: TextEmbeds | None = None) -> TextEmbeds:
        """As `encode_texts`, but on the encoders' device, in their dtype and with gradients: to train the encoders.

        Args:
            texts: captions.
            frozen: embeddings of the same texts from before; what a T5 gives is taken from them, so that
                it may be freed.
        """

    def train_encoders(self) -> tuple[str, ...]:
        """Keep the CLIP text encoders on the device for the whole run, to train a LoRA on them; their names.

        Call it before a LoRA is put on them: what the cached embeddings belong to is settled here.
        """
        self.text_identity()
        names = [encoder.name for encoder in FAMILIES[self.name].trainable_encoders]
        held = [part for part in self.text_encoders if part.name in names]
        for part in held:
            part.encoder.to(self.device)
        self.trained_encoders = frozenset(part.name for part in held)
        return tuple(part.name for part in held)

    def no_negative(self, empty: TextEmbeds) -> TextEmbeds:
        """What the stock pipeline takes where no negative prompt is given; `empty` is the empty text, encoded."""
        return empty

    @staticmethod
    def to_rows(embeds: TextEmbeds) -> TextEmbeds:
        """Embeddings as they are cached: detached, float32, on the CPU."""
        return {key: value.detach().float().cpu() for key, value in embeds.items()}

    def part(self, name: str) -> TextEncoderPart | None:
        """The text encoder `name`, or None where it is absent or freed."""
        return next((part for part in self.text_encoders if part.name == name), None)

    # ------------------------------------------------------------ the denoiser

    @classmethod
    @abstractmethod
    def text_shapes(cls, config: Any, num_tokens: int) -> dict[str, tuple[int, ...]]:
        """Shape of each text embedding of one caption, by the denoiser's config: what `predict` takes."""

    def num_image_tokens(self, height: int, width: int) -> int:
        """How many tokens the denoiser makes of latents of that height and width: what shifts the timesteps."""
        patch = FAMILIES[self.name].patch
        return (height // patch) * (width // patch)

    @abstractmethod
    def predict(self, noisy_latents: Tensor, timesteps: Tensor, text: TextEmbeds, conditioning: Conditioning) -> Tensor:
        """The denoiser's output, float32 [B, C, H, W].

        `timesteps` float32 [B]: SD 0..999 (whole numbers); flow models sigma in 0..1.
        """

    def _inputs(self, noisy_latents: Tensor, timesteps: Tensor, text: TextEmbeds) -> tuple[Tensor, Tensor, TextEmbeds]:
        """To the device; latents and embeddings in the denoiser's dtype, timesteps in float32."""
        self.place_denoiser()
        moved = {key: to_device(value, self.device, self.dtype) for key, value in text.items()}
        return (
            noisy_latents.to(self.device, self.dtype),
            timesteps.to(self.device, torch.float32),
            moved,
        )

    # ------------------------------------------------------------ memory

    def place_denoiser(self) -> None:
        """Move the denoiser and its LoRA to the device in the form that was planned, and text encoders off it.

        Does something once; `predict` calls it too. Until then it is on the CPU, so that the encoders have the device
        for themselves. Call it after the data set is encoded and before an optimizer looks at the parameters.
        """
        if self._placed:
            return
        self._placed = True
        for part in self.text_encoders:
            if part.name not in self.trained_encoders:
                part.encoder.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.vae_in_tiles = self.memory is not None and self.memory.tile_decode
        if self.device.type == "mps":  # which has no float8
            make_plain(self.denoiser)
        if self.memory is not None and self.memory.offload:
            offload_blocks(self.denoiser, self.device, FAMILIES[self.name].blocks, self.memory.spare_gib)
            return
        if self.memory is not None and self.memory.quantize != "none":
            quantize_linears(self.denoiser, self.memory.quantize, self.device)
        self.denoiser.to(self.device)

    def free_encoders(self) -> None:
        """Let go of the text encoders that are not trained and of the VAE's encoder half; identities are kept."""
        self.vae_identity()
        self.text_identity()
        self.text_encoders = [part for part in self.text_encoders if part.name in self.trained_encoders]
        if self.vae is not None and getattr(self.vae, "encoder", None) is not None:
            self.vae.encoder = None
            self.vae.quant_conv = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ------------------------------------------------------------ identities

    def vae_identity(self, *, as_encoded: bool = True) -> str:
        """A digest that changes when `encode_images` would give other latents.

        Latents that are made in tiles are a little different; not `as_encoded` it is of the files alone.
        """
        if "vae" not in self._identities:
            assert self.vae is not None
            self._identities["vae"] = digest_module(self.vae, config_values(self.vae.config))
        tiled = as_encoded and self.memory is not None and self.memory.tile_encode
        return self._identities["vae"] + f" in even tiles of {TILE}" * tiled

    def text_identity(self, *, as_encoded: bool = True) -> str:
        """A digest that changes when `encode_texts` would give other embeddings.

        Embeddings of quantised encoders are a little different; not `as_encoded` it is of the files alone.
        """
        if "text" not in self._identities:
            digest = hashlib.sha256(self.name.encode())
            if self.clip_skip != FAMILIES[self.name].clip_skip:
                digest.update(f"clip skip {self.clip_skip}".encode())
            for part in self.text_encoders:
                digest.update((self._plain_digests.get(part.name) or digest_encoder(part)).encode())
            self._identities["text"] = digest.hexdigest()
        forms = self.memory.encoder_forms if as_encoded and self.memory is not None else {}
        return self._identities["text"] + "".join(f" {name} in {form}" for name, form in sorted(forms.items()))

    def note_plain(self, part: TextEncoderPart) -> None:
        """Remember an encoder's digest before it is quantised."""
        self._plain_digests[part.name] = digest_encoder(part)

    # ------------------------------------------------------------ samples

    @abstractmethod
    def draw(self, request: DrawRequest, text: TextEmbeds, negative: TextEmbeds) -> Tensor:
        """Scaled latents [1, C, H, W] of a sample; embeddings are on the device."""

    def fresh_scheduler(self) -> Any:
        """A scheduler of the model's own kind that no one else uses."""
        return type(self.scheduler).from_config(self.scheduler.config)


class PipelineFamily(LoadedFamily):
    """A model whose samples the stock pipeline draws."""

    def encoder_kwargs(self) -> dict[str, Any]:
        """Encoders and tokenizers as a pipeline takes them; None for those that are not there."""
        kwargs: dict[str, Any] = {}
        for encoder in FAMILIES[self.name].text_encoders:
            part = self.part(encoder.name)
            kwargs[encoder.name] = part.encoder if part else None
            kwargs[encoder.tokenizer_name] = part.tokenizer if part else None
        return kwargs

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> TextEmbeds:
        """What `encode_with_grad` gives, float32 on the CPU, a row per text."""
        return self.to_rows(self.encode_with_grad(texts))

    @classmethod
    def text_shapes(cls, config: Any, num_tokens: int) -> dict[str, tuple[int, ...]]:
        """Tokens and one pooled embedding."""
        return {
            "prompt_embeds": (num_tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def pipeline(self) -> Any:
        """The stock pipeline around the live modules; freed encoders are None in it."""
        import diffusers

        spec = FAMILIES[self.name]
        parts = {"vae": self.vae, spec.denoiser: self.denoiser, "scheduler": self.fresh_scheduler()}
        return getattr(diffusers, spec.pipeline)(**parts, **self.encoder_kwargs(), **self.pipeline_settings())

    def pipeline_settings(self) -> dict[str, Any]:
        """What the pipeline is told besides its parts."""
        return {}

    def pipeline_kwargs(self, text: TextEmbeds, negative: TextEmbeds, guidance: float | None) -> dict[str, Any]:
        """Arguments of the pipeline's call: classifier-free guidance; `guidance` None is the model's usual one."""
        without = {f"negative_{key}": value for key, value in negative.items()}
        return {**text, **without, "guidance_scale": self.usual_guidance if guidance is None else guidance}

    @property
    def usual_guidance(self) -> float:
        """The guidance of samples."""
        return FAMILIES[self.name].guidance

    def draw(self, request: DrawRequest, text: TextEmbeds, negative: TextEmbeds) -> Tensor:
        """Scaled latents [1, C, H, W] by the stock pipeline; embeddings are on the device."""
        kwargs = self.pipeline_kwargs(text, negative, request.guidance)
        with quiet():
            pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        latents: Tensor = pipeline(
            **kwargs, **request.extras, width=request.width, height=request.height,
            generator=torch.Generator("cpu").manual_seed(request.seed), num_inference_steps=request.steps,
            output_type="latent",
        ).images  # fmt: skip
        return self.unpack_sampled(latents, request.width, request.height)

    def unpack_sampled(self, latents: Tensor, width: int, height: int) -> Tensor:
        """Latents as the pipeline returns them -> scaled latents [B, C, H, W]; `width` and `height` in pixels."""
        return latents


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Numbers to the device in `dtype`; masks stay on the CPU, where they are counted without waiting."""
    return tensor.to(device, dtype) if tensor.is_floating_point() else tensor


def ids_of(part: TextEncoderPart, texts: list[str]) -> Tensor:
    """Token ids int64 [B, S], padded and cut to the encoder's `max_tokens`.

    Raises:
        ModelError: see `refuse_larger_tokenizer`.
    """
    batch = part.tokenizer(
        texts,
        padding="max_length",
        max_length=part.max_tokens,
        truncation=True,
        return_tensors="pt",
    )
    ids: Tensor = batch.input_ids
    refuse_larger_tokenizer(part, int(ids.max()))
    device = next(part.encoder.parameters()).device
    return (ids.pin_memory() if device.type == "cuda" else ids).to(device, non_blocking=True)


def refuse_larger_tokenizer(part: TextEncoderPart, largest: int | None = None) -> None:
    """Refuse a tokenizer that makes tokens which its encoder does not know.

    Args:
        part: the encoder and its tokenizer.
        largest: of some texts; None: of all that it can make.

    Raises:
        ModelError: they are not of one model.
    """
    if largest is None:
        largest = max(part.tokenizer.get_vocab().values(), default=0)
    encoder: Any = part.encoder  # Anima's conditioner is a model of diffusers
    table = encoder.get_input_embeddings() if hasattr(encoder, "get_input_embeddings") else encoder.embed
    known = table.num_embeddings
    if largest >= known:
        raise ModelError(
            f"the tokenizer of {part.name} makes token {largest}, but the encoder knows {known} tokens",
            "they are not of one model: download both again",
        )
