"""The step of a training script made of diffusers' and peft's own parts: what ours is held beside.

LoRA weights in float32 by peft on a base in bfloat16, autocast, torch's AdamW, the gradient clipped, the loss read each
step: as diffusers' text-to-image LoRA example does it with mixed precision, without accelerate around it.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from peft import LoraConfig

from emotrain.families.common import LoadedFamily
from emotrain.lora import targets


class BareLoop:
    """SD 1.x and SDXL in the usual way.

    Args:
        family: with random weights, on its device.
        text: embeddings of one caption, as the family's `predict` takes them.
        size: of the picture, in pixels.
    """

    def __init__(self, family: LoadedFamily, text: dict[str, torch.Tensor], size: int, *, checkpointing: bool) -> None:
        self.unet, self.device, self.dtype = family.denoiser, family.device, family.dtype
        family.vae = None  # its script keeps it out of the way too: latents are cached
        self.unet.requires_grad_(False)
        paths = targets.select(self.unet, "attn-mlp", family.name)
        self.unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=list(paths)))
        for parameter in self.unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.unet.train()
        self.trained = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        side = size // family.vae_scale
        self.latents = torch.zeros(1, 4, side, side, device=self.device)
        self.words: dict[str, Any] = {
            "encoder_hidden_states": text["prompt_embeds"].to(self.device, self.dtype),
        }
        if "pooled_prompt_embeds" in text:
            ids = torch.tensor([[size, size, 0, 0, size, size]], device=self.device, dtype=self.dtype)
            pooled = text["pooled_prompt_embeds"].to(self.device, self.dtype)
            self.words["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        self.alpha_bar = torch.linspace(0.9991, 0.0047, 1000, device=self.device)

    def step(self) -> float:
        """One step; its loss."""
        noise = torch.randn_like(self.latents)
        timesteps = torch.randint(0, 1000, (1,), device=self.device)
        share = self.alpha_bar[timesteps].view(-1, 1, 1, 1)
        noisy = (share.sqrt() * self.latents + (1 - share).sqrt() * noise).to(self.dtype)
        with torch.autocast(self.device.type, self.dtype):
            output = self.unet(noisy, timesteps, **self.words).sample
        loss = (output.float() - noise.float()).pow(2).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss)

    def measure(self, steps: int) -> dict[str, Any]:
        """Seconds a step and the loss."""
        losses = [self.step() for _ in range(3)]
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            losses.append(self.step())
            seconds.append(time.perf_counter() - started)
        return {"s_step": statistics.median(seconds), "loss": losses[-1]}
