"""The encoders as the data set uses them: several pictures at once where there is room, else one by one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from emotrain.batch import TextEmbeds
from emotrain.families.common import LoadedFamily
from emotrain.train.events import Event, Notice
from emotrain.train.memory import OutOfMemory, with_memory

HINT = "close what else uses the GPU, or set model.memory to a smaller card: the VAE then works in tiles"


class Encoders:
    """A family's encoders; running out of memory costs the batches, and with one picture the run.

    Args:
        family: whose encoders they are.
        pictures_at_once: pictures of one size that are encoded together.
        notify: gets one line where that was too many.
    """

    def __init__(self, family: LoadedFamily, pictures_at_once: int, notify: Callable[[Event], None]) -> None:
        self.family, self.pictures_at_once, self.notify = family, pictures_at_once, notify
        self.vae_scale = family.vae_scale
        self.vae_identity, self.text_identity = family.vae_identity, family.text_identity

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Float32 [B, 3, H, W] in -1..1 -> latents float32 [B, C, h, w] on the CPU.

        Raises:
            OutOfMemory: not even one picture fits.
        """
        count, _, height, width = pixels.shape
        try:
            return with_memory(f"encoding a picture of {width}x{height}", partial(self.family.encode_images, pixels))
        except OutOfMemory as error:
            if count == 1:
                raise OutOfMemory(error.doing, error.asked_gib, HINT) from None
        self.pictures_at_once = 1
        self.notify(Notice(f"no room for {count} pictures of {width}x{height} at once: they are encoded one by one"))
        return torch.cat([self.encode_images(one) for one in torch.split(pixels, 1)])

    def encode_texts(self, texts: list[str]) -> TextEmbeds:
        """As the family's.

        Raises:
            OutOfMemory: there is no room for it.
        """
        try:
            return with_memory("encoding a caption", partial(self.family.encode_texts, texts))
        except OutOfMemory as error:
            hint = "close what else uses the GPU, or set model.quantize_text_encoders to nf4"
            raise OutOfMemory(error.doing, error.asked_gib, hint) from None
