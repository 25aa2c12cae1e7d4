"""The loop: what it counts, hears, leaves out, and when it ends."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from fake_run import FakeData, Recorder, limits, make_parts

from emotrain.optim import EmoSens
from emotrain.optim.averaged import Averaged
from emotrain.optim.registry import build_optimizer
from emotrain.pulse.gain import SURE, Gain
from emotrain.pulse.stopping import UNFAIR_SENTENCE, StopRule
from emotrain.train.events import Notice, StepEnd, ValidationEnd
from emotrain.train.loop import Parts, StopReason, accumulate, fit
from emotrain.train.losses import noise_like, uniforms
from emotrain.train.state import TrainState, capture, restore


def accumulated(parts, numbers, state):
    """Loss, observed loss and samples of one step."""
    gathered = accumulate(parts, numbers, state)
    plain, values, *_ = gathered.read(torch.zeros(()))
    return (
        sum(values) / len(values),
        parts.loss_baseline.observe(gathered.positions, values),
        gathered.samples(1, plain),
    )


def test_a_run_ends_at_the_ceiling_and_tells_every_step():
    recorder, state = Recorder(), TrainState()
    outcome = fit(make_parts(recorder), limits(), state)
    assert outcome.reason is StopReason.MAX_STEPS
    assert [event.step for event in recorder.of(StepEnd)] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in recorder.of(ValidationEnd)] == [0, 2, 4, 6]
    assert recorder.saves == [3, 6]
    assert recorder.samples == [0, 3, 6]
    assert state.step == 6
    assert state.micro_step == 6


def test_the_optimizer_hears_the_mean_over_all_micro_batches():
    recorder, state = Recorder(), TrainState()
    parts = make_parts(recorder)
    loss, observed_loss, samples = accumulated(parts, limits(gradient_accumulation_steps=3), state)
    assert len(samples) == 5
    assert loss == pytest.approx(sum(sample.loss for sample in samples) / 5)
    assert observed_loss == loss


def test_a_regularisation_weight_counts_in_the_loss_and_not_in_the_picture_s_record():
    class Prior(FakeData):
        def batch(self, micro_step: int):
            return replace(super().batch(micro_step), weights=torch.tensor([1.0, 0.5]))

    loss, _, samples = accumulated(make_parts(Recorder(), data=Prior(4, 2)), limits(), TrainState())
    first, second = (sample.loss for sample in samples)
    assert loss == pytest.approx((first + 0.5 * second) / 2)


def test_a_sample_whose_caption_was_dropped_is_marked_in_the_record():
    class Dropped(FakeData):
        def batch(self, micro_step: int):
            return replace(super().batch(micro_step), texts=("", "a cat"))

    _, _, samples = accumulated(make_parts(Recorder(), data=Dropped(4, 2)), limits(), TrainState())
    assert [(sample.id, sample.captioned) for sample in samples] == [("picture-0", False), ("picture-1", True)]


def test_accumulated_gradient_is_that_of_one_batch_with_a_ragged_end():
    def gradient(data: FakeData, count: int) -> torch.Tensor:
        parts = make_parts(Recorder(), data=data)
        noise = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(9))
        import emotrain.train.loop as loop

        original = loop.noise_like
        loop.noise_like = lambda latents, seed, micro: noise[2 * micro : 2 * micro + len(latents)]
        try:
            accumulate(parts, limits(gradient_accumulation_steps=count), TrainState())
        finally:
            loop.noise_like = original
        return parts.adapter.parameters()[0].grad

    torch.testing.assert_close(gradient(FakeData(5, 2), 3), gradient(FakeData(5, 5), 1))


def test_non_finite_steps_never_reach_the_optimizer():
    recorder, state = Recorder(), TrainState()
    parts = make_parts(recorder, validation=False)
    parts.family.poison = {2}
    fit(parts, limits(max_steps=3), state)
    assert [event.step for event in recorder.of(StepEnd)] == [1, 2, 3]
    assert state.guard.skipped == 1
    assert state.micro_step == 4
    assert "picture-2" in recorder.of(Notice)[0].message
    assert all(math.isfinite(event.reading.short) for event in recorder.of(StepEnd))
    assert torch.isfinite(parts.adapter.parameters()[0]).all()


def test_three_non_finite_steps_in_a_row_end_the_run():
    recorder, state = Recorder(), TrainState()
    parts = make_parts(recorder, validation=False)
    parts.family.poison = {3, 4, 5}
    outcome = fit(parts, limits(), state)
    assert outcome.reason is StopReason.DIVERGED
    assert state.step == 2


def test_an_interrupt_saves_after_the_step_in_progress():
    recorder, state = Recorder(), TrainState()
    outcome = fit(make_parts(recorder, interrupted=lambda: state.step >= 2), limits(), state)
    assert outcome.reason is StopReason.INTERRUPTED
    assert recorder.saves == [2]


def test_watching_changes_nothing():
    def weights(validate_every: int, sample_every: int) -> torch.Tensor:
        parts = make_parts(Recorder())
        fit(parts, limits(validate_every=validate_every, sample_every=sample_every), TrainState())
        return parts.adapter.state()["layer.weight"]

    assert torch.equal(weights(1, 1), weights(100, 0))


def test_the_same_seed_gives_the_same_weights_and_another_one_others():
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed + 100)  # the global state has no say
        parts = make_parts(Recorder())
        fit(parts, limits(seed=seed), TrainState())
        return parts.adapter.state()["layer.weight"]

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_the_best_adapter_is_kept_and_is_not_the_last_one():
    recorder, state = Recorder(), TrainState()
    parts = make_parts(recorder)
    losses = iter([1.0, 0.5, 0.7, 0.8])
    falling = {"pictures": lambda s, progress: [next(losses)], "drift": lambda s: 0.0}
    parts = replace(parts, validation=type("P", (), falling)())
    fit(parts, limits(), state)
    assert state.best_step == 2
    assert state.best_loss == 0.5
    assert not torch.equal(state.best_adapter["layer.weight"], parts.adapter.state()["layer.weight"])


def test_once_mirroring_is_unfair_only_the_pictures_as_they_are_are_measured_and_the_run_says_so_once():
    def validation(losses: list[float]) -> object:
        left = iter(losses)
        return type("P", (), {"pictures": lambda s, progress: [next(left)], "drift": lambda s: 0.0})()

    recorder, state = Recorder(), TrainState()
    flipped, plain = (
        validation([1.0, 0.9, 0.95]),
        validation([1.0, 0.5, 0.4, 0.3]),
    )  # the fourth flipped one would not be there
    parts = make_parts(recorder, stop_rule=StopRule(held_out=False), plain_validation=plain)
    fit(replace(parts, validation=flipped), limits(), state)
    assert [event.loss for event in recorder.of(ValidationEnd)] == [1.0, 0.9, 0.4, 0.3]
    assert (state.best_step, state.best_loss) == (6, 0.3)
    assert [notice.message for notice in recorder.of(Notice)] == [UNFAIR_SENTENCE]


@pytest.mark.parametrize("kind", ["schedulefree", "averaged"])
def test_an_averaging_optimizer_is_validated_and_kept_with_its_averaged_weights(kind: str):
    recorder, state = Recorder(), TrainState()
    parts = make_parts(recorder)
    if kind == "schedulefree":
        pytest.importorskip("schedulefree")
        optimizer = build_optimizer("schedulefree", parts.adapter.parameters(), lr=0.05)
    else:
        optimizer = Averaged(build_optimizer("adamw", parts.adapter.parameters(), lr=0.05))
    falling = iter([4.0, 3.0, 2.0, 1.0])
    parts = replace(
        parts,
        optimizer=optimizer,
        validation=type("P", (), {"pictures": lambda s, progress: [next(falling)], "drift": lambda s: 0.0})(),
    )
    fit(parts, limits(max_steps=6, validate_every=2), state)
    trained = parts.adapter.state()["layer.weight"]
    with optimizer.eval_mode():
        meant = parts.adapter.state()["layer.weight"]
    assert state.best_step == 6
    assert torch.equal(state.best_adapter["layer.weight"], meant)
    assert not torch.allclose(meant, trained, atol=1e-4)


def measured_run(losses: list[float | list[float]], **numbers):
    """An averaged EmoSens that begins at three times its step length; the validations say these losses.

    Each is that of one picture, or a list of several.
    """
    recorder, state, left = Recorder(), TrainState(), iter(losses)

    def pictures(said: float | list[float]) -> list[float]:
        return said if isinstance(said, list) else [said]

    parts = make_parts(recorder, stop_rule=StopRule(min_steps=1, gain=Gain()))
    optimizer = Averaged(EmoSens(parts.adapter.parameters(), lr=3.0))
    validation = type("P", (), {"pictures": lambda s, progress: pictures(next(left)), "drift": lambda s: 0.0})()
    parts = replace(parts, optimizer=optimizer, validation=validation)
    return recorder, state, parts, fit(parts, limits(**numbers), state)


def test_where_validations_stop_improving_the_best_weights_train_on_with_a_third_of_the_step_length():
    recorder, state, parts, _ = measured_run([1.0, 0.5, 0.6, 0.6], max_steps=6)  # validations at 0, 2, 4, 6
    assert torch.equal(parts.adapter.state()["layer.weight"], state.best_adapter["layer.weight"])
    assert state.best_step == 2
    assert [group["scope"] for group in parts.optimizer.param_groups] == [1.0]
    assert [(notice.level, notice.message) for notice in recorder.of(Notice)] == [
        (
            "info",
            "step length reduced to a third at step 6 (gain 1): 2 validations without improvement; training goes on"
            " from the weights of step 2",
        )
    ]
    with parts.optimizer.eval_mode():  # the average begins anew
        assert torch.equal(parts.adapter.state()["layer.weight"], state.best_adapter["layer.weight"])
    recorder, _, parts, _ = measured_run([1.0, 0.5, 0.6, 0.6, 0.4], max_steps=8)
    steps = recorder.of(StepEnd)
    assert [event.gain for event in steps] == [3.0] * 6 + [pytest.approx(1.0)] * 2
    assert steps[6].reading.pulse < 0.5 * steps[5].reading.pulse


def test_a_rise_goes_on_from_the_weights_of_now_and_is_taken_back_with_the_best_ones():
    losses = [[1.0 - 0.01 * place] * 3 for place in range(SURE + 1)]
    recorder, state, parts, _ = measured_run(losses, max_steps=2 * SURE)
    assert [group["scope"] for group in parts.optimizer.param_groups] == [9.0]
    assert parts.optimizer.steps == 2 * SURE  # the average goes on
    said = [notice.message for notice in recorder.of(Notice)]
    assert said == [
        "step length tripled at step 20 (gain 9): 10 validations in a row were each better by more than their standard"
        " error"
    ]
    recorder, state, parts, _ = measured_run([*losses, [0.95] * 3, [0.95] * 3], max_steps=2 * SURE + 4)
    assert [group["scope"] for group in parts.optimizer.param_groups] == [pytest.approx(3.0)]
    assert state.best_step == 2 * SURE
    assert torch.equal(parts.adapter.state()["layer.weight"], state.best_adapter["layer.weight"])
    assert recorder.of(Notice)[1].message == (
        "step length reduced to a third at step 24 (gain 3): 2 validations without improvement; training goes on from"
        " the weights of step 20"
    )
    assert [event.gain for event in recorder.of(StepEnd)][-5:] == [3.0, 9.0, 9.0, 9.0, 9.0]


def test_a_measured_run_ends_by_itself_and_says_why():
    recorder, state, _, outcome = measured_run([1.0, 0.5, *[0.6] * 6], max_steps=100)
    assert (outcome.reason, state.step, state.best_step) == (StopReason.SIGNAL, 14, 2)
    assert "2 step lengths in a row have brought less than 0.5% of what was gained" in outcome.sentence
    assert len(recorder.of(Notice)) == 2


def test_a_measured_run_that_is_not_finite_goes_on_from_its_best_weights_with_shorter_steps():
    recorder, state, left = Recorder(), TrainState(), iter([1.0, 0.5, math.nan, math.nan, 0.4, 0.3])
    parts = make_parts(recorder, stop_rule=StopRule(gain=Gain()))
    parts.family.poison = {4, 5, 6}  # step 3 and what would have been in its place
    validation = type("P", (), {"pictures": lambda s, progress: [next(left)], "drift": lambda s: 0.0})()
    parts = replace(parts, optimizer=EmoSens(parts.adapter.parameters(), lr=3.0), validation=validation)
    outcome = fit(parts, limits(max_steps=10), state)
    assert outcome.reason is StopReason.MAX_STEPS
    assert parts.stop_rule.gain.changes == [(3, pytest.approx(1.0)), (6, pytest.approx(1 / 3))]
    assert parts.optimizer.param_groups[0]["scope"] == pytest.approx(1 / 3)
    said = [notice.message for notice in recorder.of(Notice) if notice.level == "info"]
    assert "(gain 1): loss or gradient was not finite on 3 steps in a row" in said[0]
    assert "(gain 0.333): 2 validations without improvement" in said[1]


def with_gradients_up_to(parts: Parts, limit: float) -> None:
    """Float16's range, for a loss scale of which larger ones give gradients that are not finite."""
    adapter = parts.adapter

    def collect() -> None:
        if adapter.loss_scale > limit:
            adapter.layer.weight.grad.fill_(math.inf)

    def unscale() -> None:
        adapter.layer.weight.grad.div_(adapter.loss_scale)

    adapter.loss_scale, adapter.collect_gradients, adapter.unscale_gradients = 4096.0, collect, unscale


def test_gradients_too_large_for_float16_lower_the_loss_s_scale_and_a_resumed_run_keeps_it():
    recorder, state = Recorder(), TrainState()
    parts = make_parts(recorder)
    with_gradients_up_to(parts, 64.0)
    assert fit(parts, limits(max_steps=4), state).reason is StopReason.MAX_STEPS
    assert (state.step, state.guard.skipped, parts.adapter.loss_scale) == (4, 6, 64.0)
    assert [notice.message for notice in recorder.of(Notice) if "float16" in notice.message] == [
        f"gradients were too large for float16 on 3 steps in a row: the loss is scaled by {scale} from step 1 on"
        for scale in (512, 64)
    ]
    tensors, documents = capture(state, parts.adapter, parts.optimizer, parts.stop_rule, [])
    again = make_parts(recorder)
    with_gradients_up_to(again, 64.0)
    saved = json.loads(json.dumps(documents))
    resumed, _ = restore(tensors, saved, again.adapter, again.optimizer, again.stop_rule)
    fit(again, limits(max_steps=6), resumed)
    assert (resumed.step, resumed.guard.skipped, again.adapter.loss_scale) == (6, 6, 64.0)


def test_gradients_that_no_scale_of_the_loss_makes_finite_end_the_run():
    state = TrainState()
    parts = make_parts(Recorder())
    with_gradients_up_to(parts, 0.5)
    assert fit(parts, limits(), state).reason is StopReason.DIVERGED
    assert (state.loss_scale, state.guard.skipped) == (1.0, 3 * 5)


def test_a_measured_run_that_is_never_finite_ends():
    recorder, state = Recorder(), TrainState()
    parts = make_parts(recorder, stop_rule=StopRule(gain=Gain()))
    parts.family.poison = set(range(2, 100))
    parts = replace(parts, validation=type("P", (), {"pictures": lambda s, progress: [1.0], "drift": lambda s: 0.0})())
    outcome = fit(parts, limits(), state)
    assert outcome.reason is StopReason.DIVERGED
    assert parts.stop_rule.gain.value < 0.01
    assert state.guard.skipped == 3 * 7


def test_the_stop_rule_ends_the_run_after_sample_and_save():
    class Enough(StopRule):
        def decide(self, step: int) -> str | None:
            return "enough" if step == 4 else None

    recorder = Recorder()
    outcome = fit(make_parts(recorder, stop_rule=Enough()), limits(), TrainState())
    assert (outcome.reason, outcome.sentence) == (StopReason.SIGNAL, "enough")
    assert recorder.saves == [3, 4]
    assert recorder.samples == [0, 3, 4]


@pytest.mark.parametrize("said", [True, False])
def test_a_stop_signal_that_lights_up_is_one_event_each_time_and_no_warning(said: bool):
    class Blinking(EmoSens):
        def observe(self, loss):
            self.on = next(self.lit)
            return super().observe(loss)

        @property
        def should_stop(self):
            return self.on

    recorder = Recorder()
    parts = make_parts(recorder)
    Blinking.lit = iter([False, True, True, False, True, True])
    parts = replace(parts, optimizer=Blinking(parts.adapter.parameters()))
    fit(parts, limits(tell_ready=said), TrainState())
    told = [(event.level, event.message) for event in recorder.of(Notice)]
    lines = [("info", f"READY TO STOP: the optimizer's signal is lit at step {step}") for step in (2, 5)]
    assert told == (lines if said else [])


def test_uniforms_fill_the_scale_evenly_and_are_uniform_over_seeds():
    assert torch.equal(uniforms(3, 10, 5), uniforms(3, 0, 15)[10:])
    counts = torch.histc(uniforms(3, 0, 200), bins=10, min=0, max=1)
    assert counts.min() >= 19
    firsts = torch.cat([uniforms(seed, 7, 1) for seed in range(400)])
    assert 0.45 < float(firsts.mean()) < 0.55


def test_noise_depends_on_seed_and_micro_step_alone():
    latents = torch.zeros(2, 4, 4, 4)
    torch.manual_seed(1)
    one = noise_like(latents, 3, 8)
    torch.manual_seed(2)
    assert torch.equal(one, noise_like(latents, 3, 8))
    assert not torch.equal(one, noise_like(latents, 3, 9))


def test_without_samples_at_the_start_the_base_is_measured_and_not_drawn():
    recorder = Recorder()
    fit(make_parts(recorder), limits(sample_at_start=False), TrainState())
    assert 0 not in recorder.samples
    assert [event.step for event in recorder.of(ValidationEnd)][0] == 0
