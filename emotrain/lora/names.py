"""Canonical names: "<part>.<path in diffusers>.lora_A.weight", whatever a library calls its modules at run time.

A LoKr has ".lokr_w1" and ".lokr_w2" in place of the two halves.

Parts are unet, transformer, text_encoder, text_encoder_2 and text_encoder_3. CLIP paths always carry `text_model.`,
as files do everywhere: transformers 5 dropped it from `CLIPTextModel` and kept it in `CLIPTextModelWithProjection`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from emotrain.errors import ModelError

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
DOWN = ".lora_A.weight"
UP = ".lora_B.weight"
W1 = ".lokr_w1"
W2 = ".lokr_w2"


def canonical(key: str, part: str) -> str:
    """A path (or key) of a live model, or a canonical one, as files carry it.

    >>> canonical("encoder.layers.0.mlp.fc1", "text_encoder")
    'text_encoder.text_model.encoder.layers.0.mlp.fc1'
    """
    own = part_of_key(key)
    part, path = (part, key) if own is None else (own, key.removeprefix(f"{own}."))
    if part.startswith("text_encoder") and path.startswith("encoder.layers."):
        path = f"text_model.{path}"
    return f"{part}.{path}"


def local(key: str, part: str) -> str:
    """The canonical name without its part; other keys are returned as they are."""
    own = part_of_key(key)
    path = key if own is None else key.removeprefix(f"{own}.")
    if part.startswith("text_encoder") and path.startswith("encoder.layers."):
        return f"text_model.{path}"
    return path


def part_of_key(key: str) -> str | None:
    """The part that a canonical key names, or None for a plain one."""
    head = key.split(".", 1)[0]
    return head if head in PARTS else None


def module_names(keys: Iterable[str]) -> tuple[str, ...]:
    """Module paths of the keys, in their order, each once."""
    return tuple(dict.fromkeys(_module_of(key) for key in keys))


def _module_of(key: str) -> str:
    return key.removesuffix(DOWN).removesuffix(UP).removesuffix(W1).removesuffix(W2)


def modules(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path -> (A [rank, in, ...], B [out, rank, ...]) of the LoRAs; keys of LoKrs are passed over.

    Raises:
        ModelError: an A without its B (or the reverse), ranks that differ between them, or a key of another kind.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for path in module_names(key for key in state if not key.endswith((W1, W2))):
        down, up = state.get(path + DOWN), state.get(path + UP)
        if down is None or up is None:
            if path in state:
                raise ModelError(f"`{path}` is not a LoRA tensor")
            raise ModelError(
                f"`{path}` has only one half, {'A' if up is None else 'B'} without {'B' if up is None else 'A'}"
            )
        if (
            down.ndim not in (2, 4)
            or up.ndim not in (2, 4)
            or down.shape[0] != up.shape[1]
            or 0 in (*down.shape, *up.shape)
        ):
            raise ModelError(f"the halves of `{path}` do not fit: A is {tuple(down.shape)}, B is {tuple(up.shape)}")
        found[path] = (down, up)
    return found


def as_layer(down: Tensor, up: Tensor, *, is_conv: bool) -> tuple[Tensor, Tensor]:
    """Bring A and B to the dimensions of a Linear or a convolution: 1x1 kernels come as 2-D or 4-D alike."""
    if is_conv:
        down = down if down.ndim == 4 else down[:, :, None, None]
        up = up if up.ndim == 4 else up[:, :, None, None]
    else:
        down = down.flatten(1) if down.ndim == 4 and down.shape[2:] == (1, 1) else down
        up = up.flatten(1) if up.ndim == 4 and up.shape[2:] == (1, 1) else up
    return down, up
