"""The study: every point that is tried is a trial of an Optuna study, in a storage that several machines may share.

A trial runs (state RUNNING) from its first fidelity to its last, is COMPLETE once it was trained in full, PRUNED where
it never was, FAIL where it cannot be. What each fidelity found, and which process is at it, are user attributes: a
process that is killed leaves a claim that goes stale, and whoever comes next takes it over. Should two take it at the
same moment, both compute the same figures.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import time
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from flatcompress.environment import process_is_alive
from flatcompress.errors import UserError
from flatcompress.search.halving import Point
from flatcompress.search.space import Parameter, Space
from flatcompress.search.spec import Search

CONNECT_SECONDS = 30
STALE_SECONDS = 120.0  # without a sign of life, after which another process takes a trial over
STARTUP = 10  # results of a fidelity, from which on the sampler learns from it
MANY = 10  # times the trials: so many combinations of choices, and every point is another one
TRIES, DRAWS = 20, 200  # points that the sampler may propose in vain, and points drawn evenly after that
Measures = dict[str, float | None]


@dataclass
class Record:
    """One point of the space. ``results``: by rung; ``claim``: {rung, worker, host, pid, at} of who is at it."""

    number: int
    id: int
    values: dict[str, Any]
    results: dict[int, Measures] = field(default_factory=dict)
    claim: dict[str, Any] | None = None
    open: bool = True
    failed: str | None = None
    sampler: dict[str, Any] = field(default_factory=dict)
    ended: float = 0.0

    @property
    def pending(self) -> int | None:
        """The rung that was begun and has no result yet."""
        if not self.open or self.claim is None or self.claim["rung"] in self.results:
            return None
        return int(self.claim["rung"])


def imported() -> Any:
    """The package optuna. UserError where it is missing."""
    try:
        import optuna
    except ModuleNotFoundError:
        raise UserError("search needs Optuna: pip install 'flatcompress[search]'.") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


class Study:
    """The Optuna study of a search. UserError: no Optuna, a storage out of reach, a study of another search."""

    def __init__(self, search: Search, space: Space) -> None:
        self.optuna, self.search, self.space = imported(), search, space
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        url = search.storage or f"sqlite:///{search.folder.resolve() / 'study.db'}"
        if search.storage is None:
            search.folder.mkdir(parents=True, exist_ok=True)
        self.storage = opened(self.optuna, url)
        self.study = self.optuna.create_study(
            storage=self.storage, study_name=search.name, directions=list(search.objectives.values()),
            load_if_exists=True,
        )  # fmt: skip
        self._check_same()

    def _check_same(self) -> None:
        """UserError where the storage has a study of this name with another space, recipe or objectives."""
        wanted = {k: getattr(self.search, k) for k in ("recipe", "objectives", "fidelities", "budgets")}
        if self.search.full_stages is not None:
            wanted["full_stages"] = self.search.full_stages
        wanted["space"] = [(p.name, p.choices, _range(p)) for p in self.space.parameters]
        mine = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
        found = self.study.user_attrs.get("flatcompress")
        if found is None and not self.study.get_trials(deepcopy=False):
            self.study.set_user_attr("flatcompress", mine)
        elif found != mine:
            raise UserError(
                f"the storage holds a study {self.search.name!r} with another recipe, space, objectives, budgets or "
                "fidelities. Give this search another name, or put back what was changed."
            )

    def records(self) -> list[Record]:
        """Every trial, in order."""
        return [self._record(t) for t in self.study.get_trials(deepcopy=False)]

    def _record(self, trial: Any) -> Record:
        attrs = trial.user_attrs
        results = {int(k.split(":")[1]): v for k, v in attrs.items() if k.startswith("result:")}
        running = trial.state == self.optuna.trial.TrialState.RUNNING
        ended = 0.0 if trial.datetime_complete is None else trial.datetime_complete.timestamp()
        return Record(trial.number, trial._trial_id, dict(trial.params), results, attrs.get("claim"), running,
                      attrs.get("failed"), attrs.get("sampler") or {}, ended)  # fmt: skip

    def add(self, values: Mapping[str, Any], sampler: Mapping[str, Any] | None = None, rung: int = 0) -> Record:
        """A new trial, claimed for the first fidelity (or another ``rung``) by this process."""
        token = uuid.uuid4().hex
        attrs = {"claim": self._claim(rung), "sampler": dict(sampler or {}), "token": token}
        self.study.add_trial(
            self.optuna.trial.create_trial(
                state=self.optuna.trial.TrialState.RUNNING, params=dict(values), distributions=self.distributions(),
                user_attrs=attrs,
            )
        )  # fmt: skip
        return next(
            self._record(t)
            for t in reversed(self.study.get_trials(deepcopy=False))
            if t.user_attrs.get("token") == token
        )

    def _claim(self, rung: int) -> dict[str, Any]:
        return {
            "rung": rung,
            "worker": self.worker,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "at": time.time(),
        }

    def claim(self, record: Record, rung: int) -> None:
        """This process is at ``rung`` of ``record``, and alive."""
        record.claim = self._claim(rung)
        self.storage.set_trial_user_attr(record.id, "claim", record.claim)

    def is_stale(self, record: Record) -> bool:
        """Has whoever claimed ``record`` gone?"""
        claim = record.claim or {}
        if claim.get("worker") == self.worker:
            return False
        if claim.get("host") == socket.gethostname() and not process_is_alive(int(claim.get("pid", 0))):
            return True
        return time.time() - float(claim.get("at", 0)) > STALE_SECONDS

    def result(self, record: Record, rung: int, measures: Measures) -> None:
        """What ``rung`` found; at the last one the trial is complete. Known results are left as they are."""
        now = next(r for r in self.records() if r.number == record.number)
        if not now.open:
            return
        record.results[rung] = measures
        self.storage.set_trial_user_attr(record.id, f"result:{rung}", measures)
        if rung == self.search.top:
            values = [measures[name] for name in self.search.objectives]
            self.study.tell(record.number, values, skip_if_finished=True)

    def fail(self, record: Record, reason: str) -> None:
        """A point that cannot be trained."""
        now = next(r for r in self.records() if r.number == record.number)
        if now.open:
            self.storage.set_trial_user_attr(record.id, "failed", reason)
            self.study.tell(record.number, state=self.optuna.trial.TrialState.FAIL, skip_if_finished=True)

    def close(self) -> None:
        """The search is over: what was not trained in full is pruned."""
        for record in self.records():
            if record.open:
                pruned = self.optuna.trial.TrialState.PRUNED
                self.study.tell(record.number, state=pruned, skip_if_finished=True)

    def point(self, record: Record, rung: int) -> Point:
        """``record`` as ``rung`` sees it."""
        return point(self.search, record.number, record.results[rung])

    def rungs(self, records: list[Record]) -> list[list[Point]]:
        """The points that each fidelity has judged."""
        return [[self.point(r, k) for r in records if k in r.results] for k in range(self.search.top + 1)]

    def distributions(self) -> dict[str, Any]:
        """Optuna's distributions by parameter."""
        d, found = self.optuna.distributions, {}
        for parameter in self.space.parameters:
            r = parameter.range
            if parameter.choices:
                found[parameter.name] = d.CategoricalDistribution(parameter.choices)
            elif r.whole:
                found[parameter.name] = d.IntDistribution(r.low, r.high, log=r.log, step=int(r.step or 1))
            else:
                found[parameter.name] = d.FloatDistribution(r.low, r.high, log=r.log, step=r.step)
        return found

    def suggest(self, records: list[Record]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Values of a new point, and what the sampler keeps with it; None where it finds none that was not tried.

        A sampler is made anew for every point, of the seed and the point's number, over the highest fidelity that has
        enough results: so it depends on the results alone, and a search that was killed goes on as if it had not been.
        """
        tried = {self._told_apart(r.values) for r in records}
        rungs = [k for k in range(self.search.top + 1) if sum(k in r.results for r in records) >= STARTUP]
        rung, distributions = (rungs or [0])[-1], self.distributions()
        seen = [self._seen(r, rung, distributions) for r in records if rung in r.results]
        for attempt in range(TRIES + DRAWS):
            view = self.optuna.create_study(
                directions=list(self.search.objectives.values()), sampler=self._sampler(len(records), attempt)
            )
            view.add_trials(seen)
            trial = view.ask(distributions)
            if self._told_apart(trial.params) not in tried:
                return dict(trial.params), dict(view.trials[-1].system_attrs)
        return None

    def _told_apart(self, values: Mapping[str, Any]) -> str:
        """What makes a point a new one. Of many choices those alone: a sampler that has settled on all of them would go
        on with the same network at other numbers, which cheap fidelities cannot tell apart.
        """
        return json.dumps({name: values[name] for name in self._telling}, sort_keys=True)

    @cached_property
    def _telling(self) -> list[str]:
        """The parameters that make a point a new one."""
        parameters = self.space.parameters
        choices = [p for p in parameters if p.choices]
        many = math.prod(len(p.choices) for p in choices) >= MANY * self.search.n_trials
        return [p.name for p in (choices if many else parameters)]

    def _seen(self, record: Record, rung: int, distributions: dict[str, Any]) -> Any:
        measures = record.results[rung]
        over = {k: (measures[k] or 0.0) / limit - 1 for k, limit in self.search.budgets.items()}
        return self.optuna.trial.create_trial(
            params=record.values, distributions=distributions, system_attrs=record.sampler,
            values=[measures[name] for name in self.search.objectives], constraints=over or None,
        )  # fmt: skip

    def _sampler(self, number: int, attempt: int) -> Any:
        samplers, seed = self.optuna.samplers, (self.search.seed * 1_000_003 + number * 1_009 + attempt) % 2**32
        if attempt >= TRIES:  # the sampler proposes nothing but what was tried
            return samplers.RandomSampler(seed=seed)
        if self.search.sampler == "tpe":
            return samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)
        if self.search.sampler == "nsga2":
            return samplers.NSGAIISampler(seed=seed, population_size=max(4, min(50, self.search.n_trials // 4)))
        return samplers.RandomSampler(seed=seed)


def _range(parameter: Parameter) -> dict[str, Any]:
    """What a parameter may be, without what studies of earlier versions did not have: these go on."""
    return parameter.range.model_dump(exclude={"together"} if parameter.range.together is None else None)


def point(search: Search, number: int, measures: Mapping[str, float | None]) -> Point:
    """Measures as a point whose values are all to be minimised; what was not measured counts as worst."""
    values = []
    for name, direction in search.objectives.items():
        found = measures.get(name)
        values.append(float("inf") if found is None else -found if direction == "maximize" else found)
    over = sum(max(0.0, (measures.get(k) or 0.0) / limit - 1) for k, limit in search.budgets.items())
    return Point(number, tuple(values), over)


def opened(optuna: Any, url: str) -> Any:
    """The storage at ``url``, of a database or a journal's file (*.log). UserError where it is out of reach."""
    if "://" not in url:
        if not url.endswith(".log") or not Path(url).parent.is_dir():
            raise UserError(f"storage {url!r}: give a URL (sqlite:///FILE, postgresql://...) or a journal's FILE.log.")
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(url))
    import sqlalchemy

    try:
        parsed = sqlalchemy.engine.make_url(url)
        if parsed.drivername == "postgresql":  # the driver of the extra, whatever SQLAlchemy's own default is
            parsed = parsed.set(drivername="postgresql+pg8000")
        driver = parsed.get_driver_name()  # pg8000's is that of every answer, not of the connection alone
        wait = "timeout" if driver in ("pg8000", "pysqlite") else "connect_timeout"
        arguments = {wait: 60 if driver == "pysqlite" else CONNECT_SECONDS}
        full = parsed.render_as_string(hide_password=False)
        return _connected(optuna, full, {"connect_args": arguments, "pool_pre_ping": True})
    except (ImportError, sqlalchemy.exc.NoSuchModuleError) as error:
        raise UserError(
            f"storage {_shown(url)}: its driver is not installed ({error}). PostgreSQL: pip install "
            "'flatcompress[postgresql]'."
        ) from None
    except Exception as error:
        reason = (str(getattr(error, "orig", None) or error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"storage {_shown(url)}: cannot be reached ({reason[:300]}).") from None


def _connected(optuna: Any, url: str, arguments: dict[str, Any]) -> Any:
    """The storage; of several processes that make its tables at the same moment all but one are refused once."""
    try:
        return optuna.storages.RDBStorage(url, arguments)
    except Exception as error:
        if not any(word in str(error).lower() for word in ("already exist", "duplicate", "unique")):
            raise
        time.sleep(2)
        return optuna.storages.RDBStorage(url, arguments)


def _shown(url: str) -> str:
    """A URL without its password."""
    head, at, rest = url.rpartition("@")
    scheme, separator, user = head.partition("://")
    return f"{scheme}{separator}{user.partition(':')[0]}:***@{rest}" if at else url
