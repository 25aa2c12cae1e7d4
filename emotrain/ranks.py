"""Several processes that train one LoRA together, one on each GPU: what they add up, and what they agree on.

torch.distributed does the work; torchrun, or `--gpus` through the same launcher, starts the processes. Each has a rank,
counted from 0. One of them leads, rank 0 unless another has the folder of the run that goes on: it writes the files and
speaks to the user. torch is loaded by the processes of such a run alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import socket
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from emotrain import __version__, errors
from emotrain.errors import ConfigError, EmotrainError, Problem, ResourceError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
LONGEST = timedelta(hours=6)  # that rank 0 may encode, draw or write while the others wait
WAIT_S = 20.0  # for the others' part of a step once this process was told to stop: the launcher kills it after 30
POLL_S = 2e-4
LOOK_S = 0.5  # how often our launcher looks whether all processes are there
LOST = 76  # exit code of a process that ends because another one did; the launcher gives the user that one's
LAUNCHER = "EMOTRAIN_LAUNCHER"  # set by ours, which tells of lost processes by itself
GO_ON = "goes on from the newest checkpoint; where none is saved yet, start anew under another --name"
_ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class LostRankError(ResourceError):
    """Another process of the run has ended without a word: killed, or its machine is gone (exit 6)."""


_open: list[Ranks] = []  # joined and not closed
_losses: list[LostRankError] = []


class Ranks:
    """A run in one process: it has everything, and agrees with itself."""

    rank, world, local_rank, restarts = 0, 1, 0, 0
    local_world = 1  # how many of the processes are on this machine, and share its memory
    lead = 0  # the rank that writes the files and speaks to the user
    launch: tuple[str, ...] = ()
    stopped = False  # whether any of several processes was told to stop, as of the last step

    @property
    def first(self) -> bool:
        """Whether this process writes the files and speaks to the user."""
        return self.rank == self.lead

    def command(self, words: str) -> str:
        """The command that does this in as many processes; on several machines torchrun starts them."""
        if self.local_world < self.world:
            return f"torchrun ... -m emotrain {words}"
        return f"emotrain {words}" + (f" --gpus {self.world}" if self.world > 1 else "")

    def lead_where(self, there: bool) -> bool:
        """Let the first process lead that has the run's folder, maybe on another machine; whether any has."""
        return there

    def has(self, number: int) -> bool:
        """Whether the piece of work of that number is this process's."""
        return number % self.world == self.rank

    def meet(self, value: T) -> list[T]:
        """The value (as JSON has it) of every process, in the order of their ranks; all wait for the last.

        Raises:
            EmotrainError: a process failed instead, within `together`: the same error in all of them.
            LostRankError: a process has ended.
        """
        return [value]

    def told(self, value: T | None) -> T:
        """What the leading process has (as JSON has it), in every process; the others' value does not matter."""
        assert value is not None
        return value

    def send(self, content: bytes | None) -> bytes:
        """What the leading process has, in every process; the others give None."""
        assert content is not None
        return content

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """An error of one process within ends them all: the others learn of it when they next `meet`."""
        yield

    def in_turn(self, work: Callable[[], T]) -> T:
        """What `work` gives, done by one process of each machine first, then by the others."""
        return work()

    def one_by_one(self, work: Callable[[], T]) -> T:
        """What `work` gives, done by the processes of each machine one after another; it may not `meet`."""
        return work()

    def sum_gradients(self, parameters: Sequence[Tensor], numbers: Tensor, stopped: Callable[[], bool]) -> None:
        """Add up the parameters' gradients, and `numbers`, over all processes, in place.

        One all-reduce of float32. A parameter without a gradient in any process stays without.
        """

    def close(self) -> None:
        """The work is done: wait for the others."""


ALONE = Ranks()


class JoinedRanks(Ranks):
    """One of several processes; made by `join`."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        self.rank, self.local_rank, self.world = (int(environment[key]) for key in _ENVIRONMENT[:3])
        self.local_world = int(environment.get("LOCAL_WORLD_SIZE", 1))
        self.restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT", 0))
        if not self.first:
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
        on_gpu = torch.cuda.is_available() and torch.cuda.device_count() > self.local_rank
        if on_gpu:
            torch.cuda.set_device(self.local_rank)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        with _lost():
            store, *_ = next(rendezvous("env://", timeout=LONGEST))
            store = dist.PrefixStore(_token(store, self.rank, self.world), store)  # type: ignore[attr-defined]
            dist.init_process_group(backend, timeout=LONGEST, store=store, rank=self.rank, world_size=self.world)
        _open.append(self)
        self._buffer: Tensor | None = None
        self._met: list[Tensor] = []
        place = f"{environment.get('TORCHELASTIC_RUN_ID')}/{socket.gethostname()}/{os.getppid()}"
        own = hashlib.sha256(place.encode()).hexdigest()[:16]
        self.launch = tuple(sorted(set(self.meet(own))))
        everyones = self.meet([version(), "GPU" if torch.cuda.is_available() else "CPU"])
        with self.together():
            refuse_others([one for one, _ in everyones], [kind for _, kind in everyones])
            if torch.cuda.is_available() and not on_gpu:
                count, number = torch.cuda.device_count(), self.local_rank + 1
                raise ResourceError(
                    f"process {number} of this machine has no GPU: torch sees {count}", f"start {count} of them"
                )
        self.meet(None)

    def meet(self, value: T) -> list[T]:
        return self._exchange(value, None)

    def lead_where(self, there: bool) -> bool:
        found = self.meet(there)
        self.lead = found.index(True) if any(found) else 0
        return any(found)

    def told(self, value: T | None) -> T:
        found = self.meet(value)[self.lead]
        assert found is not None
        return found

    def send(self, content: bytes | None) -> bytes:
        import torch
        import torch.distributed as dist

        whole = torch.empty(self.told(None if content is None else len(content)), dtype=torch.uint8)
        if content is not None:
            whole.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        with _lost():
            dist.broadcast(whole, self.lead)
        return whole.numpy().tobytes()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except LostRankError:
            raise
        except EmotrainError as error:
            if error.of_rank is None:
                self._exchange(None, error)
            raise

    def in_turn(self, work: Callable[[], T]) -> T:
        done = [work()] if self.local_rank == 0 else []
        self.meet(None)
        done = done or [work()]
        self.meet(None)
        return done[0]

    def one_by_one(self, work: Callable[[], T]) -> T:
        done: list[T] = []
        for turn in range(max(self.meet(self.local_world))):
            if turn == self.local_rank:
                done = [work()]
            self.meet(None)
        return done[0]

    def sum_gradients(self, parameters: Sequence[Tensor], numbers: Tensor, stopped: Callable[[], bool]) -> None:
        import torch
        import torch.distributed as dist

        size = sum(parameter.numel() for parameter in parameters)
        if self._buffer is None or self._buffer.numel() != size + numbers.numel():
            self._buffer = torch.empty(size + numbers.numel(), dtype=torch.float32, device=numbers.device)
        places = [*torch.split(self._buffer[:size], [p.numel() for p in parameters]), self._buffer[size:]]
        views = [view.view(p.shape) for view, p in zip(places, parameters, strict=False)]
        known = [(view, p.grad) for view, p in zip(views, parameters, strict=True) if p.grad is not None]
        for view, parameter in zip(views, parameters, strict=True):
            if parameter.grad is None:
                view.zero_()
        torch._foreach_copy_([view for view, _ in known] + [places[-1]], [grad for _, grad in known] + [numbers])
        with _lost():
            work = dist.all_reduce(self._buffer, async_op=True)
            told_s = None
            while not work.is_completed():
                time.sleep(POLL_S)
                if stopped():
                    told_s = told_s or time.monotonic()
                    if time.monotonic() - told_s > WAIT_S:
                        raise RuntimeError("told to stop, and the others do not answer")
            work.wait()
        torch._foreach_copy_([grad for _, grad in known] + [numbers], [view for view, _ in known] + [places[-1]])
        for view, parameter in zip(views, parameters, strict=True):
            if parameter.grad is None and bool(view.any()):  # another process has one
                parameter.grad = view.clone()

    def close(self) -> None:
        import torch.distributed as dist

        self.meet(None)
        _open.clear()
        dist.destroy_process_group()

    def _exchange(self, value: Any, error: EmotrainError | None) -> list[Any]:
        mine = {"value": value} if error is None else {"error": _packed(error)}
        everyones = [json.loads(text) for text in self._gather(json.dumps(mine).encode())]
        for rank, one in enumerate(everyones):
            if "error" in one:
                raise self._unpacked(one["error"], rank, error if rank == self.rank else None)
        return [one["value"] for one in everyones]

    def _gather(self, text: bytes) -> list[bytes]:
        """The text of every process."""
        import torch
        import torch.distributed as dist

        with _lost():
            size, sizes = torch.tensor([len(text)]), [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
            dist.all_gather(sizes, size)
            longest = max(int(size) for size in sizes)
            own = torch.zeros(longest, dtype=torch.uint8)
            own[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            rows = [torch.empty_like(own) for _ in range(self.world)]
            # gloo's thread lets go of them a moment later. Were it the last, it would ask for Python's lock, with which
            # `destroy_process_group` of torch before 2.8 waits for that thread for ever
            self._met = [size, own, *sizes, *rows]
            dist.all_gather(rows, own)
        return [row.numpy().tobytes()[: int(size)] for row, size in zip(rows, sizes, strict=True)]

    def _unpacked(self, packed: Mapping[str, Any], rank: int, own: EmotrainError | None) -> EmotrainError:
        """The error of a process as all raise it; only the one that leads tells it."""
        where = f"rank {rank}: " if rank else ""
        problems = tuple(Problem(where + message, hint) for message, hint in packed["problems"])
        kind = getattr(errors, packed["kind"], EmotrainError)
        if own is not None:  # its own class, which may be none of `errors`
            own.message, own.problems = problems[0].message, problems
            error = own
        else:
            error = kind(problems[0].message, problems[0].hint, problems=problems)
            error.exit_code = errors.ExitCode(packed["exit_code"])
        error.of_rank, error.is_silent = rank, not self.first
        return error


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher has started this process as one of several."""
    return all(key in environment for key in _ENVIRONMENT) and int(environment["WORLD_SIZE"]) > 1


def version() -> str:
    """Of emotrain, with a digest of its source: between two releases a number says little."""
    whole = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted(here.rglob("*.py"), key=lambda path: path.relative_to(here).as_posix()):
        whole.update(path.relative_to(here).as_posix().encode() + path.read_bytes().replace(b"\r\n", b"\n"))
    return f"{__version__} (source {whole.hexdigest()[:8]})"


def refuse_others(versions: Sequence[str], devices: Sequence[str]) -> None:
    """Refuse to add up the gradients of programs that may compute them in other ways.

    Args:
        versions: of every process, in the order of their ranks.
        devices: GPU or CPU, in the same order.

    Raises:
        ConfigError: with the versions that differ from rank 0's.
        ResourceError: some compute on a GPU, and some have none.
    """
    other = [(rank, one) for rank, one in enumerate(versions) if one != versions[0]]
    problems = [Problem(f"rank {rank} is emotrain {one}, and rank 0 is {versions[0]}") for rank, one in other]
    if problems:
        problems[-1] = Problem(problems[-1].message, "install the same version on every machine")
        raise ConfigError(problems[0].message, problems[0].hint, problems=tuple(problems))
    if len(set(devices)) > 1:
        rank = devices.index("CPU")
        raise ResourceError(
            f"torch sees no GPU on the machine of rank {rank}, and rank {devices.index('GPU')} has one",
            "`emotrain doctor` there shows which torch it has",
        )


def join() -> Ranks:
    """This process among those that the launcher has started; alone where it has started none.

    Raises:
        ResourceError: there is no GPU for this process.
        LostRankError: the others are not there.
    """
    return JoinedRanks() if is_launched() else ALONE


def leave(code: int) -> int:
    """The exit code of the command; where others wait for this process in vain, it ends here, to let them know."""
    if not _open:
        return code
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if _losses and LAUNCHER in os.environ:
        time.sleep(4 * LOOK_S)  # the launcher is to see the other one first
        code = LOST
    os._exit(code)


def _token(store: Any, rank: int, world: int) -> str:
    """A word that all processes of this start have, and no other start has had.

    torchrun keeps its store when it starts the processes again, and what those before wrote into it, their addresses
    among it, would be read for that of these. So each of the others asks rank 0 under a name of its own and is answered
    there; rank 0 answers until all have come, since the first question that it finds may be an older one.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"emotrain/question/{rank}", own)
        token = str(store.get(f"emotrain/answer/{own}").decode())
        store.set(f"emotrain/came/{token}/{rank}", "")
        return token
    answered: set[str] = set()
    missing, until = set(range(1, world)), time.monotonic() + LONGEST.total_seconds()
    while missing:
        for other in sorted(missing):
            question = f"emotrain/question/{other}"
            asked = store.get(question).decode() if store.check([question]) else ""
            if asked and asked not in answered:
                store.set(f"emotrain/answer/{asked}", own)
                answered.add(asked)
            if store.check([f"emotrain/came/{own}/{other}"]):
                missing.discard(other)
        if missing and time.monotonic() > until:
            raise RuntimeError(f"rank {min(missing)} does not come")
        time.sleep(0.02)
    return own


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    """What torch.distributed raises where another process is gone, as one kind of error."""
    try:
        yield
    except (RuntimeError, ConnectionError) as error:
        said = re.sub(r"^\[[^]]*\] *", "", str(error).strip()).partition(". ")[0].partition("\n")[0]
        lost = LostRankError(
            f"another process of this run has ended ({said[:120]})"
            if said
            else "another process of this run has ended",
            f"`emotrain resume RUN` {GO_ON}",
        )
        lost.is_silent = LAUNCHER in os.environ or os.environ.get("RANK") != "0"
        _losses.append(lost)
        raise lost from error


def _packed(error: EmotrainError) -> dict[str, Any]:
    kinds = [kind.__name__ for kind in type(error).__mro__ if hasattr(errors, kind.__name__)]
    problems = [(problem.message, problem.hint) for problem in error.problems]
    return {"kind": kinds[0], "exit_code": int(error.exit_code), "problems": problems}
