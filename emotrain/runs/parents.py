"""Earlier LoRAs that a run builds on: continued, or frozen underneath."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emotrain.config.paths import MODEL_FILES
from emotrain.config.schema import Preset
from emotrain.errors import CheckpointError, ModelError
from emotrain.families.common import LoadedFamily
from emotrain.files import is_regular
from emotrain.lora.adapter import HIDDEN, STACK, stack_frozen
from emotrain.lora.file import LoraFile, read_lora
from emotrain.lora.origin import require_family
from emotrain.lora.targets import part_of
from emotrain.runs.folder import INFO, open_run


def apply_stack(
    preset: Preset, family: LoadedFamily, *, in_samples: bool = False, texts: bool = True
) -> list[dict[str, Any]]:
    """Freeze the earlier LoRAs under the new one; what they are, for the records.

    Args:
        preset: whose stack.
        family: the model.
        in_samples: only those that samples are drawn with.
        texts: on the text encoders too.
    """
    items = [item for item in preset.start_from.stack if item.sample or not in_samples]
    files = [(read_lora(lora_of(item.path)), item.weight) for item in items]
    for file, _ in files:
        refuse_misfit(file, family)
    for name, shown in ((STACK, True), (HIDDEN, False)):
        stack = [
            (file.state, file.alphas, weight)
            for item, (file, weight) in zip(items, files, strict=True)
            if item.sample == shown
        ]
        if stack:
            stack_frozen(family.denoiser, stack, part=part_of(family.name), name=name)
            for part in family.text_encoders if texts else ():
                stack_frozen(part.encoder, stack, part=part.name, name=name)
    return [
        {"kind": "stack", **name_of(item.path), "sha256": file.sha256, "weight": weight}
        for item, (file, weight) in zip(items, files, strict=True)
    ]


def refuse_misfit(file: LoraFile, family: LoadedFamily) -> None:
    """Refuse a LoRA for another family, or one with a part that the model does not have.

    Raises:
        ModelError: it is such a one.
    """
    require_family(file.family, family.name, str(file.path))
    own = [part_of(family.name), *(part.name for part in family.text_encoders)]
    others = [part for part in file.parts if part not in own]
    if others:
        raise ModelError(
            f"{file.path} also trains {' and '.join(others)}, which this model does not have",
            "use a model with all of its text encoders, or a LoRA of the denoiser alone",
        )


def name_of(path: str) -> dict[str, str | None]:
    """The run and the file that a LoRA comes from, by name alone: `runs show` finds them by it."""
    lora = lora_of(path)
    is_run = (lora.parent / INFO).is_file()
    return {"run": lora.parent.name if is_run else None, "file": lora.name}


def lora_of(path: str) -> Path:
    """A LoRA file, or the best one of a run, which is named by its folder or its name.

    Raises:
        ModelError: neither a file nor a run.
    """
    place = Path(path)
    if is_regular(place):
        return place
    try:
        return open_run(path).lora_path
    except CheckpointError as error:
        if place.suffix.lower() in MODEL_FILES or (len(place.parts) > 1 and not _is_dir(place)):
            return place  # whose reader says that it is missing
        raise ModelError(f"{path} is neither a LoRA file nor a run", error.hint) from error


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that cannot be
        return False


def continued(file: LoraFile) -> str:
    """What a LoRA that is continued brings with it, in words."""
    ranks = sorted({int(value.shape[0]) for key, value in file.state.items() if key.endswith("lora_A.weight")})
    if not ranks:
        return f"LoKr, {len(file.alphas)} modules, as {file.path.name} has them"
    alphas = sorted({round(float(alpha), 4) for alpha in file.alphas.values()})
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    alpha = f"{alphas[0]:g}" if len(alphas) == 1 else f"{alphas[0]:g} to {alphas[-1]:g}"
    return f"rank {rank}, alpha {alpha}, {len(file.alphas)} modules, as {file.path.name} has them"
