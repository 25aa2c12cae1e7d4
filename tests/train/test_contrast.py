"""A caption that belongs to its picture lowers the loss; a swapped one is found, at the price that was said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from emotrain.batch import Batch, Conditioning
from emotrain.dataset.contrasts import contrast_scores
from emotrain.diffusion import build_objective
from emotrain.train.contrast import contrastive_losses

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
COUNT = 12


class Knowing:
    """Predicts the noise of a picture whose constant value is the caption's embedding, and counts its samples."""

    device = torch.device("cpu")
    dtype = torch.float32
    trained_encoders: frozenset[str] = frozenset()

    def __init__(self, objective: Any) -> None:
        self.objective, self.samples, self.largest = objective, 0, 0

    def num_image_tokens(self, height: int, width: int) -> int:
        return height * width

    def predict(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], conditioning: Any) -> Tensor:
        self.samples += len(noisy)
        self.largest = max(self.largest, len(noisy))
        alpha = self.objective.alphas_cumprod[timesteps.long()][:, None, None, None]
        said = text["prompt_embeds"][:, :1, None, None].expand_as(noisy)
        return (noisy - alpha.sqrt() * said) / (1 - alpha).sqrt()


class Pictures:
    """Picture k is constantly k / 4 (and some noise of its own); its caption says so, or what `swapped` says."""

    def __init__(self, swapped: dict[int, int] | None = None, side: int = 4) -> None:
        self.said = {k: (swapped or {}).get(k, k) for k in range(COUNT)}
        self.captions = {f"data/{k:02}.png": f"caption {said}" for k, said in self.said.items()}
        self.side = side

    def fixed(self, ids: Any) -> list[Batch]:
        ids = list(dict.fromkeys(ids))
        numbers = [int(name[5:7]) for name in ids]
        values = torch.tensor([k / 4 for k in numbers])[:, None, None, None]
        noise = torch.randn(COUNT, 4, self.side, self.side, generator=torch.Generator().manual_seed(1)) * 0.2
        sizes = torch.zeros(len(ids), 2, dtype=torch.int64)
        whole = Batch(
            values + noise[numbers],
            {"prompt_embeds": torch.tensor([[self.said[k] / 4] for k in numbers])},
            Conditioning(sizes, sizes, sizes), torch.ones(len(ids)), None, tuple(ids), 0,
            tuple(self.captions[name] for name in ids),
        )  # fmt: skip
        return [whole]


def losses(pictures: Pictures, **words: Any) -> tuple[list[Any], Knowing]:
    objective = build_objective("epsilon", SCHEDULER)
    family = Knowing(objective)
    found: Any = contrastive_losses(family, objective, pictures, pictures.captions, **words)  # type: ignore[arg-type]
    return list(found), family


def test_swapped_captions_score_above_all_others() -> None:
    found, _ = losses(Pictures({2: 7, 7: 2}))
    scores = contrast_scores(found)
    assert sorted(scores, key=lambda name: -scores[name])[:2] in (
        ["data/02.png", "data/07.png"], ["data/07.png", "data/02.png"],
    )  # fmt: skip


def test_it_costs_as_many_forward_passes_as_it_says() -> None:
    found, family = losses(Pictures(), others=4, draws=3)
    assert family.samples == COUNT * 3 * 5
    assert {len(one.own) for one in found} == {3}
    assert {len(one.others) for one in found} == {4}
    assert all(one.id not in dict(one.others) for one in found)


def test_large_pictures_go_through_the_denoiser_one_by_one() -> None:
    assert losses(Pictures(), others=7)[1].largest == 16
    assert losses(Pictures(side=64), others=7)[1].largest == 4
    assert losses(Pictures(side=128), others=2)[1].largest == 1


def test_it_depends_on_the_seed_alone_and_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    first, again, other = losses(Pictures())[0], losses(Pictures())[0], losses(Pictures(), seed=1)[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again
    assert first != other


def test_the_own_caption_is_compared_at_the_noise_of_the_others() -> None:
    class Deaf(Knowing):
        def predict(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], conditioning: Any) -> Tensor:
            return super().predict(noisy, timesteps, {"prompt_embeds": text["prompt_embeds"] * 0}, conditioning)

    objective = build_objective("epsilon", SCHEDULER)
    pictures: Any = Pictures()
    for one in contrastive_losses(Deaf(objective), objective, pictures, pictures.captions):  # type: ignore[arg-type]
        assert all(row == pytest.approx(one.own) for _, row in one.others)


def test_equal_captions_are_no_other_captions() -> None:
    pictures = Pictures(dict.fromkeys(range(10), 0))
    for one in losses(pictures, others=2)[0]:
        assert pictures.captions[one.id] not in {pictures.captions[name] for name, _ in one.others}
    with pytest.raises(ValueError, match="2 other captions, fewer than 3"):
        losses(pictures, others=3)


def test_it_stops_between_pictures_when_asked() -> None:
    answers = iter([False, False, True])
    assert len(losses(Pictures(), stop=lambda: next(answers))[0]) == 2


def test_texts_go_along_where_text_encoders_are_trained() -> None:
    seen: list[tuple[str, ...]] = []

    class Untold(Pictures):
        def fixed(self, ids: Any) -> list[Batch]:
            return [replace(batch, text={}) for batch in super().fixed(ids)]

    import emotrain.train.contrast as module

    def spy(family: Any, objective: Any, batch: Batch, noise: Tensor, timesteps: Tensor) -> Tensor:
        seen.append(batch.texts)
        return torch.ones(len(batch.ids))

    whole, module.sample_losses = module.sample_losses, spy  # type: ignore[assignment]
    try:
        losses(Untold(), others=2, draws=1)
    finally:
        module.sample_losses = whole
    assert seen[0][0] == "caption 0"
    assert len(set(seen[0])) == 3
