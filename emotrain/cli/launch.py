"""`--gpus N`: the same command in N processes of this machine, started and watched by torch's elastic launcher."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emotrain.cli import output
from emotrain.errors import ConfigError, EmotrainError, ExitCode, ResourceError
from emotrain.ranks import GO_ON, LAUNCHER, LOOK_S, LOST, Ranks, is_launched, join
from emotrain.runs.folder import RunFolder

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

Gpus = Annotated[
    int | None,
    typer.Option("--gpus", min=1, help="Train on so many GPUs of this machine together; without a GPU: processes"),
]
LONGEST_STOP_S = 30  # after a process has failed, for the others to end


def wants_launch(gpus: int | None) -> bool:
    """Whether this process is to start others, in place of doing the work."""
    return gpus is not None and gpus > 1 and not is_launched()


def launch(words: Sequence[str], gpus: int) -> int:
    """Do the command of these words in `gpus` processes; gives its exit code.

    Raises:
        ResourceError: there are fewer GPUs, or a process was killed.
    """
    import torch

    refuse_missing(gpus, torch.cuda.device_count(), torch.backends.mps.is_available())
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    if not torch.cuda.is_available():
        output.note(f"note: torch sees no GPU: {gpus} processes share this machine's CPU")
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // gpus)))
    os.environ[LAUNCHER] = "1"
    for name in ("torch.distributed", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what is of use to the user is said below
    with tempfile.TemporaryDirectory(prefix="emotrain-launch-") as logs, passed_on():
        try:
            codes = elastic_launch(config(gpus, logs), work)(list(words))
        except ChildFailedError as failure:
            rank, one = failure.get_first_failure()
            return ended(rank, one.exitcode, gpus)
    return int(codes[0])


def refuse_missing(gpus: int, there: int, is_mac: bool) -> None:
    """Refuse more GPUs than there are.

    Raises:
        ResourceError: with how many there are.
    """
    there = there or int(is_mac)
    if there and gpus > there:
        raise ResourceError(f"--gpus is {gpus}, and torch sees {there} here", "`emotrain doctor` lists them")


def config(gpus: int, logs: str) -> LaunchConfig:
    """A launch of so many processes on this machine, which find each other at a free port of it."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    words: dict[str, Any] = {
        "signals_to_handle": "SIGQUIT",  # Ctrl-C and SIGTERM are the processes' own
        "shutdown_timeout": LONGEST_STOP_S,
    }
    return LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=gpus, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=0, monitor_interval=LOOK_S,
        start_method="spawn", logs_specs=DefaultLogsSpecs(log_dir=logs),
        **{word: value for word, value in words.items() if word in LaunchConfig.__dataclass_fields__},
    )  # fmt: skip


@contextmanager
def passed_on() -> Iterator[None]:
    """Within it signals go to the processes: they stop the run, and this one waits for them."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, number)

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {
        number: signal.signal(number, pass_on) for number in numbers if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def work(words: list[str]) -> int:
    """What each process does: the command; where another one is lost, it ends once the launcher has seen which."""
    from emotrain.cli.app import main

    code = main(words)
    threading.Thread(target=leave_with, args=(multiprocessing.parent_process(), code), daemon=True).start()
    return code


def leave_with(launcher: Any, code: int) -> None:
    """End once the launcher has, with its part of the GPU's memory: the work is done.

    torch keeps this process until the launcher has read its result, which a killed one never does.
    """
    if launcher is not None:
        launcher.join()
        os._exit(code)


def stop_with(launcher: int) -> None:
    """Tell this process to save and stop once its parent, the launcher, was killed.

    Under ours the system does so by SIGINT, unless that is ignored, as in a shell's background.
    """
    while os.getppid() == launcher:
        time.sleep(LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)


def ended(rank: int, code: int, gpus: int) -> int:
    """The exit code of a run whose process `rank` ended with `code` by itself, which it has told unless it was killed.

    Raises:
        ResourceError: it was killed.
    """
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # the cursor, which a killed dashboard leaves hidden
        sys.stderr.flush()
    if code < 0 or code == LOST:
        how = f"was killed ({signal.Signals(-code).name})" if code < 0 else "was lost"
        raise ResourceError(
            f"rank {rank} {how}, and with it the run",
            f"too little memory is often why; `emotrain resume RUN --gpus {gpus}` {GO_ON}",
        )
    return code if code in set(ExitCode) else int(ExitCode.BUG)


@contextmanager
def joined(gpus: int | None) -> Iterator[Ranks]:
    """This process among those that a launcher started, if one did; all leave together, whatever the work came to.

    Raises:
        ConfigError: torchrun and `--gpus` at once.
    """
    ranks = join()
    if ranks.world > 1 and (LAUNCHER not in os.environ or signal.getsignal(signal.SIGINT) == signal.SIG_IGN):
        threading.Thread(target=stop_with, args=(os.getppid(),), daemon=True).start()
    with ranks.together():
        if ranks.world > 1 and gpus is not None and LAUNCHER not in os.environ:
            raise ConfigError("--gpus and torchrun both start processes", "leave --gpus out")
    try:
        yield ranks
    except typer.Exit:
        ranks.close()
        raise
    except EmotrainError as error:
        if error.of_rank is not None:
            ranks.close()
        raise
    else:
        ranks.close()


def begun_before(ranks: Ranks, target: Path) -> bool:
    """Whether this launch began the run in `target`, and is to go on with it after a restart.

    A folder without a checkpoint is renamed: there the run begins anew.
    """
    if not ranks.restarts:
        return False
    folder = RunFolder(target)
    with ranks.together():
        is_own = folder.info_path.is_file() and bool(set(folder.info().get("launch") or ()) & set(ranks.launch))
        if not ranks.lead_where(is_own):
            return False
        goes_on = ranks.told(folder.has_checkpoint if ranks.first else None)
        if ranks.first and not goes_on:
            names = (target.with_name(f"{target.name}-lost-{number}") for number in range(1, 10**6))
            target.rename(next(free for free in names if not free.exists()))
        ranks.meet(None)
        return goes_on
