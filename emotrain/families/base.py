"""One model family as the training loop sees it.

Shape letters: B batch, C latent channels, H W latent height and width, S tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, device, dtype, nn

from emotrain.batch import Conditioning, TextEmbeds


@dataclass
class TextEncoderPart:
    """One text encoder with its tokenizer; `name` as in the diffusers folder: text_encoder, text_encoder_2, ..."""

    name: str
    encoder: nn.Module
    tokenizer: Any
    max_tokens: int


class Family(Protocol):
    """A loaded model. All of its parameters are frozen; the LoRA is added to `denoiser` by `lora.adapter`."""

    name: str  # sd15 | sd21 | sdxl | sd3 | flux
    prediction: Literal["epsilon", "v_prediction", "flow"]
    denoiser: nn.Module
    vae: nn.Module | None  # None once freed
    text_encoders: list[TextEncoderPart]  # empty once freed
    trained_encoders: frozenset[str]  # names of those that carry a LoRA; they are never freed
    device: device
    dtype: dtype  # of the denoiser's arithmetic
    vae_scale: int  # pixels per latent: 8 on the real models
    scheduler_config: dict[str, Any]

    def encode_images(self, pixels: Tensor) -> Tensor:
        """float32 [B, 3, H*vae_scale, W*vae_scale] in -1..1 -> scaled latents float32 [B, C, H, W] (posterior mean)."""

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, H, W] -> pixels float32 [B, 3, H*vae_scale, W*vae_scale] in -1..1."""

    def encode_texts(self, texts: list[str]) -> TextEmbeds:
        """Texts -> embeddings float32 on the CPU, a row per text, all of the same token count."""

    def num_image_tokens(self, height: int, width: int) -> int:
        """How many tokens the denoiser makes of latents of that height and width: what shifts the timesteps."""

    def no_negative(self, empty: TextEmbeds) -> TextEmbeds:
        """What the stock pipeline takes where no negative prompt is given; `empty` is the empty text, encoded."""

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, text: TextEmbeds, conditioning: Conditioning) -> Tensor:
        """The denoiser's output, float32 [B, C, H, W].

        `timesteps` float32 [B]: SD 0..999 (whole numbers); flow models sigma in 0..1.
        """

    def encode_with_grad(self, texts: list[str], frozen: TextEmbeds | None = None) -> TextEmbeds:
        """As `encode_texts`, on the encoders' device, in their dtype, and with gradients.

        `frozen` are embeddings of the same texts from before: what a T5 gives is taken from them.
        """

    def train_encoders(self) -> tuple[str, ...]:
        """Keep the CLIP text encoders on the device for the whole run; their names."""

    def place_denoiser(self) -> None:
        """Move the denoiser and its LoRA to the device, where they waited for the encoders' work to be done."""

    def free_encoders(self) -> None:
        """Let go of the untrained text encoders (and of the VAE's encoder half) once everything is cached."""

    def vae_identity(self) -> str:
        """A digest that changes when encode_images would give other latents (weights, scale, dtype)."""

    def text_identity(self) -> str:
        """A digest that changes when encode_texts would give other embeddings."""


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
