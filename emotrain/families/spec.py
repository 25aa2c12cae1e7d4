"""What there is to say of a model family without opening a file: the kinds of facts (no torch).

A family is a folder here: `spec.py` holds one `FamilySpec` (or several that share everything else), `configs.json` the
public models' own configs, `model.py` the class that encodes, predicts and draws. `registry.py` lists the families.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

from emotrain.errors import ModelError

Shapes = Mapping[str, tuple[int, ...]]  # tensor name -> shape

CLIP_TOKENIZERS = "stabilityai/stable-diffusion-xl-base-1.0"  # not gated; the second one pads with `!`
T5_TOKENIZER = "google/t5-v1_1-xxl"

# How parts of a checkpoint begin; those of models for which ComfyUI has no names of their own begin as SD's do.
TEXTS_BEGIN, VAE_BEGINS = ("text_encoders.", "cond_stage_model."), ("vae.", "first_stage_model.")


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder of a family."""

    name: str  # as in a diffusers folder: text_encoder, text_encoder_2, ...
    # of model; only CLIP encoders can be trained. An adapter lies in the denoiser's file, and works on what the first
    # encoder gives.
    kind: Literal["clip", "t5", "llm", "adapter"]
    parameters: int  # of the public one
    tokenizer: tuple[str, str]  # a public repository that holds its tokenizer, and the folder in it
    tokenizer_class: str = "CLIPTokenizer"  # of transformers
    prefixes: tuple[str, ...] = ("text_encoders.",)  # how its tensors begin in a single file of the whole model
    max_tokens: int = 77  # what the stock pipeline pads or cuts to
    adds_tokens: bool = True  # whether its tokens are tokens of the denoiser's, or widen those of another encoder
    lora_modules: int = 0  # modules that a LoRA on the public one has; 0 where it is never trained
    optional: bool = False  # the model works without it
    chat_template: bool = False  # captions go through the tokenizer's chat template
    # of what the denoiser takes: a key of its config, and how many of the encoder's layers stand side by side
    width: tuple[str, int] = ("", 1)
    # of the encoder and its tokenizer in a diffusers folder, where they are other ones than by its name
    folders: tuple[str, str] = ("", "")
    # how many of its layers are read; those above them, and the last norm, are left out of memory, and may be left out
    # of a file. 0: all.
    layers_read: int = 0

    @property
    def quantizable(self) -> bool:
        """Whether its layers may be held in fewer bits: large ones, which are never trained."""
        return self.kind in ("t5", "llm")

    @property
    def folder(self) -> str:
        """Its folder in a diffusers folder."""
        return self.folders[0] or self.name

    @property
    def tokenizer_folder(self) -> str:
        """Its tokenizer's folder in a diffusers folder."""
        return self.folders[1] or self.tokenizer_name

    @property
    def tokenizer_name(self) -> str:
        """Its tokenizer's name: tokenizer, tokenizer_2, ..."""
        return self.name.replace("text_encoder", "tokenizer")


@dataclass(frozen=True)
class Variant:
    """One public model of a family."""

    parameters: int  # of its denoiser
    # how many modules a LoRA has per named set of targets, counted on the meta device; a test counts again
    modules: Mapping[str, int]
    architecture: str  # `modelspec.architecture` of LoRA files
    repository: str = ""  # on the hub, where its sizes stand for the files
    text_encoders: tuple[TextEncoder, ...] = ()  # where they are others than the family's


@dataclass(frozen=True)
class Group:
    """One module of the original model: its dotted name, and diffusers' modules in the order of its output rows."""

    name: str
    parts: tuple[str, ...]
    swaps: bool = False  # (shift, scale) here is (scale, shift) there


class OriginalNames(Protocol):
    """Names of the original checkpoints, which kohya and ComfyUI files use, against diffusers' names."""

    @property
    def heads(self) -> tuple[str, ...]:
        """By which an original name is recognised."""

    @property
    def words(self) -> tuple[str, ...]:
        """Segments of paths that hold an underscore: kohya writes dots as underscores."""

    @property
    def joins(self) -> bool:
        """Whether an original module may be several of diffusers'."""

    def to_original(self, path: str) -> Group | None:
        """The original module that a diffusers path belongs to; None where there is none."""

    def from_original(self, path: str) -> Group | None:
        """The group of a dotted original name; None where it is not one."""


@dataclass(frozen=True)
class NameTable:
    """Names by a table of (original, diffusers' parts), in which {i} is a number.

    `swaps` names originals whose two halves (shift, scale) are the other way round in diffusers.
    """

    rows: tuple[tuple[str, tuple[str, ...]], ...]
    heads: tuple[str, ...]
    swaps: re.Pattern[str] | None = None

    @property
    def words(self) -> tuple[str, ...]:
        paths = [path for original, parts in self.rows for path in (original, *parts)]
        return tuple(sorted({word for path in paths for word in path.split(".") if "_" in word}))

    @property
    def joins(self) -> bool:
        """Whether an original module may be several of diffusers'; not where it is only read so, in others' files."""
        alone = {parts[0] for _, parts in self.rows if len(parts) == 1}
        return any(len(parts) > 1 and parts[0] not in alone for _, parts in self.rows)

    def to_original(self, path: str) -> Group | None:
        for original, parts in self.rows:
            for part in parts:
                if found := _rule(part).fullmatch(path):
                    return self._filled(original, parts, found.groups())
        return None

    def from_original(self, path: str) -> Group | None:
        for original, parts in self.rows:
            if found := _rule(original).fullmatch(path):
                return self._filled(original, parts, found.groups())
        return None

    def _filled(self, original: str, parts: tuple[str, ...], numbers: tuple[str, ...]) -> Group:
        number = numbers[0] if numbers else ""
        swaps = self.swaps is not None and self.swaps.fullmatch(original) is not None
        return Group(original.replace("{i}", number), tuple(p.replace("{i}", number) for p in parts), swaps)


def double_blocks(first: str, second: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Rows of FLUX's blocks of two streams; `first` and `second` are diffusers' names of the feed-forward's layers."""
    block = "transformer_blocks.{i}"
    rows = []
    for theirs, qkv, out, mlp in (
        ("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff"),
        ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context"),
    ):
        rows += [
            (f"double_blocks.{{i}}.{theirs}_attn.qkv", tuple(f"{block}.attn.{name}" for name in qkv)),
            (f"double_blocks.{{i}}.{theirs}_attn.proj", (f"{block}.attn.{out}",)),
            (f"double_blocks.{{i}}.{theirs}_mlp.0", (f"{block}.{mlp}.{first}",)),
            (f"double_blocks.{{i}}.{theirs}_mlp.2", (f"{block}.{mlp}.{second}",)),
        ]
    return tuple(rows)


@cache
def _rule(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{i\}", r"(\d+)"))


def never(shapes: Shapes) -> bool:
    """No widths tell."""
    return False


@dataclass(frozen=True)
class LoraFacts:
    """How LoRA files of a family look."""

    targets: Mapping[str, tuple[str, ...]]  # "attn", "mlp" and "rest": regular expressions of whole module paths
    heads: tuple[str, ...]  # how diffusers' paths of its denoiser begin
    originals: OriginalNames  # names of the original model
    # the file layout that ComfyUI, A1111 and diffusers all read at exactly the trained strength
    layout: Literal["kohya", "diffusers", "comfyui"]
    loader: str  # diffusers' mixin that reads such files
    base_version: str  # `ss_base_model_version`
    marks: tuple[str, ...] = ()  # regular expressions of diffusers' paths that this family alone has
    # tells the family by its widths, module path -> (in, out), where names alone do not
    recognise: Callable[[Shapes], bool] = never
    # whether that returns alphas: always, where asked, or never (it folds them in)
    loader_alphas: Literal["always", "asked", "never"] = "never"
    unread_layouts: tuple[str, ...] = ()  # layouts that diffusers cannot read for this family, or not with every target
    lokr_layouts: tuple[str, ...] = ()  # layouts in which diffusers reads a LoKr of this family
    kohya_originals: bool = True  # kohya's files use the original's names (else diffusers')
    comfyui_originals: bool = True  # `diffusion_model.` files use the original's names (else diffusers')
    kohya_text: str = "lora_te1"  # prefix of the first text encoder in kohya's files
    implementation: str = ""  # `modelspec.implementation`, the original code
    stated: tuple[str, ...] = ()  # words in the metadata of others' files by which they name the family
    # a family whose files have the same names: metadata alone tell them apart, and either fits the other
    alike: str = ""

    def joins(self, layout: str) -> bool:
        """Whether one module of a layout is several of ours, such as q, k and v."""
        originals = {"kohya": self.kohya_originals, "comfyui": self.comfyui_originals}.get(layout, False)
        return originals and self.originals.joins


@dataclass(frozen=True)
class Distilled:
    """How a model draws that was distilled to few steps; its weights look like those it was made from."""

    steps: int = 8  # that it was made for, where its name says no number of them
    words: tuple[str, ...] = ()  # that tell it of this family's models, beside those of all
    unless: str = ""  # a word beside which those do not
    variants: tuple[str, ...] = ()  # public models whose sizes alone tell

    def tells(self, name: str) -> bool | None:
        """Whether a name says that its model was distilled; False where it says that this was undone, None: neither."""
        words = " ".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)).lower()
        if _UNDONE.search(words):
            return False
        own = set(words.split())
        return True if _FEW_STEPS.search(words) or (own & {*self.words} and self.unless not in own) else None


_FEW_STEPS = re.compile(
    r"turbo|lightning|distill|lcm\b|dmd\b|\bhyper(?=sd|xl|flux|\b)(?! real| photo| detail)"  # not hyperrealism
)
_UNDONE = re.compile(r"(?:\b(?:de|un|non|not|anti) |de|un)(?:turbo|distill)|\btraining adapter\b")


Check = Callable[[Path, Shapes, Mapping[str, Any]], None]


def by_signs(variant: str, *signs: str) -> Callable[[Path, Shapes], str | None]:
    """Recognises a public model by tensors that it alone has, for `FileFacts.variant_of`."""
    return lambda path, shapes: variant if all(sign in shapes for sign in signs) else None


def nothing_to_check(path: Path, shapes: Shapes, config: Mapping[str, Any]) -> None:
    """A single file whose tensor names alone say enough."""


def same_sizes(
    title: str, models: str, blocks: Mapping[str, str], *, inputs: str | None = None, width: str | None = None
) -> Check:
    """Refuses a file of other sizes than its config's: pruned, taking more than latents, or one that came later.

    Args:
        title: of the family.
        models: what to train on.
        blocks: how the tensors of each kind of block begin, and the config's key for their number.
        inputs: a tensor whose last side is the config's `in_channels`.
        width: a tensor whose last side is that of all attention heads together.
    """

    def check(path: Path, shapes: Shapes, config: Mapping[str, Any]) -> None:
        numbers = {kind: {name.split(".")[1] for name in shapes if name.startswith(f"{kind}.")} for kind in blocks}
        sizes = [(kind, len(numbers[kind]), int(config.get(key, len(numbers[kind])))) for kind, key in blocks.items()]
        if inputs is not None:
            sizes.append(("inputs", shapes.get(inputs, (0, 0))[-1], int(config["in_channels"])))
        if width is not None:
            wide = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
            sizes.append(("channels", shapes[width][-1], wide))
        if odd := [size for size in sizes if size[1] != size[2]]:
            own = ", ".join(f"{there} {what}" for what, there, _ in odd)
            wanted = ", ".join(str(number) for _, _, number in odd)
            raise ModelError(
                f"`{path}` has {own}, and {title} has {wanted}: a pruned model or one of another kind",
                f"train on {models}",
            )

    return check


@dataclass(frozen=True)
class FileFacts:
    """How a single file of a family looks, in the original layout."""

    # which public model the shapes belong to, "" for the only one; None: another family. Names come without the
    # denoiser's prefix. Raises ModelError for near relatives that cannot be trained.
    variant_of: Callable[[Path, Shapes], str | None]
    heads: tuple[str, ...]  # how the denoiser's tensors begin
    vae_prefixes: tuple[str, ...] = ("vae.",)  # how the VAE's tensors begin
    # refuses what the names alone do not show; gets path, shapes and the denoiser's config
    check: Check = nothing_to_check


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """One family; sizes in pixels."""

    name: str  # in presets
    title: str  # for people
    folder: str = ""  # of `configs.json` and `model.py`; by itself the name
    pipeline: str  # diffusers' class, which model_index.json names
    denoiser: Literal["unet", "transformer"] = "transformer"  # unet or transformer, as in a diffusers folder
    denoiser_class: str  # of diffusers
    model_class: str  # in `model.py`
    resolution: int = 1024  # of the public model
    latent_channels: int = 16  # of the VAE
    guidance: float  # of samples
    text_encoders: tuple[TextEncoder, ...]  # in the order of the pipeline
    variants: Mapping[str, Variant]  # public models by name; the first is meant where nothing is said
    lora: LoraFacts = field(repr=False)  # how LoRA files look
    file: FileFacts = field(repr=False)  # how single files look
    blocks: tuple[str, ...]  # classes that gradient checkpointing computes again
    vae_scale: int = 8  # pixels per latent
    bucket_step: int = 64  # sides are multiples of this
    vae_class: str = "AutoencoderKL"  # of diffusers
    flow: bool = True  # rectified flow; else epsilon or v
    # which layer of CLIP, counted from the last as 1, the prompt is taken from; 0 where none is chosen
    clip_skip: int = 0
    packed_channels: int = 1  # the denoiser's input channels are these times the latent channels
    patch: int = 1  # latents per token and side, as the stock pipeline counts them for the scheduler
    vae_patch: int = 1  # latents are patches of that many of the VAE's own per side
    distilled: Distilled = Distilled()  # its models of few steps
    # shipped presets for captions that are tags, by what the model predicts
    tag_presets: Mapping[str, str] = field(default_factory=dict)
    other_pipelines: tuple[str, ...] = ()  # further pipelines that such folders name
    # how configs of other trainers name it ("trainer word"), and the shipped preset for it, "" for none
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.folder:
            object.__setattr__(self, "folder", self.name)

    @property
    def trainable_encoders(self) -> tuple[TextEncoder, ...]:
        """Text encoders that can carry a LoRA."""
        return tuple(encoder for encoder in self.text_encoders if encoder.lora_modules)

    @property
    def separate_files(self) -> bool:
        """Whether the text encoder is a large one alone, which ComfyUI keeps in a file of its own."""
        return all(encoder.kind != "clip" for encoder in self.text_encoders)

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest text encoder."""
        return max(encoder.max_tokens for encoder in self.text_encoders)

    def encoders_of(self, variant: str) -> tuple[TextEncoder, ...]:
        """The text encoders of a public model, or of one of another size ("custom")."""
        own = self.variants[variant].text_encoders if variant in self.variants else ()
        return own or self.text_encoders

    def encoder(self, name: str) -> TextEncoder:
        return next(encoder for encoder in self.text_encoders if encoder.name == name)
