"""Whether the parts of a model's folder are what their configs say, and work together, before a weight is read.

The models are built on the meta device, which has shapes and no numbers, and called there once by the family's own
methods: what only a forward pass would meet in a run is met here.
"""

from __future__ import annotations

import inspect
import os
import re
import tempfile
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from emotrain.batch import Conditioning
from emotrain.errors import ModelError
from emotrain.families.common import LoadedFamily, refuse_larger_tokenizer
from emotrain.families.component import guard, known_class, weight_files
from emotrain.families.encoder_file import own_names
from emotrain.families.headers import own_name, read_header, read_index, read_json
from emotrain.families.kept import stamp_of
from emotrain.families.loading import assemble
from emotrain.families.pieces import ENCODERS, load_encoder, load_tokenizer, scheduler_class, text_parts
from emotrain.families.registry import FAMILIES, configs, encoder_configs
from emotrain.families.separate import diffusers_vae, own_vae_config, tokenizer_of
from emotrain.families.single import as_published, copy_tokenizer
from emotrain.families.sniff import MAX_SIZE, Sniffed, odd_value, refuse_other_vae
from emotrain.families.sniff_file import companion
from emotrain.families.spec import Shapes, TextEncoder
from emotrain.families.structure import by_masks
from emotrain.families.understood import PARTS, STATED, refuse_quantised, scaled_layers

LATENT_INPUTS = tuple(  # of a VAE's decoder: their second side is the latent channels
    f"{head}decoder.{name}.weight" for head in ("", "first_stage_model.", "vae.") for name in ("conv_in", "conv1")
)
MAX_TABLE = 4096  # of fields that are the side of a table of positions
TABLES = ("pos_embed_max_size", "base_size")
SPARE = 500  # parameters that a model may register besides eight times those that are stored: tied and replaced ones
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # which diffusers still reads
SEVERAL = re.compile(r"\b(?:[Tt]uple|[Ll]ist|Sequence|ndarray)\b(?:\[(?:[^\[\]]|\[[^\[\]]*\])*\])?")
OPEN_CLIP = {  # transformers' names of CLIP's parts -> OpenCLIP's
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias",
    "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
DAMAGED = "the download may be damaged or not complete"
_WORKING: set[Hashable] = set()  # folders as they were when their parts were called: a queue's runs ask for each again


def refuse_misfit(found: Sniffed, sample_steps: int = 20) -> LoadedFamily:
    """Refuse a diffusers folder with a part that a run could not use, by its configs and headers alone.

    Args:
        found: a folder.
        sample_steps: steps of a sample, which the scheduler must know how to place.

    Returns:
        The model without weights, on the meta device.

    Raises:
        ModelError: a config value of another type or size than its class takes, weights that do not belong to the
            config, a tokenizer larger than its encoder, or parts that do not work together.
    """
    import diffusers

    spec, folder = FAMILIES[found.family], Path(found.path)
    index = read_index(folder)
    denoiser = known_class(str(folder), spec.denoiser, index, frozenset((spec.denoiser_class,)))
    pieces: dict[str, Any] = {
        "scheduler": _scheduler(folder, index, found, sample_steps),
        "denoiser": on_meta(getattr(diffusers, denoiser), folder / spec.denoiser),
        "vae": on_meta(getattr(diffusers, spec.vae_class), folder / "vae"),
    }
    for encoder in spec.encoders_of(found.variant):
        pieces[encoder.name], pieces[encoder.tokenizer_name] = _encoder(folder, index, encoder)
    family = _family(found, pieces)
    asked = (str(folder), found.family, found.variant, found.prediction, found.bucket_step, stamp_of(str(folder)))
    if asked not in _WORKING:
        _call(found, family)
        _WORKING.add(asked)
    return family


def from_configs(found: Sniffed) -> LoadedFamily:
    """A model without weights or tokenizers, from the sizes that are known of it: of a single file or a hub id."""
    import diffusers
    import transformers

    spec = FAMILIES[found.family]
    pieces: dict[str, Any] = {"scheduler": diffusers.DDIMScheduler()}
    if spec.flow:
        pieces["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler()
    pieces["scheduler"].register_to_config(**found.scheduler_config)
    with torch.device("meta"):
        for part, cls, config in (
            ("denoiser", spec.denoiser_class, found.denoiser_config),
            ("vae", spec.vae_class, configs(found.family)["vae"]),
        ):
            pieces[part] = guard(str(found.path), part, partial(getattr(diffusers, cls).from_config, config))
        for encoder in spec.encoders_of(found.variant):
            kind, words = encoder_configs(found.family, found.variant)[encoder.name]
            of_text = getattr(transformers, kind, None)
            built = of_text(of_text.config_class(**words)) if of_text else getattr(diffusers, kind).from_config(words)
            pieces[encoder.name], pieces[encoder.tokenizer_name] = built, _NoTokenizer()
    return _family(found, pieces)


def refuse_misfit_file(found: Sniffed, tokenizer: str | None = None) -> None:
    """Refuse a single file whose denoiser lacks a tensor, or has one in another shape than its config says.

    Args:
        found: the file.
        tokenizer: `model.tokenizer`.

    Raises:
        ModelError: with the first name; also where a tokenizer is neither beside the file nor to be had.
    """
    import diffusers
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    spec, path = FAMILIES[found.family], Path(found.path)
    own = companion(path) / spec.denoiser / "config.json"
    cls, header = getattr(diffusers, spec.denoiser_class), read_header(path)
    if own.is_file():
        refuse_other_types(own, read_json(own), cls)
    with bounded(str(path), len(header.shapes)), torch.device("meta"):
        model: nn.Module = guard(str(path), "", lambda: cls.from_config(found.denoiser_config))
        apart = tuple(prefix for encoder in spec.text_encoders for prefix in encoder.prefixes if found.kind == "file")
        held = {
            name: torch.empty(shape)
            for name, shape in header.shapes.items()
            if not own_name(name).startswith((*apart, *PARTS)) and not name.endswith(STATED)
        }
        convert = SINGLE_FILE_LOADABLE_CLASSES[spec.denoiser_class]["checkpoint_mapping_fn"]
        made = guard(
            str(path),
            "",
            lambda: convert(config=dict(found.denoiser_config), checkpoint=as_published(found.family, held)),
        )
    refuse_other_tensors(str(path), model, {name: tuple(value.shape) for name, value in made.items()})
    for encoder in spec.encoders_of(found.variant):
        if encoder.name not in found.missing and not spec.separate_files:
            _refuse_lacking_texts(path, found, encoder, header.shapes)
    for encoder in spec.encoders_of(found.variant):
        if spec.separate_files:
            tokenizer_of(found, encoder, tokenizer)
        elif not encoder.optional or encoder.name not in found.missing:
            with tempfile.TemporaryDirectory(prefix="emotrain-") as folder:
                copy_tokenizer(encoder, companion(path), Path(folder), path)


def _refuse_lacking_texts(path: Path, found: Sniffed, spec: TextEncoder, shapes: Shapes) -> None:
    """Refuse a single file that lacks a tensor of a text encoder which it holds, by either library's names.

    Also one that has others of a T5, of which every tensor is read.
    """
    import transformers

    kind, words = encoder_configs(found.family, found.variant)[spec.name]
    own = companion(path) / spec.name / "config.json"
    cls = getattr(transformers, kind)
    config = read_json(own) if own.is_file() else words
    refuse_other_types(own, config, cls.config_class)
    with bounded(str(path), len(shapes)), torch.device("meta"):
        model: nn.Module = guard(str(path), spec.name, lambda: cls(cls.config_class(**config)))
    (prefix,) = spec.prefixes
    held = {name.removeprefix(prefix).removeprefix("transformer.") for name in shapes if name.startswith(prefix)}
    held = {name.removeprefix("text_model.") for name in held}
    wanted = {name.removeprefix("text_model.") for name, _ in model.named_parameters()}
    if any(name.startswith("resblocks.") for name in held):
        wanted = {OPEN_CLIP.get(name, name) for name in wanted}
        wanted = {_open_clip_layer(name) for name in wanted}
    given_else = {"text_projection.weight", "encoder.embed_tokens.weight", "shared.weight"}
    if lacking := sorted(wanted - held - given_else):
        raise ModelError(
            f"`{path}` lacks {len(lacking)} tensors of its {spec.name}, such as `{lacking[0]}`",
            "the file is not complete, or it is a model of another kind",
        )
    known = wanted | given_else
    if spec.quantizable and (odd := sorted(own_names(kind, dict.fromkeys(held), spec, scaled=True).keys() - known)):
        raise ModelError(
            f"`{path}` has {len(odd)} tensors that its {spec.name} does not have, such as `{odd[0][:100]}`",
            "is it a model of another kind, or an extension of one?",
        )


def _open_clip_layer(name: str) -> str:
    """A parameter of a CLIP layer by OpenCLIP's name: q, k and v are one there."""
    found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if found is None:
        return name
    number, inner, kind = found.groups()
    if inner in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        return f"resblocks.{number}.attn.in_proj_{kind}"
    return f"resblocks.{number}.{OPEN_CLIP[inner]}.{kind}"


def refuse_misfit_vae(vae: str, found: Sniffed) -> None:
    """Refuse a VAE of the preset's own, a file or a folder, by its config and header alone.

    Raises:
        ModelError: of another number of latent channels, or with tensors that do not belong to its config.
    """
    import diffusers

    spec, path = FAMILIES[found.family], Path(vae).expanduser()
    cls = getattr(diffusers, spec.vae_class)
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        refuse_other_vae(vae, read_json(folder / "config.json"), found)
        on_meta(cls, folder)
    if not path.is_file():
        return
    shapes = read_header(path).shapes
    first = next((shapes[name] for name in LATENT_INPUTS if len(shapes.get(name, ())) > 1), None)
    if first is not None:
        refuse_other_vae(vae, {"latent_channels": first[1]}, found)
    config = own_vae_config(path, found)
    refuse_other_types(path, config, cls)
    with bounded(vae, len(shapes)), torch.device("meta"):
        model: nn.Module = guard(vae, "", lambda: cls.from_config(config))
        held = {name: torch.empty(shape) for name, shape in shapes.items()}
        held = guard(vae, "", lambda: diffusers_vae(held, spec.vae_class, config))
    refuse_other_tensors(vae, model, {name: tuple(value.shape) for name, value in held.items()})


class _NoTokenizer:
    model_max_length = 10**9


# ------------------------------------------------------------ one part


def on_meta(cls: Any, folder: Path) -> nn.Module:
    """A model of diffusers without its weights, which are in its folder under the names that it gives them.

    Raises:
        ModelError: see `refuse_misfit`.
    """
    config = read_json(folder / "config.json")
    refuse_other_types(folder / "config.json", config, cls)
    stored = stored_shapes(folder)
    with bounded(str(folder), len(stored)), torch.device("meta"):
        model: nn.Module = guard(str(folder), "", lambda: cls.from_config(config))
    refuse_other_tensors(str(folder), model, stored)
    return model.requires_grad_(False).eval()


def refuse_other_types(file: Path, config: dict[str, Any], cls: Any) -> None:
    """Refuse a config with a value of another type than the class takes, or a size that no model has.

    Raises:
        ModelError: with the field.
    """
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name not in config or parameter.annotation is inspect.Parameter.empty:
            continue
        kind = parameter.annotation
        words = kind if isinstance(kind, str) else kind.__name__ if isinstance(kind, type) else str(kind)
        value = config[name]
        may_be_none = parameter.default is None or "None" in words or "Optional" in words
        if not (value is None and may_be_none) and not _fits(value, words, _most(name)):
            raise odd_value(file, name, value)


def _most(name: str) -> int:
    return MAX_TABLE if name in TABLES else 2**31 if name.endswith(("_id", "_ids")) else MAX_SIZE


def _fits(value: Any, words: str, most: int) -> bool:
    """Whether a value of JSON is of a type that an annotation names; what is in a list may be of any type in it."""
    if isinstance(value, list):
        return SEVERAL.search(words) is not None and all(_is_of(one, words, most) for one in _flat(value))
    return _is_of(value, SEVERAL.sub("", words), most)


def _flat(values: list[Any]) -> Iterator[Any]:
    for value in values:
        yield from _flat(value) if isinstance(value, list) else (value,)


def _is_of(value: Any, words: str, most: int) -> bool:
    names = set(re.findall(r"\w+", words))
    if isinstance(value, bool):
        return "bool" in names
    if isinstance(value, int):
        return bool(names & {"int", "float"}) and abs(value) <= most
    if isinstance(value, float):
        return "float" in names or ("int" in names and value.is_integer() and abs(value) <= most)
    if isinstance(value, str):
        return bool(names & {"str", "Literal", "dtype"})
    return isinstance(value, dict) and bool(re.search("dict|Mapping|Config", words, re.IGNORECASE))


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a component's files.

    Raises:
        ModelError: no file that can be read, weights in a quantised form, or an index of files that are not there.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    files = weight_files(folder)
    for file in files:
        header = read_header(file)
        refuse_quantised(file, header)
        if scaled_layers(header):
            raise ModelError(
                f"`{file}` holds scaled fp8 weights, which are read from single files alone",
                "use the folder's bf16 or fp16 version",
            )
        shapes |= header.shapes
    for index in sorted(folder.glob("*.safetensors.index.json")):
        placed = read_json(index).get("weight_map")
        named = set(map(str, placed.values())) if isinstance(placed, dict) else {"weight_map"}
        if lacking := sorted(named - {file.name for file in folder.glob("*.safetensors")}):
            raise ModelError(f"`{index}` names `{lacking[0][:60]}`, which is not there", DAMAGED)
    return shapes


@contextmanager
def bounded(where: str, num_stored: int) -> Iterator[None]:
    """Refuse to build a model of many more parameters than are stored: a config can ask for millions of layers."""
    left = 8 * num_stored + SPARE

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ModelError(f"`{where}` has {num_stored} tensors, and its config asks for many more", DAMAGED)

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def refuse_other_tensors(where: str, model: nn.Module, stored: Shapes) -> None:
    """Refuse files that lack a parameter of a model, have it in another shape, or hold a tensor that it has not.

    Raises:
        ModelError: with the first name.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    own = {_new_name(name, wanted): shape for name, shape in stored.items()}
    lacking = sorted({name for name, _ in model.named_parameters()} - own.keys())
    if lacking:
        raise ModelError(
            f"`{where}` lacks {len(lacking)} of its tensors, such as `{lacking[0]}`",
            "its file is not complete, or its tensors have other names; download it again",
        )
    for name in sorted(wanted.keys() & own.keys()):
        if own[name] != wanted[name]:
            raise ModelError(f"`{where}` has {own[name]} for `{name}`, and its config {wanted[name]}", DAMAGED)
    known = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    odd = [name for name in sorted(own.keys() - wanted.keys()) if not any(one.search(name) for one in known)]
    if odd:
        raise ModelError(
            f"`{where}` has {len(odd)} tensors that its model does not have, such as `{odd[0][:100]}`",
            "is it a model of another kind, or an extension of one?",
        )


def _new_name(name: str, wanted: Shapes) -> str:
    stem, _, last = name.rpartition(".")
    above, _, old = stem.rpartition(".")
    new = f"{above}.{OLD_NAMES[old]}.{last}" if old in OLD_NAMES else name
    return new if new in wanted and name not in wanted else name


def _encoder(folder: Path, index: dict[str, Any], spec: Any) -> tuple[Any, Any]:
    """A text encoder without its weights, and its tokenizer; None for both where the model has none."""
    import transformers

    if (index.get(spec.folder) or [None])[0] is None:
        return None, None
    where, name = folder / spec.folder, known_class(str(folder), spec.folder, index, ENCODERS[spec.kind])
    if spec.kind == "adapter":
        import diffusers

        return on_meta(getattr(diffusers, name), where), load_tokenizer(str(folder), index, spec, None)
    kind = getattr(transformers, name)
    refuse_other_types(where / "config.json", read_json(where / "config.json"), kind.config_class)
    with bounded(str(where), len(stored_shapes(where))):
        return load_encoder(str(folder), index, spec, torch.float32, None, device_map="meta")


# ------------------------------------------------------------ all of them


def _scheduler(folder: Path, index: dict[str, Any], found: Sniffed, steps: int) -> Any:
    """The scheduler, which has placed and taken a step of a sample."""
    cls, where = scheduler_class(str(folder), index), folder / "scheduler"
    refuse_other_types(where / "scheduler_config.json", found.scheduler_config, cls)
    scheduler = guard(str(where), "", lambda: cls.from_config(found.scheduler_config))

    def step() -> None:
        own = cls.from_config(scheduler.config)
        shifts = {"mu": 1.0} if own.config.get("use_dynamic_shifting") else {}
        own.set_timesteps(min(steps, int(own.config.num_train_timesteps)), **shifts)
        latents = torch.zeros(1, found.latent_channels, 2, 2)
        own.step(latents, own.timesteps[0], latents)

    guard(str(where), "", step)
    return scheduler


class _NoNumbers(TorchFunctionMode):
    """Tensors of the meta device stay there where the code would look at them; masks are taken for full ones."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cpu:
            return args[0]
        if func is Tensor.__bool__ and args[0].is_meta:
            return True
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].is_meta:
            return args[0].flatten(0, args[1].dim() - 1) if args[1].dtype == torch.bool else func(*args)
        known = by_masks(func, args, kwargs or {})
        return func(*args, **(kwargs or {})) if known is NotImplemented else known


def _family(found: Sniffed, pieces: dict[str, Any]) -> LoadedFamily:
    """The family's own object around parts on the meta device."""
    where = str(found.path)
    texts = guard(where, "tokenizer", lambda: text_parts(found, pieces))
    family = guard(where, "", lambda: assemble(found, pieces, texts, torch.device("meta"), torch.float32))
    family._placed = True
    family._identities = {"text": "", "vae": ""}  # there are no numbers to tell it by
    if not FAMILIES[found.family].flow:
        family.scheduler_config["prediction_type"] = found.prediction
    return family


@torch.no_grad()
def _call(found: Sniffed, family: LoadedFamily) -> None:
    """Encode a picture and a text, predict once, decode: by the family's own methods."""
    spec, where, meta = FAMILIES[found.family], str(found.path), torch.device("meta")
    for part in family.text_encoders:
        refuse_larger_tokenizer(part)
    pixels = torch.empty(1, 3, found.bucket_step, found.bucket_step, device=meta)
    sizes = torch.zeros(1, 2, dtype=torch.int64, device=meta)
    with _NoNumbers():
        latents = guard(where, "vae", lambda: family.encode_images(pixels))
        side = found.bucket_step // found.vae_scale
        _refuse_shape(os.path.join(where, "vae"), "latents", latents, (1, found.latent_channels, side, side))
        embeds = guard(where, "text_encoder", lambda: family.encode_texts(["a"]))
        predicted = guard(
            where,
            spec.denoiser,
            lambda: family.predict(latents, torch.zeros(1, device=meta), embeds, Conditioning(sizes, sizes, sizes)),
        )
        _refuse_shape(os.path.join(where, spec.denoiser), "latents", predicted, tuple(latents.shape))
        decoded = guard(where, "vae", lambda: family.decode_latents(latents))
        _refuse_shape(os.path.join(where, "vae"), "a picture", decoded, tuple(pixels.shape))


def _refuse_shape(where: str, what: str, made: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(made.shape) != wanted:
        raise ModelError(f"`{where}` makes {what} of the shape {tuple(made.shape)} instead of {wanted}", DAMAGED)
