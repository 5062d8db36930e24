"""Where runs are computed: the protocol that an executor keeps, and the pool of processes on this machine.

An executor takes jobs and says which are finished, in whatever order they end. Which job may begin when is the
caller's business; that a run whose worker was lost goes on elsewhere from its last checkpoint is the executor's.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from flatcompress.errors import Interrupted
from flatcompress.sweep.worker import execute, worker_start

MOST_LOSSES = 5  # of one job's worker, before the job counts as failed
Outcome = tuple[str, str | None]  # a job's key, and what went wrong


@dataclass(frozen=True)
class Job:
    """One run: the folder ``name`` in the executor's root, and the folder whose finished stages it begins with.

    ``whole``: its weights are wanted in the root too, wherever it is computed.
    """

    key: str
    name: str
    recipe: dict[str, Any]
    base: str | None = None
    whole: bool = False


class Executor(Protocol):
    """What computes jobs; a context manager. ``slots``: how many jobs it takes at a time."""

    slots: int

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...

    def submit(self, job: Job) -> None: ...

    def finished(self, timeout: float | None = None) -> list[Outcome]:
        """Jobs that have ended since the last call, at least one of those submitted; none after ``timeout`` seconds."""
        ...

    def stop(self, told: bool) -> None:
        """Let every running job save and end; ``told``: the signal has reached the workers by itself."""
        ...


def lost(job: Job, losses: Counter[str]) -> str | None:
    """Count a lost worker of ``job``; the reason to give the job up, None while it is to go on elsewhere."""
    losses[job.key] += 1
    if losses[job.key] < MOST_LOSSES:
        return None
    return f"its worker was killed {MOST_LOSSES} times (out of memory?); its last checkpoint is kept"


class LocalPool:
    """``jobs`` processes of one thread each on this machine.

    A process that is killed costs no run: the pool is made anew, and what was running goes on from its checkpoints.
    """

    def __init__(self, root: Path, jobs: int, show: Callable[[str], None] = lambda line: None) -> None:
        self.root, self.slots, self.show = root, jobs, show
        self._running: dict[Future[str | None], Job] = {}
        self._losses: Counter[str] = Counter()
        self._stack = contextlib.ExitStack()
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        self._stack.enter_context(_one_thread())
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._stack.close()

    def submit(self, job: Job) -> None:
        """Give ``job`` to a process, once one is free."""
        base = None if job.base is None else str(self.root / job.base)
        arguments = job.recipe, str(self.root / job.name), base
        try:
            self._running[self._alive().submit(execute, *arguments)] = job
        except BrokenProcessPool:
            self._end_broken()
            self._running[self._alive().submit(execute, *arguments)] = job

    def finished(self, timeout: float | None = None) -> list[Outcome]:
        """See `Executor`."""
        while self._running:
            done = wait(self._running, timeout, return_when=FIRST_COMPLETED).done
            outcomes, broken = [], []
            for future in done:
                job = self._running.pop(future)
                try:
                    outcomes.append((job.key, future.result()))
                except BrokenProcessPool:
                    broken.append(job)
            outcomes += self._again(broken)
            if outcomes or not done:
                return outcomes
        return []

    def _again(self, broken: list[Job]) -> list[Outcome]:
        """Submit what ran in a pool that has lost a process; outcomes of what is given up."""
        if not broken:
            return []
        self._running, rest = {}, list(self._running.values())
        self._end_broken()
        given_up: list[Outcome] = []
        for job in [*broken, *rest]:
            problem = lost(job, self._losses)
            if problem is not None:
                given_up.append((job.key, problem))
                continue
            self.show(f"{job.name}: its process was killed (out of memory?); it goes on from its last checkpoint")
            self.submit(job)
        return given_up

    def stop(self, told: bool) -> None:
        """See `Executor`."""
        if not told:
            for worker in multiprocessing.active_children():
                worker.terminate()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _end_broken(self) -> None:
        """Wait for the processes of a pool that has lost one: they save, and hold their runs' locks until then."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None

    def _alive(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.slots, context, worker_start)
        return self._pool


@contextlib.contextmanager
def interruptible(executor: Executor, what: str) -> Iterator[None]:
    """SIGTERM and an interrupt of the terminal stop the executor, with everything saved. Interrupted then."""
    with _terminable():
        try:
            yield
        except KeyboardInterrupt as stop:
            # A terminal interrupts the workers itself; a second signal would stop them before they have saved.
            executor.stop(told=not isinstance(stop, _Terminated))
            raise Interrupted(f"{what} was stopped; every run is saved, and the same command resumes it") from None


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which reached this process alone."""


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM stops the sweep as an interrupt of the terminal does; only the main thread can take signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Processes that are started while it is open load libraries that count on one thread."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
