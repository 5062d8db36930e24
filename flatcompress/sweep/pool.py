"""Running a sweep: every run in its own folder, by an executor (processes here, or Ray); what is done is skipped.

``plan`` writes every run's recipe and the command that runs it, so that any other queue (Slurm job arrays, submitit)
can do them; the sweep command then finds the finished folders and makes the table.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatcompress.errors import RunError, UserError
from flatcompress.recipe import SCHEMA, Recipe, identity, parse_recipe
from flatcompress.storage import write_text_atomic
from flatcompress.store.runfolder import RunFolder
from flatcompress.sweep.executor import Executor, Job, LocalPool, interruptible
from flatcompress.sweep.spec import MethodEntry, Run, Sweep, Task, folder_name, runs_of, tasks_of
from flatcompress.tasks import build as learned
from flatcompress.yaml_source import parse_yaml

Show = Callable[[str], None]


@dataclass(frozen=True)
class Finished:
    """What a finished run has to say."""

    run: Run
    folder: Path
    rows: list[dict[str, Any]]
    val_accuracy: float | None


def run_sweep(
    sweep: Sweep, show: Show = lambda line: None, executor: Callable[[], Executor] | None = None
) -> list[Finished]:
    """Run everything that is not done yet; returns the finished runs of every method's chosen setting.

    ``executor`` makes what the runs are computed by (default: `LocalPool`, ``jobs`` processes on this machine).

    A method with a grid is first run on the tuning seeds and domains, and the setting with the best mean validation
    accuracy on the source domains is run on all of them. UserError for a wrong sweep, before anything runs; RunError
    names the runs that failed, after everything else is done; Interrupted after a signal.
    """
    chosen: dict[str, dict[str, Any]] = {m.name: m.settings()[0] for m in sweep.methods}
    check_all(sweep)
    made = executor or (lambda: LocalPool(sweep.folder, sweep.jobs, show))
    tuned = [m for m in sweep.methods if len(m.settings()) > 1]
    if tuned:
        done = _execute(sweep, [r for m in tuned for s in m.settings() for r in _tuning_runs(sweep, m, s)], show, made)
        for method in tuned:
            chosen[method.name] = _best(sweep, method, done)
            show(f"{method.name}: chosen {chosen[method.name]}")
    return _execute(sweep, _chosen_runs(sweep, chosen), show, made)


def finished_runs(sweep: Sweep) -> list[Finished]:
    """What is finished of a sweep, without running anything; a setting is chosen among the finished ones."""
    chosen: dict[str, dict[str, Any]] = {}
    for method in sweep.methods:
        done = [
            f for setting in method.settings() for f in _finished_of(sweep, _tuning_runs(sweep, method, setting))
        ]  # fmt: skip
        chosen[method.name] = _best(sweep, method, done) if done else method.settings()[0]
    return _finished_of(sweep, _chosen_runs(sweep, chosen))


def _chosen_runs(sweep: Sweep, chosen: dict[str, dict[str, Any]]) -> list[Run]:
    return [r for m in sweep.methods for r in runs_of(sweep, m, chosen[m.name], sweep.seeds, sweep.held_out)]


def _finished_of(sweep: Sweep, runs: list[Run]) -> list[Finished]:
    """The finished ones of ``runs``."""
    found = []
    for run in runs:
        folder = sweep.folder / folder_name(run.recipe)
        if is_done(folder, run.recipe):
            found.append(_finished(run, folder))
    return found


def check_all(sweep: Sweep) -> list[Run]:
    """Every run of every setting, checked but not run. UserError for the first that is wrong."""
    every = [r for m in sweep.methods for s in m.settings() for r in runs_of(sweep, m, s, sweep.seeds, sweep.held_out)]
    for method in sweep.methods:
        for setting in method.settings():
            _tuning_runs(sweep, method, setting)
    for run in every:
        if run.recipe.task is not None and "accuracy" not in learned(run.recipe.task).metrics:
            raise _no_accuracy(f"task {learned(run.recipe.task).name!r}")
    return every


def _no_accuracy(learned_by: str) -> UserError:
    return UserError(f"a sweep compares accuracy, which {learned_by} does not have: run its recipes one by one.")


def plan(sweep: Sweep) -> list[str]:
    """Write the recipe of every run into its folder and return the commands that would run them."""
    commands = []
    for task in tasks_of(check_all(sweep)).values():
        if task.wanted:
            folder = sweep.folder / task.name
            folder.mkdir(parents=True, exist_ok=True)
            write_text_atomic(folder / "plan.yaml", task.recipe.to_yaml())
            commands.append(f"flatcompress run {folder / 'plan.yaml'} --output {folder}")
    return commands


def _tuning_runs(sweep: Sweep, method: MethodEntry, setting: dict[str, Any]) -> list[Run]:
    return runs_of(sweep, method, setting, sweep.tune_seeds or sweep.seeds, sweep.tune_held_out or sweep.held_out)


def _best(sweep: Sweep, method: MethodEntry, done: list[Finished]) -> dict[str, Any]:
    """The setting with the best mean validation accuracy; the first of equal ones."""
    values = {f.run.key: f.val_accuracy for f in done}

    def mean(setting: dict[str, Any]) -> float:
        found = [values.get(run.key) for run in _tuning_runs(sweep, method, setting)]
        known = [v for v in found if v is not None]
        return sum(known) / len(known) if known else float("-inf")

    return max(method.settings(), key=mean)


def _execute(sweep: Sweep, runs: list[Run], show: Show, executor: Callable[[], Executor]) -> list[Finished]:
    # Seed by seed: a sweep that is stopped early has every method under the first seeds.
    tasks = tasks_of(sorted(runs, key=lambda run: sweep.seeds.index(run.seed) if run.seed in sweep.seeds else -1))
    root = sweep.folder
    todo = {key: task for key, task in tasks.items() if not is_done(root / task.name, task.recipe)}
    todo = {key: task for key, task in todo.items() if not _needed_by_nobody(key, task, tasks, todo)}
    show(f"{len(tasks)} runs, {len(tasks) - len(todo)} done or not needed, {len(todo)} to do")
    failed: dict[str, str] = {}
    if todo:
        with executor() as computed_by:
            failed = _Schedule(tasks, todo, computed_by, show).work()
    finished = [_finished(run, root / tasks[run.key].name) for run in runs if run.key not in failed]
    if failed:
        lines = "\n".join(f"  {tasks[key].name}: {reason}" for key, reason in failed.items())
        raise RunError(
            f"{len(failed)} runs failed; the others are kept, and the same command does these again:\n{lines}"
        )
    return finished


def _needed_by_nobody(key: str, task: Task, tasks: dict[str, Task], todo: dict[str, Task]) -> bool:
    """A shared beginning whose users are all done already."""
    return not task.wanted and not any(_begins_with(t, key, tasks) for t in todo.values() if t is not task)


def _begins_with(task: Task, key: str, tasks: dict[str, Task]) -> bool:
    base = task.base
    while base is not None:
        if base == key:
            return True
        base = tasks[base].base
    return False


class _Schedule:
    """Tasks whose base is done go to the executor, in order."""

    def __init__(self, tasks: dict[str, Task], todo: dict[str, Task], executor: Executor, show: Show) -> None:
        self.tasks, self.waiting, self.executor, self.show = tasks, dict(todo), executor, show
        self.total, self.count = len(todo), 0
        self.running: set[str] = set()
        self.failed: dict[str, str] = {}

    def work(self) -> dict[str, str]:
        """Run everything; returns the failures by key."""
        with interruptible(self.executor, "the sweep"):
            while self.waiting or self.running:
                self._start_ready()
                self._collect()
        return self.failed

    def _start_ready(self) -> None:
        for key, task in list(self.waiting.items()):
            if len(self.running) >= self.executor.slots:
                return
            if task.base in self.waiting or task.base in self.running:
                continue
            del self.waiting[key]
            if task.base in self.failed:
                self.failed[key] = f"it begins with {self.tasks[task.base].name}, which failed"
                continue
            base = None if task.base is None else self.tasks[task.base].name
            self.executor.submit(Job(key, task.name, task.recipe.to_dict(), base))
            self.running.add(key)

    def _collect(self) -> None:
        if not self.running:
            return
        for key, problem in self.executor.finished():
            self.running.remove(key)
            self.count += 1
            if problem is not None:
                self.failed[key] = problem
            self.show(f"[{self.count}/{self.total}] {self.tasks[key].name}: {problem or 'done'}")


def is_done(folder: Path, recipe: Recipe) -> bool:
    """Every stage of ``recipe`` has its row in the folder's ledger, and the folder is this recipe's."""
    run = RunFolder(folder)
    try:
        rows = run.read_ledger()
        saved, _ = parse_yaml(run.read_recipe() or "", str(folder))
        same = saved.get("schema", 1) == SCHEMA and not identity.differences(parse_recipe(saved, str(folder)), recipe)
    except (UserError, AttributeError):
        return False
    return same and len(rows) >= len(recipe.stages)


def _finished(run: Run, folder: Path) -> Finished:
    there = RunFolder(folder)
    rows = there.read_ledger()
    if "metric" in rows[-1] and rows[-1]["accuracy"]["test"] is None:  # the data brought the task
        raise _no_accuracy(f"the data's task (it has {', '.join(rows[-1]['metrics'])})")
    return Finished(run, folder, rows, val_accuracy(there.log))


def val_accuracy(log: Path) -> float | None:
    """Validation accuracy, on the source domains, of what the last training stage kept."""
    found = None
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event.get("event") in ("epoch", "selected"):  # "selected" follows the epochs where the best one is kept
            found = event.get("val_accuracy")
    return found


def stderr(line: str) -> None:
    """Progress as a line on stderr."""
    print(line, file=sys.stderr, flush=True)
