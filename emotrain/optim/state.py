"""An emo optimizer's state as plain numbers and tensors, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch.optim import Optimizer

from emotrain.errors import CheckpointError
from emotrain.optim.kernels import state_dtype
from emotrain.pulse.signal import EmotionState, Reading, state_to_dict


class WrongStateError(CheckpointError, ValueError):
    """A state that belongs to another optimizer, generation or set of parameters; nothing has changed."""


def emotion_to_dict(
    name: str,
    state: EmotionState,
    reading: Reading | None,
    observed_loss: bool,
    memory: Mapping[str, float],
) -> dict[str, Any]:
    """The part of the state that is no tensor, ready for JSON."""
    return {
        "optimizer": name,
        "state": state_to_dict(state),
        "reading": {} if reading is None else asdict(reading),
        "observed_loss": observed_loss,
        "memory": dict(memory),
    }


def reading_from_dict(plain: Mapping[str, float]) -> Reading | None:
    """The last reading, None where there was none."""
    return Reading(**plain) if plain else None


def check_state(optimizer: Optimizer, name: str, generation: str, state_dict: Mapping[str, Any]) -> None:
    """Refuse a state that does not fit an optimizer of this name and generation, before anything is changed.

    Raises:
        WrongStateError: with a sentence that says what it belongs to.
    """
    here = type(optimizer).__name__
    emotion = state_dict.get("emotion")
    if not isinstance(emotion, Mapping):
        raise WrongStateError(
            f"this state holds no emotion, so it is not of {here}",
            "load it into the optimizer that saved it",
        )
    if emotion["optimizer"] != name:
        raise WrongStateError(
            f"this state is of the optimizer `{emotion['optimizer']}` and cannot go on in `{name}`",
            f"build `{emotion['optimizer']}`, or start `{name}` without a state",
        )
    saved = emotion["state"]["generation"]
    if saved != generation:
        raise WrongStateError(
            f"this state is of {here} generation {saved} and cannot go on in {generation}",
            f'pass generation="{saved}", or start without a state',
        )
    _check_groups(optimizer, state_dict)


def _check_groups(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    here = [len(group["params"]) for group in optimizer.param_groups]
    there = [len(group["params"]) for group in state_dict["param_groups"]]
    if here != there:
        raise WrongStateError(
            f"this state is of parameter groups of {there} tensors, this optimizer has {here}",
            "build the optimizer on the same parameters in the same order",
        )
    for param, slots in _pairs(optimizer, state_dict["param_groups"], state_dict["state"]):
        for slot, value in slots.items():
            if value.shape != param.shape:
                raise WrongStateError(
                    f"this state has a `{slot}` of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(param.shape)}",
                    "build the optimizer on the same parameters in the same order",
                )


def load_tensors(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Copy the tensors in, in the state's dtype (not the parameter's) and on the parameter's device."""
    for param, slots in _pairs(optimizer, state_dict["param_groups"], state_dict["state"]):
        optimizer.state[param] = {
            slot: torch.empty_like(param, dtype=state_dtype(param), requires_grad=False).copy_(value)
            for slot, value in slots.items()
        }


def _pairs(
    optimizer: Optimizer,
    groups: list[dict[str, Any]],
    state: Mapping[int, Mapping[str, torch.Tensor]],
) -> list[tuple[torch.Tensor, Mapping[str, torch.Tensor]]]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    indices = [index for group in groups for index in group["params"]]
    return [(param, state[index]) for param, index in zip(params, indices, strict=True) if index in state]
