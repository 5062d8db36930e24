"""Builds report.html: gathers a run folder, makes the tables and charts, renders the template."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from flatcompress import __version__
from flatcompress.report import bits, costs, curves, examples, proof, said, tables
from flatcompress.report.gather import Run, gather
from flatcompress.report.numbers import (
    factor,
    mapping,
    milliseconds,
    number,
    percent,
    points,
    size,
    text,
)
from flatcompress.storage import write_text_atomic

TEMPLATES = Path(__file__).parent / "templates"


def build(run_folder: str | Path) -> Path:
    """Write ``report.html`` into ``run_folder`` from the files that are there, and return its path.

    Missing, partial or damaged files cost only their part of the page and are named on it. UserError when the folder
    is no run folder; RunError when the page cannot be written.

    >>> build("/no/such/folder")
    Traceback (most recent call last):
    flatcompress.errors.UserError: /no/such/folder: not a folder. Give a run folder, for example runs/quickstart.
    """
    run = gather(run_folder)
    path = run.path / "report.html"
    write_text_atomic(path, render(run), "The report before this one is kept.")
    return path


def render(run: Run) -> str:
    """The page as text; everything that came from a file is escaped."""
    certificate = run.certificate
    shown = {"holds", "failures"}
    values = {
        "run": run,
        "title": run.name,
        "badge": badge(run),
        "tiles": tiles(run),
        "facts": facts(run),
        "stages": tables.by_stage(run),
        "ledger": tables.ledger(run),
        "corruptions": tables.corruptions(run),
        "training": curves.training(run),
        "pruning": curves.pruning(run),
        "conflict": curves.conflict(run),
        "bits": bits.maps(run),
        "layers": tables.layers(run),
        "checks": proof.checks(certificate),
        "failures": [text(f, 300) for f in _listed(certificate.get("failures"))[:50]],
        "sizes": proof.sizes(certificate),
        "proof": proof.tree({k: v for k, v in certificate.items() if k not in shown}),
        "environment": proof.tree(mapping(run.start.get("environment"))),
        "warnings": [_message(m) for m in run.messages[-50:]],
        "files": [(name, size(bytes_)) for name, bytes_ in run.files],
        "plans": {stage: _steps(kinds) for stage, kinds in run.plans.items()},
        "said": said.sections(run),
        "examples": examples.shown(run),
        "floats": costs.floats(run),
        "spent": costs.spent(run),
    }  # fmt: skip
    return rendered("report.html.j2", **values, contents=contents(values))


def rendered(template: str, **values: Any) -> str:
    """A page of our style and script; every value is escaped."""
    script = _source("report.js")
    return _environment().get_template(template).render(
        **values,
        style=Markup(_source("report.css")),  # our own files: the only markup that is not escaped
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=__version__,
    )  # fmt: skip


def contents(values: dict[str, Any]) -> list[tuple[str, str]]:
    """The table of contents: anchor and title of every part that has something to show."""
    parts = (
        ("stages", "Stage to stage", values["ledger"]["rows"]),
        ("classes", "Classes", values["said"]),
        ("mistakes", "Mistakes", values["examples"]["worst"]),
        ("examples", "Examples", values["examples"]["drawn"]),
        ("training", "Training", values["training"] or values["pruning"]),
        ("conflict", "Conflict", values["conflict"]),
        ("bits", "Bits", values["bits"]),
        ("layers", "Layers", values["layers"]["rows"]),
        ("floats", "What stayed float", values["floats"]),
        ("corruption", "Corruption", values["corruptions"]["rows"] or values["examples"]["corruptions"]),
        ("certificate", "Certificate", values["checks"] or values["proof"]),
        ("spent", "Time and memory", values["spent"]),
        ("data", "Data", values["run"].preview),
        ("recipe", "Recipe", values["run"].recipe_text),
    )
    return [(anchor, title) for anchor, title, there in parts if there]


def badge(run: Run) -> dict[str, str]:
    """The verdict in one phrase: ``tone`` is good, bad, warn or plain."""
    holds = run.certificate.get("holds")
    if holds is True:
        return {"tone": "good", "text": "Certificate holds"}
    if holds is False:
        return {"tone": "bad", "text": "Certificate does not hold"}
    if run.stopped:
        return {"tone": "warn", "text": f"Interrupted: {run.stopped}"}
    if not run.finished:
        return {"tone": "warn", "text": "Not finished"}
    return {"tone": "plain", "text": "No certificate"}


def tiles(run: Run) -> list[dict[str, str]]:
    """The figures at the top: size, ratio, the three accuracies and the latency of the last row."""
    if not run.rows:
        return []
    first, last = run.rows[0], run.rows[-1]
    exported = last.get("stage") == "export"
    found = [_tile("File size" if exported else "Weights", size(last.get("bytes")), _smaller(run))]
    for column in tables.columns_of(run.rows):
        value = tables.lookup(last, column.key)
        if value is None or not column.better or not column.key.startswith(("accuracy.", "metrics.")):
            continue
        now, then = number(value), number(tables.lookup(first, column.key))
        change = now - then if now is not None and then is not None and last is not first else None
        tone = "" if change is None or abs(change) < 5e-4 else "good" if change * column.better > 0 else "bad"
        title = f"{column.title} accuracy" if column.key.startswith("accuracy.") else column.title
        shown = points(change) if column.change == "points" else f"{change or 0:+.3g}"
        since = f"{shown} since {text(first.get('stage'), 24)}" if change is not None else ""
        found.append(_tile(title, column.show(value), since, tone))
    if number(last.get("latency_ms")) is not None:
        found.append(_tile("Latency", milliseconds(last["latency_ms"]), _faster(run) if exported else ""))
    return found


def _tile(title: str, value: str, note: str = "", tone: str = "") -> dict[str, str]:
    return {"title": title, "value": value, "note": note, "tone": tone}


def _smaller(run: Run) -> str:
    """How many times smaller than the float model: its own ONNX file where that was measured, else its weights."""
    now = number(run.rows[-1].get("bytes"))
    file = proof.float_bytes(run.certificate)
    before = file or number(run.rows[0].get("bytes"))
    if not now or not before or (file is None and len(run.rows) < 2):
        return ""
    ratio = factor(before / now).removeprefix("×")
    what = "the float model’s ONNX file" if file else f"the weights after {text(run.rows[0].get('stage'), 24)}"
    return f"{ratio} × smaller than {what}" if before > now else ""


def _faster(run: Run) -> str:
    faster = number(mapping(run.certificate.get("float")).get("faster"))
    if not faster or faster <= 0:
        return "one image, onnxruntime"
    return f"{faster:,.1f} × the float model’s speed" if faster >= 1 else f"{1 / faster:,.1f} × slower than float"


def facts(run: Run) -> list[str]:
    """What was done to what, in short phrases."""
    recipe = run.recipe
    data, model = mapping(recipe.get("data")), mapping(recipe.get("model"))
    held_out = text(run.start.get("held_out"), 40) or text(data.get("held_out"), 40)
    found = [
        text(model.get("name"), 60),
        text(data.get("name"), 60) or text(run.start.get("data"), 60),
        f"never trained on “{held_out}”" if held_out else "",
        _bits(run),
        _cut(run),
    ]
    found.append(costs.taken(run))
    return [f for f in found if f]


def _bits(run: Run) -> str:
    rows = tables.layers(run)["rows"]
    pairs = Counter("".join(r["bits"]) for r in rows if not r["float"])
    if not pairs:
        return ""
    common, n = pairs.most_common(1)[0]
    return f"{common} in {n} of {len(rows)} layers"


def _cut(run: Run) -> str:
    macs = [m for m in (number(r.get("macs")) for r in run.rows) if m]
    if len(macs) < 2 or macs[-1] >= macs[0]:
        return ""
    return f"{percent(1 - macs[-1] / macs[0], 0)} of the MACs removed"


def _message(event: dict[str, Any]) -> str:
    where = text(event.get("stage"), 40)
    return (f"{where}: " if where else "") + text(event.get("message") or event.get("text"), 400)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _steps(kinds: list[str]) -> str:
    counted = Counter(kinds)
    return ", ".join(f"{kind} ×{n}" if n > 1 else kind for kind, n in counted.items()) or "unchanged architecture"


@cache
def _source(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
