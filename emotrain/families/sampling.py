"""One sample with the live modules. The global random state is not touched."""

from __future__ import annotations

import torch
from PIL import Image

from emotrain.families.common import DrawRequest, LoadedFamily, to_device


def draw_sample(family: LoadedFamily, request: DrawRequest) -> Image.Image:
    """Draw one picture, RGB, `request.width` x `request.height` pixels.

    Noise comes from a generator of its own on the CPU, seeded with `request.seed`: the same request on
    the same weights gives the same picture. Embeddings have one row. `request.extras` goes to the
    pipeline's call as it is.

    Raises:
        ValueError: a size that the model cannot have.
    """
    step = family.vae_scale * 2
    if request.width % step or request.height % step:
        raise ValueError(f"width and height must be multiples of {step}, got {request.width} x {request.height}")
    text = {key: to_device(value, family.device, family.dtype) for key, value in request.text.items()}
    negative = {key: to_device(value, family.device, family.dtype) for key, value in request.negative.items()}
    family.place_denoiser()
    training = family.denoiser.training
    family.denoiser.eval()
    try:
        with torch.no_grad():
            pixels = family.decode_latents(family.draw(request, text, negative))
    finally:
        family.denoiser.train(training)
    levels = ((pixels[0] / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())
