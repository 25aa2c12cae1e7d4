"""The LoRA on a live model: peft layers with float32 weights, seeded, switchable, and nothing global touched.

y = W x + (alpha / rank) B A x, Hu et al. 2021 (arXiv:2106.09685), A [rank, in], B [out, rank].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from emotrain.batch import fetch
from emotrain.errors import ModelError
from emotrain.lora import names
from emotrain.lora import targets as rules
from emotrain.lora.half import HalfLora, HalfWeights
from emotrain.lora.inject import activate, fitted, fitted_krons, initialise, install, set_weights
from emotrain.lora.kron import Kron
from emotrain.lora.lokr import HalfLokr, Lokr, attach, empty

STACK = "stack"
HIDDEN = "hidden"  # the stack that samples are drawn without
FP16_LOSS_SCALE = 4096.0  # float16 ends at 6e-8: without it 7 to 19 % of a real model's LoRA gradients become zero


class Adapter:
    """A LoRA that lives on a model. Its weights are float32 whatever the model's dtype is.

    Args:
        layers: path in the model -> peft layer that holds this adapter (a LoKr in a `LokrAdapter`).
        name: the adapter's name within peft.
        part: unet, transformer, text_encoder or text_encoder_2: the prefix in files.
        family: a name of `emotrain.families.registry.FAMILIES`.
        rank: the rank asked for; single modules may differ.
        alpha: the alpha asked for; alpha / rank is the strength of every module.
        models: the models that the layers are in, each with its own layers.
    """

    def __init__(
        self,
        layers: Mapping[str, Any],
        *,
        name: str,
        part: str,
        family: str,
        rank: int,
        alpha: float,
        models: Sequence[tuple[nn.Module, Mapping[str, Any]]] = (),
    ) -> None:
        self.name = name
        self.part = part
        self.family = family
        self.rank = rank
        self.alpha = alpha
        self.factor: int | None = None  # a LoKr's
        self._layers = dict(layers)
        self._models = tuple(models)
        self._halves: list[HalfWeights] = []
        self.loss_scale = 1.0  # of the loss before the backward pass; above 1 in float16

    def use_half_precision(self, dtype: torch.dtype) -> None:
        """Give the layers the forward of `lora.half`, on a base in `dtype`; in float32 they keep peft's.

        Call it when the model is on its device and before an optimizer looks at the parameters, which are exchanged.
        """
        if dtype == torch.float32:
            return
        self._halves = self._halved(dtype)
        self.loss_scale = FP16_LOSS_SCALE if dtype == torch.float16 else 1.0

    def _halved(self, dtype: torch.dtype) -> list[HalfWeights]:
        return [HalfLora(model, layers, self.name, dtype) for model, layers in self._models]

    @property
    def title(self) -> str:
        """What it is, in words."""
        return f"rank {self.rank}"

    @property
    def half_weights(self) -> list[Tensor]:
        """The copies of the weights in the base's dtype, and the buffers of the same size for their gradients."""
        return [tensor for half in self._halves for tensor in (half.low, half.grads)]

    @property
    def half_gradients(self) -> list[Tensor]:
        """The buffers that a backward pass adds to; empty where some weights get their gradients from autograd."""
        held = sum(len(half.parameters) for half in self._halves)
        return [half.grads for half in self._halves] if held == len(self.parameters()) else []

    def collect_gradients(self) -> None:
        """After each backward pass: bring the gradients into the parameters' `grad`, still times `loss_scale`."""
        for half in self._halves:
            half.collect()

    def unscale_gradients(self) -> None:
        """After the last backward pass of a step: take `loss_scale` out of the gradients."""
        if self.loss_scale != 1.0:
            torch._foreach_div_([p.grad for p in self.parameters() if p.grad is not None], self.loss_scale)

    def gradients(self) -> list[Tensor]:
        """All gradients, the half-precision layers' in one buffer for each model: what clipping works on."""
        flat = {id(p) for half in self._halves for p in half.parameters}
        single = [p.grad for p in self.parameters() if p.grad is not None and id(p) not in flat]
        return [*(half.gradient for half in self._halves), *single]

    def drop_gradients(self) -> None:
        """Forget the gradients, also those of a backward pass that did not come to its end."""
        for half in self._halves:
            half.grads.zero_()
            half.forget()
        for parameter in self.parameters():
            parameter.grad = None

    @property
    def module_names(self) -> tuple[str, ...]:
        """Paths of the adapted modules, in the model's order."""
        return tuple(self._layers)

    @property
    def num_modules(self) -> int:
        """How many modules are adapted."""
        return len(self._layers)

    def num_modules_by_part(self) -> dict[str, int]:
        """unet, transformer, text_encoder...: how many modules each has."""
        parts = [names.canonical(path, self.part).split(".", 1)[0] for path in self._layers]
        return {part: parts.count(part) for part in dict.fromkeys(parts)}

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
        keys, parameters = zip(*self.named_parameters(), strict=True)
        return dict(zip(keys, (copy.float() for copy in fetch(parameters)), strict=True))

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
        given = {names.canonical(key, self.part): value for key, value in state.items()}
        own = {names.canonical(key, self.part): p for key, p in self.named_parameters()}
        if given.keys() != own.keys():
            odd = sorted(names.local(key, self.part) for key in given.keys() ^ own.keys())
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
                activate(layer, [name for name in active[path] if name != self.name], trained=None)
            yield
        finally:
            for path, layer in self._layers.items():
                activate(layer, active[path], trained=self.name)


class LokrAdapter(Adapter):
    """A LoKr that lives on a model: as `Adapter`, with "<module path>.lokr_w1" and "...lokr_w2" for weights.

    Its strength is 1: `ranks` are empty, and every alpha is 1.

    Args:
        layers: path in the model -> LoKr.
        factor: rows and columns of w1 that were asked for; single modules may have fewer.
        kwargs: as those of `Adapter`.
    """

    def __init__(self, layers: Mapping[str, Lokr], *, factor: int, **kwargs: Any) -> None:
        super().__init__(layers, rank=0, alpha=1.0, **kwargs)
        self.factor = factor

    def _halved(self, dtype: torch.dtype) -> list[HalfWeights]:
        return [HalfLokr(model, layers, dtype) for model, layers in self._models]

    @property
    def title(self) -> str:
        return f"LoKr with factor {self.factor}"

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield ("<module path>.lokr_w1" or "...lokr_w2", parameter), in a fixed order."""
        for path, lokr in self._layers.items():
            yield path + names.W1, lokr.w1.weight
            yield path + names.W2, lokr.w2.weight

    def ranks(self) -> dict[str, int]:
        """None: a LoKr has no rank."""
        return {}

    def alphas(self) -> dict[str, float]:
        return dict.fromkeys(self._layers, 1.0)

    @contextmanager
    def off(self) -> Iterator[None]:
        active = {path: lokr.active for path, lokr in self._layers.items()}
        try:
            for lokr in self._layers.values():
                lokr.active = False
            yield
        finally:
            for path, lokr in self._layers.items():
                lokr.active = active[path]


def join(denoiser: Adapter, texts: Sequence[Adapter]) -> Adapter:
    """The LoRA of a denoiser and those of its text encoders as one: trained, switched and saved together.

    The denoiser's modules keep their plain paths, those of the encoders have canonical ones
    ("text_encoder_2.text_model...").
    """
    layers = dict(denoiser._layers)
    for adapter in texts:
        layers.update({names.canonical(path, adapter.part): layer for path, layer in adapter._layers.items()})
    models = [*denoiser._models, *(model for adapter in texts for model in adapter._models)]
    kwargs: dict[str, Any] = {
        "name": denoiser.name, "part": denoiser.part, "family": denoiser.family, "models": models
    }  # fmt: skip
    if isinstance(denoiser, LokrAdapter):
        return LokrAdapter(layers, factor=denoiser.factor or 1, **kwargs)
    return Adapter(layers, rank=denoiser.rank, alpha=denoiser.alpha, **kwargs)


def add_adapter(
    denoiser: nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    targets: rules.Targets,
    conv_rank: int = 0,
    rank_pattern: Mapping[str, int] | None = None,
    factor: int | None = None,
    family: str,
    seed: int,
    name: str = "default",
    part: str | None = None,
) -> Adapter:
    """Put a new LoRA on a denoiser (or, with `part="text_encoder"`, on a CLIP text encoder).

    A starts as peft's does (uniform with bound 1/sqrt(fan_in)) from a generator of its own, B at zero, so that
    the model's output is unchanged. Modules of another rank get an alpha in proportion: the strength
    alpha / rank is everywhere the same. With a `factor` it is a LoKr, for which ranks and alpha mean nothing.

    Raises:
        ConfigError: targets that match nothing, or a rank that the layers cannot hold.
    """
    part = part or rules.part_of(family)
    kind = family if part in ("unet", "transformer") else "clip"
    alpha = float(rank) if alpha is None else float(alpha)
    paths = rules.select(denoiser, targets, kind)
    if factor is not None:
        generator = torch.Generator().manual_seed(seed)
        held = rules.layers(denoiser)
        krons = {path: empty(rules.whole_shape(held[path]), factor, generator) for path in paths}
        return _lokr(denoiser, krons, name=name, part=part, family=family, factor=factor)
    ranks = rules.ranks_of(denoiser, paths, rank=rank, conv_rank=conv_rank, rank_pattern=dict(rank_pattern or {}))
    alphas = {path: alpha * r / rank for path, r in ranks.items()}
    layers = install(denoiser, ranks, alphas, name)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        initialise(layer, name, generator)
    models = [(denoiser, layers)]
    return Adapter(layers, name=name, part=part, family=family, rank=rank, alpha=alpha, models=models)


def adapter_like(
    denoiser: nn.Module,
    state: Mapping[str, Tensor],
    alphas: Mapping[str, float],
    *,
    family: str,
    name: str = "default",
    part: str | None = None,
) -> Adapter:
    """Put the LoRA or LoKr of a file on a model, trainable: its modules, ranks, alphas and weights.

    Args:
        denoiser: the model, or a text encoder with `part`.
        state: canonical or plain names, as `read_lora` gives them; only those of `part` may be in it.
        alphas: alpha per module, under the same names.
        family: a name of `emotrain.families.registry.FAMILIES`.
        name: the adapter's name within peft.
        part: unet, transformer, text_encoder or text_encoder_2.

    Raises:
        ModelError: a module that the model does not have, or a shape that does not fit.
    """
    part = part or rules.part_of(family)
    krons = fitted_krons(denoiser, state, part)
    if krons:
        factors = [max(kron.w1.shape) for kron in krons.values()]
        factor = max(sorted(set(factors)), key=factors.count)
        return _lokr(denoiser, krons, name=name, part=part, family=family, factor=factor)
    ranks, own_alphas, weights = fitted(denoiser, state, alphas, part)
    layers = install(denoiser, ranks, own_alphas, name)
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    alpha = max(own_alphas[path] / ranks[path] for path in ranks) * rank
    for path, layer in layers.items():
        set_weights(layer, name, *weights[path])
    models = [(denoiser, layers)]
    return Adapter(layers, name=name, part=part, family=family, rank=rank, alpha=alpha, models=models)


def _lokr(
    model: nn.Module, krons: Mapping[str, Kron], *, name: str, part: str, family: str, factor: int
) -> LokrAdapter:
    held = rules.layers(model)
    lokrs = attach(held, krons, name, trained=True)
    return LokrAdapter(lokrs, factor=factor, name=name, part=part, family=family, models=[(model, lokrs)])


def stack_frozen(
    denoiser: nn.Module,
    loras: Sequence[tuple[Mapping[str, Tensor], Mapping[str, float], float]],
    *,
    part: str,
    name: str = STACK,
) -> tuple[str, ...]:
    """Apply earlier LoRAs to the base and freeze them: sum over k of weight_k (alpha_k / rank_k) B_k A_k, exactly.

    Several LoRAs on one module become one of the ranks' sum (A stacked in rows, B in columns), so the result does
    not depend on their order. LoKrs stay what they are, one after the other. Call it once, before `add_adapter`.

    Args:
        denoiser: the model, or a text encoder.
        loras: (state, alphas, weight) each, names as `read_lora` gives them.
        part: unet, transformer, text_encoder or text_encoder_2; other parts' modules are left out.
        name: of the stack; the one called HIDDEN is left out by `hidden_off`.

    Returns:
        Paths of the modules that got something.

    Raises:
        ModelError: a module that the model does not have, a shape that does not fit, or a weight that is not finite.
        ValueError: called a second time on the same model with that name.
    """
    if name in getattr(denoiser, "peft_config", {}):
        raise ValueError("stack_frozen was already called on this model")
    downs: dict[str, list[Tensor]] = {}
    ups: dict[str, list[Tensor]] = {}
    krons: list[tuple[str, Kron]] = []
    for state, alphas, weight in loras:
        if not math.isfinite(weight):
            raise ModelError(f"a stacked LoRA's weight is {weight}")
        own = {key: value for key, value in state.items() if names.part_of_key(key) in (part, None)}
        if not own and part in ("unet", "transformer"):
            raise ModelError(f"a stacked LoRA has no weights for this {part}")
        if weight == 0.0 or not own:
            continue
        for path, kron in fitted_krons(denoiser, own, part).items():
            krons.append((path, Kron(kron.w1, kron.w2 * weight)))
        ranks, own_alphas, weights = fitted(denoiser, own, alphas, part)
        for path, (down, up) in weights.items():
            downs.setdefault(path, []).append(down)
            ups.setdefault(path, []).append(up * (weight * own_alphas[path] / ranks[path]))
    held = rules.layers(denoiser)
    for number, (path, kron) in enumerate(krons):
        attach(held, {path: kron}, f"{name}_{number}", trained=False)
    touched = tuple(dict.fromkeys((*downs, *(path for path, _ in krons))))
    if not downs:
        return touched
    total = {path: sum(d.shape[0] for d in parts) for path, parts in downs.items()}
    layers = install(denoiser, total, {path: float(r) for path, r in total.items()}, name, trained=False)
    for path, layer in layers.items():
        set_weights(layer, name, torch.cat(downs[path]), torch.cat(ups[path], dim=1))
    return touched


@contextmanager
def hidden_off(*models: nn.Module) -> Iterator[None]:
    """Run models without the stack called HIDDEN; everything else on them stays as it is."""
    layers = [module for model in models for module in model.modules()]
    scaled = [layer.scaling for layer in layers if isinstance(layer, LoraLayer) and HIDDEN in layer.scaling]
    before = [scaling[HIDDEN] for scaling in scaled]
    lokrs = [
        child
        for layer in layers
        for name, child in layer.named_children()
        if isinstance(child, Lokr) and name.startswith(f"lokr_{HIDDEN}_")
    ]
    try:
        for scaling in scaled:
            scaling[HIDDEN] = 0.0
        for lokr in lokrs:
            lokr.active = False
        yield
    finally:
        for scaling, value in zip(scaled, before, strict=True):
            scaling[HIDDEN] = value
        for lokr in lokrs:
            lokr.active = True
