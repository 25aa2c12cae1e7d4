"""Everything that changes while the loop runs, as tensors and JSON for a checkpoint, and back.

`TrainState` holds what is not a tensor of the adapter, the optimizer or a random generator: a new variable of the loop
belongs there, or a resumed run would not equal an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from emotrain.errors import CheckpointError
from emotrain.train import rng
from emotrain.train.suspects import Suspects

if TYPE_CHECKING:
    from emotrain.lora.adapter import Adapter
    from emotrain.optim.protocol import OptimizerLike
    from emotrain.pulse.stopping import StopRule


LIMIT = 3  # steps in a row that are not finite end the run


@dataclass(frozen=True)
class Guard:
    """How many steps were left out because their loss or gradient norm was not finite.

    Ask it before `optimizer.observe`: `guard = guard.update(loss, grad_norm)`; with `leave_out` the
    step must be left out (gradients zeroed, no observe, no optimizer step).
    """

    in_a_row: int = 0
    skipped: int = 0

    def update(self, loss: float, grad_norm: float) -> Guard:
        """The guard after one step with this loss and gradient norm (before clipping)."""
        if isfinite(loss) and isfinite(grad_norm):
            return replace(self, in_a_row=0)
        return replace(self, in_a_row=self.in_a_row + 1, skipped=self.skipped + 1)

    @property
    def leave_out(self) -> bool:
        """Whether the step that was just asked about must not be taken."""
        return self.in_a_row > 0

    @property
    def diverged(self) -> bool:
        """Whether the run has to end."""
        return self.in_a_row >= LIMIT

    def to_dict(self) -> dict[str, int]:
        return {"in_a_row": self.in_a_row, "skipped": self.skipped}

    @classmethod
    def from_dict(cls, numbers: Mapping[str, Any]) -> Guard:
        return cls(in_a_row=int(numbers["in_a_row"]), skipped=int(numbers["skipped"]))


def describe(step: int, loss: float, grad_norm: float, ids: Iterable[str]) -> str:
    """One line for the user: what was not finite, and in which pictures' batch."""
    what = f"loss is {loss}" if not isfinite(loss) else f"gradient norm is {grad_norm}"
    names = ", ".join(dict.fromkeys(ids)) or "unknown"
    return f"step {step} left out: {what}; pictures of this step: {names}"


@dataclass
class TrainState:
    """Counters and memories of one run, over all its resumes.

    `micro_step` names the next micro-batch: with the seed it fixes pictures, captions, noise and timesteps, so that no
    position of a sampler has to be saved.
    """

    step: int = 0  # optimizer steps done
    micro_step: int = 0  # micro-batches used, the skipped ones too
    samples_seen: int = 0
    micro_batches: int = 0  # of a step, of all processes together; 0: not known yet
    guard: Guard = Guard()  # steps left out because of non-finite numbers
    loss_scale: float | None = None  # in float16, once it was lowered; None: the adapter's own
    resumes: int = 0
    train_s: float = 0.0  # seconds of pure training
    best_step: int | None = None
    best_loss: float | None = None
    best_adapter: dict[str, Tensor] = field(default_factory=dict)
    suspects: Suspects = field(default_factory=Suspects)  # what is known of single pictures, and done about them

    def to_document(self) -> dict[str, Any]:
        """Plain numbers, for JSON; the best adapter is saved as tensors beside it."""
        document = asdict(replace(self, best_adapter={}, suspects=Suspects()))
        del document["best_adapter"]
        return {**document, "suspects": self.suspects.to_document()}

    @classmethod
    def from_document(cls, document: dict[str, Any], best_adapter: dict[str, Tensor]) -> TrainState:
        suspects = Suspects.from_document(document["suspects"])
        fields = {**document, "guard": Guard.from_dict(document["guard"]), "suspects": suspects}
        return cls(**fields, best_adapter=best_adapter)


Tensors = dict[str, dict[str, Tensor]]


def optimizer_files(optimizer: OptimizerLike, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors named `<parameter>|<slot>` and a JSON document with everything else."""
    whole = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    slots: dict[str, dict[str, Any]] = {}
    for index, entries in whole["state"].items():
        name = names[index]
        for slot, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{name}|{slot}"] = value
            else:
                slots.setdefault(name, {})[slot] = value
    rest = {key: value for key, value in whole.items() if key != "state"}
    return tensors, {"rest": rest, "slots": slots, "names": names}


def load_optimizer(
    optimizer: OptimizerLike,
    names: list[str],
    tensors: Mapping[str, Tensor],
    document: Mapping[str, Any],
) -> None:
    """Inverse of `optimizer_files`.

    Raises:
        CheckpointError: the parameters are not those that the state was saved for.
    """
    if list(document["names"]) != names:
        raise CheckpointError("the checkpoint's optimizer belongs to other parameters", "was network.targets changed?")
    place = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        name, slot = key.rsplit("|", 1)
        state.setdefault(place[name], {})[slot] = value.clone()
    for name, values in document["slots"].items():
        state.setdefault(place[name], {}).update(values)
    optimizer.load_state_dict({**document["rest"], "state": state})


def capture(
    state: TrainState,
    adapter: Adapter,
    optimizer: OptimizerLike,
    stop_rule: StopRule,
    expected: list[float],
) -> tuple[Tensors, dict[str, Any]]:
    """Everything that the rest of the run depends on: tensors by file stem, JSON documents by file stem."""
    names = [name for name, _ in adapter.named_parameters()]
    optimizer_tensors, optimizer_document = optimizer_files(optimizer, names)
    rng_tensors, rng_document = rng.capture()
    tensors = {"adapter": adapter.state(), "optimizer": optimizer_tensors, "rng": rng_tensors}
    if state.best_adapter:
        tensors["best"] = state.best_adapter
    documents = {
        "state": state.to_document(),
        "optimizer": optimizer_document,
        "stop_rule": stop_rule.to_document(),
        "baseline": expected,
        "rng": rng_document,
    }
    return tensors, documents


def restore(
    tensors: Tensors,
    documents: Mapping[str, Any],
    adapter: Adapter,
    optimizer: OptimizerLike,
    stop_rule: StopRule,
) -> tuple[TrainState, list[float]]:
    """Put everything back but the random state; gives the state and the baseline's expected losses.

    Raises:
        CheckpointError: something is missing or belongs to another run.
    """
    try:
        adapter.load_state(tensors["adapter"])
        names = [name for name, _ in adapter.named_parameters()]
        load_optimizer(optimizer, names, tensors.get("optimizer", {}), documents["optimizer"])
        stop_rule.load_document(documents["stop_rule"])
        state = TrainState.from_document(documents["state"], dict(tensors.get("best", {})))
        if state.loss_scale is not None:
            adapter.loss_scale = float(state.loss_scale)
        expected = [float(value) for value in documents["baseline"]]
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint lacks or garbles {error}") from error
    for parameter in adapter.parameters():
        assert parameter.dtype == torch.float32
    return state, expected
