"""The step of a training script made of diffusers' and peft's own parts: what ours is held beside.

LoRA weights in float32 by peft on a base in bfloat16, autocast, torch's AdamW, the gradient clipped, the loss read each
step: as diffusers' text-to-image LoRA example does it with mixed precision, without accelerate around it.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from diffusers import FluxPipeline
from peft import LoraConfig

from emotrain.families.common import LoadedFamily
from emotrain.lora import targets


class BareLoop:
    """SD 1.x, SDXL and FLUX.1 in the usual way.

    Args:
        family: with random weights, on its device.
        text: embeddings of one caption, as the family's `predict` takes them.
        size: of the picture, in pixels.
    """

    def __init__(self, family: LoadedFamily, text: dict[str, torch.Tensor], size: int, *, checkpointing: bool) -> None:
        self.model, self.device, self.dtype = family.denoiser, family.device, family.dtype
        family.vae = None  # its script keeps it out of the way too: latents are cached
        self.model.requires_grad_(False)
        paths = targets.select(self.model, "attn-mlp", family.name)
        self.model.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=list(paths)))
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if checkpointing:
            self.model.enable_gradient_checkpointing()
        self.model.train()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        self.side = size // family.vae_scale
        self.is_flux = family.name == "flux"
        self.latents = torch.zeros(1, 16 if self.is_flux else 4, self.side, self.side, device=self.device)
        embeds = text["prompt_embeds"].to(self.device, self.dtype)
        self.words: dict[str, Any] = {"encoder_hidden_states": embeds}
        pooled = text["pooled_prompt_embeds"].to(self.device, self.dtype) if "pooled_prompt_embeds" in text else None
        if self.is_flux:
            grid = FluxPipeline._prepare_latent_image_ids(1, self.side // 2, self.side // 2, self.device, self.dtype)
            tokens = torch.zeros(embeds.shape[1], 3, device=self.device, dtype=self.dtype)
            scale = torch.ones(1, device=self.device) if self.model.config.guidance_embeds else None
            self.words |= {"pooled_projections": pooled, "img_ids": grid, "txt_ids": tokens, "guidance": scale}
        elif pooled is not None:
            ids = torch.tensor([[size, size, 0, 0, size, size]], device=self.device, dtype=self.dtype)
            self.words["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        self.alpha_bar = torch.linspace(0.9991, 0.0047, 1000, device=self.device)

    def loss(self) -> torch.Tensor:
        """Of one sample at a random timestep."""
        noise = torch.randn_like(self.latents)
        if self.is_flux:
            sigma = torch.sigmoid(torch.randn(1, device=self.device))
            noisy = ((1 - sigma) * self.latents + sigma * noise).to(self.dtype)
            packed = FluxPipeline._pack_latents(noisy, 1, 16, self.side, self.side)
            with torch.autocast(self.device.type, self.dtype):
                output = self.model(packed, timestep=sigma, return_dict=False, **self.words)[0]
            output = FluxPipeline._unpack_latents(output, 8 * self.side, 8 * self.side, 8)
            return (output.float() - (noise - self.latents)).pow(2).mean()
        timesteps = torch.randint(0, 1000, (1,), device=self.device)
        share = self.alpha_bar[timesteps].view(-1, 1, 1, 1)
        noisy = (share.sqrt() * self.latents + (1 - share).sqrt() * noise).to(self.dtype)
        with torch.autocast(self.device.type, self.dtype):
            output = self.model(noisy, timesteps, **self.words).sample
        return (output.float() - noise).pow(2).mean()

    def step(self) -> float:
        """One step; its loss."""
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def measure(self, first: int, steps: int) -> dict[str, Any]:
        """Seconds a step, the `first` ones left out, and the loss."""
        losses = [self.step() for _ in range(first)]
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            losses.append(self.step())
            seconds.append(time.perf_counter() - started)
        return {"s_step": statistics.median(seconds), "loss": losses[-1]}
