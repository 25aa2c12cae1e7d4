"""What Stable Diffusion 1.x, 2.x and SDXL share: a UNet's names and marks (no torch)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from emotrain.errors import ModelError
from emotrain.families.spec import Group, Shapes

FIRST = "input_blocks.0.0.weight"
TEXT_WIDTHS = {768: "sd15", 1024: "sd21", 2048: "sdxl"}  # of attn2.to_k: the text encoders' outputs

_BLOCK = r"(?:(?:down_blocks|up_blocks)\.\d+|mid_block)"
TARGETS: dict[str, tuple[str, ...]] = {
    "attn": (rf"{_BLOCK}\.attentions\.\d+\.transformer_blocks\.\d+\.attn[12]\.(?:to_[qkv]|to_out\.0)",),
    "mlp": (
        rf"{_BLOCK}\.attentions\.\d+\.transformer_blocks\.\d+\.ff\.net\.(?:0\.proj|2)",
        rf"{_BLOCK}\.attentions\.\d+\.proj_(?:in|out)",
    ),
    "rest": (
        rf"{_BLOCK}\.resnets\.\d+\.(?:conv1|conv2|time_emb_proj|conv_shortcut)",
        rf"{_BLOCK}\.(?:downsamplers|upsamplers)\.0\.conv",
    ),
}
LORA_HEADS = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "time_embedding.", "add_embedding.")
FILE_HEADS = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock")


def variant_of(name: str) -> Callable[[Path, Shapes], str | None]:
    """Recognises the single files of one of the three by the width of the text that the UNet takes."""

    def recognise(path: Path, shapes: Shapes) -> str | None:
        if FIRST not in shapes:
            return None
        if (channels := shapes[FIRST][1] if len(shapes[FIRST]) > 1 else 0) != 4:
            raise ModelError(
                f"`{path}` takes {channels} input channels instead of 4: an inpainting or edit model",
                "train on the text-to-image model that it was made from",
            )
        widths = {shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight") and len(shape) > 1}
        found = [TEXT_WIDTHS[width] for width in sorted(widths) if width in TEXT_WIDTHS]
        if len(widths) != 1 or not found:
            known = ", ".join(f"{width} ({family})" for width, family in TEXT_WIDTHS.items())
            raise ModelError(
                f"`{path}` has a UNet whose text width is {sorted(widths)}, which emotrain does not know",
                f"known widths are {known}",
            )
        return "" if found[0] == name else None

    return recognise


class SgmNames:
    """The names of the SGM UNet (two resnets a level, as in SD and SDXL).

    Attributes:
        plain: the levels on the way up that have no attention; their upsamplers stand one place further forward.
    """

    def __init__(self, plain: tuple[int, ...] = ()) -> None:
        self.plain = plain

    heads = FILE_HEADS
    words = (
        "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "to_q", "to_k", "to_v", "to_out", "proj_in",
        "proj_out", "time_emb_proj", "conv_shortcut", "conv_in", "conv_out", "time_embedding", "add_embedding",
        "linear_1", "linear_2", "input_blocks", "middle_block", "output_blocks", "in_layers", "out_layers",
        "emb_layers", "skip_connection", "time_embed", "label_emb",
    )  # fmt: skip

    joins = False

    def to_original(self, path: str) -> Group | None:
        name = to_sgm(path, self.plain)
        return None if name is None else Group(name, (path,))

    def from_original(self, path: str) -> Group | None:
        ours = from_sgm(path)
        return None if ours is None else Group(path, (ours,))


_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}


def to_sgm(path: str, plain: tuple[int, ...] = ()) -> str | None:
    """The name in the SGM UNet of a diffusers path (two resnets a level, as in SD and SDXL); None where there is none.

    `plain` are the levels on the way up without attention: SD's first.

    >>> to_sgm("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
    'input_blocks.4.1.transformer_blocks.0.attn1.to_q'
    """
    if path in _TOP:
        return _TOP[path]
    found = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)", path)
    if found is None:
        return None
    side, level, kind, index, rest = found.groups()
    inner = _RESNET.get(rest) if kind == "resnets" else rest
    if inner is None:
        return None
    if side is None:
        place = {"attentions": "1", "resnets": str(2 * int(index))}.get(kind)
        return None if place is None else f"middle_block.{place}.{inner}"
    if kind in ("downsamplers", "upsamplers"):
        if rest != "conv":
            return None
        row = 3 * (int(level) + 1) if side == "down" else 3 * int(level) + 2
        if side == "down":
            return f"input_blocks.{row}.0.op"
        return f"output_blocks.{row}.{1 if int(level) in plain else 2}.conv"
    column = {"attentions": 1, "resnets": 0}.get(kind)
    if column is None:
        return None
    row = 3 * int(level) + int(index)
    return f"input_blocks.{row + 1}.{column}.{inner}" if side == "down" else f"output_blocks.{row}.{column}.{inner}"


def from_sgm(path: str) -> str | None:
    """The diffusers path of a name in the SGM or LDM UNet; None where it is not one.

    >>> from_sgm("output_blocks.2.2.conv")
    'up_blocks.0.upsamplers.0.conv'
    """
    for ours, theirs in _TOP.items():
        if path == theirs:
            return ours
    inner_of = {theirs: ours for ours, theirs in _RESNET.items()}
    if found := re.fullmatch(r"middle_block\.([012])\.(.+)", path):
        place, rest = found.groups()
        if place == "1":
            return f"mid_block.attentions.0.{rest}"
        return f"mid_block.resnets.{int(place) // 2}.{inner_of[rest]}" if rest in inner_of else None
    found = re.fullmatch(r"(input|output)_blocks\.(\d+)\.([012])\.(.+)", path)
    if found is None:
        return None
    side, row, column, rest = found.group(1), int(found.group(2)), found.group(3), found.group(4)
    level, index = divmod(row - 1, 3) if side == "input" else divmod(row, 3)
    block = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
    if rest == "op" and side == "input":
        return f"{block}.downsamplers.0.conv"
    if rest == "conv" and side == "output":
        return f"{block}.upsamplers.0.conv"
    if column == "0":
        return f"{block}.resnets.{index}.{inner_of[rest]}" if rest in inner_of else None
    return f"{block}.attentions.{index}.{rest}" if column == "1" else None
