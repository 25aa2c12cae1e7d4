"""Long runs with everything recorded, so that stop rules can be tried on them afterwards.

One cell is a task, a micro-batch size, a seed and an optimizer. The product's own loop trains without an end; every
`EVERY` steps 3 held-out pictures and 3 flipped training pictures are validated and the adapter is kept.
The true held-out loss of any kept step is measured when it is asked for. Cells lie in a work folder and are reused.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from heldout import Bench, base_of
from safetensors.torch import load_file, save_file

from emotrain.config.schema import Preset
from emotrain.dataset.cache import Cache
from emotrain.dataset.encode import prepare
from emotrain.dataset.scan import resolve_folder
from emotrain.pulse.stopping import StopRule
from emotrain.runs import build
from emotrain.runs.data import read_pictures
from emotrain.train import rng
from emotrain.train.events import Event, StepEnd
from emotrain.train.loop import Limits, Parts, fit
from emotrain.train.state import TrainState
from emotrain.train.validation import Validation

EVERY = 10
SIGNS = Path(__file__).parent / "signs"
TRUE_DRAWS = 4  # per held-out picture
NETWORKS: dict[str, dict[str, Any]] = {"lora": {"rank": 8, "alpha": 8.0}, "lokr": {"type": "lokr"}}
LONG = 3  # a run goes on for this many times the steps of its best


@dataclass(frozen=True)
class Task:
    """A base model, a style, and from how many pictures of it; `wrong` captions are passed round.

    `folders` are the training and the held-out pictures of a style that is not known here.
    """

    model: str
    style: str
    pictures: int
    wrong: int = 0
    folders: tuple[str, str] | None = None

    @classmethod
    def of_folders(cls, model: str, pictures: Path, held_out: Path) -> Task:
        """A style from outside: all its pictures but 3; named by the folder's last two names and what lies in it."""
        files = sorted(pictures.glob("*.png"))
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:6]
        name = "-".join([*pictures.resolve().parts[-2:], digest])
        return cls(model, name, len(files) - 3, folders=(str(pictures), str(held_out)))

    @property
    def name(self) -> str:
        """Such as tiny-sd-ink-32."""
        return f"{Path(self.model).name}-{self.style}-{self.pictures}" + ("-noisy" if self.wrong else "")

    def train_folder(self) -> Path:
        if self.folders:
            return Path(self.folders[0])
        return resolve_folder("builtin:example") if self.style == "ink" else SIGNS / "train"

    def heldout_folder(self) -> str:
        if self.folders:
            return self.folders[1]
        return "builtin:example-heldout" if self.style == "ink" else str(SIGNS / "heldout")

    def lay_out(self, work: Path) -> tuple[Path, Path]:
        """Copy the pictures: a folder to train on, and one of 3 others for the validation."""
        files = sorted(self.train_folder().glob("*.png"))
        order = np.random.default_rng(3).permutation(len(files))
        chosen = sorted(int(i) for i in order[: min(self.pictures, len(files) - 3)])
        rest = [int(i) for i in order if int(i) not in chosen][:3]
        train, validation = work / "train", work / "validation"
        for folder, places in ((train, chosen), (validation, rest)):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            captions = [files[i].with_suffix(".txt").read_text(encoding="utf-8") for i in places]
            if folder == train and self.wrong:
                step = len(places) // self.wrong
                swapped = [k * step for k in range(self.wrong)]
                moved = [captions[k] for k in [*swapped[1:], swapped[0]]]
                for k, text in zip(swapped, moved, strict=True):
                    captions[k] = text
            for i, text in zip(places, captions, strict=True):
                shutil.copy(files[i], folder)
                (folder / f"{files[i].stem}.txt").write_text(text, encoding="utf-8")
        return train, validation


@dataclass(frozen=True)
class Cell:
    """One run: what is trained and how."""

    task: Task
    micro_batch: int = 4
    seed: int = 0
    optimizer: str = "emosens"
    lr: float | None = None
    words: tuple[tuple[str, Any], ...] = ()  # of the optimizer
    baseline: str = "auto"
    ema: bool = True
    gain: str = "fixed"
    network: str = "lora"

    @property
    def name(self) -> str:
        """The folder of this cell."""
        rate = f"-{self.lr:g}" if self.lr else ""
        words = "".join(f"-{key}={value}" for key, value in self.words) + (
            "" if self.baseline == "auto" else f"-{self.baseline}"
        )
        words += ("-averaged" if self.ema else "") + ("" if self.gain == "fixed" else f"-gain={self.gain}")
        words += "" if self.network == "lora" else f"-{self.network}"
        return f"{self.place}-{self.optimizer}{rate}{words}"

    @property
    def place(self) -> str:
        """What is trained on, without how: such as tiny-sd-ink-32-mb4-seed0."""
        return f"{self.task.name}-mb{self.micro_batch}-seed{self.seed}"

    def preset(self, train: Path, validation: Path, every: int | str = EVERY) -> Preset:
        """The quickstart's choices, on this cell's pictures."""
        return Preset.model_validate(
            {
                "name": "cell",
                "model": {"base": base_of(self.task.model)},
                "dataset": {
                    "trigger": "inkmoji",
                    "resolution": (64,),
                    "buckets": {"step": 8, "min": 64, "max": 64},
                    "folders": ({"path": str(train)},),
                },
                "network": {"targets": "all", **NETWORKS[self.network]},
                "train": {
                    "micro_batch_size": self.micro_batch,
                    "seed": self.seed,
                    "lr": self.lr,
                    "optimizer": {"name": self.optimizer, **dict(self.words)},
                    "loss": {"baseline": self.baseline},
                    "ema": self.ema,
                    "gain": self.gain,
                },
                "validate": {"folder": str(validation), "every": every, "probe_images": 3},
                "stop": {"mode": "off"},
            }
        )


@dataclass
class Record:
    """What a long run left behind; `true` values are filled in as they are asked for."""

    steps: int = 0
    losses: list[float] = field(default_factory=list)
    observed_loss: list[float] = field(default_factory=list)
    ready: list[bool] = field(default_factory=list)
    pulse: list[float] = field(default_factory=list)
    held: dict[str, float] = field(default_factory=dict)  # validation on held-out pictures, by step
    flipped: dict[str, float] = field(default_factory=dict)  # validation on flipped training pictures
    plain: dict[str, float] = field(default_factory=dict)  # validation on the same as they are, where it was asked for
    true: dict[str, float] = field(default_factory=dict)  # held-out loss, right captions
    wrong: dict[str, float] = field(default_factory=dict)  # the same with wrong captions
    drift: dict[str, float] = field(default_factory=dict)  # change of predictions without the trigger
    step_s: list[float] = field(default_factory=list)


class BothValidations:
    """Looks like a validation to the loop; takes two and keeps the adapter."""

    def __init__(
        self, held: Validation, flipped: Validation, record: Record, state: TrainState, keep: Callable[[int], None]
    ):
        self.held, self.flipped, self.record, self.state, self.keep = held, flipped, record, state, keep

    def pictures(self, progress: object = None) -> list[float]:
        step, held = str(self.state.step), self.held.pictures()
        self.record.held[step], self.record.flipped[step] = fmean(held), fmean(self.flipped.pictures())
        self.keep(self.state.step)
        return held

    def drift(self) -> float:
        return 0.0


class LongRun:
    """A cell on disk: trained as far as asked, measured where asked."""

    def __init__(self, cell: Cell, work: Path) -> None:
        self.cell, self.folder = cell, work / cell.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.record = Record()
        self.file = self.folder / "record.json"
        if self.file.exists():
            self.record = Record(**json.loads(self.file.read_text(encoding="utf-8")))
        self.bench: Bench | None = None
        self.plain_validation: Validation | None = None  # once built

    def save(self) -> None:
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self.record)), encoding="utf-8")
        temporary.replace(self.file)

    # ------------------------------------------------------------ training

    def train(self, first: int, ceiling: int) -> None:
        """Train `first` steps, then on until LONG times the best step is reached, at most to the ceiling.

        A cell that was ended half-way begins anew; one that is there is left alone.
        """
        if self.record.steps:
            return
        self._build()
        limit = first
        while True:
            self._fit(limit)
            if limit >= ceiling or limit >= LONG * self.best():
                break
            limit = min(max(limit + 100, LONG * self.best()), ceiling)
        self.record.steps = limit
        self.save()

    def _build(self) -> None:
        cell = self.cell
        preset = cell.preset(*cell.task.lay_out(self.folder))
        self.preset = preset
        rng.seed_all(cell.seed)
        settings = build.loader_settings(preset, build.sniffed(preset))
        pictures = read_pictures(preset)
        self.model = build.load_model(preset, lambda event: None)
        also_flipped = build.flipped_ids(preset, pictures)
        family = self.model.family
        whole = prepare(family, pictures.all, settings, Cache(), lambda *words: None, also_flipped=also_flipped)
        empty = family.encode_texts([""])
        held = whole.fixed([example.id for example in pictures.held_out])
        self.data = whole.without([example.id for example in pictures.held_out])
        self.optimizer = build.build_optimizer_of(preset, self.model.adapter.parameters())
        self.loss_baseline = build.build_loss_baseline(preset, self.model, self.data, lambda event: None)
        self.state = TrainState()

        def validation(batches: list[Any]) -> Validation:
            return Validation(family, self.model.objective, self.model.adapter, batches, empty, draws=4, seed=cell.seed)

        self.plain_validation = validation(whole.fixed(also_flipped))
        self.validation = BothValidations(
            validation(held), validation(whole.fixed(also_flipped, flip=True)), self.record, self.state, self._keep
        )

    def _keep(self, step: int) -> None:
        save_file(self.model.adapter.state(), self.folder / f"{step:05d}.safetensors")

    def _hear(self, event: Event) -> None:
        if isinstance(event, StepEnd):
            self.record.losses.append(event.loss)
            self.record.observed_loss.append(event.observed_loss)
            self.record.ready.append(event.ready)
            self.record.pulse.append(event.reading.pulse)
            self.record.step_s.append(event.step_s)

    def _fit(self, limit: int) -> None:
        parts = Parts(
            family=self.model.family,
            objective=self.model.objective,
            adapter=self.model.adapter,
            optimizer=self.optimizer,
            data=self.data,
            stop_rule=StopRule("off"),
            loss_baseline=self.loss_baseline,
            validation=self.validation,  # type: ignore[arg-type]
            notify=self._hear,
            save=lambda state: None,
            sample=lambda step: None,
            interrupted=lambda: False,
        )
        limits = Limits(limit, 1, 1.0, self.cell.seed, EVERY, 10**9, 0)
        fit(parts, limits, self.state)

    # ------------------------------------------------------------ measured when asked for

    def plain(self, step: int) -> float:
        """Validation loss of the flipped pictures as they are, with the adapter kept at a step."""
        if str(step) not in self.record.plain:
            if self.plain_validation is None:
                self._build()
            assert self.plain_validation is not None
            self.model.adapter.load_state(load_file(self.folder / f"{step:05d}.safetensors"))
            self.record.plain[str(step)] = fmean(self.plain_validation.pictures())
            self.save()
        return self.record.plain[str(step)]

    def true(self, step: int) -> float:
        """Held-out loss of the adapter kept at a step (a multiple of EVERY), mean of all pictures and draws."""
        if str(step) not in self.record.true:
            self._put_on(step)
            assert self.bench is not None
            self.record.true[str(step)] = float(self.bench.losses(draws=TRUE_DRAWS).mean())
            if self.record.steps:
                self.save()
        return self.record.true[str(step)]

    def controls(self, step: int) -> tuple[float, float]:
        """(held-out loss with wrong captions, drift of predictions for captions without the trigger)."""
        if str(step) not in self.record.wrong:
            self._put_on(step)
            assert self.bench is not None
            self.record.wrong[str(step)] = float(self.bench.losses(shift=7, draws=TRUE_DRAWS).mean())
            self.record.drift[str(step)] = self.bench.drift()
            self.save()
        return self.record.wrong[str(step)], self.record.drift[str(step)]

    def _put_on(self, step: int) -> None:
        """The adapter of a step on a bench's own copy of the model."""
        state = load_file(self.folder / f"{step:05d}.safetensors")
        if self.bench is None:
            self.bench = Bench(self.cell.task.model, self.cell.task.heldout_folder())
            self.bench.wear(state)
        self.bench.adapter.load_state(state)

    def kept(self, last: int | None = None) -> list[int]:
        """The steps whose adapter was kept, in order; up to `last`."""
        return sorted(int(step) for step in self.record.held if last is None or int(step) <= last)

    def best(self, last: int | None = None) -> int:
        """The step with the lowest held-out loss: on a coarse grid first, then around its lowest point."""
        kept = self.kept(last)
        coarse = sorted({kept[round(i * (len(kept) - 1) / 12)] for i in range(13)})
        around = coarse
        for _ in range(4):
            lowest = min(around, key=self.true)
            known = sorted(step for step in kept if str(step) in self.record.true)
            place = known.index(lowest)
            left = [step for step in kept if (known[place - 1] if place else lowest) < step < lowest]
            right = [step for step in kept if lowest < step < (known[place + 1] if place + 1 < len(known) else lowest)]
            new = [side[len(side) // 2] for side in (left, right) if side]
            if not new:
                break
            around = [*around, *new]
        measured = [step for step in kept if str(step) in self.record.true]
        return min(measured, key=lambda step: self.record.true[str(step)])
