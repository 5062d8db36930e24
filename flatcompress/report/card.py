"""model-card.md: the run as a Hugging Face model card. Uploading it is the user's own step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flatcompress import __version__
from flatcompress.report import proof, tables
from flatcompress.report.gather import Run, gather
from flatcompress.report.numbers import mapping, milliseconds, number, percent, size, text
from flatcompress.storage import write_text_atomic

MOST_CLASSES = 40


def build(folder: str | Path) -> Path:
    """Write ``model-card.md`` into a run folder from its files. UserError when it is none; RunError on a full disk."""
    run = gather(folder)
    path = run.path / "model-card.md"
    write_text_atomic(path, render(run), "The card before this one is kept.")
    return path


def render(run: Run) -> str:
    """The card as text; what nobody measured is said to be missing, not left out silently."""
    parts = [
        _front(run),
        f"# {_safe(run.name)}\n",
        _summary(run),
        _use(run),
        _data(run),
        _metrics(run),
        _corruptions(run),
    ]
    return "\n".join([*parts, _size(run), _certificate(run), _repeat(run)]).rstrip() + "\n"


def _safe(value: Any, limit: int = 120) -> str:
    """A name from a file as plain text in Markdown."""
    return "".join("\\" + c if c in "\\`*_{}[]<>#|!" else c for c in text(value, limit))


def _last(run: Run) -> dict[str, Any]:
    return run.rows[-1] if run.rows else {}


def _task(run: Run) -> str:
    task = run.recipe.get("task")
    return text(mapping(task).get("name") or task, 40) or "classification"


def _front(run: Run) -> str:
    image = {"classification": "image-classification", "segmentation": "image-segmentation"}
    kind = image.get(_task(run), "other")
    found: list[str] = ["---", "library_name: onnx", f"pipeline_tag: {kind}"]
    found += ["tags:", "- onnx", "- quantized", "- flatcompress"]
    accuracy = tables.lookup(_last(run), "accuracy.test")
    if number(accuracy) is not None:
        name, data = (json.dumps(text(v, 80)) for v in (run.name, mapping(run.recipe.get("data")).get("name") or "?"))
        found += ["model-index:", f"- name: {name}", "  results:", "  - task:", f"      type: {kind}",
                  "    dataset:", f"      name: {data}", f"      type: {data}", "    metrics:", "    - type: accuracy",
                  f"      value: {accuracy}"]  # fmt: skip
    return "\n".join([*found, "---", ""])


def _summary(run: Run) -> str:
    model = _safe(mapping(run.recipe.get("model")).get("name")) or "a network"
    stages = run.recipe.get("stages")
    steps = [_safe(next(iter(s)), 40) for s in stages if isinstance(s, dict) and s] if isinstance(stages, list) else []
    return f"{model}, made by flatcompress {__version__} in the stages {', '.join(steps) or 'unknown'}.\n"


def _use(run: Run) -> str:
    target = (
        "a class of each input" if _task(run) == "classification" else f"the output of a {_safe(_task(run))} network"
    )
    return (
        f"## Intended use\n\nTo predict {target}, on inputs like those it was trained and measured on (below), through "
        "onnxruntime or what else the certificate names. Not for anything that a person's safety or rights depend on "
        "without a validation of its own: the figures below are of one data set.\n"
    )


def _data(run: Run) -> str:
    section, classes = mapping(run.recipe.get("data")), run.start.get("classes")
    lines = [f"- data set: {_safe(section.get('name')) or 'not recorded'}"]
    if isinstance(classes, list) and classes:
        more = f" and {len(classes) - MOST_CLASSES} more" if len(classes) > MOST_CLASSES else ""
        lines.append(f"- {len(classes)} classes: {', '.join(_safe(c, 40) for c in classes[:MOST_CLASSES])}{more}")
    held_out = _safe(run.start.get("held_out"))
    lines.append(f"- never trained on: domain {held_out}" if held_out else "- no domain was held out")
    skipped = number(run.start.get("skipped"))
    lines += [f"- left out as unreadable: {skipped:.0f} files"] if skipped else []
    return "## Data\n\n" + "\n".join(lines) + "\n\nLicence and origin of the data are for its owner to add here.\n"


def _table(titles: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [titles, ["---"] * len(titles), *rows])


def _metrics(run: Run) -> str:
    rows = [
        [_safe(r.get("stage"), 40), *(percent(tables.lookup(r, f"accuracy.{k}"), 2) for k, _, _ in tables.ACCURACIES)]
        for r in run.rows
    ]
    more = [
        f"- {_safe(name, 40)}: "
        + ", ".join(f"{part} {number(v):.4g}" for part, v in mapping(m).items() if number(v) is not None)
        for name, m in mapping(_last(run).get("metrics")).items()
    ]
    if not rows:
        return "## Metrics\n\nNothing was measured.\n"
    head = "## Metrics\n\nAccuracy on test part, held-out domain and corrupted copies; the last row is the file.\n\n"
    return head + _table(["stage", "test", "held out", "corrupted"], rows) + "\n\n" + "\n".join(more) + "\n"


def _corruptions(run: Run) -> str:
    found = tables.corruptions(run)
    if not found["rows"]:
        return "Accuracy under corruption was not measured.\n"
    rows = [[_safe(r["kind"], 40), *(c["text"] for c in r["cells"]), r["mean"]] for r in found["rows"]]
    return "By corruption and severity:\n\n" + _table(["corruption", *found["severities"], "mean"], rows) + "\n"


def _size(run: Run) -> str:
    float_, row = mapping(run.certificate.get("float")), _last(run)
    lines = [f"- size: {size(row.get('bytes'))}"]
    dense, faster = proof.float_bytes(run.certificate), number(float_.get("faster"))
    lines += [f"- the float model's file: {size(dense)}"] if dense is not None else []
    if number(row.get("latency_ms")) is not None:
        lines.append(f"- latency: {milliseconds(row['latency_ms'])} a sample, onnxruntime on the machine of the run")
        lines += [f"- {faster:.2f} times the float model's speed there"] if faster else []
    else:
        lines.append("- latency: not measured")
    return "## Size and latency\n\n" + "\n".join(lines) + "\n"


def _certificate(run: Run) -> str:
    if not run.certificate:
        return "## Certificate\n\nNone: no file was exported.\n"
    holds = run.certificate.get("holds") is True
    lines = ["The certificate **holds**." if holds else "The certificate **does not hold**.", ""]
    lines += [
        f"- {_safe(c['name'], 200)}{': ' + _safe(c['details'], 300) if c['details'] else ''}"
        for c in proof.checks(run.certificate)
    ]
    failures = run.certificate.get("failures")
    lines += [f"- {_safe(f, 300)}" for f in failures] if isinstance(failures, list) else []
    return "## Certificate\n\n" + "\n".join(lines) + "\n\n`flatcompress verify` repeats it on another machine.\n"


def _repeat(run: Run) -> str:
    return "## How to repeat it\n\n`flatcompress run recipe.yaml`, with the recipe.yaml of this folder.\n"
