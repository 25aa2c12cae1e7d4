"""What a forward pass needs goes to the device in one copy, and is there what it was."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent))

from fake_run import SCHEDULER, FakeData, FakeFamily

from emotrain.batch import fill, layout, send
from emotrain.diffusion import build_objective
from emotrain.train.losses import sample_losses

ELSEWHERE = torch.device("meta")


class Copies(TorchDispatchMode):
    """Counts what goes from the CPU to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        places = [{t.device.type for t in tree_leaves(side) if isinstance(t, Tensor)} for side in (args, out)]
        self.count += "cpu" in places[0] and ELSEWHERE.type in places[1]
        return out


class Elsewhere(FakeFamily):
    device = ELSEWHERE

    def predict(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], conditioning: Any) -> Tensor:
        given = [noisy, timesteps, *text.values(), conditioning.original_sizes, conditioning.target_sizes]
        assert {tensor.device.type for tensor in given} == {ELSEWHERE.type}
        return noisy * 2


def test_a_micro_batch_goes_to_the_device_in_one_copy() -> None:
    batch = FakeData().of([0, 1])
    text = {"prompt_embeds": torch.randn(2, 3, 5), "pooled_prompt_embeds": torch.randn(2, 7)}
    batch = replace(batch, text=text, texts=("a", "b"), masks=torch.ones(2, 1, 4, 4))
    noise, timesteps = torch.randn(2, 4, 4, 4), torch.tensor([3.0, 500.0])
    objective = build_objective("v_prediction", SCHEDULER, min_snr_gamma=5.0)
    with Copies() as copies:
        losses = sample_losses(Elsewhere(), objective, batch, noise, timesteps)  # type: ignore[arg-type]
    assert copies.count == 1
    assert (losses.shape, losses.device) == ((2,), ELSEWHERE)


def test_what_is_packed_comes_out_as_it_was() -> None:
    tensors = [
        torch.randn(3, 5), torch.tensor([[1, -2]]), torch.zeros(0, 4), torch.randn(7).half(), torch.rand(2, 3).t(),
        torch.tensor(2.5), torch.tensor([True, False]),
    ]  # fmt: skip
    size, unpack = layout(tensors)
    packed = torch.empty(size, dtype=torch.uint8)
    fill(packed, unpack, tensors)
    for one, other in zip(unpack(packed.clone()), tensors, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert [tensor.shape for tensor in send(tensors, ELSEWHERE)] == [tensor.shape for tensor in tensors]
    assert send(tensors, torch.device("cpu"))[0] is tensors[0]
