"""Everything the report shows, read from a run folder's files; what is missing or damaged becomes a note."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from flatcompress import storage
from flatcompress.errors import UserError
from flatcompress.report.numbers import mapping, number, records, text
from flatcompress.store.runfolder import RunFolder
from flatcompress.store.runlog import read_events
from flatcompress.yaml_source import parse_yaml

MAX_PREVIEW = 4 << 20
MAX_EXAMPLES = 16 << 20
MAX_RECIPE = 1 << 18
STAGE_EVENTS = (
    "stage",
    "epoch",
    "prune",
    "conflict",
    "layers",
    "protected",
    "bits",
    "flatness",
    "predictions",
    "spent",
)
T = TypeVar("T")


@dataclass
class StageLog:
    """One stage's events, with what was logged twice (an interrupted and repeated stretch) left out."""

    name: str
    start: dict[str, Any] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    prune: list[dict[str, Any]] = field(default_factory=list)
    conflict: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    protected: list[dict[str, Any]] = field(default_factory=list)
    bits: dict[str, Any] = field(default_factory=dict)
    flatness: dict[str, Any] = field(default_factory=dict)
    predictions: dict[str, Any] = field(default_factory=dict)
    float_predictions: dict[str, Any] = field(default_factory=dict)
    spent: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """A run folder's content as plain data. Every field may be empty."""

    path: Path
    recipe_text: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    certificate: dict[str, Any] = field(default_factory=dict)
    examples: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, StageLog] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False
    stopped: str = ""
    last_time: str = ""
    plans: dict[str, list[str]] = field(default_factory=dict)
    files: list[tuple[str, int]] = field(default_factory=list)
    beside: dict[str, Any] = field(default_factory=dict)
    preview: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The recipe's name, else the folder's."""
        return text(self.recipe.get("name")) or text(self.start.get("name")) or text(self.path.resolve().name)


def gather(path: str | Path) -> Run:
    """Read ``path``. UserError when it is no run folder at all; a damaged file inside it is only a note."""
    folder = RunFolder(path)
    known = (folder.recipe, folder.ledger, folder.log, folder.certificate)
    try:
        if not folder.path.is_dir():
            raise UserError(f"{folder.path}: not a folder. Give a run folder, for example runs/quickstart.")
        if not any(p.exists() for p in known):
            names = ", ".join(p.name for p in known)
            raise UserError(f"{folder.path}: not a run folder, it has none of {names}.")
    except (OSError, ValueError) as error:
        raise error if isinstance(error, UserError) else UserError(f"{path!s}: cannot be read ({error}).") from None
    run = Run(folder.path)
    _read_recipe(run, folder)
    events: list[dict[str, Any]] = _tried(run, lambda: _events(run, folder.log), [])
    _sort_events(run, events)
    rows: list[dict[str, Any]] = _tried(run, folder.read_ledger, [])
    run.rows = rows or [mapping(e.get("row")) for e in events if e["event"] == "row"]
    run.certificate = mapping(_read(run, folder.certificate, lambda p: storage.read_json(p, 16 << 20), {}))
    run.examples = mapping(_read(run, folder.examples, lambda p: storage.read_json(p, MAX_EXAMPLES), {}))
    run.preview = _read(run, folder.preview, _data_uri, "")
    _list_files(run, folder)
    return run


def _tried(run: Run, action: Callable[[], T], otherwise: T) -> T:
    try:
        return action()
    except UserError as error:
        run.notes.append(text(str(error), 400))
        return otherwise


def _read(run: Run, path: Path, reader: Callable[[Path], T], otherwise: T) -> T:
    return _tried(run, lambda: reader(path), otherwise) if path.exists() else otherwise


def _read_recipe(run: Run, folder: RunFolder) -> None:
    if not folder.recipe.exists():
        return
    raw = _tried(run, lambda: storage.read_bytes(folder.recipe, MAX_RECIPE), b"")
    run.recipe_text = raw.decode("utf-8", "replace")
    try:
        run.recipe = mapping(parse_yaml(run.recipe_text, "recipe.yaml")[0])
    except Exception as error:  # hostile YAML breaks PyYAML in many ways; the text itself is shown all the same
        run.notes.append(text(f"recipe.yaml: not YAML ({error})", 400))


def _events(run: Run, path: Path) -> list[dict[str, Any]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        events = read_events(path)
    run.notes.extend(text(str(w.message), 400) for w in caught)
    return events


def _data_uri(path: Path) -> str:
    data = storage.read_bytes(path, MAX_PREVIEW)
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise UserError(f"{path}: not a PNG image.")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _list_files(run: Run, folder: RunFolder) -> None:
    try:
        run.files = [(p.name, p.stat().st_size) for p in sorted(folder.path.glob("*.onnx")) if p.is_file()]
        for plan in sorted(folder.checkpoints.glob("*/plan.json"))[:50]:
            if "@" in plan.parent.name or plan.parent.name.startswith("."):
                continue
            steps = mapping(_tried(run, lambda plan=plan: storage.read_json(plan), {})).get("steps")  # type: ignore[misc]
            run.plans[text(plan.parent.name)] = [text(s.get("kind"), 40) for s in records(steps)[:100]]
            weights = plan.parent / "model.safetensors"
            if weights.is_file():
                run.files.append((f"checkpoints/{plan.parent.name}/{weights.name}", weights.stat().st_size))
    except OSError as error:
        run.notes.append(text(str(error), 400))


def _sort_events(run: Run, events: list[dict[str, Any]]) -> None:
    for event in events:
        kind = event["event"]
        run.last_time = text(event.get("time"), 40) or run.last_time
        if kind == "run":
            run.start, run.finished, run.stopped = event, False, ""
        elif kind == "done":
            run.finished = True
        elif kind == "stopped":
            run.stopped = text(event.get("reason"), 400) or "stopped"
        elif kind == "warning":
            run.messages.append(event)
        elif kind in STAGE_EVENTS and text(event.get("stage")):
            _take(run.stages, kind, event)
        elif kind == "spent":
            run.beside |= mapping(event.get("seconds"))
    planned = run.start.get("stages")
    if isinstance(planned, list) and planned:  # stages of a recipe that was changed later on
        run.stages = {k: v for k, v in run.stages.items() if k in planned}
    run.stages = dict(sorted(run.stages.items(), key=lambda item: _order(item[0])))


def _take(stages: dict[str, StageLog], kind: str, event: dict[str, Any]) -> None:
    name = text(event["stage"])
    log = stages.setdefault(name, StageLog(name))
    if kind == "stage":
        step = number(event.get("resumed_at_step"))
        log = stages[name] = log if step is not None else StageLog(name)
        log.start = event
        if step is not None:
            log.prune = [e for e in log.prune if (number(e.get("step")) or 0) <= step]
            log.conflict = [e for e in log.conflict if (number(e.get("step")) or 0) <= step]
    elif kind == "layers":
        log.layers = records(event.get("layers")) or log.layers
    elif kind == "protected":
        log.protected.append(event)
    elif kind == "predictions" and event.get("of") == "float":
        log.float_predictions = event
    elif kind in ("bits", "flatness", "predictions", "spent"):
        setattr(log, kind, event)
    elif kind == "epoch":
        _append(log.epochs, "epoch", event)
    else:
        _append(log.prune if kind == "prune" else log.conflict, "step", event)


def _append(events: list[dict[str, Any]], clock: str, event: dict[str, Any]) -> None:
    """Append, dropping what a resumed run does a second time: everything at or after the event's own clock."""
    now = number(event.get(clock))
    if now is None:
        return
    while events and (number(events[-1].get(clock)) or 0) >= now:
        events.pop()
    events.append(event)


def _order(name: str) -> tuple[int, str]:
    head = name.split("-", 1)[0]
    return (int(head) if head.isascii() and head.isdigit() and len(head) < 9 else 10**9, name)
