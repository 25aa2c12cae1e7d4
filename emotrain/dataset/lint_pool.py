"""Pictures measured on all cores, in order, with progress (no torch)."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from emotrain.dataset.lint_pictures import Job, Measured, measure

Progress = Callable[[int, int], None]
_WORTH_IT = 96  # pictures of 1,024 pixels from where starting processes (half a second each) pays
_CHUNK = 4


def default_workers() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def measure_all(jobs: Sequence[Job], *, workers: int | None = None, progress: Progress | None = None) -> list[Measured]:
    """Measure every picture; results in the order of the jobs.

    Args:
        jobs: what to measure.
        workers: processes; None takes one a core, and this process alone for a few
            pictures. 1: this process alone.
        progress: told (done, total) after each picture.
    """
    count = default_workers() if workers is None else workers
    if workers is None and len(jobs) < _WORTH_IT:
        count = 1
    done: list[Measured] = []
    if count > 1:
        try:
            for measured in _in_processes(jobs, count):
                done.append(measured)
                _tell(progress, len(done), len(jobs))
        except (BrokenProcessPool, OSError, RuntimeError, EOFError):
            pass  # no processes here (a sandbox, a frozen program): the rest is measured below
    for job in jobs[len(done) :]:
        done.append(measure(job))
        _tell(progress, len(done), len(jobs))
    return done


def _in_processes(jobs: Sequence[Job], count: int) -> Iterator[Measured]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_single_thread)
    try:
        yield from pool.map(measure, jobs, chunksize=_CHUNK)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _single_thread() -> None:
    """One thread a worker, and Ctrl-C is for the parent alone to answer."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)
