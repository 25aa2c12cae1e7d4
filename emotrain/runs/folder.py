"""A run's folder: made once, never over another, one trainer at a time (no torch)."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from emotrain import __version__
from emotrain.config.dump import dump_values
from emotrain.config.guess import likely
from emotrain.config.names import check_run_name
from emotrain.config.schema import Preset
from emotrain.errors import CheckpointError, ConfigError, EmotrainError, ResourceError
from emotrain.files import (
    decode_json,
    encode_json,
    fsync_folder,
    is_regular,
    read_regular,
    replace_file,
    write_synced,
)
from emotrain.runs.lock import hold
from emotrain.train.checkpoint import step_folders

RUNS_DIR = Path("runs")  # under the working directory, unless --runs-dir says otherwise
INFO = "run.json"
TRIAL = 1 << 20  # bytes
SCHEMA_VERSION = 1  # of run.json; one without is of emotrain 0.1, and is read
_KINDS: dict[type, tuple[str, ...]] = {  # of the fields of run.json; None stands for what is not known
    str: ("name", "emotrain", "started", "finished", "stop_reason", "stop_sentence", "lora", "device", "family",
          "base_sha256", "dataset_sha256"),
    int: ("schema_version", "steps", "best_step", "seed", "resumes", "skipped", "ranks"),
    float: ("best_loss", "base_loss", "start_loss", "train_s"),
    dict: ("libraries", "sample_base", "last_validation"),
    list: ("held_out", "parents", "launch"),
}  # fmt: skip
LIBRARIES = (
    "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow",
)  # fmt: skip


def safe_name(name: str) -> str:
    """`name`, once it is one that stays inside its folder on every system.

    Raises:
        ConfigError: it is not; see `config.names`.
    """
    try:
        return check_run_name(name)
    except ValueError as error:
        raise ConfigError(
            f"name is {ascii(name[:60])}, {error}", "use letters, digits, `_`, `-` and single dots"
        ) from error


@dataclass(frozen=True)
class RunFolder:
    """Where one run keeps its files. Nothing in it names its own place, so it can be moved."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def preset_path(self) -> Path:
        """The resolved preset."""
        return self.path / "preset.yaml"

    @property
    def info_path(self) -> Path:
        """`run.json`."""
        return self.path / INFO

    @property
    def metrics_path(self) -> Path:
        """A JSON line per step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints_dir(self) -> Path:
        """What resume reads."""
        return self.path / "checkpoints"

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is one that a resume may go on from."""
        return bool(step_folders(self.checkpoints_dir))

    @property
    def samples_dir(self) -> Path:
        """Pictures drawn during the run."""
        return self.path / "samples"

    @property
    def tensorboard_dir(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def lora_path(self) -> Path:
        """The best LoRA."""
        return self.path / "lora.safetensors"

    @property
    def lora_last_path(self) -> Path:
        """The LoRA of the last step."""
        return self.path / "lora-last.safetensors"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; an exception from within learns its folder, where its traceback is kept.

        Raises:
            ResourceError: another process trains in it (exit 6); a dead one's lock is taken over.
        """
        with hold(self.path / ".lock", f"run `{self.name}`"):
            try:
                yield
            finally:
                if (error := sys.exception()) is not None:
                    vars(error)["run_dir"] = self.path

    def info(self) -> dict[str, Any]:
        """What `run.json` says.

        Raises:
            CheckpointError: it is missing or damaged, or of a newer emotrain.
        """
        try:
            info = decode_json(read_regular(self.info_path))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.info_path} cannot be read: {error}") from error
        wrong = "the whole" if not isinstance(info, dict) else next(_misfits(info), None)
        if wrong is not None:
            raise CheckpointError(f"{self.info_path} is not a run's description: {wrong} is of another kind")
        if (info.get("schema_version") or 0) > SCHEMA_VERSION:
            raise CheckpointError(
                f"{self.path} was written by emotrain {info.get('emotrain')} in a format this one ({__version__}) "
                "cannot read",
                "upgrade emotrain",
            )
        return dict(info)

    def write_preset(self, preset: Mapping[str, Any]) -> None:
        """Put a changed preset in the place of the one that is there; an equal one is left alone.

        Raises:
            ResourceError: the disk is full or read-only; the file is as it was.
        """
        content = dump_values(preset).encode()
        try:
            if not self.preset_path.is_file() or self.preset_path.read_bytes() != content:
                replace_file(self.preset_path, content)
        except OSError as error:
            raise ResourceError(f"{self.preset_path} cannot be written: {error.strerror}") from error

    def update_info(self, **fields: Any) -> None:
        """Set fields of `run.json` in one atomic write.

        Raises:
            CheckpointError: it is missing or damaged.
            ResourceError: the disk is full or read-only; the file is as it was.
            ValueError: a NaN, or a value that JSON cannot hold.
        """
        content = encode_json(self.info() | fields)
        try:
            replace_file(self.info_path, content)
        except OSError as error:
            raise ResourceError(f"{self.info_path} cannot be written: {error.strerror}") from error


@dataclass(frozen=True)
class KeptByTheLead(RunFolder):
    """The folder as the other processes of a run have it: one of them holds and writes it, maybe on another machine."""

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """The leading process holds it."""
        yield

    def write_preset(self, preset: Mapping[str, Any]) -> None:
        """The leading process does."""

    def update_info(self, **fields: Any) -> None:
        """The leading process does."""


def create_run(
    runs_dir: Path,
    name: str,
    preset: Mapping[str, Any],
    *,
    seed: int | None = None,
    device: str | None = None,
    base_sha256: str | None = None,
    dataset_sha256: str | None = None,
    parents: tuple[Mapping[str, Any], ...] = (),
    **fields: Any,
) -> RunFolder:
    """Make a new run's folder with its resolved preset and `run.json`, or leave nothing.

    Args:
        runs_dir: holds all runs; made if need be. Nothing is written outside of it.
        name: of the run and its folder.
        preset: resolved, plain values.
        seed: of the run.
        device: it trains on.
        base_sha256: digest of the base model, if known yet.
        dataset_sha256: digest of the data set, if known yet.
        parents: what the run builds on, each `{"kind": "continue" | "stack", "run": name or None,
            "path", "sha256", "weight"}`.
        fields: further ones for `run.json`.

    Raises:
        ConfigError: the name cannot be a folder's (exit 2).
        CheckpointError: the folder exists (exit 5).
        ResourceError: it cannot be made (exit 6).
    """
    target = runs_dir / safe_name(name)
    info = {
        **{"schema_version": SCHEMA_VERSION, "name": name, "emotrain": __version__, "python": sys.version.split()[0]},
        **{"libraries": library_versions(), "seed": seed, "device": device},
        **{"started": now(), "finished": None, "steps": 0, "stop_reason": None},
        **{"best_step": None, "best_loss": None, "lora": None},
        **{"base_sha256": base_sha256, "dataset_sha256": dataset_sha256},
        **{"parents": [dict(parent) for parent in parents], **fields},
    }
    text = dump_values(preset)
    temporary = runs_dir / f".new-{name[:50]}-{os.getpid()}"
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(target):
            raise name_taken(target)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write_synced(temporary / "preset.yaml", text.encode())
        write_synced(temporary / INFO, encode_json(info))
        fsync_folder(temporary)
        temporary.rename(target)
        fsync_folder(runs_dir)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if os.path.lexists(target):
            raise name_taken(target) from error
        raise ResourceError(f"{target} cannot be made: {error.strerror}") from error
    return RunFolder(target)


def refuse_place(runs_dir: Path, name: str) -> None:
    """Refuse, before anything is loaded, a place where no run can be made; a small file is tried there, and removed.

    Raises:
        ConfigError: the name cannot be a folder's.
        CheckpointError: it is taken.
        ResourceError: nothing can be written there.
    """
    target = runs_dir / safe_name(name)
    if os.path.lexists(target):
        raise name_taken(target)
    above = next(folder for folder in (runs_dir, *runs_dir.absolute().parents) if os.path.lexists(folder))
    try:
        with tempfile.TemporaryDirectory(prefix=".new-", dir=above) as trial:
            write_synced(Path(trial) / INFO, bytes(TRIAL))
    except OSError as error:
        hint = f"is {above} a folder of yours? --runs-dir names another"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = f"free some space on the disk of {above}, or name another place with --runs-dir"
        raise ResourceError(f"{target} cannot be made: {error.strerror}", hint) from error


def open_run(path_or_name: str | Path, runs_dir: Path = RUNS_DIR) -> RunFolder:
    """The run at a path, or of that name in `runs_dir`.

    Raises:
        CheckpointError: there is none (exit 5).
    """
    for path in (Path(path_or_name), runs_dir / path_or_name):
        if is_regular(path / INFO):
            return RunFolder(path.absolute() if path.name in ("", "..") else path)
    names = [run.name for run in list_runs(runs_dir)]
    hint = likely(str(path_or_name), names) or "`emotrain runs list` lists them"
    raise CheckpointError(f"no run `{path_or_name}` here or in {runs_dir}", hint)


def named_in(runs_dir: Path, preset: Preset) -> Preset:
    """The preset with its earlier LoRAs as folders, where their names are those of runs in `runs_dir`."""

    def place(path: str) -> str:
        run = runs_dir.absolute() / path
        return str(run) if len(Path(path).parts) == 1 and is_regular(run / INFO) else path

    start = preset.start_from
    stack = tuple(item.model_copy(update={"path": place(item.path)}) for item in start.stack)
    first = {"continue_": place(start.continue_)} if start.continue_ else {}
    return preset.model_copy(update={"start_from": start.model_copy(update={"stack": stack, **first})})


OWN_FILES = (
    "run.json", "preset.yaml", "metrics.jsonl", "validation.jsonl", "likeness.jsonl",
    "picture_losses.jsonl", "lora.safetensors", "lora-last.safetensors", "report.html", ".lock",
)  # fmt: skip
OWN_FOLDERS = ("samples", "tensorboard", "checkpoints")


def refuse_foreign_parts(folder: RunFolder) -> None:
    """Refuse a run folder whose parts are links, or of another kind than a run makes them.

    A resumed run cuts its logs, writes its pictures over and deletes old checkpoints: through a link that would be
    somebody else's file.

    Raises:
        CheckpointError: with the part.
    """
    with os.scandir(folder.path) as listing:
        for part in listing:
            is_folder = part.name in OWN_FOLDERS
            _refuse_foreign(part, is_folder, part.name in OWN_FILES)
            if is_folder:
                for below, _, _ in os.walk(part.path):
                    with os.scandir(below) as inside:
                        for entry in inside:
                            _refuse_foreign(entry, is_folder=False, is_file=False)


def _refuse_foreign(part: os.DirEntry[str], is_folder: bool, is_file: bool) -> None:
    """Refuse a link, what is no regular file or folder, and what is the other of the two than it should be."""
    if part.is_symlink():
        what = "is a link"
    elif is_folder != part.is_dir(follow_symlinks=False) and (is_folder or is_file):
        what = f"is no {'folder' if is_folder else 'file'}"
    elif not part.is_dir(follow_symlinks=False) and not part.is_file(follow_symlinks=False):
        what = "is no regular file"
    else:
        return
    raise CheckpointError(
        f"{part.path} {what}, which a run does not make: nothing in this folder is written",
        "put the file or folder itself there, or start a new run",
    )


def how_done(folder: RunFolder, max_steps: int) -> str | None:
    """How a run ended that has handed over its LoRA; None where it has not, or `max_steps` asks for more."""
    info = folder.info()
    reason, steps = info.get("stop_reason"), info.get("steps")
    more = reason == "max_steps" and isinstance(steps, int) and max_steps > steps
    if not info.get("finished") or reason not in ("signal", "max_steps") or more or not folder.lora_path.is_file():
        return None
    how = "it stopped automatically" if reason == "signal" else "it reached train.max_steps"
    return f"run `{folder.name}` is done: {how} after step {steps}"


def refuse_finished(folder: RunFolder, max_steps: int) -> None:
    """Refuse to resume a run that has ended and handed over its LoRA, before anything is loaded.

    Raises:
        CheckpointError: it is done, and `max_steps` asks for no more.
    """
    if (how := how_done(folder, max_steps)) is not None:
        raise CheckpointError(
            how, "raise train.max_steps with --set, or start a new run from it with start_from.continue"
        )


def list_runs(runs_dir: Path = RUNS_DIR) -> list[RunFolder]:
    """All runs in `runs_dir`, the earliest first; those with a damaged `run.json` come last."""
    if not runs_dir.is_dir():
        return []
    found = [RunFolder(path) for path in runs_dir.iterdir() if _is_run(path)]
    return sorted(found, key=lambda run: (_started(run), run.name))


def _misfits(info: Mapping[str, Any]) -> Iterator[str]:
    """The fields of a `run.json` that hold what no run writes into them."""
    for field, value in info.items():
        kind = next((kind for kind, fields in _KINDS.items() if field in fields), object)
        right = value is None or isinstance(value, kind) or (kind is float and isinstance(value, int))
        if isinstance(value, bool):
            right = kind is object
        elif isinstance(value, float):
            right = right and math.isfinite(value)
        if not right:
            yield f"`{field}`"
    parents = info.get("parents")
    if isinstance(parents, list) and not all(isinstance(parent, dict) for parent in parents):
        yield "`parents`"


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that a result depends on."""
    versions = {}
    for library in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[library] = metadata.version(library)
    return versions


def now() -> str:
    """UTC, ISO 8601, to the second: `2026-11-22T09:16:19+00:00`."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _is_run(path: Path) -> bool:
    return not path.name.startswith(".") and not path.is_symlink() and (path / INFO).is_file()


def _started(run: RunFolder) -> str:
    try:
        return str(run.info().get("started"))
    except EmotrainError:
        return "~"


def name_taken(target: Path) -> CheckpointError:
    """The error for a run folder that is there already, with the next free name; how it goes on, if it can."""
    free = next(name for n in range(2, 10**6) if not (target.parent / (name := f"{target.name}-{n}")).exists())
    hint = f"`--name {shlex.quote(free)}` is free"
    if RunFolder(target).has_checkpoint:
        hint += f"; `emotrain resume {shlex.quote(target.name)}` resumes that run"
    elif is_regular(target / INFO):
        hint += "; that run was not saved yet, and cannot be resumed"
    return CheckpointError(f"{target} exists already", hint)
