"""Our LoRA files given to ComfyUI's own loader, beside us: which names it takes, and what it adds to each weight.

    python tests/bench/comfyui_lora.py --comfyui ~/ComfyUI [--variants ...] [--report docs/benchmarks]

ComfyUI is not part of this project; the folder is a checkout of yours, and it needs its own requirements. Its model of
each variant is built at its real size on the meta device, found from the names of the original checkpoint as ComfyUI
finds it. Files hold a LoRA of rank 2 with an alpha of 1 on every layer, float32, in each layout, and a LoKr in the
default one, whose left factor has up to 16 rows and columns. Of every kind of layer the first and the last are
computed: what ComfyUI's patch adds to a weight of zeros against alpha / rank B A, or the Kronecker product.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import logging
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import diffusers
import torch
import transformers
from by_hand import write_report
from safetensors.torch import load_file
from torch import Tensor, nn

from emotrain.errors import ModelError
from emotrain.families.registry import FAMILIES, configs, family_of_variant
from emotrain.families.spec import Group
from emotrain.lora import names, targets
from emotrain.lora.file import save_lora
from emotrain.lora.formats import LAYOUTS, Layout, halves_swap
from emotrain.lora.fused import swap_halves
from emotrain.lora.kron import Kron

# Layers that the name tables do not hold, by which ComfyUI knows a model: name -> shape.
SIGNS: dict[str, dict[str, tuple[int, ...]]] = {
    "flux": {"double_blocks.0.img_attn.norm.key_norm.scale": (128,)},
    "flux2": {"double_blocks.0.img_attn.norm.key_norm.scale": (128,)},
    "chroma": {
        "double_blocks.0.img_attn.norm.key_norm.scale": (128,), "distilled_guidance_layer.norms.0.scale": (5120,),
    },
    "zimage": {"noise_refiner.0.attention.k_norm.weight": (128,), "cap_pad_token": (1, 3840)},
    "krea2": {"txtfusion.layerwise_blocks.0.prenorm.scale": (2560,)},
    "qwen": {"txt_norm.weight": (3584,)},
    "anima": {"llm_adapter.blocks.0.cross_attn.q_proj.weight": (1024, 1024)},
    "sd3": {"joint_blocks.0.context_block.attn.ln_q.weight": (64,)},
}  # fmt: skip
UNSEEN = (
    "torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.ops",
    "torchvision.models", "torchaudio", "torchaudio.transforms", "torchaudio.functional", "av", "spandrel", "kornia",
)  # fmt: skip


def comfyui(folder: Path) -> Any:
    """ComfyUI's packages from a checkout; libraries that its LoRA code does not use may be missing."""
    sys.path.insert(0, str(folder))
    sys.argv = [sys.argv[0], "--cpu"]
    missing = []
    transformers.utils.is_torchvision_available()  # asked now, it does not take a stand-in for the library
    for name in UNSEEN:
        try:
            importlib.import_module(name)
        except ImportError:
            stand_in = MagicMock(name=name, __path__=[])
            stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None)
            sys.modules[name] = stand_in
            missing.append(name)
    importlib.import_module("comfy.options").enable_args_parsing()
    for name in ("lora", "lora_convert", "model_detection"):
        importlib.import_module(f"comfy.{name}")
    for name in missing:
        del sys.modules[name]
    return sys.modules["comfy"]


class UnknownModelError(Exception):
    """This ComfyUI does not know the model."""


def denoiser_of(family: str, variant: str) -> nn.Module:
    """The denoiser at its real size, without weights."""
    with torch.device("meta"):
        model: nn.Module = getattr(diffusers, FAMILIES[family].denoiser_class).from_config(
            configs(family)["denoiser"][variant]
        )
    return model


def original_shapes(family: str, model: nn.Module) -> dict[str, Tensor]:
    """Weights on the meta device under the original checkpoint's names."""
    table, layers = FAMILIES[family].lora.originals, targets.layers(model)
    signs = SIGNS.get(family, {})
    if family == "sd3":
        signs = {**signs, "x_embedder.proj.weight": (64 * model.config.num_layers, 16, 2, 2)}
    found = {name: torch.empty(shape, device="meta") for name, shape in signs.items()}
    for path in layers:
        group = table.to_original(path)
        if group is None:
            continue
        shapes = [tuple(targets.whole_shape(layers[part])) for part in group.parts]
        found[f"{group.name}.weight"] = torch.empty((sum(s[0] for s in shapes), *shapes[0][1:]), device="meta")
        if getattr(layers[path], "bias", None) is not None:
            found[f"{group.name}.bias"] = torch.empty(sum(s[0] for s in shapes), device="meta")
    return found


def their_model(comfy: Any, model: nn.Module, shapes: dict[str, Tensor]) -> Any:
    """ComfyUI's model for these names and shapes, on the meta device."""
    if isinstance(model, diffusers.UNet2DConditionModel):
        config = comfy.model_detection.model_config_from_diffusers_unet(model.state_dict())
    else:
        config = comfy.model_detection.model_config_from_unet(shapes, "")
    if config is None:
        raise UnknownModelError("not known to this ComfyUI")
    config.set_inference_dtype(torch.bfloat16, None)
    return config.get_model(shapes, "", device=torch.device("meta"))


def random_lora(family: str, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Rank 2 and alpha 1 for every layer that `targets: all` reaches."""
    held, generator = targets.layers(model), torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for path in targets.select(model, "all", family):
        out, inner, *kernel = targets.whole_shape(held[path])
        name = names.canonical(path, targets.part_of(family))
        state[name + names.DOWN] = torch.randn((2, inner, *kernel), generator=generator)
        state[name + names.UP] = torch.randn((out, 2, *(1 for _ in kernel)), generator=generator)
        alphas[name] = 1.0
    return state, alphas


def random_lokr(family: str, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A left factor of at most 16 a side for every layer: a public model's right factors fit into memory."""
    held, generator = targets.layers(model), torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for path in targets.select(model, "all", family):
        out, inner, *kernel = targets.whole_shape(held[path])
        name, a, b = names.canonical(path, targets.part_of(family)), math.gcd(out, 16), math.gcd(inner, 16)
        state[name + names.W1] = torch.randn((a, b), generator=generator)
        state[name + names.W2] = torch.randn((out // a, inner // b, *kernel), generator=generator)
    return state, {}


class UNetNames:
    """The original names of a UNet's layers, by ComfyUI's list of them."""

    def __init__(self, comfy: Any, config: dict[str, Any]) -> None:
        known = comfy.utils.unet_to_diffusers(config)
        self.own = {theirs.removesuffix(".weight"): ours.removesuffix(".weight") for ours, theirs in known.items()}

    def from_original(self, path: str) -> Group:
        """As `OriginalNames.from_original`."""
        return Group(path, (self.own[path],))


class Expected:
    """alpha / rank B A of a LoRA where the original checkpoint keeps it."""

    def __init__(self, family: str, model: nn.Module, state: dict[str, Tensor], table: Any) -> None:
        self.table, self.layers, self.state = table, targets.layers(model), state
        self.part = targets.part_of(family)

    def of(self, original: str) -> Tensor:
        """The update of an original module, [out, in, ...]."""
        group = self.table.from_original(original)
        assert group is not None, original
        whole = torch.cat([self._one(part) for part in group.parts])
        swaps = group.swaps and halves_swap(group.name, whole.shape[1], whole.shape[0])
        return swap_halves(whole) if swaps else whole

    def _one(self, path: str) -> Tensor:
        shape, stem = tuple(targets.whole_shape(self.layers[path])), f"{self.part}.{path}"
        if (w1 := self.state.get(stem + names.W1)) is not None:
            return Kron(w1, self.state[stem + names.W2]).dense()
        if (down := self.state.get(stem + names.DOWN)) is None:
            return torch.zeros(shape)
        up = self.state[stem + names.UP]
        return (0.5 * up.flatten(1) @ down.flatten(1)).reshape(shape)


def worst_error(comfy: Any, patches: dict[Any, Any], expected: Expected) -> tuple[float, int]:
    """Largest relative error over the first and last layer of each kind, and how many layers that were."""
    of_weight: dict[str, list[Any]] = {}
    for key, adapter in patches.items():
        weight, offset, function = (*key, None)[:3] if isinstance(key, tuple) else (key, None, None)
        of_weight.setdefault(weight, []).append((1.0, adapter, 1.0, offset, function))
    kinds: dict[str, list[str]] = {}
    for weight in of_weight:
        kinds.setdefault(re.sub(r"\d+", "#", weight), []).append(weight)
    worst, chosen = 0.0, {weight for own in kinds.values() for weight in (own[0], own[-1])}
    for weight in sorted(chosen):
        stem = weight.removeprefix("diffusion_model.").removesuffix(".weight")
        wanted = expected.of(stem)
        added = comfy.lora.calculate_weight(of_weight[weight], torch.zeros_like(wanted), weight)
        worst = max(worst, float((added - wanted).norm() / wanted.norm()))
    return worst, len(chosen)


def rows(comfy: Any, variant: str, folder: Path) -> Iterator[dict[str, Any]]:
    """One row for each layout of a variant."""
    family = str(family_of_variant(variant))
    model = denoiser_of(family, variant)
    shapes = original_shapes(family, model)
    theirs = their_model(comfy, model, shapes)
    key_map = comfy.lora.model_lora_keys_unet(theirs, {})
    unet = isinstance(model, diffusers.UNet2DConditionModel)
    table = UNetNames(comfy, theirs.model_config.unet_config) if unet else FAMILIES[family].lora.originals
    for network, layouts in ((random_lora, LAYOUTS), (random_lokr, (FAMILIES[family].lora.layout,))):
        state, alphas = network(family, model)
        expected = Expected(family, model, state, table)
        for layout in layouts:
            default = "**" * (layout == FAMILIES[family].lora.layout)
            kind = f"{default}{layout}{default}" + " (LoKr)" * (network is random_lokr)
            row: dict[str, Any] = {"variant": variant, "model": type(theirs).__name__, "layout": kind}
            try:
                yield row | _loaded(comfy, key_map, expected, folder, (state, alphas, family, layout))
            except ModelError as error:
                yield row | {"refused": str(error).splitlines()[0]}


def _loaded(
    comfy: Any,
    key_map: dict[str, Any],
    expected: Expected,
    folder: Path,
    lora: tuple[dict[str, Tensor], dict[str, float], str, Layout],
) -> dict[str, Any]:
    state, alphas, family, layout = lora
    path = folder / "lora.safetensors"
    save_lora(path, state, alphas=alphas, family=family, format=layout, dtype="fp32", metadata={})
    tensors = comfy.lora_convert.convert_lora(load_file(path))
    patches = comfy.lora.load_lora(tensors, key_map, log_missing=False)
    taken = {key for adapter in patches.values() for key in adapter.loaded_keys}
    stems = {re.sub(r"\.(?:lora_(?:down|up|A|B)\.weight|alpha|lokr_w[12])$", "", key) for key in tensors}
    unread = {stem for stem in stems if not any(key.startswith(stem + ".") for key in taken)}
    error, compared = worst_error(comfy, patches, expected) if patches else (0.0, 0)
    return {"modules": len(stems), "unread": sorted(unread), "error": error, "compared": compared}


def table(found: list[dict[str, Any]], version: str) -> str:
    """The rows as Markdown."""
    lines = [
        f"ComfyUI {version}, diffusers {diffusers.__version__}.",
        "",
        "| model | ComfyUI's class | layout | modules in the file | not read | compared | largest relative error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found:
        if "unknown" in row:
            lines.append(f"| {row['variant']} | {row['unknown']} | | | | | |")
            continue
        layout = row["layout"]
        if "refused" in row:
            lines.append(f"| {row['variant']} | {row['model']} | {layout} | not written: {row['refused']} | | | |")
            continue
        kinds = {re.sub(r"\d+", "#", stem) for stem in row["unread"]}
        unread = f"{len(row['unread'])}" + (f" ({', '.join(sorted(kinds)[:3])})" if 0 < len(kinds) <= 3 else "")
        error = f"{row['error']:.1g}" if row["compared"] else "-"
        lines.append(
            f"| {row['variant']} | {row['model']} | {layout} | {row['modules']} | {unread} | {row['compared']} "
            f"| {error} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True)
    variants = [variant for spec in FAMILIES.values() for variant in spec.variants]
    parser.add_argument("--variants", nargs="*", default=variants, choices=variants)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    comfy = comfyui(args.comfyui)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for variant in args.variants:
            start = time.monotonic()
            try:
                own = list(rows(comfy, variant, Path(folder)))
            except UnknownModelError as unknown:
                own = [{"variant": variant, "unknown": str(unknown)}]
            found += own
            print(f"{variant}: {time.monotonic() - start:.0f} s", own, flush=True)
    text = table(found, str(importlib.import_module("comfyui_version").__version__))
    print(text)
    if args.report:
        about = (__doc__ or "").split("\n\n", 2)[2].splitlines()
        command = "`python tests/bench/comfyui_lora.py --comfyui FOLDER`"
        write_report(args.report / "comfyui.md", ["# Our files in ComfyUI", "", command, "", *about, "", text])


if __name__ == "__main__":
    main()
