"""The list kernels: guarded private calls, layouts they must not be used for, chunks, number of dispatched calls."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from emotrain.optim import EmoAiry, EmoCats, EmoSens, kernels
from emotrain.optim.kernels import chunks
from emotrain.optim.registry import EMO

KINDS = [(name, generation) for name, cls in EMO.items() for generation in cls.generations]


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def run(cls, params, steps: int = 6, **words):
    optimizer = cls(params, **words)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.observe(1.0 - 0.1 * step)
        optimizer.step()
    return optimizer


def without_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_fused_adamw", lambda device_type: False)
    monkeypatch.setattr(kernels, "has_fused_sgd", lambda device_type: False)


def test_this_torch_has_the_private_kernels_in_the_form_that_is_called() -> None:
    # if this fails after an update of torch, the fallback is in use: correct, but slower
    assert kernels.has_fused_adamw("cpu")
    assert kernels.has_fused_sgd("cpu")


@pytest.mark.parametrize("missing", ["_fused_adamw_", "_fused_sgd_"])
def test_a_torch_without_the_private_kernel_is_noticed(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = {"_fused_adamw_": kernels.has_fused_adamw, "_fused_sgd_": kernels.has_fused_sgd}[missing]
    monkeypatch.delattr(torch, missing)
    guard.cache_clear()
    try:
        assert not guard("cpu")
    finally:
        guard.cache_clear()


@pytest.mark.parametrize(("name", "generation"), KINDS)
def test_fused_kernels_and_their_fallback_agree_to_a_few_roundings(
    name: str, generation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights() -> torch.Tensor:
        torch.manual_seed(1)
        param = torch.nn.Parameter(torch.randn(16, 33))
        run(EMO[name], [param], steps=200, generation=generation, notify=False)
        return param.detach()

    fused = weights()
    without_fused(monkeypatch)
    assert torch.allclose(fused, weights(), rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", EMO)
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "every second"])
def test_parameters_of_any_memory_layout_follow_contiguous_ones(name: str, layout: str) -> None:
    torch.manual_seed(2)
    odd = {
        "transposed": lambda: torch.randn(6, 4).t(),
        "channels_last": lambda: torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
        "every second": lambda: torch.randn(4, 12)[:, ::2],
    }[layout]()
    plain, other = torch.nn.Parameter(odd.contiguous().clone()), torch.nn.Parameter(odd)
    assert not other.is_contiguous()
    for param in (plain, other):
        run(EMO[name], [param], use_shadow=True)
    assert torch.allclose(plain, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "generation"), KINDS)
def test_no_call_depends_on_the_number_of_tensors_and_none_waits_for_the_device(name: str, generation: str) -> None:
    def calls(num_tensors: int) -> list[str]:
        params = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(num_tensors)]
        optimizer = run(EMO[name], params, steps=2, generation=generation, notify=False)
        optimizer.observe(0.9)
        with Count() as count:
            optimizer.step()
        return count.calls

    few, many = calls(100), calls(1000)
    assert few == many
    assert len(many) <= 20
    assert not [call for call in many if "_local_scalar_dense" in call or "item" in call]


@pytest.mark.parametrize("chunk_elements", [1, 40, 100, None])
def test_chunks_hold_every_parameter_once_and_in_order(chunk_elements: int | None) -> None:
    params = [torch.nn.Parameter(torch.zeros(size)) for size in (30, 10, 70, 200, 5, 5)]
    parts = [params[part] for part in chunks(params, chunk_elements)]
    assert [id(p) for part in parts for p in part] == [id(p) for p in params]
    assert all(len(c) == 1 or sum(p.numel() for p in c) <= (chunk_elements or 10**9) for c in parts)
    assert len(parts) == {1: 6, 40: 4, 100: 4, None: 1}[chunk_elements]


def test_chunking_does_not_change_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def weights() -> list[torch.Tensor]:
        torch.manual_seed(3)
        params = [torch.nn.Parameter(torch.randn(8, size)) for size in (3, 9, 5)]
        run(EmoCats, params, generation="3.7.0")
        return [param.detach() for param in params]

    whole = weights()
    monkeypatch.setattr(kernels, "CHUNK_ELEMENTS", 30)
    assert all(torch.equal(x, y) for x, y in zip(whole, weights(), strict=True))


@pytest.mark.parametrize(("cls", "times"), [(EmoSens, 2), (EmoCats, 1), (EmoAiry, 0)])
def test_state_takes_two_one_and_no_times_the_parameters(cls: type, times: int) -> None:
    params = [torch.nn.Parameter(torch.randn(16, 40)), torch.nn.Parameter(torch.randn(40, 16))]
    optimizer = run(cls, params)
    held = sum(v.numel() * v.element_size() for slots in optimizer.state.values() for v in slots.values())
    assert held == times * sum(p.numel() * p.element_size() for p in params)


def test_gradients_are_left_as_they_were() -> None:
    for cls in EMO.values():
        param = torch.nn.Parameter(torch.randn(7))
        optimizer = run(cls, [param])
        before = param.grad.clone()
        optimizer.observe(0.3)
        optimizer.step()
        assert torch.equal(param.grad, before)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("name", "lr"), [("emosens", None), ("emonavi", 1e-3)])
def test_with_bias_correction_it_is_adamw_at_the_emotions_step_length(
    name: str, lr: float | None, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:
        without_fused(monkeypatch)
    torch.manual_seed(4)
    mine = torch.nn.Parameter(torch.randn(5, 7))
    theirs = torch.nn.Parameter(mine.detach().clone())
    optimizer = EMO[name]([mine], lr, bias_correction=True, weight_decay=0.1, notify=False)
    adamw = torch.optim.AdamW([theirs], betas=(0.9, 0.995), weight_decay=0.1)
    for step in range(60):
        mine.grad = torch.randn(mine.shape, generator=torch.Generator().manual_seed(step))
        theirs.grad = mine.grad.clone()
        reading = optimizer.observe(1.0 - 0.003 * step)
        assert reading.drive == 1.0  # elsewhere EmoNavi's decay follows lr alone
        optimizer.step()
        adamw.param_groups[0]["lr"] = reading.pulse
        adamw.step()
    assert torch.allclose(mine, theirs, rtol=0, atol=1e-5)
    assert float((mine.detach() - run_plain(name, lr)).abs().max()) > 1e-3  # the published rule goes another way


def run_plain(name: str, lr: float | None) -> torch.Tensor:
    torch.manual_seed(4)
    param = torch.nn.Parameter(torch.randn(5, 7))
    optimizer = EMO[name]([param], lr, weight_decay=0.1, notify=False)
    for step in range(60):
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
        optimizer.observe(1.0 - 0.003 * step)
        optimizer.step()
    return param.detach()
