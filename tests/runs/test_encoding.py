"""Encoding where memory is short: fewer pictures at once, then one line and exit 6."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from emotrain.families.memory import EncoderNeeds, Needs, choose_memory
from emotrain.runs.encoding import Encoders
from emotrain.train.events import Notice
from emotrain.train.memory import OutOfMemory


class Small:
    """A family on a device that holds so many pictures."""

    vae_scale = 8

    def __init__(self, room: int) -> None:
        self.room, self.calls = room, list[int]()

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(pixels))
        if len(pixels) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")
        return pixels[:, :1, ::8, ::8]

    def encode_texts(self, texts: list[str]) -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")

    def vae_identity(self) -> str:
        return "vae"

    def text_identity(self) -> str:
        return "text"


def test_too_many_at_once_are_encoded_one_by_one_and_that_is_said_once() -> None:
    said: list[Any] = []
    encoders = Encoders(Small(room=1), 4, said.append)  # type: ignore[arg-type]
    pixels = torch.randn(3, 3, 16, 24)
    assert torch.equal(encoders.encode_images(pixels), pixels[:, :1, ::8, ::8])
    assert encoders.pictures_at_once == 1
    assert encoders.family.calls == [3, 1, 1, 1]  # type: ignore[attr-defined]
    assert [type(event) for event in said] == [Notice]
    assert "3 pictures of 24x16" in said[0].message


def test_one_that_does_not_fit_ends_with_what_to_change() -> None:
    encoders = Encoders(Small(room=0), 1, lambda event: None)  # type: ignore[arg-type]
    with pytest.raises(OutOfMemory) as raised:
        encoders.encode_images(torch.randn(1, 3, 16, 24))
    assert raised.value.exit_code == 6
    assert "24x16" in raised.value.message
    assert "model.memory" in str(raised.value.hint)
    with pytest.raises(OutOfMemory, match="encoding a caption"):
        encoders.encode_texts(["a"])


NEEDS = Needs(
    2_600_000_000, 2, (6.0, 1.0), trained=0.5, encoders=(EncoderNeeds("clip", 800_000_000),), encode=(2.5, 0.63)
)


@pytest.mark.parametrize(("free", "at_once"), [(None, 1), (80.0, 4), (13.0, 4), (9.0, 1), (4.5, 1)])
def test_so_many_at_once_as_take_no_more_than_the_rest_of_the_run(free: float | None, at_once: int) -> None:
    plan = choose_memory(NEEDS, free_gib=free)
    assert plan.pictures_at_once == at_once
    stages = dict(plan.stages)
    assert plan.needed_gib == max(stages.values())
    assert stages["encode"] <= max(stages["train"], 0.93 + 2.5 + 1.5)
