"""`emotrain doctor`: what this machine has to train with."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import emotrain
from emotrain.cli import output
from emotrain.cli.options import OneJson
from emotrain.families.memory import unusable
from emotrain.families.ram import ram

_LIBRARIES = (
    "torch", "diffusers", "transformers", "peft", "safetensors", "pillow", "pydantic", "typer", "rich",
)  # fmt: skip
_OPTIONAL = ("bitsandbytes", "prodigyopt", "schedulefree")
_LOW_DISK_GIB = 5.0


def doctor(
    as_json: OneJson = False,
) -> None:
    """Report versions, devices and disk.

    Please add its output to bug reports: it holds no user name and no token.
    """
    facts = dict(_facts())
    warnings = list(_warnings(facts))
    if as_json:
        report = {"schema_version": output.SCHEMA_VERSION, **facts, "warnings": warnings}
        output.json_object(report)
        return
    output.table([(key, _shown(value)) for key, value in facts.items()])
    for line in warnings:
        output.warning(line)


def _facts() -> Iterator[tuple[str, Any]]:
    yield "emotrain", emotrain.__version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for name in _LIBRARIES:
        yield name, _version(name)
    yield "optional", [f"{name} {_version(name)}" for name in _OPTIONAL if _version(name)]
    yield "cpu_cores", os.cpu_count()
    yield "memory_gib", round(ram().total / 2**30, 1)
    yield "devices", list(_devices())
    yield "disk_free_gib", _free_gib(Path.cwd())
    from emotrain.dataset.cachedir import default_cache_dir

    cache = default_cache_dir()
    home = Path.home()
    yield "cache_dir", f"~/{cache.relative_to(home)}" if cache.is_relative_to(home) else str(cache)
    yield "cache_free_gib", _free_gib(cache)
    yield "fsync", _fsync_works()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[dict[str, Any]]:
    """CPU threads, and every GPU with its memory in GiB and whether it computes in bfloat16."""
    import torch

    yield {"name": "cpu", "threads": torch.get_num_threads()}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        yield {
            "name": f"cuda:{index} {torch.cuda.get_device_name(index)}",
            "memory_gib": round(total / 2**30, 1),
            "free_gib": round(free / 2**30, 1),
            "bf16": torch.cuda.get_device_capability(index) >= (8, 0),
        }
    if torch.backends.mps.is_available():
        yield {"name": "mps"}


def _free_gib(path: Path) -> float | None:
    """Free disk space at a folder that may not exist yet."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return round(shutil.disk_usage(path).free / 2**30, 1)
    except OSError:
        return None


def _fsync_works() -> bool:
    """Whether a file can be written through to the disk here; checkpoints rely on it."""
    try:
        with tempfile.TemporaryFile(dir=Path.cwd()) as file:
            file.write(b"emotrain")
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        return False
    return True


def _warnings(facts: dict[str, Any]) -> Iterator[str]:
    for name in _LIBRARIES:
        if facts[name] is None:
            yield f"{name} is not installed: pip install emotrain again"
    if len(facts["devices"]) == 1:
        yield "no GPU was found: the built-in models train on the CPU, real ones need a GPU"
    if len(facts["devices"]) > 1 and (lacking := unusable("nf4")) is not None:
        yield f"nf4, which small GPUs take for large models, {lacking[0]}: {lacking[1]}"
    for key in ("disk_free_gib", "cache_free_gib"):
        if facts[key] is not None and facts[key] < _LOW_DISK_GIB:
            yield f"{key} is {facts[key]}, which is little"
    if not facts["fsync"]:
        yield "files cannot be written safely in the current folder: run somewhere else"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(_shown(item) for item in value) or "none"
    if isinstance(value, dict):
        name, *rest = (f"{k} {_shown(v)}" if k != "name" else str(v) for k, v in value.items())
        return f"{name} ({', '.join(rest)})" if rest else name
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not installed" if value is None else str(value)
