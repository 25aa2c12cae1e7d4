"""What a training step keeps in memory, counted on the meta device: shapes are real, numbers are not.

The forward pass runs under saved-tensor hooks, which see everything that autograd keeps. Attention
is replaced by a stand-in that keeps what the fused kernels keep; without it the meta device falls
back to plain attention and the count is several times too high.

Shape letters: B batch, C latent channels, H W latent height and width, S tokens, D width.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emotrain.families.loading import family_class
from emotrain.families.quantize import in_large_linears
from emotrain.families.registry import FAMILIES
from emotrain.families.structure import by_masks
from emotrain.families.texts import CLIP_TOKENS
from emotrain.lora.adapter import Adapter, adapter_like, add_adapter
from emotrain.lora.file import LoraFile
from emotrain.lora.targets import part_of
from emotrain.runs.adapters import text_kwargs

# what diffusers computes again with gradient checkpointing
BLOCKS = frozenset(block for spec in FAMILIES.values() for block in spec.blocks)


@dataclass(frozen=True)
class TextMemory:
    """Trained text encoders: bytes that autograd keeps of them, their LoRA modules, its parameters and their own."""

    saved: int = 0
    modules: tuple[tuple[str, int], ...] = ()
    num_trained: int = 0
    num_parameters: int = 0


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes that autograd keeps over one forward pass; `block` is the largest block's share.

    `latents` is the shape that was counted with, `forward` what a pass without gradients holds at most for one picture
    of that size, `block_weights` the numbers of the largest block, `other_weights` those that are in no block,
    `linear` those that a quantisation stores in fewer bits, and `tables` those that are no parameters: SD3's places.
    """

    saved: int
    saved_checkpointed: int
    block: int
    adapter: Adapter
    num_parameters: int
    latents: tuple[int, int, int, int]
    forward: int
    block_weights: int
    other_weights: int
    linear: int
    text: TextMemory = TextMemory()
    tables: int = 0

    @property
    def num_trained(self) -> int:
        """Parameters of the LoRA, text encoders too."""
        return self.adapter.num_parameters + self.text.num_trained

    @property
    def plain(self) -> int:
        """Peak of activations without gradient checkpointing."""
        return self.saved + self.text.saved

    @property
    def checkpointed(self) -> int:
        """Peak with it: what is kept, and the largest block, whose inside is computed again.

        The text encoders, small beside the denoiser, keep all of theirs.
        """
        return self.saved_checkpointed + self.block + self.text.saved


class _Attention(torch.autograd.Function):
    """Keeps what flash and memory-efficient attention keep: q, k, v, output and log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError


class _FusedAttention(TorchFunctionMode):
    """Attention as GPUs have it, which keeps no matrix of weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*_first_three(args, kwargs))  # type: ignore[no-untyped-call]
        known = by_masks(func, args, kwargs)
        return func(*args, **kwargs) if known is NotImplemented else known


def _first_three(args: Any, kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    names = ("query", "key", "value")
    return tuple(args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))


@dataclass
class _Count:
    """Sums unique storages; it keeps hold of the tensors, since freed storages give their identity away.

    `outside` sums those that stay with gradient checkpointing: what is kept outside of the blocks that it computes
    again, and what goes into them. `shares` is what each block keeps inside.
    """

    skip: set[int]
    total: int = 0
    outside: int = 0
    shares: list[int] = field(default_factory=list)
    is_inside: bool = False
    seen: dict[int, Tensor] = field(default_factory=dict)
    stay: dict[int, Tensor] = field(default_factory=dict)

    def pack(self, tensor: Tensor) -> Tensor:
        self.total += self._new(tensor, self.seen)
        if not self.is_inside:
            self.outside += self._new(tensor, self.stay)
        return tensor

    def block(self, block: Callable[..., Any], *args: Any) -> Any:
        """In the place of gradient checkpointing: calls a block as it is."""
        self.outside += sum(self._new(leaf, self.stay) for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        before, self.is_inside = self.total, True
        try:
            return block(*args)
        finally:
            self.is_inside = False
            self.shares.append(self.total - before)

    def _new(self, tensor: Tensor, held: dict[int, Tensor]) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata in self.skip or storage._cdata in held:
            return 0
        held[storage._cdata] = tensor
        return storage.nbytes()


def count_saved(model: nn.Module, run: Callable[[], Any], resident: Iterable[Tensor] = ()) -> tuple[int, int, int]:
    """Bytes that autograd keeps over `run()` besides weights and `resident` tensors.

    Returns:
        All; those that stay with gradient checkpointing; those of the largest block that it computes again.
    """
    count = _Count({t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *resident)})
    is_denoiser = hasattr(model, "enable_gradient_checkpointing")  # of diffusers; a text encoder keeps all
    if is_denoiser:
        model.enable_gradient_checkpointing(count.block)  # type: ignore[operator]
    with saved_tensors_hooks(count.pack, lambda tensor: tensor), _FusedAttention():
        run()
    if is_denoiser:
        model.disable_gradient_checkpointing()  # type: ignore[operator]
    return count.total, count.outside, max(count.shares, default=0)


class _Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors that are alive at once, but for those in `skip`."""

    def __init__(self, skip: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen, self.now, self.peak = skip, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, identity: int, size: int) -> None:
        self.seen.discard(identity)
        self.now -= size


def count_living(model: nn.Module, run: Callable[[], Any], resident: Iterable[Tensor] = ()) -> int:
    """Bytes that a pass without gradients holds at most besides weights and `resident` tensors."""
    living = _Living({t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *resident)})
    with torch.no_grad(), living, _FusedAttention():
        run()
    return living.peak


def block_weights(model: nn.Module) -> tuple[int, int]:
    """Parameters of the largest block, and of all that is in no block."""
    sizes = [sum(p.numel() for p in m.parameters()) for m in model.modules() if type(m).__name__ in BLOCKS]
    return max(sizes, default=0), sum(p.numel() for p in model.parameters()) - sum(sizes)


def build_on_meta(family: str, config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """The frozen denoiser without weights."""
    import diffusers

    cls = getattr(diffusers, FAMILIES[family].denoiser_class)
    with torch.device("meta"):
        model: nn.Module = cls.from_config(config)
    model = nn.Module.to(model, dtype)
    wide = set(getattr(model, "_keep_in_fp32_modules", None) or ())  # as diffusers loads it
    for name, module in model.named_modules():
        if wide & set(name.split(".")):
            module.to(torch.float32)
    return model.requires_grad_(False).eval()


def num_parameters(family: str, config: dict[str, Any]) -> int:
    """Of a denoiser."""
    return sum(p.numel() for p in build_on_meta(family, config, torch.float32).parameters())


def measure(
    family: str,
    config: dict[str, Any],
    *,
    latents: tuple[int, int, int, int],
    num_tokens: int,
    low: torch.dtype | None,
    adapter_kwargs: dict[str, Any],
    encoders: Mapping[str, tuple[str, dict[str, Any]]] | None = None,
    earlier: LoraFile | None = None,
) -> ActivationMemory:
    """Count one forward pass of a denoiser with its LoRA.

    Args:
        family: a name of `emotrain.families.registry.FAMILIES`.
        config: of the denoiser, as in its config.json.
        latents: B, C, H, W of the largest bucket.
        num_tokens: text tokens of the model.
        low: dtype of the base (bf16, fp16); None is float32 throughout.
        adapter_kwargs: as `adapters.adapter_kwargs` gives them.
        encoders: text encoders that are trained too: name -> (class, config).
        earlier: the LoRA that is continued, whose modules and ranks count in place of `adapter_kwargs`.

    Raises:
        ModelError: the earlier LoRA does not fit the model.
        ConfigError: targets that match nothing, or a rank that the layers cannot hold.
    """
    model = build_on_meta(family, config, low or torch.float32)
    num_parameters = sum(p.numel() for p in model.parameters())
    sizes, tables = (*block_weights(model), in_large_linears(model)), sum(b.numel() for b in model.buffers())
    if earlier is None:
        adapter = add_adapter(model, family=family, seed=0, **adapter_kwargs)
    else:
        state, alphas = earlier.of_part(part_of(family))
        adapter = adapter_like(model, {name: value.to("meta") for name, value in state.items()}, alphas, family=family)
    adapter.use_half_precision(low or torch.float32)
    run = _forward(family, model, latents, num_tokens, low or torch.float32, grad=bool(encoders))
    saved, checkpointed, block = count_saved(model, run, adapter.half_weights)
    one = _forward(family, model, (1, *latents[1:]), num_tokens, low or torch.float32)
    forward = count_living(model, one, adapter.half_weights)
    text = measure_texts(family, encoders or {}, latents[0], low, adapter_kwargs)
    return ActivationMemory(saved, checkpointed, block, adapter, num_parameters, latents, forward, *sizes, text, tables)


def measure_texts(
    family: str,
    encoders: Mapping[str, tuple[str, dict[str, Any]]],
    batch: int,
    low: torch.dtype | None,
    kwargs: dict[str, Any],
) -> TextMemory:
    """Count one forward pass of CLIP text encoders with their LoRA; arguments as those of `measure`."""
    import transformers

    saved, trained, parameters, modules = 0, 0, 0, []
    for name, (kind, config) in encoders.items():
        with torch.device("meta"):
            model: nn.Module = getattr(transformers, kind)(transformers.CLIPTextConfig(**config))
        model = nn.Module.to(model, low or torch.float32).requires_grad_(False).eval()
        parameters += sum(p.numel() for p in model.parameters())
        adapter = add_adapter(model, family=family, part=name, seed=0, **text_kwargs(kwargs))
        adapter.use_half_precision(low or torch.float32)
        tokens = min(int(config.get("max_position_embeddings", CLIP_TOKENS)), CLIP_TOKENS)
        ids = torch.zeros(batch, tokens, dtype=torch.int64, device="meta")
        saved += count_saved(model, partial(model, ids, output_hidden_states=True), adapter.half_weights)[0]
        trained += adapter.num_parameters
        modules.append((name, adapter.num_modules))
    return TextMemory(saved, tuple(modules), trained, parameters)


def _forward(
    family: str,
    model: nn.Module,
    latents: tuple[int, int, int, int],
    num_tokens: int,
    dtype: torch.dtype,
    grad: bool = False,
) -> Callable[[], Tensor]:
    """A call of the family's own `predict` with tensors of the right shapes."""
    from emotrain.batch import Conditioning

    cls = family_class(family)
    built = object.__new__(cls)
    built.denoiser, built.device, built.dtype = model, torch.device("meta"), dtype
    built._placed = True
    batch = latents[0]
    text = {
        name: torch.empty(batch, *shape, device="meta", requires_grad=grad)
        for name, shape in cls.text_shapes(model.config, num_tokens).items()
    }
    sizes = torch.zeros(batch, 2, dtype=torch.int64, device="meta")
    noisy, times = torch.empty(latents, device="meta"), torch.zeros(batch, device="meta")
    return lambda: built.predict(noisy, times, text, Conditioning(sizes, sizes, sizes))
