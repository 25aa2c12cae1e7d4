"""Keeping a class as it was without pictures of it: the model without the LoRA is what the one with it has to equal.

DreamBooth (Ruiz et al. 2022, arXiv:2208.12242, 3.3) keeps a class by training on pictures of it that the base has
drawn. Their loss pulls towards what the base predicts for the class; here that prediction itself is the target, at the
noisy latents that the step has anyway: nothing has to be drawn, and the target has no noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emotrain.train.losses import predict

if TYPE_CHECKING:
    from emotrain.batch import Batch, TextEmbeds
    from emotrain.families.common import LoadedFamily
    from emotrain.lora.adapter import Adapter

EVERY = 2  # steps: one of so many preserves
WEIGHT = 0.3  # of its loss: chosen by what it costs the pictures (tests/bench/class_preservation.py)


@dataclass(frozen=True)
class Preservation:
    """What the model without the LoRA makes of the captions with the class word in place of the trigger.

    `texts_of` gives texts by the pictures' ids and their cached embeddings, a row each; {} where the text encoders are
    trained, which then encode them anew.
    """

    family: LoadedFamily
    adapter: Adapter
    texts_of: Callable[[Sequence[str]], tuple[tuple[str, ...], TextEmbeds]]

    def loss(self, step: int, batch: Batch, noisy: Tensor, timesteps: Tensor) -> Tensor | None:
        """WEIGHT times the mean squared change of the prediction for the class: a scalar with gradient.

        Args:
            step: steps done; None comes back where the next one does not preserve.
            batch: of the step.
            noisy: its latents with noise, on the CPU [B, C, H, W].
            timesteps: [B].
        """
        if step % EVERY:
            return None
        texts, embeds = self.texts_of(batch.ids)
        said = replace(batch, text=embeds, texts=texts)
        with torch.no_grad(), self.adapter.off():
            target = predict(self.family, said, noisy, timesteps)
        prediction = predict(self.family, said, noisy, timesteps)
        return WEIGHT * (prediction - target).pow(2).mean()
