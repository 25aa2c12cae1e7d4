"""The optimizers in other people's loops: closures, accumulation, GradScaler, accelerate, groups, half precision."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from emotrain.optim import EmoCats, EmoSens
from emotrain.optim.registry import EMO
from emotrain.pulse.signal import NonFiniteLossError, observe, start


class Scalars:
    def __init__(self) -> None:
        self.rows: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.rows.append((tag, scalar_value, global_step))


def parameter(*shape: int, dtype=torch.float32, grad: bool = True) -> torch.nn.Parameter:
    param = torch.nn.Parameter(torch.ones(shape).to(dtype))
    if grad:
        param.grad = torch.full(shape, 0.5, dtype=dtype)
    return param


@pytest.mark.parametrize("name", EMO)
def test_step_without_a_loss_raises_and_says_what_to_do(name: str) -> None:
    optimizer = EMO[name]([parameter(2)])
    with pytest.raises(RuntimeError, match=r"call observe\(mean_loss\) once before each step\(\), or pass a closure"):
        optimizer.step()
    optimizer.observe(1.0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="before observe"):
        optimizer.step()


@pytest.mark.parametrize("name", EMO)
def test_step_with_a_closure_returns_its_loss_and_feels_it(name: str) -> None:
    param = parameter(3, grad=False)
    optimizer = EMO[name]([param])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (param**2).mean()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == 1.0
    assert optimizer.reading.short == 1.0
    assert not torch.equal(param, torch.ones(3))


def test_a_loss_that_was_observed_is_not_felt_again_through_the_closure() -> None:
    optimizer = EmoSens([parameter(2)])
    reading = optimizer.observe(0.25)
    assert optimizer.step(lambda: 9.0) == 9.0
    assert optimizer.reading == reading


@pytest.mark.parametrize("name", EMO)
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_non_finite_loss_is_refused_and_nothing_has_changed(name: str, loss: float) -> None:
    param = parameter(2)
    optimizer = EMO[name]([param])
    optimizer.observe(1.0)
    optimizer.step()
    before, weights = optimizer.state_dict(), param.detach().clone()
    with pytest.raises(NonFiniteLossError):
        optimizer.observe(torch.tensor(loss))
    with pytest.raises(NonFiniteLossError):
        optimizer.step(lambda: loss)
    with pytest.raises(RuntimeError, match="before observe"):
        optimizer.step()
    assert optimizer.state_dict()["emotion"] == before["emotion"]
    assert torch.equal(param, weights)


def test_with_gradient_accumulation_the_emotion_hears_the_mean_of_the_whole_step() -> None:
    losses = [0.4, 0.2, 0.1, 0.3]
    param = parameter(1, grad=False)
    optimizer = EmoSens([param])
    for loss in losses:
        (param.sum() * loss / len(losses)).backward()
    reading = optimizer.observe(sum(losses) / len(losses))
    optimizer.step()
    assert reading.short == pytest.approx(0.25)


def test_a_grad_scaler_scales_gradients_and_never_the_loss_that_is_felt() -> None:
    def train(enabled: bool) -> tuple[torch.Tensor, float]:
        param = parameter(4, grad=False)
        optimizer = EmoSens([param])
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=enabled)
        for _ in range(5):
            optimizer.zero_grad()
            loss = ((param - 3.0) ** 2).mean()
            scaler.scale(loss).backward()
            optimizer.observe(loss)
            scaler.step(optimizer)
            scaler.update()
        return param.detach(), optimizer.reading.short

    scaled, plain = train(True), train(False)
    assert torch.allclose(scaled[0], plain[0], rtol=0, atol=1e-6)
    assert scaled[1] == pytest.approx(plain[1], abs=1e-6)


def test_a_step_that_the_grad_scaler_skips_leaves_the_weights_and_training_goes_on() -> None:
    param = parameter(2, grad=False)
    optimizer = EmoSens([param])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for gradient in (math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((param * gradient).sum()).backward()
        optimizer.observe(1.0)
        before = param.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, param) == math.isinf(gradient)


def test_accelerate_drives_it_with_accumulation_and_the_state_goes_through_it() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = torch.nn.Linear(3, 1)
    emo = EmoSens(model.parameters())
    model, wrapped = accelerator.prepare(model, emo)
    losses: list[float] = []
    for micro_step in range(8):
        with accelerator.accumulate(model):
            loss = (model(torch.full((2, 3), 1.0 + micro_step)) ** 2).mean()
            losses.append(loss.item())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                emo.observe(sum(losses[-2:]) / 2)
            wrapped.step()
            wrapped.zero_grad()
    assert emo.state_dict()["emotion"]["state"]["step"] == 4
    state = start("3.9")
    for first in range(0, 8, 2):
        state, reading, _ = observe(state, sum(losses[first : first + 2]) / 2, watch="long")
    assert emo.reading == reading


@pytest.mark.parametrize(("name", "cls"), EMO.items())
def test_each_groups_own_lr_scales_its_pulse(name: str, cls: type) -> None:
    first, second = parameter(3), parameter(3)
    # 0.02: small enough that no pulse is at its upper bound
    lr = 1e-3 if cls.generations == ("3.6",) else 0.02
    optimizer = cls([{"params": [first]}, {"params": [second], "lr": lr / 2}], lr=lr, weight_decay=0.0)
    optimizer.observe(1.0)
    optimizer.step()
    one, two = (group["lr"] for group in optimizer.param_groups)
    assert two == pytest.approx(one / 2)
    moved = [(1 - param).abs().sum().item() for param in (first, second)]
    assert moved[1] == pytest.approx(moved[0] / 2, rel=0.05)


def test_param_group_lr_shows_the_pulse_and_the_scope_is_kept_apart() -> None:
    optimizer = EmoSens([parameter(2)], lr=0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5
    for loss in (1.0, 0.7, 0.4):
        reading = optimizer.observe(loss)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == reading.pulse
        assert optimizer.param_groups[0]["scope"] == 0.5


def test_a_scheduler_moves_the_learning_rate_of_3_6_as_in_the_source() -> None:
    optimizer = EMO["emofact"]([parameter(2)], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    pulses = []
    for _ in range(3):
        pulses.append(optimizer.observe(1.0).pulse)
        optimizer.step()
        scheduler.step()
    assert pulses == [1e-3, 0.5e-3, 0.25e-3]


@pytest.mark.parametrize("name", EMO)
def test_parameters_without_gradients_stay_as_they_are_and_get_no_state(name: str) -> None:
    with_grad, without = parameter(3), parameter(3, grad=False)
    optimizer = EMO[name]([with_grad, without], use_shadow=True)
    for _ in range(3):
        optimizer.observe(1.0)
        optimizer.step()
    assert torch.equal(without, torch.ones(3))
    assert without not in optimizer.state
    assert not torch.equal(with_grad, torch.ones(3))


@pytest.mark.parametrize("name", EMO)
def test_a_step_without_any_gradient_does_nothing(name: str) -> None:
    optimizer = EMO[name]([parameter(3, grad=False)])
    optimizer.observe(1.0)
    optimizer.step()


@pytest.mark.parametrize("name", EMO)
@pytest.mark.parametrize("generation", ["first", "last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_follow_float32_ones_with_float32_state(name, generation, dtype) -> None:
    cls = EMO[name]
    generation = cls.generations[0 if generation == "first" else -1]
    exact, half = parameter(5), parameter(5, dtype=dtype)
    words = {"lr": 0.05, "use_shadow": True} if generation == "3.6" else {"lr": 50.0, "use_shadow": True}
    optimizers = [cls([param], generation=generation, **words) for param in (exact, half)]
    for step in range(10):
        for optimizer in optimizers:
            optimizer.observe(1.0 - 0.05 * step)
            optimizer.step()
    assert half.dtype == dtype
    assert torch.allclose(half.float(), exact, atol=0.05)
    assert not torch.equal(half.float(), torch.ones(5))
    for value in optimizers[1].state[half].values():
        assert value.dtype == torch.float32


def test_half_and_float32_parameters_may_share_a_group() -> None:
    params = [parameter(2), parameter(2, dtype=torch.bfloat16), parameter(3, dtype=torch.float64)]
    optimizer = EmoCats(params, lr=50.0)
    for _ in range(4):
        optimizer.observe(1.0)
        optimizer.step()
    assert all(not torch.equal(param.float(), torch.ones_like(param).float()) for param in params)


def test_a_sparse_gradient_is_refused_with_the_fix() -> None:
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    optimizer = EmoSens(embedding.parameters())
    optimizer.observe(1.0)
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()


def test_ready_to_stop_is_logged_once_when_the_signal_turns_on(caplog: pytest.LogCaptureFixture) -> None:
    optimizer, silent = EmoSens([parameter(2)]), EmoSens([parameter(2)], notify=False)
    with caplog.at_level(logging.INFO, logger="emotrain.optim"):
        for _ in range(200):
            for each in (optimizer, silent):
                each.observe(0.01)
                each.step()
    assert optimizer.should_stop
    assert silent.should_stop
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["READY TO STOP"]


@pytest.mark.parametrize("name", EMO)
def test_the_writer_gets_every_tag_once_per_step(name: str) -> None:
    writer = Scalars()
    optimizer = EMO[name]([parameter(2)], writer=writer)
    for loss in (1.0, 0.6):
        optimizer.observe(loss)
        optimizer.step()
    tags = ["emoLR/base", "emoLR/Turbo", "emostate/emoDrive", "emostate/scalar", "emostate/trust", "emostate/stop"]
    assert [(tag, step) for tag, _, step in writer.rows] == [(tag, step) for step in (1, 2) for tag in tags]
    last = {tag: value for tag, value, _ in writer.rows[-6:]}
    assert last["emoLR/base"] == optimizer.reading.pulse
    assert last["emoLR/Turbo"] == optimizer.reading.pulse * optimizer.reading.drive
    assert last["emostate/scalar"] == optimizer.reading.scalar


def test_backward_of_torch_is_the_one_it_was_before_the_import() -> None:
    assert torch.Tensor.backward.__module__ == "torch._tensor"
