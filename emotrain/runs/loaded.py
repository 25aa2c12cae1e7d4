"""The first stage of a run: everything up to the first step that needs no run folder; bad input is refused here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from emotrain.config.schema import Preset
from emotrain.dataset.settings import LoaderSettings
from emotrain.dataset.split import example_digests, fingerprint
from emotrain.families.common import config_values
from emotrain.families.kept import KeptBase
from emotrain.families.memory import GIB, MemoryPlan
from emotrain.families.ram import ram
from emotrain.families.table import Sniffed
from emotrain.lora.file import LoraFile, read_lora
from emotrain.optim.protocol import OptimizerLike
from emotrain.pulse.stopping import StopRule
from emotrain.ranks import ALONE, Ranks
from emotrain.runs import adapters, build, changes, parents, sample_base
from emotrain.runs.data import Pictures, read_pictures
from emotrain.runs.draw import Sampler
from emotrain.runs.folder import library_versions
from emotrain.runs.likeness import Likeness, build_likeness
from emotrain.runs.plan import plan_run
from emotrain.runs.plan_ram import RamPlan, room
from emotrain.train import rng
from emotrain.train.checkpoint import Checkpoint
from emotrain.train.events import Event, Notice
from emotrain.train.state import TrainState, restore


@dataclass(frozen=True)
class Asked:
    """What a run is put together from; `plan` says how to fit."""

    preset: Preset
    found: Sniffed
    pictures: Pictures
    settings: LoaderSettings
    earlier: LoraFile | None
    other: sample_base.Other | None
    plan: MemoryPlan | None


@dataclass(frozen=True)
class Loaded:
    """All that a run trains with. The adapter, the optimizer and the stop rule change while it trains.

    `size` is the side of a sample in pixels where the preset says none.
    """

    preset: Preset
    found: Sniffed
    pictures: Pictures
    model: build.Model
    data: build.Data
    size: int
    sampler: Sampler | None
    sample_base: sample_base.SampleBase | None
    optimizer: OptimizerLike
    stop_rule: StopRule
    dataset_digest: str
    ranks: Ranks = ALONE
    likeness: Likeness | None = None

    def facts(self) -> dict[str, Any]:
        """What run.json says of the beginning."""
        return {
            "seed": self.preset.train.seed,
            "device": str(self.model.family.device),
            "memory": self.model.family.memory.means() if self.model.family.memory else None,
            "base_sha256": self.model.base_digest,
            "dataset_sha256": self.dataset_digest,
            "parents": self.model.parents,
            "family": self.found.family,
            "sample_base": None if self.sample_base is None else self.sample_base.record(),
            "held_out": [example.id for example in self.pictures.held_out],
            **({"ranks": self.ranks.world, "launch": list(self.ranks.launch)} if self.ranks.world > 1 else {}),
        }

    @cached_property
    def identity(self) -> changes.Identity:
        """What a resumed run must agree with; it cannot change while this process trains."""
        family = self.model.family
        scheduler = json.dumps(config_values(family.scheduler.config), sort_keys=True, default=str)
        inputs = {
            "the VAE": family.vae_identity(as_encoded=False),
            "the text encoders or tokenizers": family.text_identity(as_encoded=False),
            "the model's scheduler": hashlib.sha256(scheduler.encode()).hexdigest(),
        }
        for number, parent in enumerate(self.model.parents, 1):
            inputs[f"earlier LoRA {number} ({parent['kind']} {parent['file']})"] = parent["sha256"]
        digests = example_digests(self.pictures.all)
        return changes.Identity(self.preset.to_dict(), self.model.base_digest, digests, inputs)


@dataclass(frozen=True)
class Beginning:
    """Where training begins: at step 0, or where a checkpoint was taken, with its expected losses of the baseline."""

    state: TrainState
    expected: tuple[float, ...] = ()
    checkpoint: Checkpoint | None = None


def load(
    preset: Preset,
    notify: Callable[[Event], None],
    known: Mapping[str, str] | None = None,
    ranks: Ranks = ALONE,
    kept: KeptBase | None = None,
) -> Loaded:
    """Model, pictures, sampler, optimizer and stop rule of a preset; `known` as in `read_pictures`.

    `kept` is the base of a queue's run before.

    Raises:
        EmotrainError: with the exit code that belongs to it.
    """
    rng.deterministic_kernels(preset.train.deterministic is True)
    rng.seed_all(preset.train.seed)
    for line in changes.libraries_apart(ranks.meet(library_versions())):
        notify(Notice(line))
    found = build.sniffed(preset)
    settings = build.loader_settings(preset, found)
    pictures = read_the_same(preset, known, ranks)
    path = preset.start_from.continue_
    earlier = read_lora(parents.lora_of(path)) if path else None
    if earlier is not None:
        words = f"the LoRA that is continued sets the network: {parents.continued(earlier)}"
        notify(Notice(words, level="info"))
    other = sample_base.look(preset, found)
    plan, ram_plan = plan_run(preset, found, pictures, settings, ranks, other)
    if plan is not None:
        notify(Notice(plan.sentence, level="info"))
    alone = one_after_another(ram_plan, notify, ranks, kept)
    asked = Asked(preset, found, pictures, settings, earlier, other, plan)
    work = partial(place, asked, notify, kept, ranks.first, ALONE.in_turn if alone else ranks.in_turn)
    model, data, sampler, base = ranks.one_by_one(work) if alone else work()
    build.compile_model(preset, model.family, notify)
    optimizer = build.build_optimizer_of(preset, model.adapter.parameters(), held_out=bool(pictures.held_out))
    stop_rule = build.build_stop_rule(preset, held_out=bool(pictures.held_out))
    digest = fingerprint(pictures.all)
    likeness = build_likeness(preset, pictures, notify) if ranks.first else None
    loaded = Loaded(
        preset, found, pictures, model, data, settings.rules.resolutions[0], sampler, base, optimizer, stop_rule,
        digest, ranks, likeness,
    )  # fmt: skip
    if ranks.world > 1:
        identities = ranks.meet(loaded.identity.to_document())
        if ranks.first:
            changes.refuse_apart(identities)
    return loaded


def place(
    asked: Asked,
    notify: Callable[[Event], None],
    kept: KeptBase | None,
    leads: bool,
    share: Callable[[Callable[[], build.Data]], build.Data],
) -> tuple[build.Model, build.Data, Sampler | None, sample_base.SampleBase | None]:
    """Load the model, encode with it and bring it to its device, after which little of it is in the computer's memory.

    Args:
        asked: what is wanted.
        notify: told what is going on.
        kept: the base of a queue's run before.
        leads: whether this process draws.
        share: calls what encodes the data set, so that processes do not do it twice.
    """
    preset, earlier, other = asked.preset, asked.earlier, asked.other
    model = build.load_model(preset, notify, earlier, asked.plan, kept)
    counts = model.adapter.num_modules_by_part()
    if earlier is None:
        adapters.check_modules(asked.found, preset.network.targets, counts[model.adapter.part])
        if preset.network.text_encoder:
            adapters.check_text_modules(asked.found, counts)
    data = share(partial(build.prepare_data, preset, model, asked.pictures, asked.settings, notify))
    base = None
    if other is not None and leads:
        base = sample_base.load_base(preset, other, model.family, model.adapter, earlier, notify)
    drawn, size = other.found if other else asked.found, asked.settings.rules.resolutions[0]
    sampler = build.build_sampler(preset, drawn, model, size, notify, base) if leads else None
    model.family.free_encoders()  # all is encoded: the denoiser takes their place
    if base is not None:
        base.place()
    model.family.place_denoiser()
    model.adapter.use_half_precision(model.family.dtype)
    return model, data, sampler, base


def one_after_another(plan: RamPlan, notify: Callable[[Event], None], ranks: Ranks, kept: KeptBase | None) -> bool:
    """Whether the processes load their model so, since the computer's memory does not hold it for all at once.

    Raises:
        ResourceError: it does not hold what the run needs.
    """
    alone, tight = room(plan, ram(), ranks.local_world, kept=kept.nbytes if kept is not None else 0)
    if kept is not None:
        kept.copied, kept.beside = round(plan.copied * GIB), round(plan.beside * GIB)
    alone = any(ranks.meet(alone))
    if tight is not None:
        notify(Notice(tight))
    if alone:
        words = "the computer's memory does not hold the model once for each process: they load it one after another"
        notify(Notice(words, level="info"))
    return alone


def read_the_same(preset: Preset, known: Mapping[str, str] | None, ranks: Ranks) -> Pictures:
    """The pictures, under the same ids in every process: on another machine their folder may have another name."""
    if ranks.world == 1:
        return read_pictures(preset, known)
    pictures = read_pictures(preset, known) if ranks.first else None
    first = ranks.told(None if pictures is None else example_digests(pictures.all))
    return pictures or read_pictures(preset, first)


def go_back(loaded: Loaded, checkpoint: Checkpoint, before: changes.Identity) -> Beginning:
    """Bring adapter, optimizer and stop rule back to where a checkpoint was taken.

    A learning rate that was changed on purpose counts, though a checkpoint brings its own back.

    Raises:
        CheckpointError: something is missing or belongs to another run.
    """
    state, expected = restore(
        checkpoint.tensors, checkpoint.documents, loaded.model.adapter, loaded.optimizer, loaded.stop_rule
    )
    state.resumes += 1
    accumulation = loaded.preset.train.gradient_accumulation_steps
    if not state.micro_batches or before.preset["train"]["gradient_accumulation_steps"] != accumulation:
        state.micro_batches = accumulation * loaded.ranks.world
    rate = loaded.preset.train.lr
    if rate is not None and dict(changes.flat(before.preset)).get("train.lr") != rate:
        gain = loaded.stop_rule.gain.value if loaded.stop_rule.gain else 1.0
        for group in loaded.optimizer.param_groups:
            group["scope" if "scope" in group else "lr"] = rate * gain
    return Beginning(state, tuple(expected), checkpoint)
