"""From a preset to the parts of a run: the one place that knows both."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from emotrain.batch import Batch, send
from emotrain.config.builtin import is_builtin
from emotrain.config.prompts import parse_prompt
from emotrain.config.schema import EMO_OPTIMIZERS, Preset
from emotrain.dataset.cache import Cache
from emotrain.dataset.captions import fill_trigger
from emotrain.dataset.encode import prepare
from emotrain.dataset.loader import CachedDataset
from emotrain.dataset.settings import LoaderSettings, settings_from
from emotrain.diffusion import Objective, build_objective
from emotrain.errors import ConfigError
from emotrain.families.blocks import can_compile, compile_blocks
from emotrain.families.common import LoadedFamily, config_values, digest_module
from emotrain.families.kept import KeptBase
from emotrain.families.loading import load_family
from emotrain.families.memory import MemoryPlan
from emotrain.families.quantize import RoundedLinear
from emotrain.families.table import FAMILIES, Sniffed, sniff
from emotrain.lora.adapter import Adapter, hidden_off
from emotrain.lora.file import LoraFile
from emotrain.optim.averaged import Averaged
from emotrain.optim.protocol import OptimizerLike
from emotrain.optim.registry import build_optimizer
from emotrain.pulse import gain
from emotrain.pulse.stopping import MIN_STEPS, StopRule
from emotrain.ranks import ALONE, Ranks
from emotrain.runs import parents
from emotrain.runs.adapters import build_adapter
from emotrain.runs.data import Pictures, evenly
from emotrain.runs.draw import Sampler
from emotrain.runs.encoding import Encoders
from emotrain.runs.sample_base import SampleBase
from emotrain.train.events import Event, Notice, Phase
from emotrain.train.graphs import Graphs
from emotrain.train.losses import LossBaseline, expected_by_bins, noise_like, sample_losses, timesteps_at, uniforms
from emotrain.train.preservation import Preservation
from emotrain.train.validation import Validation

Notify = Callable[[Event], None]
VALIDATION_DRAWS = 4
VALIDATION_SHARE = 0.05
VALIDATION_SHARE_TINY = 0.10  # of a built-in model, whose runs are so short that a twentieth is too seldom
GAIN_SHARE = 2  # times as much where validations set the step length: it then falls sooner, and the run is shorter
BASELINE_SAMPLES = {"auto": 32, "corrected": 64}


@dataclass(frozen=True)
class Model:
    """A loaded family with its new LoRA, the objective and what the LoRA builds on."""

    family: LoadedFamily
    objective: Objective
    adapter: Adapter
    base_digest: str
    parents: tuple[dict[str, Any], ...]


def sniffed(preset: Preset, *, by_size: bool = False) -> Sniffed:
    """What the base model is, from its files alone; `by_size` as in `sniff`."""
    model = preset.model
    return sniff(model.base, model.family, model.revision, model.prediction, by_size=by_size)


def loader_settings(preset: Preset, found: Sniffed) -> LoaderSettings:
    """Sizes, captions and batches; what the preset leaves open comes from the model."""
    settings = settings_from(
        preset.dataset,
        resolution=found.resolution,
        step=found.bucket_step,
        micro_batch_size=preset.train.micro_batch_size,
        seed=preset.train.seed,
        encode_texts=not preset.network.text_encoder or has_frozen_encoder(found.family),
    )
    return replace(settings, shard=None)  # `read_pictures` has taken the shard


def has_frozen_encoder(family: str) -> bool:
    """Whether a family has a text encoder that is never trained (a T5): its embeddings are always cached."""
    info = FAMILIES[family]
    return len(info.text_encoders) > len(info.trainable_encoders)


def load_model(
    preset: Preset,
    notify: Notify,
    earlier: LoraFile | None = None,
    plan: MemoryPlan | None = None,
    kept: KeptBase | None = None,
) -> Model:
    """Load the base, apply the stack, add the new LoRA (or the one that is continued); `plan` says how to fit."""
    notify(Phase("loading the model"))
    model = preset.model
    family = load_family(
        model.base,
        family=model.family,
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        revision=model.revision,
        dtype=model.dtype,
        quantize=model.quantize,
        quantize_text_encoders=model.quantize_text_encoders,
        plan=plan,
        prediction=model.prediction,
        clip_skip=model.clip_skip,
        gradient_checkpointing=preset.train.gradient_checkpointing,
        kept=kept,
    )
    if kept is not None and kept.reused:
        notify(Notice("the model is that of the run before: nothing of it is loaded again", level="info"))
    if (line := as_stored(family)) is not None:
        notify(Notice(line, level="info"))
    base_digest = digest_module(family.denoiser, config_values(family.denoiser.config))
    objective, adapter, ancestors = equip(preset, family, earlier)
    notify(Phase("loading the model", 1, 1))
    return Model(family, objective, adapter, base_digest, ancestors)


def as_stored(family: LoadedFamily) -> str | None:
    """Which of the base's layers stay as its file stores them, in one line; None where none do."""
    if family.memory is not None and family.memory.quantize != "none":
        return None
    kinds = Counter(layer.weight.dtype for layer in family.denoiser.modules() if isinstance(layer, RoundedLinear))
    if not kinds:
        return None
    forms = " and ".join(f"{count} in {str(kind).removeprefix('torch.')}" for kind, count in kinds.items())
    return f"large layers of the base stay as its file stores them, {forms}: half the memory of bf16"


def equip(
    preset: Preset, family: LoadedFamily, earlier: LoraFile | None
) -> tuple[Objective, Adapter, tuple[dict[str, Any], ...]]:
    """What is trained for, the stack under the new LoRA, and that LoRA (or the one that is continued).

    Returns:
        The objective, the LoRA, and the records of the earlier ones.

    Raises:
        ConfigError: losses, targets or ranks that this model does not take.
        ModelError: an earlier LoRA that does not fit, or a scheduler that cannot be trained with.
    """
    loss = preset.train.loss
    try:
        objective = build_objective(
            family.prediction,
            family.scheduler_config,
            timesteps=loss.timesteps,
            shift=loss.shift,
            min_snr_gamma=loss.min_snr_gamma,
            noise_offset=loss.noise_offset,
        )
    except ValueError as error:
        raise ConfigError(f"train.loss: {error}") from error
    ancestors: list[dict[str, Any]] = []
    if preset.start_from.stack:
        ancestors += parents.apply_stack(preset, family)
    if earlier is not None:
        parents.refuse_misfit(earlier, family)
        path = preset.start_from.continue_ or ""
        ancestors.append({"kind": "continue", **parents.name_of(path), "sha256": earlier.sha256, "weight": 1.0})
    return objective, build_adapter(preset, family, earlier), tuple(ancestors)


@dataclass(frozen=True)
class Data:
    """What is trained on, the validation's batches, the same not flipped, and the embeddings of the empty caption."""

    train: CachedDataset
    validation: list[Batch]
    plain: list[Batch]
    empty_text: dict[str, torch.Tensor]


def prepare_data(preset: Preset, model: Model, pictures: Pictures, settings: LoaderSettings, notify: Notify) -> Data:
    """Encode pictures and captions, from the cache where they are there already.

    The validation looks at the held-out pictures, or at flipped training pictures where none are held out.
    """
    flipped = [] if pictures.held_out else flipped_ids(preset, pictures)
    cache = Cache(warn=lambda line: notify(Notice(line)))
    with model.adapter.off():  # what is cached belongs to the base (and the stack), not to a trained text encoder
        # what a batch gives depends on its neighbours, by rounding
        at_once = 1 if preset.train.deterministic is True else model.family.pictures_at_once
        whole = prepare(
            Encoders(model.family, at_once, notify),
            pictures.all,
            settings,
            cache,
            lambda name, done, total: notify(Phase(f"encoding {name}", done, total)),
            also_flipped=flipped,
        )
        empty = model.family.encode_texts([""]) if settings.encode_texts else {}
    held = [example.id for example in pictures.held_out]
    batches = whole.fixed(held) if held else whole.fixed(flipped, flip=True)
    train = whole.without(held) if held else whole
    return Data(train, batches, [] if held else whole.fixed(flipped), empty)


def flipped_ids(preset: Preset, pictures: Pictures) -> list[str]:
    """Training pictures for the validation, evenly spread over the data set."""
    return list(dict.fromkeys(example.id for example in evenly(pictures.own, preset.validate_.probe_images)))


def build_sampler(
    preset: Preset, found: Sniffed, model: Model, size: int, notify: Notify, base: SampleBase | None = None
) -> Sampler | None:
    """The sampler of a run, or None where `sample.every` is 0; its prompts are encoded here.

    Args:
        preset: of the run.
        found: the model that draws.
        model: the one that is trained.
        size: the side of a sample in pixels where the preset says none.
        notify: told what is going on.
        base: where another model draws, that one.
    """
    sample, family = preset.sample, base.family if base else model.family
    if not sample.every or not sample.prompts:
        return None
    prompts = [parse_prompt(fill_trigger(prompt, preset.dataset.trigger)) for prompt in sample.prompts]
    step = family.vae_scale * 2
    side = (sample.size or size) // step * step
    with hidden_off(*(part.encoder for part in family.text_encoders)):
        return Sampler(
            family,
            prompts,
            size=(side, side),
            seed=sample.seed,
            steps=found.steps_of_sample(sample.steps),
            guidance=found.sample_guidance if sample.guidance == "auto" else sample.guidance,
            notify=notify,
            name=found.name,
            drawing=base.drawing if base else nullcontext,
        )


def measures_gain(preset: Preset, *, held_out: bool) -> bool:
    """Whether the run measures how long its steps may be, in place of the published unit.

    Not by flipped training pictures: they go on gaining a little while they are memorised, so that each shorter step
    brings a new best and the run goes on for too long (docs/benchmarks/gain_trials.md, "flipped").
    """
    if not held_out:
        return False
    optimizer = preset.train.optimizer
    return preset.train.gain == "auto" and optimizer.name == "emosens" and optimizer.generation != "3.7.0"


def build_optimizer_of(preset: Preset, params: list[torch.nn.Parameter], *, held_out: bool = True) -> OptimizerLike:
    """The optimizer with the settings of the preset, averaged unless it averages already."""
    settings = preset.train.optimizer
    kwargs = {k: v for k, v in settings.model_dump().items() if k != "name" and v is not None}
    if settings.name in EMO_OPTIMIZERS:
        kwargs["notify"] = False  # the loop says it, as an event
    lr = preset.train.lr
    if measures_gain(preset, held_out=held_out):
        lr = (lr or 1.0) * gain.START
    optimizer = build_optimizer(settings.name, params, lr=lr, **kwargs)
    return Averaged(optimizer) if preset.train.ema and settings.name != "schedulefree" else optimizer


def build_graphs(preset: Preset, family: LoadedFamily, adapter: Adapter, notify: Notify) -> Graphs | None:
    """What records the passes of a step, where the preset asks for it and it can be had; says why not."""
    if not preset.train.cuda_graphs:
        return None
    memory = family.memory
    whys = {
        f"this run is on the {family.device.type}": family.device.type != "cuda",
        "text encoders are trained": bool(family.trained_encoders),
        "blocks wait in the computer's memory": memory is not None and memory.offload,
        "the LoRA has layers without half-precision passes of their own": not adapter.half_gradients,
    }
    for why, holds in whys.items():
        if holds:
            notify(Notice(f"steps are not recorded as CUDA graphs: {why}", level="info"))
            return None
    return Graphs(family.device, lambda: adapter.half_gradients, lambda line: notify(Notice(line)))


def compile_model(preset: Preset, family: LoadedFamily, notify: Notify) -> None:
    """Let the denoiser's blocks be compiled, where the preset asks for it and it can be had; says so, or why not."""
    if preset.train.compile is not True:  # auto: no GPU has shown yet that it pays (docs/benchmarks/gpu.md)
        return
    memory = family.memory
    exact = preset.train.deterministic is True
    whys = {
        "train.deterministic is true, and what is compiled depends on the sizes that come first": exact,
        "its blocks wait in the computer's memory": memory is not None and memory.offload,
        f"torch {torch.__version__} is too old for it": not can_compile(),
    }
    for why, holds in whys.items():
        if holds:
            notify(Notice(f"the model is not compiled: {why}", level="info"))
            return
    notify(Notice("the model's blocks are compiled: the first steps take minutes longer", level="info"))
    compile_blocks(family.denoiser, FAMILIES[family.name].blocks, lambda line: notify(Notice(line)))


def build_stop_rule(preset: Preset, *, held_out: bool) -> StopRule:
    """The stop rule; the published signals exist for emo optimizers alone."""
    mode = preset.stop.mode
    if mode == "signal" and preset.train.optimizer.name not in EMO_OPTIMIZERS:
        raise ConfigError(
            f"stop.mode is `signal`, but `{preset.train.optimizer.name}` has no stop signal",
            "use `trusted`, which looks at the held-out loss",
        )
    least = MIN_STEPS if preset.stop.min_steps == "auto" else preset.stop.min_steps
    measured = gain.Gain() if measures_gain(preset, held_out=held_out) else None
    return StopRule(mode, least, held_out, measured)


def validate_every(preset: Preset, held_out: int, micro_batches: int | None = None) -> int:
    """Steps between two validations: the preset's, or so many that validations take VALIDATION_SHARE of the run.

    Counted in forward passes: a step is about 2.5 of them per sample (forward, and backward to frozen weights' inputs),
    a validation VALIDATION_DRAWS per picture (flipped ones twice) and one for the drift. With a built-in model what a
    step does besides takes as long as 1.2 samples (tests/bench/validation_cost.py). Several processes share both.
    """
    every = preset.validate_.every
    if every != "auto":
        return every
    micro_batches = micro_batches or preset.train.gradient_accumulation_steps
    pictures = held_out or preset.validate_.probe_images
    tiny = is_builtin(preset.model.base)
    samples = preset.train.micro_batch_size * micro_batches + (1.2 if tiny else 0.0)
    draws = VALIDATION_DRAWS if held_out else 2 * VALIDATION_DRAWS  # flipped, and as they are
    share = VALIDATION_SHARE_TINY if tiny else VALIDATION_SHARE
    if measures_gain(preset, held_out=held_out > 0):
        share *= GAIN_SHARE
    wanted = pictures * (draws + 1) / (share * 2.5 * samples)
    return max(10, math.ceil(wanted / 10) * 10)


def build_validation(preset: Preset, model: Model, data: Data, ranks: Ranks, batches: list[Batch]) -> Validation:
    """A validation of a run on these pictures."""
    return Validation(
        model.family,
        model.objective,
        model.adapter,
        batches,
        data.empty_text,
        draws=VALIDATION_DRAWS,
        seed=preset.train.seed,
        ranks=ranks,
    )


def build_preservation(preset: Preset, model: Model, data: Data) -> Preservation | None:
    """What keeps `dataset.class` as it was, where the preset names one."""
    wanted = preset.dataset.class_ is not None
    return Preservation(model.family, model.adapter, data.train.class_texts) if wanted else None


@torch.no_grad()
def build_loss_baseline(
    preset: Preset, model: Model, data: CachedDataset, notify: Notify, ranks: Ranks = ALONE
) -> LossBaseline:
    """The loss baseline of a new run: it measures the untrained model first, unless it is to begin at the first loss.

    That is the base; where the LoRA goes on from another run's, with that one: the optimizer uses what is gained here.
    """
    kind = preset.train.loss.baseline
    if kind == "raw":
        return LossBaseline()
    doing, wanted, seed = "measuring the base model's loss", BASELINE_SAMPLES[kind], preset.train.seed + 1
    found: dict[int, list[tuple[float, float]]] = {}  # by micro-step: place on the noise scale and loss of each sample
    micro_step = seen = 0
    while seen < wanted:
        notify(Phase(doing, seen, wanted))
        count = len(data.labels(micro_step).ids)
        if ranks.has(micro_step):
            batch = data.batch(micro_step)
            u = uniforms(seed, seen, count)
            timesteps = timesteps_at(model.family, model.objective, u, batch.latents)
            noise = noise_like(batch.latents, seed, micro_step)
            each = sample_losses(model.family, model.objective, batch, noise, timesteps)
            weighted = each * send([batch.weights], each.device)[0]
            places = model.objective.position(timesteps).tolist()
            found[micro_step] = list(zip(places, weighted.tolist(), strict=True))
        seen += count
        micro_step += 1
    every = sorted((int(step), rows) for some in ranks.meet(found) for step, rows in some.items())
    pairs = [(place, loss) for _, rows in every for place, loss in rows]
    notify(Phase(doing, wanted, wanted))
    pairs = [(place, loss) for place, loss in pairs if math.isfinite(loss)]
    if not pairs:
        notify(Notice("no loss of the model as it is was finite: the emotion begins at the first loss"))
        return LossBaseline()
    places, losses = [place for place, _ in pairs], [loss for _, loss in pairs]
    baseline = LossBaseline(expected_by_bins(places, losses) if kind == "corrected" else [])
    baseline.start = baseline.observe(places, losses)
    return baseline
