"""What points begin with: leading stages that are trained in full, once for all points that agree in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from flatcompress.errors import RunError
from flatcompress.recipe import Recipe
from flatcompress.sweep.executor import Executor, Job, Outcome
from flatcompress.sweep.pool import is_done
from flatcompress.sweep.spec import key_of

_KEY = "start:"  # of a start's own job


def name_of(beginning: Recipe) -> str:
    """The folder of a start in the search's."""
    return f"start-{key_of(beginning, len(beginning.stages))}"


@dataclass
class Starts:
    """Jobs wait here until what they begin with is there. Of several processes with one folder, one trains a start."""

    folder: Path
    executor: Executor
    show: Callable[[str], None]
    _waiting: dict[str, list[Job]] = field(default_factory=dict)
    _recipes: dict[str, Recipe] = field(default_factory=dict)
    _locks: dict[str, FileLock] = field(default_factory=dict)  # of those that this process has trained

    def train(self, beginning: Recipe) -> str:
        """Train a start now and wait for it; its folder's name. RunError where that fails. Nothing else may run."""
        name = name_of(beginning)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock(name):  # waits for another process that is at it
            if not is_done(self.folder / name, beginning):
                self._submit(name, beginning)
                problem = next(problem for _, problem in self.executor.finished())
                if problem is not None:
                    raise RunError(f"the stages that every trial begins with failed: {problem}")
        return name

    def submit(self, job: Job, beginning: Recipe | None) -> None:
        """Give ``job`` to the executor, where it has a start after that."""
        if job.base is None or beginning is None or is_done(self.folder / job.base, beginning):
            self.executor.submit(job)
            return
        self._waiting.setdefault(job.base, []).append(job)
        self._recipes[job.base] = beginning
        self._begin(job.base)

    def advance(self) -> None:
        """Go on with what other processes have trained meanwhile, or left undone."""
        for name in [name for name in self._waiting if name not in self._locks]:
            self._begin(name)

    def are_elsewhere(self, running: int) -> bool:
        """Do all of the ``running`` jobs wait for starts that other processes train?"""
        return not self._locks and 0 < running == sum(map(len, self._waiting.values()))

    def done(self, key: str, problem: str | None) -> list[Outcome] | None:
        """None where ``key`` is no start's; else its jobs go on, or are returned with what went wrong."""
        if not key.startswith(_KEY):
            return None
        name = key.removeprefix(_KEY)
        self._locks.pop(name).release()
        jobs = self._waiting.pop(name)
        if problem is not None:
            return [(job.key, f"the stages that it begins with failed: {problem}") for job in jobs]
        for job in jobs:
            self.executor.submit(job)
        return []

    def _begin(self, name: str) -> None:
        if name in self._locks:
            return
        lock = self._lock(name)
        try:
            lock.acquire(timeout=0)
        except Timeout:  # another process is at it
            return
        self._locks[name] = lock
        if is_done(self.folder / name, self._recipes[name]):
            self.done(_KEY + name, None)
        else:
            self._submit(name, self._recipes[name])

    def _submit(self, name: str, beginning: Recipe) -> None:
        self.show(f"{name}: stages that trials begin with, trained in full")
        self.executor.submit(Job(_KEY + name, name, beginning.to_dict(), whole=True))

    def _lock(self, name: str) -> FileLock:
        return FileLock(self.folder / f".{name}.lock")
