"""One run in one folder: the lock, the log, the checkpoints, the signals, and where to go on.

The pipeline asks the session where to begin, tells it when a stage is entered and left, and never touches a file.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from flatcompress import report
from flatcompress.environment import command, of_run
from flatcompress.errors import Interrupted, RunError, UserError
from flatcompress.plan import apply_plan, load_weights
from flatcompress.recipe import Recipe
from flatcompress.recipe.resuming import first_changed_stage
from flatcompress.sharded import any_process
from flatcompress.stages import RunContext, pictures
from flatcompress.stages.context import added
from flatcompress.stages.reported import reported
from flatcompress.storage import write_bytes_atomic, write_error
from flatcompress.store import checkpoint
from flatcompress.store.checkpoint import Checkpoint
from flatcompress.store.runfolder import RunFolder
from flatcompress.store.runlog import RunLog
from flatcompress.store.trackers import open_tracker
from flatcompress.training import memory
from flatcompress.training.divergence import describe
from flatcompress.training.signals import StopRequest


class Session:
    """A context manager around one run. ``display`` receives every event as a dict and shows it, or is None.

    UserError when the folder is in use, cannot be written, or holds a run of another recipe.
    """

    def __init__(self, path: Path, recipe: Recipe, restart: bool, display: Callable[[dict[str, Any]], None] | None):
        self.folder = RunFolder(path)
        self.recipe = recipe
        self.restart = restart
        self.display = display
        self.main = int(os.environ.get("RANK", "0")) == 0
        self.elapsed = 0.0
        self.beside: dict[str, float] = {}  # seconds that belong to no stage
        self.incidents: list[dict[str, Any]] = []
        self._log: RunLog | None = None
        self._stage: str | None = None
        self._stack = ExitStack()
        self._found: Checkpoint | None = None

    # ------------------------------------------------------------------ opening and closing

    def __enter__(self) -> Session:
        with ExitStack() as stack:
            if self.main:
                self.folder.create()
                stack.enter_context(self.folder.locked())
                if self.restart:
                    self._clear()
                first_changed = first_changed_stage(self.folder, self.recipe)
                if first_changed is not None:
                    checkpoint.rewind(self.folder.checkpoints, first_changed)
                trackers = [open_tracker(name, self.folder.path, self.recipe.name) for name in self.recipe.log]
                self._log = stack.enter_context(RunLog(self.folder.log, trackers))
                self.folder.write_recipe(self.recipe.to_yaml())
                stack.enter_context(self._warnings_as_events())
            self.stop = stack.enter_context(StopRequest())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        failure = self._failure(error)
        try:
            if isinstance(failure, Interrupted | RunError | KeyboardInterrupt):
                self.emit("stopped", reason=str(failure) or "stopped at once by a second signal")
        except RunError as full:  # the log cannot be written: what stopped the run is said, not this
            warnings.warn(str(full), stacklevel=2)
        finally:
            self._stack.close()
        if failure is not None and failure is not error:
            raise failure from error

    def _failure(self, error: Any) -> BaseException | None:
        """What is raised for ``error``: the machine's failures as a RunError, an interruption with how to resume."""
        if isinstance(error, Interrupted):
            return Interrupted(f"{error}; everything is saved. {how_to_resume()}")
        if isinstance(error, OSError):
            path = Path(error.filename) if isinstance(error.filename, str) else self.folder.path
            return write_error(path, error, "Every checkpoint is kept.")
        if isinstance(error, Exception) and not isinstance(error, RunError) and memory.is_out_of_memory(error):
            reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
            return RunError(f"out of memory in {self._stage or 'the run'} ({reason}). Every checkpoint is kept.")
        return error

    def _clear(self) -> None:
        checkpoint.rewind(self.folder.checkpoints, 0)
        f = self.folder
        for path in (f.log, f.ledger, f.report, f.certificate, f.examples, *f.path.glob("model*.onnx"), f.recipe):
            path.unlink(missing_ok=True)

    @property
    def stop_requested(self) -> bool:
        """Did anybody ask to stop? All processes get the same answer, so that none waits for one that has left."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.stop.requested
        return any_process(self.stop.requested)

    # ------------------------------------------------------------------ events

    def emit(self, event: str, **fields: Any) -> None:
        """Write one event to the log and show it."""
        if not self.main:
            return
        row = {"event": event, "stage": self._stage, **fields}
        if self._log is not None:
            kept = {k: v for k, v in row.items() if k != "event"}
            row = self._log.event(event, **kept)
        if self.display is not None:
            self.display(row)

    def show(self, event: str, **fields: Any) -> None:
        """Show one event without writing it to the log."""
        if self.main and self.display is not None:
            self.display({"event": event, "stage": self._stage, **fields})

    @contextmanager
    def _warnings_as_events(self) -> Iterator[None]:
        """While it is open, a warning is an event: in the log, and where somebody watches shown there alone."""
        said: set[str] = set()
        with warnings.catch_warnings():
            usual = warnings.showwarning

            def show(
                message: Any, category: Any, filename: Any, lineno: Any, file: Any = None, line: Any = None
            ) -> None:
                if self.display is None:
                    usual(message, category, filename, lineno, file, line)
                if str(message) not in said:
                    said.add(str(message))
                    self.emit("warning", message=str(message))

            warnings.showwarning = show
            yield

    # ------------------------------------------------------------------ resume

    def restore(self, run: RunContext) -> int:
        """Bring ``run`` to where the last run stopped; returns the index of the stage to run next."""
        self._found, finished = self._sound()
        if finished is None:
            return 0
        try:
            restore(run, finished)
        except UserError as error:
            raise RunError(f"{finished.path}: the weights do not fit the plan: {error} Use --restart.") from None
        if self.main:  # it is written after the checkpoint: a run killed between the two has a row less
            self.folder.write_ledger(run.ledger)
        run.certificate = finished.extra.get("certificate")
        # Names alone: a stranger's checkpoint must not point out of the folder.
        run.artifacts = {k: self.folder.path / Path(v).name for k, v in finished.extra.get("artifacts", {}).items()}
        return finished.stage_index + 1

    def _sound(self) -> tuple[Checkpoint | None, Checkpoint | None]:
        """The newest checkpoint to go on from, and the finished stage that it stands on (itself, when it is one).

        One in the middle of a stage is of use only while the stage before it can be read.
        """
        for found in checkpoint.newest_first(self.folder.checkpoints):
            if found.finished:
                return found, found
            if found.stage_index == 0:
                return found, None
            before = stage_id(self.recipe, found.stage_index - 1)
            try:
                return found, checkpoint.load(self.folder.checkpoints / before)
            except UserError as error:
                warnings.warn(f"{found.path.name} is of no use without {before}: {error}", stacklevel=2)
        return None, None

    def begin(self, run: RunContext, first: int) -> None:
        """Log what is about to run, and where."""
        self.emit(
            "run",
            name=self.recipe.name,
            recipe_hash=run.recipe_hash,
            resumed_at=stage_id(self.recipe, first) if 0 < first < len(self.recipe.stages) else None,
            stages=[stage_id(self.recipe, i) for i in range(len(self.recipe.stages))],
            epochs=[entry.config.epochs_planned for entry in self.recipe.stages],
            first=first,
            data=run.data.name,
            classes=list(run.data.classes),
            held_out=run.data.held_out_domain,
            samples=run.data.counts(),
            skipped=len(run.data.skipped),
            notes=list(run.data.notes),
            environment=of_run(str(run.device), run.accelerator.num_processes),
        )
        if run.data.skipped:  # whoever loaded the data was told before there was a log
            said = f"bad samples left out of the data: {len(run.data.skipped)}; the first: {run.data.skipped[0]}"
            self.emit("warning", message=said)
        if self.main and not self.folder.preview.exists():
            with self.timed("the preview of the data"):
                picture = reported("the preview of the data could not be drawn", lambda: pictures.sheet(run), None)
            if picture:
                write_bytes_atomic(self.folder.preview, picture)

    # ------------------------------------------------------------------ stages

    def enter(self, run: RunContext, index: int) -> None:
        """Stage ``index`` begins; hands the state of an interrupted one to the run."""
        self._stage = stage_id(self.recipe, index)
        entry = self.recipe.stages[index]
        found, self._found = self._found, None
        run.resume = None
        self.elapsed, self.incidents = 0.0, []
        if found is not None and not found.finished and found.stage == self._stage:
            run.resume = {**found.state, "model": found.state_dict}
            self.elapsed = float(found.extra.get("seconds", 0.0))
            self.incidents = list(found.extra.get("incidents", []))
        run.progress = Progress(self, run)
        self.emit(
            "stage",
            index=index,
            of=len(self.recipe.stages),
            method=entry.config.label or None,
            epochs=entry.config.epochs_planned,
            resumed_at_step=found.step if run.resume is not None and found is not None else None,
        )

    def spent(self, run: RunContext, seconds: float) -> None:
        """Log where a stage's time went (``seconds`` for itself, the rest for measuring; ``within``: what of the first
        was no step of its training) and the most memory by now."""
        parts = {"the stage": max(0.0, seconds), **run.spent}
        self.emit("spent", seconds=parts, within=run.parts, peak_bytes=memory.peak_bytes(run.device))

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the seconds of the block, which is part of no stage, to ``beside[what]``."""
        with added(self.beside, what):
            yield

    def leave(self, run: RunContext, index: int) -> None:
        """Stage ``index`` is done: keep it."""
        with self.timed("checkpoints of the stages"):
            self._keep(run, index)
        run.accelerator.wait_for_everyone()
        if self.stop_requested and index + 1 < len(self.recipe.stages):
            raise Interrupted(f"stopped after stage {self._stage}")

    def _keep(self, run: RunContext, index: int) -> None:
        if self.incidents:
            run.ledger[-1]["divergences"] = self.incidents
        self.emit("row", row=run.ledger[-1])
        if self.main:
            extra = {
                "ledger": run.ledger,
                "passes": run.passes,
                "certificate": run.certificate,
                "artifacts": {k: v.name for k, v in run.artifacts.items()},
            }
            checkpoint.save_stage(
                self.folder.checkpoints,
                stage_id(self.recipe, index),
                run.plan,
                run.model.state_dict(),
                extra=extra,
            )
            self.folder.write_ledger(run.ledger)

    def finish(self, run: RunContext) -> None:
        """Every stage is done."""
        self._stage = None
        if self.main:
            said = "the examples could not be drawn"
            with self.timed("examples for the report"):
                reported(said, lambda: pictures.draw_examples(run, self.folder), None, fatal=(OSError, RunError))
        self.emit("spent", seconds=self.beside, peak_bytes=memory.peak_bytes(run.device))
        self.emit("done", onnx=str(run.artifacts["onnx"].name) if "onnx" in run.artifacts else None)

    def report(self) -> Path | None:
        """Write report.html and model-card.md from the folder's files; None, with a warning, where that fails."""
        self.beside = {}
        no_card, said = "the model card could not be written", "the report could not be written"
        with self.timed("report and model card"):
            reported(no_card, lambda: report.card.build(self.folder.path), None, fatal=(OSError, RunError))
            written = reported(said, lambda: report.build(self.folder.path), None, fatal=(OSError, RunError))
        self.emit("spent", seconds=self.beside)
        return written


class Progress:
    """Saves a stage's state every N steps or minutes, and when the user asks to stop; knows the failure policies."""

    def __init__(self, session: Session, run: RunContext) -> None:
        self._session, self._run = session, run
        recipe = session.recipe
        every = recipe.checkpoint_every
        self.on_divergence: str = recipe.on_divergence
        self.on_out_of_memory: str = recipe.on_out_of_memory
        self.max_rollbacks = recipe.max_rollbacks
        self._steps = every if isinstance(every, int) else None
        self._seconds = None if isinstance(every, int) else seconds(every)
        self._last = self._started = time.monotonic()

    @property
    def stop_requested(self) -> bool:
        """True after SIGINT or SIGTERM, in this process or another of the same run."""
        return self._session.stop_requested

    def due(self, step: int) -> bool:
        """Is a save due after ``step``?"""
        if self._steps is not None:
            return step % self._steps == 0
        return self._seconds is not None and time.monotonic() - self._last >= self._seconds

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint inside the running stage."""
        self._last = time.monotonic()
        session, run = self._session, self._run
        if session.main and session._stage is not None:
            checkpoint.save_progress(
                session.folder.checkpoints,
                session._stage,
                step,
                run.plan,
                state["model"],
                extra={"seconds": session.elapsed + self._last - self._started, "incidents": session.incidents},
                state={k: v for k, v in state.items() if k != "model"},
            )

    def last(self) -> dict[str, Any] | None:
        """The newest sound state of the running stage."""
        for found in checkpoint.newest_first(self._session.folder.checkpoints):
            if found.finished or found.stage != self._session._stage:
                return None
            return {**found.state, "model": found.state_dict}
        return None

    def incident(self, finding: dict[str, Any]) -> None:
        """A step diverged: into the log, and into the stage's row of the ledger."""
        self._session.incidents.append(finding)
        self._session.emit("divergence", **finding)
        done = (
            "left out" if finding["action"] == "skip" else f"back to step {finding['to_step']}, half the learning rate"
        )
        self._session.emit("warning", message=f"{describe(finding)}; {done}")


def restore(run: RunContext, finished: Checkpoint) -> None:
    """Bring ``run``, as the pipeline prepares it, to where a finished stage left it.

    UserError when the weights do not fit the plan.
    """
    run.plan = finished.plan
    run.model = apply_plan(run.model.cpu(), finished.plan, run.example().cpu())
    load_weights(run.model, finished.state_dict)
    run.model.to(run.device)
    run.ledger = list(finished.extra["ledger"])
    run.passes = int(finished.extra["passes"])


def seconds(text: str) -> float:
    """Seconds of '90s', '5m' or '2h'.

    >>> seconds("5m")
    300.0
    """
    return float(text[:-1]) * {"s": 1, "m": 60, "h": 3600}[text[-1]]


def stage_id(recipe: Recipe, index: int) -> str:
    """Name of stage ``index`` in the run folder, like '1-prune'."""
    return f"{index}-{recipe.stages[index].kind}"


def how_to_resume() -> str:
    """The sentence that says how an interrupted run is continued."""
    program = Path(sys.argv[0]) if sys.argv and sys.argv[0] else Path()
    module = program.name == "__main__.py" and program.parent.name == "flatcompress"  # python -m flatcompress
    if not module and program.stem != "flatcompress":
        return "The same call resumes the run."
    words = [w for w in sys.argv[1:] if w != "--restart"]
    return f"Resume with: {command()} " + " ".join(shlex.quote(w) for w in words)
