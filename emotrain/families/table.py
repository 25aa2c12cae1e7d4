"""Which model a name means, and what can be said of it without torch: the front door of this room."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from emotrain.config.builtin import MODELS, check_name
from emotrain.config.paths import HUB_ID, MODEL_FILES
from emotrain.errors import ConfigError, ModelError
from emotrain.families.registry import FAMILIES
from emotrain.families.sniff import Prediction, Sniffed, sniff_folder, sniff_hub
from emotrain.families.sniff_file import public_model, sniff_file

__all__ = ["FAMILIES", "Sniffed", "expected_modules", "is_hub_id", "resolve_base", "sniff"]

ASSETS = Path(__file__).parent.parent / "assets"


def is_hub_id(base: str) -> bool:
    """Whether `base` has the form of a hub id (`owner/name`) and nothing of that name is on the disk."""
    return bool(HUB_ID.fullmatch(base)) and not base.lower().endswith(MODEL_FILES) and not Path(base).exists()


def resolve_base(base: str) -> str | Path:
    """`model.base` -> a path on the disk, or a hub id as it is.

    Raises:
        ConfigError: an unknown `builtin:` name.
        ModelError: a path where nothing is.
    """
    if base.startswith("builtin:"):
        check_name(base, MODELS, "model")
        folder = ASSETS / base.removeprefix("builtin:")
        if not (folder / "model_index.json").is_file():
            raise ModelError(
                f"`{base}` is missing from this installation",
                "install emotrain again; its wheel holds the model",
            )
        return folder
    if is_hub_id(base):
        return base
    path = Path(base).expanduser()
    if not path.exists():
        raise ModelError(
            f"model `{base}` does not exist",
            "give a .safetensors file, a diffusers folder, a hub id such as `owner/name`, or `builtin:tiny-sd`",
        )
    return path


def expected_modules(found: Sniffed, targets: str | tuple[str, ...]) -> int | None:
    """How many modules a LoRA on a named set must have; None where that is not known."""
    variant = FAMILIES[found.family].variants.get(found.variant)
    return variant.modules.get(targets) if variant and isinstance(targets, str) else None


def sniff(
    base: str | Path,
    family: str = "auto",
    revision: str | None = None,
    prediction: str = "auto",
    *,
    by_size: bool = False,
) -> Sniffed:
    """What a model is, from its JSON files or its safetensors header alone.

    A hub id fetches its small JSON files (or takes them from the local cache).

    Args:
        base: as in the preset, see `resolve_base`.
        family: auto, or the family that it has to be.
        revision: of a hub id.
        prediction: auto, or epsilon, v or flow, where the files do not say it or say it wrongly.
        by_size: take a public model for what its built-in sizes say; nothing of it is fetched.

    Raises:
        ConfigError: an unknown `builtin:` name or family, or a prediction that the family does not have.
        ModelError: missing, unreadable, not known, or of another family than `family`.
    """
    if family != "auto" and family not in FAMILIES:
        raise ConfigError(f"model.family `{family}` is not known", f"one of auto, {', '.join(FAMILIES)}")
    where = resolve_base(str(base))
    if isinstance(where, str):
        found = (public_model(where) if by_size else None) or sniff_hub(where, revision)
    elif where.is_dir():
        found = sniff_folder(where)
    else:
        found = sniff_file(where)
    if family not in ("auto", found.family):
        raise ModelError(
            f"model.family is `{family}`, but `{base}` is {found.describe()}",
            f"write `family: {found.family}`, or leave it out",
        )
    return found if prediction == "auto" else _insisted(found, prediction)


def _insisted(found: Sniffed, prediction: str) -> Sniffed:
    """What was found, with the prediction that the user insists on."""
    if (prediction == "flow") != (found.prediction == "flow"):
        raise ConfigError(
            f"model.prediction is `{prediction}`, but `{found.path}` is {found.describe()}",
            "leave model.prediction out; flow is for "
            + ", ".join(spec.title for spec in FAMILIES.values() if spec.flow)
            + ", epsilon and v for the others",
        )
    if prediction == "flow":
        return found
    kind: Prediction = "epsilon" if prediction == "epsilon" else "v_prediction"
    return replace(found, prediction=kind, scheduler_config={**found.scheduler_config, "prediction_type": kind})
