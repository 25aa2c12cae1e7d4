"""The families that emotrain trains, in the order in which a file is tried (no torch).

A new family is a folder and one line here (and its name in `config.values.FamilyName`, which may not look in here).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from emotrain.families.anima.spec import ANIMA
from emotrain.families.chroma.spec import CHROMA
from emotrain.families.flux.spec import FLUX
from emotrain.families.flux2.spec import FLUX2
from emotrain.families.flux3.spec import FLUX3
from emotrain.families.krea2.spec import KREA2
from emotrain.families.qwen.spec import QWEN
from emotrain.families.qwen21.spec import QWEN21
from emotrain.families.sd.spec import SD15, SD21
from emotrain.families.sd3.spec import SD3
from emotrain.families.sdxl.spec import SDXL
from emotrain.families.spec import FamilySpec
from emotrain.families.zimage.spec import ZIMAGE

FAMILIES: dict[str, FamilySpec] = {
    spec.name: spec for spec in (SD15, SD21, SDXL, ANIMA, SD3, FLUX3, FLUX2, CHROMA, FLUX, ZIMAGE, KREA2, QWEN21, QWEN)
}


@cache
def configs(family: str) -> dict[str, Any]:
    """The public models' own configs: `denoiser` and `scheduler` by variant, `vae`, `text_encoders` by name.

    A text encoder is [class, config], a scheduler [class, config].
    """
    path = Path(__file__).parent / FAMILIES[family].folder / "configs.json"
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    own: dict[str, Any] = loaded.get(family, loaded)
    return own


def encoder_configs(family: str, variant: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Text encoders of a public model: name -> (class, config)."""
    known = configs(family)
    own = known.get("text_encoders_of", {}).get(variant, known["text_encoders"])
    return {name: (kind, config) for name, (kind, config) in own.items()}


def family_of_variant(variant: str) -> str | None:
    """The family that has a public model of that name."""
    return next((name for name, spec in FAMILIES.items() if variant in spec.variants), None)
