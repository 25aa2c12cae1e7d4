"""What a resumed run must agree with: preset, base and data set; and the difference in words where it does not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from emotrain.config.schema import Preset
from emotrain.errors import CheckpointError, ConfigError, Problem, listed

FREE = ("save.", "sample.", "log.", "name", "validate.likeness")  # what may change from one resume to the next
FIXED = ("train.loss.baseline", "train.ema", "train.gain")  # a checkpoint's state depends on them: they cannot change
MOVED = re.compile(r"(dataset\.folders\.\d+\.(path|mask)|validate\.folder) was ")
MOVED_MODEL = re.compile(
    r"(model\.(base|vae|text_encoder|tokenizer)|start_from\.continue|start_from\.stack\.\d+\.path) was "
)
MOST_NAMES = 5


@dataclass(frozen=True)
class Identity:
    """Preset (plain values), digest of the denoiser, digest of each picture with its caption and mask by id.

    `inputs` are digests of everything else that shapes the result: VAE, text encoders, scheduler, earlier LoRAs.
    """

    preset: dict[str, Any]
    base: str
    examples: dict[str, str]
    inputs: dict[str, str]

    def to_document(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Identity:
        """Inverse of `to_document`.

        Raises:
            CheckpointError: it is not what a run saves.
        """
        try:
            fields = [dict(document[name]) for name in ("preset", "examples", "inputs")]
            return cls(fields[0], str(document["base"]), *fields[1:])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint's record of its run lacks or garbles {error}") from error


def refuse(before: Identity, after: Identity, *, allow: bool) -> list[str]:
    """The differences in words, one line each, where `allow` lets them pass.

    Raises:
        CheckpointError: there are differences and they are not allowed, or never are.
    """
    lines = [
        *preset_changes(before.preset, after.preset),
        *example_changes(before.examples, after.examples),
    ]
    if before.examples == after.examples:  # the folder has moved, and holds what it held
        lines = [line for line in lines if not MOVED.match(line)]
    if (before.base, before.inputs) == (after.base, after.inputs):
        lines = [line for line in lines if not MOVED_MODEL.match(line)]
    if before.base != after.base:
        lines.append("model.base holds other weights than those that the run was started on")
    for name in sorted(before.inputs.keys() | after.inputs.keys()):
        if before.inputs.get(name) != after.inputs.get(name):
            lines.append(f"{name}: not what the run was started with")
    if fixed := [line for line in lines if line.partition(" ")[0] in FIXED]:
        raise differs(fixed, "put it back: it cannot change within a run")
    if lines and not allow:
        hint = "put it back, or go on all the same with --allow-config-change (the result is then another one)"
        raise differs(lines, hint)
    return lines


OWN = re.compile(  # keys whose values each process may have for itself
    r"name|model\.(base|vae|text_encoder|tokenizer)|dataset\.folders\.\d+\.(path|mask)|validate\.(folder|likeness)|"
    r"start_from\.continue|start_from\.stack\.\d+\.path|log\..*|sample\..*"
)


def refuse_apart(documents: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to train together with other settings, pictures or weights; where they lie may differ.

    Args:
        documents: the identity of every process's run, in the order of their ranks.

    Raises:
        ConfigError: with every difference to rank 0.
    """
    first, *others = [Identity.from_document(document) for document in documents]
    problems = []
    for rank, one in enumerate(others, 1):
        old, new = dict(flat(first.preset)), dict(flat(one.preset))
        keys = [key for key in sorted(old.keys() | new.keys()) if not OWN.fullmatch(key)]
        other = [key for key in keys if old.get(key) != new.get(key)]
        lines = [f"{key} is {new.get(key)!r}, and {old.get(key)!r} on rank 0" for key in other]
        lines += [f"{line} (beside rank 0)" for line in example_changes(first.examples, one.examples)]
        ours, theirs = ({**each.inputs, "model.base": each.base} for each in (first, one))
        names = sorted(ours.keys() | theirs.keys())
        lines += [f"{name} is not the same as on rank 0" for name in names if ours.get(name) != theirs.get(name)]
        problems += [Problem(f"rank {rank}: {line}") for line in lines]
    if problems:
        problems[-1] = Problem(problems[-1].message, "all processes of a run need the same preset, pictures and model")
        raise ConfigError(problems[0].message, problems[0].hint, problems=tuple(problems))


def library_changes(before: Mapping[str, Any], after: Mapping[str, str]) -> str | None:
    """The libraries that are of another version than at the run's start, in one line; None where all are the same."""
    changed = _other(before, after)
    if not changed:
        return None
    return f"other libraries than at the start ({', '.join(changed)}): the run goes on, but is no longer bit-identical"


def libraries_apart(versions: Sequence[Mapping[str, str]]) -> list[str]:
    """The processes that compute with other libraries than rank 0, a line each."""
    return [
        f"rank {rank} has other libraries than rank 0 ({', '.join(other)}): they may compute in another way"
        for rank, one in enumerate(versions)
        if (other := _other(versions[0], one))
    ]


def _other(before: Mapping[str, Any], after: Mapping[str, str]) -> list[str]:
    pairs = ((name, before.get(name, version), version) for name, version in after.items())
    return [f"{name} {was} -> {version}" for name, was, version in pairs if was != version]


def memory_changes(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str | None:
    """What saves memory in another way than at the run's start and changes numbers, in one line; None: nothing."""
    before, after = before or {}, after or {}
    keys = ("quantize", "text_encoders", "vae_tiles")
    changed = [key for key in keys if key in before and key in after and before[key] != after[key]]
    if not changed:
        return None
    words = ", ".join(f"{key} {before[key] or 'none'} -> {after[key] or 'none'}" for key in changed)
    return f"memory is saved in another way than at the start ({words}): the run goes on, and not bit for bit"


def differs(lines: list[str], hint: str) -> CheckpointError:
    """The error that names these differences, with one hint for all."""
    problems = (*(Problem(line) for line in lines[:-1]), Problem(lines[-1], hint))
    return CheckpointError(lines[0], hint, problems=problems)


def preset_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ and that a resumed run is not free to change.

    A key that was not there yet when the checkpoint was saved stood at its default, but for those of `FIXED`, on which
    the checkpoint's state depends.
    """
    old, new = dict(flat(before)), dict(flat(after))
    for key in new.keys() - old.keys() - set(FIXED):
        if (usual := re.sub(r"\.\d+", ".0", key)) in _defaults():
            old[key] = _defaults()[usual]
    lines = []
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key), new.get(key)
        if was == now or key.startswith(FREE):
            continue
        if key == "train.max_steps" and isinstance(was, int) and isinstance(now, int) and now > was:
            continue
        lines.append(f"{key} was {was!r} when the checkpoint was saved and is {now!r} now")
    return lines


def example_changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Pictures that were added, removed or changed (the picture itself or its caption)."""
    kinds = {
        "are new": sorted(after.keys() - before.keys()),
        "are gone": sorted(before.keys() - after.keys()),
        "have changed (picture or caption)": sorted(
            name for name in before.keys() & after.keys() if before[name] != after[name]
        ),
    }
    lines = []
    for what, names in kinds.items():
        if names:
            lines.append(f"data set: {len(names)} {what}: {listed(names, MOST_NAMES)}")
    return lines


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, plain value) of every leaf."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for index, inner in enumerate(value):
            yield from flat(inner, f"{prefix}.{index}")
    else:
        yield prefix, value


@cache
def _defaults() -> dict[str, Any]:
    """Dotted key -> value of every preset key that has a default; entries of lists are number 0."""
    least = (
        '{"model": {"base": "-"}, "dataset": {"folders": [{"path": "-"}]}, "start_from": {"stack": [{"path": "-"}]}}'
    )
    return {key: value for key, value in flat(Preset.model_validate_json(least).to_dict()) if value != "-"}
