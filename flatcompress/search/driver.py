"""Running a search: free workers get the most promising thing to do next, until trials, time or progress end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flatcompress.errors import RunError, UserError
from flatcompress.pipeline import Pipeline
from flatcompress.recipe import Recipe
from flatcompress.search import given, warm
from flatcompress.search.front import Front
from flatcompress.search.halving import promotion
from flatcompress.search.measures import Measuring
from flatcompress.search.space import Space, expand
from flatcompress.search.spec import Search
from flatcompress.search.starts import Starts, name_of
from flatcompress.search.study import Record, Study, imported
from flatcompress.session import restore
from flatcompress.stages.context import RunContext
from flatcompress.store.runfolder import RunFolder
from flatcompress.sweep.executor import Executor, Job, interruptible

BEAT_SECONDS = 20.0  # between two signs of life to the other machines of a search
Show = Callable[[str], None]


def run_search(search: Search, show: Show, executor: Callable[[], Executor]) -> Front:
    """Search until trials, time or progress end, and return the front; what an earlier call has done is kept.

    UserError for a wrong search, before anything is trained; RunError where no point could be trained; Interrupted
    after a signal.
    """
    optuna = imported()
    space, run = expand(search)
    measuring = Measuring(search, run)
    _check_ends(space)
    study = Study(search, space)
    try:
        with executor() as computed_by:
            driver = _Driver(search, space, run, study, measuring, computed_by, show)
            with interruptible(computed_by, "the search"):
                driver.begin()
                driver.work()
        return Front.of(search, space, study.records())
    except optuna.exceptions.StorageInternalError as error:
        reason = (str(error.__cause__ or error).strip().splitlines() or ["no reason given"])[0][:300]
        raise RunError(f"the study's storage failed ({reason}). Every run is kept; the same command goes on.") from None


def _check_ends(space: Space) -> None:
    """The usual point at every fidelity, and the user's own. UserError for what does not fit."""
    given.points(space)
    usual = warm.usual(space)
    for fidelity in space.search.fidelities:
        space.recipe(usual, fidelity, f"space, at fidelity {fidelity}")


@dataclass
class _Driver:
    search: Search
    space: Space
    run: RunContext
    study: Study
    measuring: Measuring
    executor: Executor
    show: Show
    started: float = field(default_factory=time.monotonic)
    running: dict[str, tuple[Record, int, Recipe]] = field(default_factory=dict)
    own: list[dict[str, Any]] = field(default_factory=list)
    first: list[dict[str, Any]] = field(default_factory=list)
    exhausted: bool = False

    def __post_init__(self) -> None:
        self.starts = Starts(self.search.folder, self.executor, self.show)

    def begin(self) -> None:
        """Train what every trial begins with, or the base recipe's start, and decide where the search starts."""
        beginning = self.space.beginning(warm.usual(self.space))
        base = None if beginning is None else self.starts.train(beginning)
        kept = self.study.study.user_attrs.get("warm_start")
        if kept is None:
            trained, run = self._trained(beginning, base)
            kept = warm.points(self.space, run, trained, self.show)
            self.study.study.set_user_attr("warm_start", kept)
        self.own = given.points(self.space)
        self.first = [*self.own, *kept]

    def _trained(self, beginning: Recipe | None, base: str | None) -> tuple[bool, RunContext]:
        """The run with the weights of the base recipe's start, where there are any."""
        folder = None if base is None else self.search.folder / base
        if beginning is not None and folder is not None and RunFolder(folder).finished_stages():
            run = Pipeline.from_recipe(beginning).prepare(tried=False)
            restore(run, RunFolder(folder).load())
            return True, run
        model = self.space.base.get("model") or {}
        return bool(isinstance(model, dict) and (model.get("weights") or model.get("pretrained"))), self.run

    def work(self) -> None:
        """Until nothing is left to begin and nothing runs."""
        beaten = time.monotonic()
        while True:
            records = self.study.records()
            stop = self._stop(records)
            while stop is None and len(self.running) < self.executor.slots and self._start(records):
                records = self.study.records()
            if not self.running:
                others = [r for r in records if r.pending is not None and not self.study.is_stale(r)]
                if stop is None and others:  # another machine may leave something behind, or make something ready
                    time.sleep(min(BEAT_SECONDS, 2.0))
                    continue
                break
            self.starts.advance()
            for key, problem in self.executor.finished(timeout=BEAT_SECONDS):
                self._done(key, problem)
            if self.starts.are_elsewhere(len(self.running)):
                time.sleep(1.0)
            if time.monotonic() - beaten > BEAT_SECONDS:
                beaten = time.monotonic()
                for record, rung, _ in self.running.values():
                    self.study.claim(record, rung)
        if stop is None:
            self.study.close()
        self.show(f"search: {stop or 'every trial is done'}")

    def _stop(self, records: list[Record]) -> str | None:
        """Why nothing more is to begin; None while there is."""
        if self.search.timeout is not None and time.monotonic() - self.started > self.search.timeout:
            return f"stopped after {self.search.timeout:g} s; the same command goes on"
        full = sorted((r for r in records if self.search.top in r.results), key=lambda r: r.ended)
        if self.search.patience is not None and len(full) > self.search.patience:
            before = Front.of(self.search, self.space, full[: -self.search.patience])
            if {p.number for p in before.points} == {p.number for p in Front.of(self.search, self.space, full).points}:
                return f"stopped: {self.search.patience} fully trained points in a row changed nothing of the front"
        return None

    def _start(self, records: list[Record]) -> bool:
        """Begin the next thing; False where there is nothing to begin now."""
        mine = {record.number for record, _, _ in self.running.values()}
        for record in records:
            if record.pending is not None and record.number not in mine and self._free(record):
                return self._submit(record, record.pending)
        usable = [r for r in records if r.failed is None]
        entered = {r.number: max([*r.results, r.pending or 0]) if r.open else self.search.top for r in usable}
        chosen = promotion(self.study.rungs(usable), entered, self.search.reduction_factor)
        if chosen is not None:
            record = next(r for r in records if r.number == chosen[0])
            return self._submit(record, chosen[1])
        if len(records) >= self.search.n_trials or self.exhausted:
            return False
        suggested = self._suggested(records)
        if suggested is None:
            self.exhausted = True
            self.show("search: every point that the sampler proposes was tried before; no more are begun")
            return False
        rung = self.search.top if suggested[0] in self.own else 0
        record = self.study.add(*suggested, rung)
        if record.number >= self.search.n_trials:  # another machine began the last one at the same moment
            self.study.fail(record, "one more than n_trials")
            return False
        return self._submit(record, rung)

    def _free(self, record: Record) -> bool:
        claim = record.claim or {}
        return claim.get("worker") == self.study.worker or self.study.is_stale(record)

    def _suggested(self, records: list[Record]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        tried = [r.values for r in records]
        for values in self.first:
            if values not in tried:
                return values, {}
        return self.study.suggest(records)

    def _submit(self, record: Record, rung: int) -> bool:
        """Give ``record`` at ``rung`` to the executor, or fail it where its values do not go together."""
        fidelity = self.search.fidelities[rung]
        try:
            recipe = self.space.recipe(record.values, fidelity, f"trial {record.number}")
        except UserError as error:
            self.study.fail(record, str(error))
            self.show(f"trial {record.number}: left out: {error}")
            return True
        self.study.claim(record, rung)
        key = f"{record.number:04d}-{fidelity}"
        self.running[key] = (record, rung, recipe)
        beginning = self.space.beginning(record.values)
        base = None if beginning is None else name_of(beginning)
        self.starts.submit(Job(key, key, recipe.to_dict(), base), beginning)
        return True

    def _done(self, key: str, problem: str | None) -> None:
        waited = self.starts.done(key, problem)
        if waited is not None:
            for other, reason in waited:
                self._done(other, reason)
            return
        record, rung, recipe = self.running.pop(key)
        fidelity = self.search.fidelities[rung]
        if problem is not None:
            self.study.fail(record, problem)
            self.show(f"trial {record.number}, {fidelity}: {problem}")
            return
        measures = self.measuring.of(self.search.folder / key, recipe)
        missing = [name for name in self.search.objectives if measures[name] is None]
        if missing:
            self.study.fail(record, f"{missing[0]} was not measured")
            self.show(f"trial {record.number}, {fidelity}: {missing[0]} was not measured")
            return
        self.study.result(record, rung, measures)
        self.show(f"trial {record.number}, {fidelity}: " + ", ".join(
            f"{name} {measures[name]:.4g}" for name in self.search.objectives
        ))  # fmt: skip
        if rung == self.search.top:
            Front.of(self.search, self.space, self.study.records()).write()
