"""What a denoiser is asked: noise, targets, densities of the timesteps, loss weights. Pure tensor functions.

Two worlds behind one `Objective`:

- Diffusion (SD 1.x, 2.x, SDXL): timesteps are whole numbers 0..999, latents and noise are mixed with
  sqrt(alpha_bar) and sqrt(1 - alpha_bar) (Ho et al. 2020, arXiv:2006.11239, eq. 4).
- Flow (SD3, FLUX.1): timesteps are sigmas in (0, 1], latents and noise are mixed with 1 - sigma and sigma
  (rectified flow; Liu et al. 2022, arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206, eq. 13).

Shape letters: B batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from emotrain.errors import ModelError

Prediction = Literal["epsilon", "v_prediction", "flow"]
Density = Literal["uniform", "logit-normal"]
SIGMA_MIN = 1e-4  # a flow timestep of exactly 0 would be a clean picture: nothing to learn


class Objective(Protocol):
    """What is predicted, from which timesteps, and how much each counts."""

    @property
    def prediction(self) -> Prediction:
        """What the denoiser predicts."""

    def timesteps(self, u: Tensor, num_tokens: int) -> Tensor:
        """Inverse CDF of the timesteps' density: `u` [B] in [0, 1) -> float32 [B].

        Being an inverse CDF it takes stratified `u` as well as random ones. `num_tokens` is the number of
        image tokens (H/2 * W/2), which shifts the sigmas of some flow models.
        """

    def noise(self, latents: Tensor, generator_noise: Tensor) -> Tensor:
        """Standard normal [B, C, H, W] -> the noise that is added, with the noise offset where one is set."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents and noise [B, C, H, W] at `timesteps` [B] -> noisy latents [B, C, H, W]."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser's output is compared with, [B, C, H, W]."""

    def weight(self, timesteps: Tensor) -> Tensor:
        """Loss weight per sample, float32 [B]."""

    def position(self, timesteps: Tensor) -> Tensor:
        """Place on the noise scale, float32 [B] in [0, 1), rising with the noise."""


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, ...] on `like`'s device and dtype."""
    return values.to(device=like.device, dtype=like.dtype).view(-1, *[1] * (like.dim() - 1))


def quantile(u: Tensor, density: Density) -> Tensor:
    """Inverse CDF of a density on (0, 1): `u` [B] -> float64 [B].

    logit-normal: sigmoid of a standard normal, Esser et al. 2024 (arXiv:2403.03206), eq. 19 with m = 0, s = 1.
    """
    u = u.double()
    if density == "uniform":
        return u
    return torch.sigmoid(math.sqrt(2.0) * torch.erfinv(2.0 * u - 1.0))


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move sigmas towards the noise for larger pictures, Esser et al. 2024 (arXiv:2403.03206), eq. 23."""
    return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)


def shift_for(num_tokens: int, scheduler_config: Mapping[str, Any]) -> float:
    """The shift that the model's own sampler uses for a picture of `num_tokens` tokens.

    With dynamic shifting (FLUX.1-dev) the logarithm of the shift runs linearly between `base_shift` and
    `max_shift` over the number of tokens; else it is the scheduler's constant (SD3: 3.0, schnell: 1.0).
    """
    if not scheduler_config.get("use_dynamic_shifting", False):
        return float(scheduler_config.get("shift", 1.0))
    mu = mu_for(num_tokens, scheduler_config)
    return mu if scheduler_config.get("time_shift_type") == "linear" else math.exp(mu)


def mu_for(num_tokens: int, scheduler_config: Mapping[str, Any]) -> float:
    """The `mu` of dynamic shifting, which runs linearly over the number of tokens."""
    low, high = (
        scheduler_config.get("base_image_seq_len", 256),
        scheduler_config.get("max_image_seq_len", 4096),
    )
    base, top = scheduler_config.get("base_shift", 0.5), scheduler_config.get("max_shift", 1.15)
    return float(base + (top - base) * (num_tokens - low) / (high - low))


def betas_of(scheduler_config: Mapping[str, Any]) -> Tensor:
    """The variance schedule of a DDPM-family scheduler config, float32 [T].

    Raises:
        ModelError: the config names a schedule that is not known here.
    """
    if scheduler_config.get("trained_betas") is not None:
        return torch.tensor(scheduler_config["trained_betas"], dtype=torch.float32)
    count = int(scheduler_config.get("num_train_timesteps", 1000))
    start, end = scheduler_config.get("beta_start", 0.0001), scheduler_config.get("beta_end", 0.02)
    kind = scheduler_config.get("beta_schedule", "linear")
    if kind == "linear":
        return torch.linspace(start, end, count, dtype=torch.float32)
    if kind == "scaled_linear":  # latent diffusion, Rombach et al. 2022
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    if kind == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17
        edge = torch.linspace(0, 1, count + 1, dtype=torch.float64)
        level = torch.cos((edge + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - level[1:] / level[:-1]).clamp(max=0.999).float()
    raise ModelError(f"the model's scheduler has the beta schedule `{kind}`, which is not known here")


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas [T] whose last timestep is pure noise, Lin et al. 2024 (arXiv:2305.08891), algorithm 1."""
    root = (1.0 - betas).cumprod(0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * first / (first - last)
    alpha_bar = root**2
    alphas = torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return 1.0 - alphas


def add_offset(noise: Tensor, offset: float) -> Tensor:
    """Noise [B, C, H, W] -> noise whose mean per channel varies by `offset`.

    Guttenberg 2023, "Diffusion with offset noise".

    In law the same as `noise + offset * randn(B, C, 1, 1)`, but it asks for no further random numbers: the mean
    over H and W is normal with variance 1/HW and independent of the rest, so it is stretched to 1/HW + offset².
    """
    mean = noise.mean(dim=(2, 3), keepdim=True)
    return noise + mean * (math.sqrt(1.0 + offset**2 * noise.shape[2] * noise.shape[3]) - 1.0)


@dataclass(frozen=True)
class DiffusionObjective:
    """Epsilon or v-prediction over whole timesteps 0..T-1; `alphas_cumprod` float32 [T] is alpha_bar."""

    prediction: Prediction
    alphas_cumprod: Tensor
    density: Density = "uniform"
    min_snr_gamma: float | None = None
    noise_offset: float = 0.0

    def timesteps(self, u: Tensor, num_tokens: int) -> Tensor:
        """See `Objective.timesteps`; whole numbers, `num_tokens` plays no part."""
        count = len(self.alphas_cumprod)
        return (quantile(u, self.density) * count).floor().clamp(0, count - 1).float()

    def noise(self, latents: Tensor, generator_noise: Tensor) -> Tensor:
        return add_offset(generator_noise, self.noise_offset) if self.noise_offset else generator_noise

    def _mix(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at `timesteps`, each [B, 1, 1, 1]."""
        alpha_bar = self.alphas_cumprod[timesteps.long()]
        return _per_sample(alpha_bar.sqrt(), like), _per_sample((1 - alpha_bar).sqrt(), like)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Ho et al. 2020, eq. 4."""
        signal, spread = self._mix(timesteps, latents)
        return signal * latents + spread * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noise, or v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) latents.

        Salimans & Ho 2022 (arXiv:2202.00512), appendix D.
        """
        if self.prediction == "epsilon":
            return noise
        signal, spread = self._mix(timesteps, latents)
        return signal * noise - spread * latents

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar), float32 [B]."""
        alpha_bar = self.alphas_cumprod[timesteps.long()]
        return alpha_bar / (1 - alpha_bar)

    def weight(self, timesteps: Tensor) -> Tensor:
        """Min-SNR-gamma, Hang et al. 2023 (arXiv:2303.09556), section 3.4.

        min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v.

        At zero terminal SNR the first is its limit 1.
        """
        if self.min_snr_gamma is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        snr = self.snr(timesteps)
        if self.prediction == "epsilon":
            return (self.min_snr_gamma / snr).clamp(max=1.0)
        return snr.clamp(max=self.min_snr_gamma) / (snr + 1)

    def position(self, timesteps: Tensor) -> Tensor:
        """Timestep / T."""
        return timesteps.float() / len(self.alphas_cumprod)


@dataclass(frozen=True)
class FlowObjective:
    """Rectified flow over sigmas; `shift` a number, or None for the one of the model's sampler."""

    scheduler_config: Mapping[str, Any]
    density: Density = "logit-normal"
    shift: float | None = None
    prediction: Prediction = "flow"

    def timesteps(self, u: Tensor, num_tokens: int) -> Tensor:
        """See `Objective.timesteps`; sigmas in (0, 1]."""
        shift = shift_for(num_tokens, self.scheduler_config) if self.shift is None else self.shift
        return shift_sigmas(quantile(u, self.density), shift).clamp(SIGMA_MIN, 1.0).float()

    def noise(self, latents: Tensor, generator_noise: Tensor) -> Tensor:
        """The noise as it is: flow models reach pure noise and need no offset."""
        return generator_noise

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(1 - sigma) latents + sigma noise."""
        sigmas = _per_sample(timesteps, latents)
        return (1 - sigmas) * latents + sigmas * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The flow's velocity: noise - latents, the same at every sigma."""
        return noise - latents

    def weight(self, timesteps: Tensor) -> Tensor:
        """1: the density of the sigmas is the weighting (Esser et al. 2024, section 3.1)."""
        return torch.ones_like(timesteps, dtype=torch.float32)

    def position(self, timesteps: Tensor) -> Tensor:
        """Sigma, kept below 1."""
        return timesteps.float().clamp(0.0, 1.0 - 1e-6)


def build_objective(
    prediction: str,
    scheduler_config: Mapping[str, Any],
    *,
    timesteps: str = "auto",
    shift: float | str = "auto",
    min_snr_gamma: float | None = None,
    noise_offset: float = 0.0,
) -> DiffusionObjective | FlowObjective:
    """The objective of a model, from what it predicts and the config of its scheduler.

    Args:
        prediction: epsilon | v_prediction | flow.
        scheduler_config: as diffusers writes it; `rescale_betas_zero_snr` gives zero terminal SNR.
        timesteps: auto | uniform | logit-normal; auto is uniform for diffusion, logit-normal for flow.
        shift: flow models: auto (the sampler's own, by the number of tokens) or a number.
        min_snr_gamma: diffusion models only; None is off.
        noise_offset: diffusion models only; 0 is off.

    Raises:
        ValueError: an unknown word, or an option that the prediction does not know.
        ModelError: a scheduler config that cannot be trained with.
    """
    if prediction not in ("epsilon", "v_prediction", "flow"):
        raise ValueError(f"prediction must be epsilon, v_prediction or flow, got {prediction!r}")
    if timesteps not in ("auto", "uniform", "logit-normal"):
        raise ValueError(f"timesteps must be auto, uniform or logit-normal, got {timesteps!r}")
    if prediction == "flow":
        if min_snr_gamma is not None or noise_offset:
            raise ValueError("min_snr_gamma and noise_offset are for diffusion models, not for flow models")
        density: Density = "uniform" if timesteps == "uniform" else "logit-normal"
        return FlowObjective(dict(scheduler_config), density, None if shift == "auto" else float(shift))
    if shift != "auto":
        raise ValueError("shift is for flow models, not for diffusion models")
    betas = betas_of(scheduler_config)
    if scheduler_config.get("rescale_betas_zero_snr", False):
        if prediction == "epsilon":  # at pure noise epsilon says nothing about the picture: Lin et al. 2024, 3.2
            raise ModelError(
                "the model's scheduler asks for zero terminal SNR, which cannot be had with epsilon prediction"
            )
        betas = rescale_zero_terminal_snr(betas)
    alphas_cumprod = (1.0 - betas).cumprod(0)
    density = "logit-normal" if timesteps == "logit-normal" else "uniform"
    kind: Prediction = "epsilon" if prediction == "epsilon" else "v_prediction"
    return DiffusionObjective(kind, alphas_cumprod, density, min_snr_gamma, noise_offset)
