"""The peft layers under an adapter: put in empty, filled, switched; nothing else of the model changes."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from emotrain.errors import ConfigError, ModelError
from emotrain.lora import names, targets
from emotrain.lora.kron import Kron, krons


def install(
    model: nn.Module, ranks: Mapping[str, int], alphas: Mapping[str, float], name: str, *, trained: bool = True
) -> dict[str, LoraLayer]:
    """Inject peft layers of the given ranks and alphas, empty: their weights come from `initialise` or `set_weights`.

    Adapters that are already there stay on and frozen.

    Raises:
        ConfigError: a module that peft cannot adapt.
        ValueError: an adapter of that name is there already.
    """
    kept = list(getattr(model, "peft_config", {}))
    if name in kept:
        raise ValueError(f"the model has an adapter `{name}` already")
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern=_grouped({path: r for path, r in ranks.items() if r != rank}),
        alpha_pattern=_grouped({path: a for path, a in alphas.items() if a != alpha}),
        target_modules="|".join(re.escape(path) for path in ranks),
        init_lora_weights=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, model, adapter_name=name, low_cpu_mem_usage=True)
    found = {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    layers = {path: found[path] for path in ranks if path in found and name in found[path].lora_A}
    if len(layers) != len(ranks):
        lost = next(path for path in ranks if path not in layers)
        raise ConfigError(f"`{lost}` cannot carry a LoRA ({len(ranks) - len(layers)} of {len(ranks)} modules)")
    for layer in found.values():
        own = [name] if name in layer.lora_A else []
        activate(layer, [n for n in kept if n in layer.lora_A] + own, trained=name if trained else None)
    return layers


def _grouped(values: Mapping[str, float]) -> dict[str, float]:
    """One exact pattern per distinct value, which peft matches against whole paths."""
    groups: dict[float, list[str]] = {}
    for path, value in values.items():
        groups.setdefault(value, []).append(re.escape(path))
    return {f"^(?:{'|'.join(paths)})": value for value, paths in groups.items()}


def activate(layer: LoraLayer, active: list[str], *, trained: str | None) -> None:
    """Switch the named adapters of a layer on, all others off; only `trained` gets gradients."""
    layer.set_adapter(active, inference_mode=True)
    for holder in (layer.lora_A, layer.lora_B):
        for key, module in holder.items():
            if key == trained:
                module.weight.requires_grad_(True)


def initialise(layer: LoraLayer, name: str, generator: torch.Generator) -> None:
    """A uniform in +-1/sqrt(fan_in), which is kaiming-uniform with a = sqrt(5); B zero."""
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    if _device(layer).type == "meta":
        return
    bound = 1.0 / math.sqrt(math.prod(down.shape[1:]))
    values = torch.rand(down.shape, generator=generator) * (2.0 * bound) - bound
    set_weights(layer, name, values, torch.zeros(up.shape))


def set_weights(layer: LoraLayer, name: str, down: Tensor, up: Tensor) -> None:
    """Give an adapter of a layer its weights, copied to float32 on the base layer's device."""
    device = _device(layer)
    trained = layer.lora_A[name].weight.requires_grad
    for holder, value in ((layer.lora_A[name], down), (layer.lora_B[name], up)):
        weight = value.detach().to(device, torch.float32, copy=True).contiguous()
        holder.weight = nn.Parameter(weight, requires_grad=trained)


def _device(layer: LoraLayer) -> torch.device:
    device: torch.device = next(layer.get_base_layer().parameters()).device
    return device


def fitted(
    model: nn.Module, state: Mapping[str, Tensor], alphas: Mapping[str, float], part: str
) -> tuple[dict[str, int], dict[str, float], dict[str, tuple[Tensor, Tensor]]]:
    """Ranks, alphas and (A, B) of a file's LoRA under the model's own paths.

    Raises:
        ModelError: a module that the model does not have, or a shape that does not fit.
    """
    held = targets.layers(model)
    modules = names.modules({names.local(key, part): value for key, value in state.items()})
    own = _own_paths(held, modules, part)
    strengths = {names.local(key, part): value for key, value in alphas.items()}
    ranks, own_alphas, weights = {}, {}, {}
    for path, (down, up) in modules.items():
        out, inner, *kernel = targets.whole_shape(held[own[path]])
        down, up = names.as_layer(down, up, is_conv=bool(kernel))
        if down.shape[1:] != (inner, *kernel) or up.shape[0] != out:
            raise ModelError(
                f"`{path}` is {tuple(down.shape)}, {tuple(up.shape)} in the LoRA; the model's layer is {out} x {inner}",
                "was it made for another model?",
            )
        ranks[own[path]] = down.shape[0]
        own_alphas[own[path]] = float(strengths.get(path, down.shape[0]))
        weights[own[path]] = (down.to(torch.float32), up.to(torch.float32))
    return ranks, own_alphas, weights


def fitted_krons(model: nn.Module, state: Mapping[str, Tensor], part: str) -> dict[str, Kron]:
    """The LoKrs of a file under the model's own paths; its LoRA keys are passed over.

    Raises:
        ModelError: a module that the model does not have, or a shape that does not fit.
    """
    held = targets.layers(model)
    modules = krons({names.local(key, part): value for key, value in state.items()})
    own = _own_paths(held, modules, part)
    found = {}
    for path, kron in modules.items():
        shape = targets.whole_shape(held[own[path]])
        numbers = kron.w1.numel() * kron.w2.numel()
        inputs = kron.w1.shape[1] * math.prod(kron.w2.shape[1:])
        if numbers != math.prod(shape) or kron.shape[0] != shape[0] or inputs != math.prod(shape[1:]):
            raise ModelError(
                f"`{path}` is a LoKr of {tuple(kron.w1.shape)} and {tuple(kron.w2.shape)}; the model's layer is "
                + " x ".join(map(str, shape)),
                "was it made for another model?",
            )
        w2 = kron.w2.reshape(kron.w2.shape[0], shape[1] // kron.w1.shape[1], *shape[2:])
        found[own[path]] = Kron(kron.w1.to(torch.float32), w2.to(torch.float32))
    return found


def _own_paths(held: Mapping[str, nn.Module], modules: Mapping[str, object], part: str) -> dict[str, str]:
    """A file's paths -> the model's.

    Raises:
        ModelError: a module that the model does not have.
    """
    own = {names.local(names.canonical(path, part), part): path for path in held}
    unknown = [path for path in modules if path not in own]
    if unknown:
        raise ModelError(
            f"{len(unknown)} of the LoRA's {len(modules)} modules are not in this {part}, first `{unknown[0]}`",
            "was it made for another model?",
        )
    return own
