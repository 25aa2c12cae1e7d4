"""A tiny run for tests of the loop: one 1x1 convolution to learn, random latents, a real optimizer and objective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from emotrain.batch import Batch, Conditioning, Labels
from emotrain.diffusion import build_objective
from emotrain.optim import EmoSens
from emotrain.pulse.stopping import StopRule
from emotrain.train.events import Event
from emotrain.train.loop import Limits, Parts
from emotrain.train.losses import LossBaseline
from emotrain.train.validation import Validation

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


class FakeFamily:
    """predict = a frozen 1x1 convolution plus the adapter's."""

    device = torch.device("cpu")
    dtype = torch.float32
    name = "sd15"
    trained_encoders: frozenset[str] = frozenset()

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.base = nn.Conv2d(4, 4, 1).requires_grad_(False)
        self.base.weight.copy_(torch.randn(4, 4, 1, 1, generator=generator) * 0.3)
        self.base.bias.zero_()
        self.adapter = FakeAdapter()
        self.poison: set[int] = set()  # calls whose prediction is NaN
        self.calls = 0

    def num_image_tokens(self, height: int, width: int) -> int:
        return height * width

    def predict(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], conditioning: Any) -> Tensor:
        self.calls += 1
        out = self.base(noisy)
        if self.adapter.on:
            out = out + self.adapter.layer(noisy)
        return out * float("nan") if self.calls in self.poison else out


class FakeAdapter:
    """One trainable 1x1 convolution that starts at zero."""

    def __init__(self) -> None:
        self.layer = nn.Conv2d(4, 4, 1, bias=False)
        nn.init.zeros_(self.layer.weight)
        self.on = True

    loss_scale = 1.0

    def collect_gradients(self) -> None:
        pass

    def unscale_gradients(self) -> None:
        pass

    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters() if parameter.grad is not None]

    def drop_gradients(self) -> None:
        for parameter in self.parameters():
            parameter.grad = None

    def parameters(self) -> list[nn.Parameter]:
        return [self.layer.weight]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [("layer.weight", self.layer.weight)]

    def state(self) -> dict[str, Tensor]:
        return {"layer.weight": self.layer.weight.detach().clone()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self.layer.weight.copy_(state["layer.weight"])

    @contextmanager
    def off(self) -> Iterator[None]:
        self.on = False
        yield
        self.on = True


class FakeData:
    """`count` random pictures in a fixed order, `size` a batch; the last batch of an epoch may be smaller."""

    def __init__(self, count: int = 5, size: int = 2) -> None:
        self.latents = torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(1))
        self.size = size
        self.batches_per_epoch = -(-count // size)

    def batch(self, micro_step: int) -> Batch:
        epoch, place = divmod(micro_step, self.batches_per_epoch)
        return self.of(range(len(self.latents))[place * self.size : (place + 1) * self.size], epoch)

    def labels(self, micro_step: int) -> Labels:
        return self.batch(micro_step).labels

    def of(self, indices: Any, epoch: int = 0) -> Batch:
        latents = self.latents[list(indices)]
        sizes = torch.zeros(len(latents), 2, dtype=torch.int64)
        ids = tuple(f"picture-{i}" for i in indices)
        return Batch(latents, {}, Conditioning(sizes, sizes, sizes), torch.ones(len(latents)), None, ids, epoch)


@dataclass
class Recorder:
    """All that a run says and does."""

    events: list[Event] = field(default_factory=list)
    saves: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def make_parts(recorder: Recorder, *, data: FakeData | None = None, validation: bool = True, **changes: Any) -> Parts:
    """Parts of a run; `changes` replace single ones."""
    family, data = FakeFamily(), data or FakeData()
    objective = build_objective("epsilon", SCHEDULER)
    held_out = Validation(family, objective, family.adapter, [data.of([0, 1])], {}, seed=3) if validation else None
    words = {
        "family": family,
        "objective": objective,
        "adapter": family.adapter,
        "optimizer": EmoSens(family.adapter.parameters()),
        "data": data,
        "stop_rule": StopRule("trusted", 60),
        "loss_baseline": LossBaseline(),
        "validation": held_out,
        "notify": recorder.events.append,
        "save": lambda state: recorder.saves.append(state.step),
        "sample": recorder.samples.append,
        "interrupted": lambda: False,
    }
    return Parts(**{**words, **changes})


def limits(**changes: Any) -> Limits:
    """Small numbers; `changes` replace single ones."""
    words = {
        "max_steps": 6,
        "gradient_accumulation_steps": 1,
        "max_grad_norm": 1.0,
        "seed": 5,
        "validate_every": 2,
        "save_every": 3,
        "sample_every": 3,
    }
    return Limits(**{**words, **changes})
