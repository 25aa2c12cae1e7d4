"""The LoRA on a live model: peft layers with float32 weights, seeded, switchable, and nothing global touched.

y = W x + (alpha / rank) B A x, Hu et al. 2021 (arXiv:2106.09685), A [rank, in], B [out, rank].
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from emotrain.errors import ConfigError, ModelError
from emotrain.lora import names, targets

STACK = "stack"


class Adapter:
    """A LoRA that lives on a model. Its weights are float32 whatever the model's dtype is.

    Args:
        layers: path in the model -> peft layer that holds this adapter.
        name: the adapter's name within peft.
        part: unet, transformer, text_encoder or text_encoder_2: the prefix in files.
        family: sd15, sd21, sdxl, sd3 or flux.
        rank: the rank asked for; single modules may differ.
        alpha: the alpha asked for; alpha / rank is the strength of every module.
    """

    def __init__(
        self, layers: Mapping[str, LoraLayer], *, name: str, part: str, family: str, rank: int, alpha: float
    ) -> None:
        self.name = name
        self.part = part
        self.family = family
        self.rank = rank
        self.alpha = alpha
        self._layers = dict(layers)

    @property
    def module_names(self) -> tuple[str, ...]:
        """Paths of the adapted modules, in the model's order."""
        return tuple(self._layers)

    @property
    def num_modules(self) -> int:
        """How many modules are adapted."""
        return len(self._layers)

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield ("<module path>.lora_A.weight" or "...lora_B.weight", parameter), in a fixed order."""
        for path, layer in self._layers.items():
            yield f"{path}.lora_A.weight", layer.lora_A[self.name].weight
            yield f"{path}.lora_B.weight", layer.lora_B[self.name].weight

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, in the order of `named_parameters`."""
        return [parameter for _, parameter in self.named_parameters()]

    def ranks(self) -> dict[str, int]:
        """Module path -> rank."""
        return {path: int(layer.r[self.name]) for path, layer in self._layers.items()}

    def alphas(self) -> dict[str, float]:
        """Module path -> alpha; the module's strength is alpha / rank."""
        return {path: float(layer.lora_alpha[self.name]) for path, layer in self._layers.items()}

    def state(self) -> dict[str, Tensor]:
        """Float32 copies on the CPU under the keys of `named_parameters`."""
        return {key: p.detach().to("cpu", torch.float32, copy=True) for key, p in self.named_parameters()}

    def file_state(self) -> dict[str, Tensor]:
        """As `state`, under the canonical names of files ("unet.", "text_encoder.text_model.", ...)."""
        return {names.canonical(key, self.part): value for key, value in self.state().items()}

    def file_alphas(self) -> dict[str, float]:
        """As `alphas`, under the canonical names of files."""
        return {names.canonical(key, self.part): value for key, value in self.alphas().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over weights; keys (plain or canonical) and shapes must be exactly this adapter's.

        Raises:
            ModelError: a key is missing or left over, or a shape differs.
        """
        given = {names.local(key, self.part): value for key, value in state.items()}
        own = {names.local(names.canonical(key, self.part), self.part): p for key, p in self.named_parameters()}
        if given.keys() != own.keys():
            odd = sorted(given.keys() ^ own.keys())
            raise ModelError(f"the LoRA's weights do not fit this adapter: {len(odd)} names differ, first `{odd[0]}`")
        for key, parameter in own.items():
            if given[key].shape != parameter.shape:
                raise ModelError(
                    f"`{key}` has shape {tuple(given[key].shape)}, this adapter needs {tuple(parameter.shape)}"
                )
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(given[key])

    @contextmanager
    def off(self) -> Iterator[None]:
        """Run the model without this adapter; frozen ones underneath stay on."""
        active = {path: list(layer.active_adapters) for path, layer in self._layers.items()}
        try:
            for path, layer in self._layers.items():
                _activate(layer, [name for name in active[path] if name != self.name], trained=None)
            yield
        finally:
            for path, layer in self._layers.items():
                _activate(layer, active[path], trained=self.name)


def add_adapter(
    denoiser: nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    targets: targets.Targets,
    conv_rank: int = 0,
    rank_pattern: Mapping[str, int] | None = None,
    family: str,
    seed: int,
    name: str = "default",
    part: str | None = None,
) -> Adapter:
    """Put a new LoRA on a denoiser (or, with `part="text_encoder"`, on a CLIP text encoder).

    A starts as peft's does (uniform with bound 1/sqrt(fan_in)) from a generator of its own, B at zero, so that the model's
    output is unchanged. Modules of another rank get an alpha in proportion: the strength alpha / rank is everywhere the same.

    Raises:
        ConfigError: targets that match nothing, or a rank that the layers cannot hold.
    """
    part = part or _targets.part_of(family)
    kind = family if part in ("unet", "transformer") else "clip"
    alpha = float(rank) if alpha is None else float(alpha)
    paths = _targets.select(denoiser, targets, kind)
    ranks = _targets.ranks_of(denoiser, paths, rank=rank, conv_rank=conv_rank, rank_pattern=dict(rank_pattern or {}))
    alphas = {path: alpha * r / rank for path, r in ranks.items()}
    layers = _install(denoiser, ranks, alphas, name)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        _initialise(layer, name, generator)
    return Adapter(layers, name=name, part=part, family=family, rank=rank, alpha=alpha)


def adapter_like(
    denoiser: nn.Module,
    state: Mapping[str, Tensor],
    alphas: Mapping[str, float],
    *,
    family: str,
    name: str = "default",
    part: str | None = None,
) -> Adapter:
    """Put the LoRA of a file on a model, trainable: its modules, ranks, alphas and weights.

    Args:
        denoiser: the model, or a text encoder with `part`.
        state: canonical or plain names, as `read_lora` gives them; only those of `part` may be in it.
        alphas: alpha per module, under the same names.
        family: sd15, sd21, sdxl, sd3 or flux.
        name: the adapter's name within peft.
        part: unet, transformer, text_encoder or text_encoder_2.

    Raises:
        ModelError: a module that the model does not have, or a shape that does not fit.
    """
    part = part or _targets.part_of(family)
    ranks, own_alphas, weights = _fitted(denoiser, state, alphas, part)
    layers = _install(denoiser, ranks, own_alphas, name)
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    alpha = max(own_alphas[path] / ranks[path] for path in ranks) * rank
    for path, layer in layers.items():
        _set_weights(layer, name, *weights[path])
    return Adapter(layers, name=name, part=part, family=family, rank=rank, alpha=alpha)


def stack_frozen(
    denoiser: nn.Module,
    loras: Sequence[tuple[Mapping[str, Tensor], Mapping[str, float], float]],
    *,
    part: str,
) -> tuple[str, ...]:
    """Apply earlier LoRAs to the base and freeze them: sum over k of weight_k (alpha_k / rank_k) B_k A_k, exactly.

    Several LoRAs on one module become one of the ranks' sum (A stacked in rows, B in columns), so the result does not depend on
    their order. Call it once, before `add_adapter`.

    Args:
        denoiser: the model, or a text encoder.
        loras: (state, alphas, weight) each, names as `read_lora` gives them.
        part: unet, transformer, text_encoder or text_encoder_2; other parts' modules are left out.

    Returns:
        Paths of the modules that got something.

    Raises:
        ModelError: a module that the model does not have, a shape that does not fit, or a weight that is not finite.
        ValueError: called a second time on the same model.
    """
    if STACK in getattr(denoiser, "peft_config", {}):
        raise ValueError("stack_frozen was already called on this model")
    downs: dict[str, list[Tensor]] = {}
    ups: dict[str, list[Tensor]] = {}
    for state, alphas, weight in loras:
        if not math.isfinite(weight):
            raise ModelError(f"a stacked LoRA's weight is {weight}")
        own = {key: value for key, value in state.items() if names.part_of_key(key) in (part, None)}
        if weight == 0.0 or not own:
            continue
        ranks, own_alphas, weights = _fitted(denoiser, own, alphas, part)
        for path, (down, up) in weights.items():
            downs.setdefault(path, []).append(down)
            ups.setdefault(path, []).append(up * (weight * own_alphas[path] / ranks[path]))
    if not downs:
        return ()
    total = {path: sum(d.shape[0] for d in parts) for path, parts in downs.items()}
    layers = _install(denoiser, total, {path: float(r) for path, r in total.items()}, STACK)
    for path, layer in layers.items():
        _set_weights(layer, STACK, torch.cat(downs[path]), torch.cat(ups[path], dim=1))
        _activate(layer, list(layer.active_adapters), trained=None)
    return tuple(layers)


_targets = targets  # the keyword of `add_adapter` has the module's name


def _install(model: nn.Module, ranks: Mapping[str, int], alphas: Mapping[str, float], name: str) -> dict[str, LoraLayer]:
    """Inject empty peft layers of the given ranks and alphas; everything else of the model stays as it was."""
    kept = list(getattr(model, "peft_config", {}))
    if name in kept:
        raise ValueError(f"the model has an adapter `{name}` already")
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides it by r; a float is as good
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
        _activate(layer, [n for n in kept if n in layer.lora_A] + own, trained=name if name != STACK else None)
    return layers


def _grouped(values: Mapping[str, float]) -> dict[str, float]:
    """One exact pattern per distinct value, which peft matches against whole paths."""
    groups: dict[float, list[str]] = {}
    for path, value in values.items():
        groups.setdefault(value, []).append(re.escape(path))
    return {f"^(?:{'|'.join(paths)})": value for value, paths in groups.items()}


def _activate(layer: LoraLayer, active: list[str], *, trained: str | None) -> None:
    layer.set_adapter(active, inference_mode=True)
    for holder in (layer.lora_A, layer.lora_B):
        for key, module in holder.items():
            if key == trained:
                module.weight.requires_grad_(True)


def _initialise(layer: LoraLayer, name: str, generator: torch.Generator) -> None:
    """A uniform in +-1/sqrt(fan_in), which is kaiming-uniform with a = sqrt(5); B zero."""
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    if _device(layer).type == "meta":
        return
    bound = 1.0 / math.sqrt(math.prod(down.shape[1:]))
    values = torch.rand(down.shape, generator=generator) * (2.0 * bound) - bound
    _set_weights(layer, name, values, torch.zeros(up.shape))


def _set_weights(layer: LoraLayer, name: str, down: Tensor, up: Tensor) -> None:
    device = _device(layer)
    trained = layer.lora_A[name].weight.requires_grad
    for holder, value in ((layer.lora_A[name], down), (layer.lora_B[name], up)):
        weight = value.detach().to(device, torch.float32, copy=True).contiguous()
        holder.weight = nn.Parameter(weight, requires_grad=trained)


def _device(layer: LoraLayer) -> torch.device:
    return next(layer.get_base_layer().parameters()).device


def _fitted(
    model: nn.Module, state: Mapping[str, Tensor], alphas: Mapping[str, float], part: str
) -> tuple[dict[str, int], dict[str, float], dict[str, tuple[Tensor, Tensor]]]:
    """Ranks, alphas and (A, B) under the model's own paths; refuses what the model cannot hold."""
    held = targets.layers(model)
    own = {names.local(names.canonical(path, part), part): path for path in held}
    modules = names.modules({names.local(key, part): value for key, value in state.items()})
    strengths = {names.local(key, part): value for key, value in alphas.items()}
    unknown = [path for path in modules if path not in own]
    if unknown:
        raise ModelError(
            f"{len(unknown)} of the LoRA's {len(modules)} modules are not in this {part}, first `{unknown[0]}`",
            "was it made for another model?",
        )
    ranks, own_alphas, weights = {}, {}, {}
    for path, (down, up) in modules.items():
        layer = held[own[path]]
        out, inner = targets.shape_of(layer)
        kernel = tuple(layer.kernel_size) if isinstance(layer, nn.Conv2d) else ()
        down, up = names.as_layer(down, up, is_conv=bool(kernel))
        if down.shape[1:] != (inner, *kernel) or up.shape[0] != out:
            raise ModelError(
                f"`{path}` is {tuple(down.shape)} and {tuple(up.shape)} in the LoRA, the model's layer is {out} x {inner}",
                "was it made for another model?",
            )
        ranks[own[path]] = down.shape[0]
        own_alphas[own[path]] = float(strengths.get(path, down.shape[0]))
        weights[own[path]] = (down.to(torch.float32), up.to(torch.float32))
    return ranks, own_alphas, weights
