"""`emotrain lora`: LoRA files of any program, looked into, converted and merged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from emotrain.cli import output
from emotrain.cli.options import Json
from emotrain.errors import ConfigError
from emotrain.files import is_regular

if TYPE_CHECKING:
    from emotrain.lora.convert import Written

app = typer.Typer(help="Inspect, convert and merge LoRA files")


Format = Literal["kohya", "diffusers", "comfyui"]
AnyFormat = Literal["auto", "kohya", "diffusers", "comfyui"]
Yes = Annotated[bool, typer.Option("--yes", help="Write over an existing file")]
Out = Annotated[Path, typer.Option("-o", "--out", help="The new .safetensors file")]


@app.command()
def inspect(
    file: Annotated[str, typer.Argument(help="A LoRA file, or a run's folder or name")],
    as_json: Json = False,
) -> None:
    """Show what is in a LoRA file.

    Layout, family, ranks, alphas, the strength of every block, what made it and what it was made from. Keys that belong
    to no module are listed.

    Examples:
        emotrain lora inspect mika.safetensors
        emotrain lora inspect mika --json
    """
    from emotrain.lora.file import read_lora
    from emotrain.lora.summary import summarise
    from emotrain.runs.parents import lora_of

    found = summarise(read_lora(lora_of(file), allow_partial=True))
    for key in found["ignored"]:
        output.warning(f"`{key}` belongs to no module of {found['family']}")
    if found["left_out"]:
        output.warning(found["left_out"])
    if as_json:
        output.json_object(found)
    else:
        _show(found)


@app.command()
def keys(
    family: Annotated[str, typer.Argument(help="A family or a variant: sdxl, flux, zimage, sd35-large, ...")],
    targets: Annotated[
        Literal["attn", "attn-mlp", "all"], typer.Option("--targets", help="Set of modules")
    ] = "attn-mlp",
    text_encoder: Annotated[bool, typer.Option("--text-encoder", help="With the CLIP text encoders")] = False,
    format: Annotated[AnyFormat, typer.Option("--format", help="Layout of the file")] = "auto",
    as_json: Json = False,
) -> None:
    """List the tensor names of a LoRA file at real size.

    No model is needed: the public sizes are built in, and no weights are read.

    Examples:
        emotrain lora keys sdxl
        emotrain lora keys flux --targets all --format kohya --json
    """
    from emotrain.runs.lora_keys import lora_keys

    found = lora_keys(family, target_set=targets, text_encoder=text_encoder, format=format)
    if as_json:
        output.json_object(found)
        return
    for key in found["keys"]:
        output.result(key)
    output.note(f"{found['modules']} modules, {len(found['keys'])} tensors, {found['format']} layout")


@app.command()
def convert(
    file: Annotated[str, typer.Argument(help="A LoRA file of any known layout, or a run's folder or name")],
    to: Annotated[Format, typer.Option("--to", help="The new layout")],
    out: Out,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Convert a LoRA file to another layout.

    The update of every module stays what it was. The new file is read back and compared.

    Examples:
        emotrain lora convert flux-kohya.safetensors --to diffusers -o flux.safetensors
    """
    from emotrain.lora.convert import convert as convert_file
    from emotrain.runs.parents import lora_of

    _report(convert_file(lora_of(file), to, out, overwrite=yes), {}, as_json)


@app.command()
def merge(
    files: Annotated[
        list[str],
        typer.Argument(help="Files or runs, two or more", metavar="FILE[:WEIGHT]..."),
    ],
    out: Out,
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="Bring it down to this rank by SVD  [default: exact, ranks add up]"),
    ] = None,
    format: Annotated[AnyFormat, typer.Option("--format", help="Layout of the file")] = "auto",
    dtype: Annotated[
        Literal["auto", "fp16", "bf16", "fp32"],
        typer.Option("--dtype", help="auto: the files' own where that loses nothing"),
    ] = "auto",
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Merge LoRA files into one.

    Exact: the ranks add up. With --rank the nearest LoRA of that rank is taken, and its error is said.

    Examples:
        emotrain lora merge mika.safetensors:0.8 style.safetensors:1.0 -o both.safetensors
        emotrain lora merge a.safetensors:0.5 b.safetensors:0.5 -o half.safetensors --rank 16
    """
    from emotrain.lora.convert import merge_files
    from emotrain.runs.parents import lora_of

    parts = [(lora_of(path), weight) for path, weight in map(_weighted, files)]
    written, merged = merge_files(parts, out, rank=rank, format=format, dtype=dtype, overwrite=yes)
    ranks = sorted(set(merged.ranks.values()))
    facts: dict[str, Any] = {"ranks": ranks}
    if rank is not None:
        facts |= {"error": merged.error, "worst_module": merged.worst[0], "worst_error": merged.worst[1]}
        if not as_json:
            worst = f", at most {merged.worst[1]:.2%} in `{merged.worst[0]}`" if merged.worst[0] else ""
            output.note(f"rank {rank} leaves out {merged.error:.2%} of the update{worst}")
    _report(written, facts, as_json)


def _weighted(text: str) -> tuple[str, float]:
    """`FILE:WEIGHT` or `FILE`; a file of that very name comes first."""
    path, colon, weight = text.rpartition(":")
    if not colon or is_regular(Path(text)):
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        if len(path) == 1:  # C:\lora.safetensors
            return text, 1.0
        raise ConfigError(f"`{weight}` in `{text}` is not a weight", "write FILE:0.8") from None


def _report(written: Written, facts: dict[str, Any], as_json: bool) -> None:
    for line in written.warnings:
        output.warning(line)
    if not as_json:
        output.note(f"{written.modules} modules, {written.format} layout, {written.dtype}, read back and compared")
        output.result(str(written.path))
        return
    output.json_object(
        {
            "path": str(written.path),
            "sha256": written.sha256,
            "format": written.format,
            "family": written.family,
            "dtype": written.dtype,
            "modules": written.modules,
            **facts,
        }
    )


def _show(found: dict[str, Any]) -> None:
    def counted(values: dict[str, int]) -> str:
        return ", ".join(value if len(values) == 1 else f"{value} ({count}x)" for value, count in values.items())

    size = f"{found['size_bytes'] / 2**20:.1f} MiB, {found['parameters'] / 1e6:.2f} M numbers, {found['dtype']}"
    rows = [
        ("file", found["file"]),
        ("size", size),
        ("format", f"{found['format']}, {found['family']}"),
        ("modules", ", ".join(f"{count} {part}" for part, count in found["parts"].items())),
        ("rank", counted(found["ranks"])),
        ("alpha", counted(found["alphas"])),
        ("strength", counted(found["strengths"])),
        ("LoKr, w1", counted(found["lokr_w1"])),
        ("sha256", found["sha256"]),
    ]
    rows = [(label, value) for label, value in rows if value]
    for parent in found["parents"]:
        if isinstance(parent, dict):
            rows.append((f"parent ({parent.get('kind')})", f"{parent.get('sha256')} x {parent.get('weight')}"))
    output.table(rows + [("note", note) for note in found["notes"]])
    if found["zero_modules"]:
        output.warning(f"{found['zero_modules']} of {found['modules']} modules change nothing")
    output.result("")
    output.table(
        [(block, f"{size:.4f}") for block, size in found["blocks"].items()], header=("block", "norm of change")
    )
    output.result("")
    output.table([(key, _short(value)) for key, value in found["metadata"].items()], header=("metadata", "value"))


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."
