"""Any picture mode to 8-bit RGB in sRGB, the alpha channel apart (no torch)."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from emotrain.dataset.textfile import printable


@dataclass(frozen=True)
class Note:
    """Worth knowing about a file that is used all the same: a short word and one line."""

    code: str
    message: str


def split_alpha(image: Image.Image, info: dict[Any, Any], notes: list[Note]) -> tuple[Image.Image, Image.Image | None]:
    """RGB in sRGB, and the alpha channel where any pixel is not opaque."""
    if image.mode.startswith("I"):
        return _from_16_bit(image), None
    alpha = None
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in info:
        gray = image.mode in ("LA", "La")
        image = image.convert("L").convert("RGBA") if image.mode == "1" else image.convert("RGBA")
        alpha = image.getchannel("A")
        if alpha.getextrema()[0] == 255:
            alpha = None
        image = image.convert("RGB").convert("L") if gray else image.convert("RGB")
    elif image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    return _to_srgb(image, info.get("icc_profile"), notes), alpha


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Gray values 0..65535 divided by 257 and rounded: 65535 becomes 255 and nothing is clipped."""
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def _to_srgb(image: Image.Image, icc: bytes | None, notes: list[Note]) -> Image.Image:
    if not icc:
        return image if image.mode == "RGB" else image.convert("RGB")
    try:
        name, transform = _transform(icc, image.mode)
        if transform and image.mode == "L" and transform.input_mode == "RGB":
            image = image.convert("RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, struct.error):
        notes.append(Note("icc-damaged", "has a colour profile that cannot be used: taken as sRGB"))
        return image.convert("RGB")
    if transform is None:
        return image.convert("RGB")
    notes.append(Note("icc", f"has the colour profile {printable(name)}: converted to sRGB"))
    return transform.apply(image)


@lru_cache(maxsize=32)
def _transform(icc: bytes, mode: str) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Name of a profile and the way to sRGB; None where it is sRGB already."""
    profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    name = ImageCms.getProfileDescription(profile).strip()
    space = profile.profile.xcolor_space.strip()
    if mode == "L" and space == "RGB":
        mode = "RGB"
    if {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}[mode] != space:
        raise ValueError(f"profile of {space} in a picture of {mode}")
    if "sRGB" in name:
        return name, None
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    srgb = ImageCms.createProfile("sRGB")
    return name, ImageCms.buildTransform(profile, srgb, mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, flags)
