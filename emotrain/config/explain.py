"""pydantic's errors -> problems with file:line, the value, and the likely word."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from emotrain.config.aliases import INSIDE, TOP
from emotrain.config.guess import likely, nearest
from emotrain.config.schema import Preset
from emotrain.config.source import Node, Scalar, resolve_scalar
from emotrain.config.words import as_mapping
from emotrain.errors import Problem

Loc = tuple[int | str, ...]

REASONS = {
    **dict.fromkeys(
        ("lr_scheduler", "lr_scheduler_type", "scheduler", "lr_warmup_steps", "warmup_steps",
         "learning_rate_scheduler", "learning_rate_warmup_steps", "lr_scheduler_num_cycles", "lr_scheduler_args"),
        "leave it out: there is no schedule, an emo optimizer sets its own learning rate",
    ),
    **dict.fromkeys(
        ("epoch", "epochs", "num_epochs", "max_train_epochs", "num_train_epochs"),
        "leave it out: the run stops automatically, and `train.max_steps` is the ceiling",
    ),
    **dict.fromkeys(
        ("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs", "cache_text_embeddings"),
        "leave it out: latents and text are always cached",
    ),
    **dict.fromkeys(
        ("xformers", "sdpa", "mem_eff_attn", "flash_attention"), "leave it out: attention is always the fused one"
    ),
    **dict.fromkeys(
        ("output_dir", "training_folder", "workspace_dir", "logging_dir"),
        "runs go to ./runs: `emotrain run ... --runs-dir DIR`",
    ),
    "cache_dir": "leave it out: the cache has its own place, `emotrain cache info` says where",
    **dict.fromkeys(
        ("network_module", "network_type"),
        "leave it out: it is a LoRA with rank and alpha; `network: {type: lokr, factor: 8}` makes it a LoKr",
    ),
    **dict.fromkeys(("lokr_full_rank", "full_matrix", "decompose_both"), "leave it out: a LoKr's factors are whole"),
    **dict.fromkeys(("enable_bucket", "enable_buckets"), "leave it out: pictures always keep their shape, in buckets"),
    "bucket_no_upscale": "leave it out: pictures are not enlarged unless `dataset.buckets.upscale: true`",
    **dict.fromkeys(
        ("reg_data_dir", "is_reg", "is_reg_data"),
        "regularisation pictures are a folder with `prior`: `dataset.folders: [{path: ..., prior: 1.0}]`",
    ),
    **dict.fromkeys(
        ("caption_ext", "caption_extension"), "did you mean `dataset.captions.extension`, for all folders together?"
    ),
    **dict.fromkeys(
        ("negative_prompt", "neg", "negative"),
        "write it behind a prompt: `sample.prompts: ['a cat --n blurry, text']`",
    ),
    **dict.fromkeys(
        ("v_parameterization", "zero_terminal_snr", "is_v_pred", "v_pred", "prediction_type"),
        "write `model.prediction: v` where the model does not say so itself; `emotrain check` shows what was found",
    ),
    "max_token_length": "leave it out: captions end where the text encoder does; `emotrain lint` names long ones",
    **dict.fromkeys(("unet_lr", "text_encoder_lr"), "there is one rate, `train.lr`, and an emo optimizer needs none"),
    **dict.fromkeys(("fp8_base", "fp8_base_unet", "quantize_base"), "write `model.quantize: fp8`"),
    "optimizer_args": "write them under the optimizer: `train.optimizer: {name: emosens, use_shadow: true}`",
    **dict.fromkeys(("save_every_n_epochs", "sample_every_n_epochs"), "count steps: `save.every`, `sample.every`"),
    **dict.fromkeys(("low_vram", "lowvram", "highvram", "medvram"), "leave it out, or write `model.memory: 8gb`"),
    "<<": "merge keys are not read here; share settings through `extends:`",
}  # fmt: skip
_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "`true` or `false`",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping (`key: value` lines)",
    "model_type": "a mapping (`key: value` lines)",
}
_MISSING: dict[Loc, str] = {
    **dict.fromkeys((("model",), ("dataset",)), "two keys are enough: `model:` and `dataset:`"),
    ("model", "base"): "`model: ./models/x.safetensors` names a file, a folder or a hub id; a lone `~` is nothing",
    ("dataset", "folders"): "`dataset: ./mika` names the folder of the pictures; a lone `~` is nothing in YAML",
}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def explain(error: ValidationError, root: Node) -> list[Problem]:
    """One problem for each place that is wrong, in the order of the lines.

    Args:
        error: of `Preset.model_validate`.
        root: the tree that the validated values came from.
    """
    places: dict[Loc, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        loc = _place(detail, root)
        if detail["type"] == "too_short" and _node_at(root, loc).value:
            continue  # the list is filled; its items are wrong, and have their own errors
        places.setdefault(loc, []).append(detail)
    found = [(_node_at(root, loc), _explain_place(loc, details, root))
             for loc, details in places.items()]  # fmt: skip
    found.sort(key=lambda pair: (pair[0].source, pair[0].line or 0))
    return [problem for _, problem in found]


def show(loc: Loc) -> str:
    """`("dataset", "folders", 0, "path")` -> `dataset.folders[0].path`."""
    if loc[:3] == ("train", "optimizer", "name"):
        return "train.optimizer"
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _walk(root: Node, loc: Loc) -> Iterator[Node]:
    node = root
    yield node
    for part in loc:
        if isinstance(node.value, dict) and part in node.value:
            node = node.value[str(part)]
        elif isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
        else:
            return
        yield node


def _node_at(root: Node, loc: Loc) -> Node:
    """The node at `loc`, or the nearest above it that has a line."""
    return list(_walk(root, loc))[-1]


def _place(detail: ErrorDetails, root: Node) -> Loc:
    """The error's place without the parts that name a branch of a union."""
    loc = detail["loc"]
    depth = len(list(_walk(root, loc))) - 1
    return loc[: depth + 1] if detail["type"] == "missing" else loc[:depth]


def _explain_place(loc: Loc, details: list[ErrorDetails], root: Node) -> Problem:
    node = _node_at(root, loc)
    kinds = {detail["type"] for detail in details}
    if "missing" in kinds:
        return Problem(f"{node.where}: {show(loc)} is missing", _MISSING.get(loc))
    if "extra_forbidden" in kinds:
        return _explain_extra(loc, node)
    value = _written(node)
    for detail in details:
        if detail["type"] == "value_error":
            reason, _, hint = str(detail["ctx"]["error"]).partition("|")
            what = f"{show(loc)} is {value}"
            if detail["loc"][-1] == "[key]":
                what = f"{show(loc[:-1])} has the key `{loc[-1]}`"
            return Problem(f"{node.where}: {what}, {reason}", hint or None)
    expected, words = _expected(details)
    type_hint = _type_hint(node, words, kinds)
    if kinds <= set(_WANTED) and len(kinds) == 1:
        return Problem(f"{node.where}: {show(loc)} is {value}, which is not {expected}", type_hint)
    return Problem(f"{node.where}: {show(loc)} is {value}, but must be {expected}", type_hint)


def _expected(details: list[ErrorDetails]) -> tuple[str, list[str]]:
    """What would have been right, as the end of a sentence; and the words among it."""
    phrases: list[str] = []
    words: list[str] = []
    for detail in details:
        kind, context = detail["type"], detail.get("ctx", {})
        if kind == "literal_error":
            words += str(context["expected"]).replace(" or ", ", ").replace("'", "").split(", ")
        elif kind in _BOUNDS:
            key, word = _BOUNDS[kind]
            phrases.append(f"{word} {context[key]:g}")
        elif kind == "too_short":
            phrases.append(f"a list of at least {context['min_length']}")
        else:
            phrases.append(_WANTED.get(kind, detail["msg"]))
    if words:
        phrases.insert(0, ("one of " if len(words) > 1 else "") + ", ".join(f"`{w}`" for w in words))
    return " or ".join(dict.fromkeys(phrases)), words


def _type_hint(node: Node, words: list[str], kinds: set[str]) -> str | None:
    value = node.value
    if not isinstance(value, str):
        if value is None and node.text and node.text.startswith("#"):
            return f"in YAML `{node.text}` is a comment: put it in quotes"
        if value is None:
            return "leave the line out to get the default"
        if "string_type" in kinds and isinstance(value, dict | list):
            return "put the text in quotes: in YAML `[a]` is a list and `a: b` a mapping"
        return None
    if "bool_type" in kinds and value.casefold() in ("yes", "on", "no", "off"):
        return f"write `{'true' if value.casefold() in ('yes', 'on') else 'false'}`"
    if kinds & {"int_type", "float_type"} and node.text is None:
        unquoted: Scalar = resolve_scalar(value)
        if isinstance(unquoted, int | float) and not isinstance(unquoted, bool):
            return "leave the quotes out"
    if re.fullmatch(r"\s*\d{1,5}\s*[,xX]\s*\d{1,5}\s*", value) and kinds & {"int_type", "int_parsing"}:
        side = re.split(r"[,xX]", value)[0].strip()
        return f"one number is enough, the side of a square of that area: `{side}`; pictures keep their shape"
    return likely(value.rpartition(".")[2], words) or likely(value, words) if words else None


def _written(node: Node) -> str:
    """The value as the preset has it, short enough for one line."""
    if isinstance(node.value, dict):
        return "a mapping" if node.value else "an empty mapping"
    if isinstance(node.value, list):
        return "a list" if node.value else "an empty list"
    if node.value is None:
        return "empty"
    text = node.text if node.text is not None else str(node.value)
    return f"`{text[:60]}{'...' if len(text) > 60 else ''}`"


def _explain_extra(loc: Loc, node: Node) -> Problem:
    key = str(loc[-1])
    section = section_at(loc[:-1])
    inside = f"of `{show(loc[:-1])}`" if len(loc) > 1 else "of a preset"
    got = f" (got {_written(node)})" if not isinstance(node.value, dict | list) else ""
    message = f"{node.where}: `{key}` is not a key {inside}{got}"
    return Problem(message, _key_hint(key, loc, section))


def _key_hint(key: str, loc: Loc, section: type[BaseModel] | None) -> str | None:
    if key in REASONS:
        return REASONS[key]
    if "." in key and len(loc) == 1:
        first, _, rest = key.partition(".")
        if first in field_names(Preset):
            return f"write `{first}:` and, indented below it, `{rest}:`"
    own = field_names(section) if section else ()
    found = nearest(key, own)
    if found:
        return f"did you mean `{found}`?"
    elsewhere = [path for path in all_keys() if path.split(".")[-1] == key]
    if elsewhere:
        return f"did you mean `{elsewhere[0]}`?"
    foreign: Mapping[str, str] = TOP if len(loc) == 1 else INSIDE.get(str(loc[0]), {})
    word = nearest(key, foreign)
    if word:
        return f"did you mean `{foreign[word]}`?"
    return likely(key, all_keys()) or (f"valid keys: {', '.join(own)}" if own else None)


def field_names(section: type[BaseModel]) -> tuple[str, ...]:
    """The keys of a section as a preset writes them."""
    return tuple(field.alias or name for name, field in section.model_fields.items())


def section_at(loc: Loc) -> type[BaseModel] | None:
    """The section that lies at a place of the preset, None where there is a plain value."""
    section: type[BaseModel] | None = Preset
    for part in loc:
        if isinstance(part, int):
            continue
        if section is None:
            return None
        fields = {field.alias or name: field for name, field in section.model_fields.items()}
        section = section_in(fields[part].annotation) if part in fields else None
    return section


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, alone or in a list; None where it holds none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (tuple, Union, types.UnionType):
        for one in get_args(annotation):
            if found := section_in(one):
                return found
    return None


def all_keys(section: type[BaseModel] = Preset, prefix: str = "") -> list[str]:
    """Every key from the top, sections too: `train`, `train.optimizer`, `train.optimizer.name`, ..."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        keys.append(prefix + (field.alias or name))
        inner = section_in(field.annotation)
        if inner:
            keys += all_keys(inner, f"{keys[-1]}.")
    return keys


def leaf(root: Node, dotted: str) -> Node | None:
    """The node at `section.key`, None if the preset does not set it."""
    node: Node | None = root
    for part in dotted.split("."):
        node = as_mapping(node).get(part)
    return node
