"""Several processes of one run, forked from the test: torch is imported once."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

from emotrain import ranks as ranks_module
from emotrain.errors import EmotrainError
from emotrain.ranks import JoinedRanks, Ranks

LIMIT_S = 240


def together(work: Callable[[Ranks], Any], world: int = 2, dead: int | None = None) -> list[Any]:
    """What `work` gives in each process; an EmotrainError counts as a result, and `dead` may end without one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    results = [fork.SimpleQueue() for _ in range(world)]
    processes = [
        fork.Process(target=_in_child, args=(work, rank, world, port, results[rank]), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT_S)
        assert not process.is_alive(), "a process of the run hangs"
    found: list[Any] = []
    for rank, (process, result) in enumerate(zip(processes, results, strict=True)):
        assert process.exitcode == 0 or rank == dead, f"a process ended with {process.exitcode}"
        found.append(None if rank == dead else result.get())
    return found


def _in_child(work: Callable[[Ranks], Any], rank: int, world: int, port: int, result: Any) -> None:
    environment = {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    os.environ.update(environment)
    try:
        ranks = JoinedRanks(environment)
    except EmotrainError as error:
        result.put(_shown(error))
        os._exit(0)
    try:
        value = work(ranks)
    except EmotrainError as error:
        value = _shown(error)
        if error.of_rank is None:
            result.put(value)
            os._exit(0)
    ranks.close()
    assert ranks_module.leave(0) == 0
    result.put(value)


def _shown(error: EmotrainError) -> Any:
    return type(error).__name__, int(error.exit_code), [one.message for one in error.problems], error.is_silent
