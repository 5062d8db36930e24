"""Results as a person reads them on the terminal. Plain data in, text on stdout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flatcompress.environment import command
from flatcompress.report import terminal

WIDTH = 132  # the ledger's; a pipe or a log file has no width of its own


def _console() -> Console:
    console = Console(highlight=False, markup=False)  # what a file holds is text, never markup
    if console.is_terminal and console.width >= WIDTH:
        return console
    return Console(highlight=False, markup=False, width=WIDTH)


@contextmanager
def display(quiet: bool) -> Iterator[Any]:
    """Live progress on stderr for the length of the block; yields a function that takes log events, or None."""
    if quiet:
        yield None
        return
    with terminal.Progress() as progress:
        yield progress.event


def print_result(result: dict[str, Any]) -> None:
    """The ledger, the certificate in a line, and where the files are."""
    console = _console()
    console.print(terminal.ledger_table(result["ledger"]))
    certificate = result["certificate"]
    if certificate is not None:
        console.print(certificate_line(certificate))
    for sentence in result["expected"]:
        console.print(f"{'expected:':<12}{sentence}", soft_wrap=True)
    for label, key in (("ONNX file", "onnx"), ("report", "report"), ("run folder", "folder")):
        if result[key]:
            console.print(f"{label + ':':<12}{result[key]}", soft_wrap=True)
    console.print(f"{'next:':<12}{next_step(result)}", soft_wrap=True)


def next_step(result: dict[str, Any]) -> str:
    """What to do after a run, in a line.

    >>> next_step({"certificate": None, "onnx": None, "folder": "runs/a", "report": "runs/a/report.html"})
    'open runs/a/report.html; add an export stage for a file'
    """
    certificate = result["certificate"]
    if result["onnx"] is None or certificate is None:
        return f"open {result['report']}; add an export stage for a file"
    if not certificate["holds"]:
        return f"{command()} debug {result['folder']} says where the file and the model part"
    return f"{command()} demo {result['folder']} shows the file in a browser; verify it where it will run"


def certificate_line(certificate: dict[str, Any]) -> str:
    """One sentence: does it hold, and the three numbers people ask for."""
    verdict = "holds" if certificate["holds"] else "DOES NOT HOLD"
    parts = [f"certificate {verdict}"]
    size, dense = certificate.get("size"), certificate.get("float")
    if isinstance(size, dict):
        parts.append(f"{size['bytes']:,} bytes, the weights alone need {size['theoretical_bytes']:,}")
    if isinstance(dense, dict) and dense["smaller"] is not None:
        parts.append(f"{dense['smaller']:.1f} times smaller than the float model's file")
        if dense["faster"] is not None:
            parts.append(f"{dense['faster']:.1f} times faster")
    for failure in certificate.get("failures", []):
        parts.append(f"\n  - {failure}")
    return "; ".join(parts)


def print_catalogue(tables: dict[str, list[dict[str, Any]]]) -> None:
    """One table per registry."""
    console = _console()
    for kind, rows in tables.items():
        table = Table(title=kind, title_justify="left", box=None, padding=(0, 2, 0, 0), title_style="bold")
        for heading in ("name", "what it is", "defaults", "paper", "from"):
            table.add_column(heading, overflow="fold")
        for row in rows:
            defaults = ", ".join(f"{k}={v}" for k, v in row["defaults"].items())
            table.add_row(row["name"], row["summary"], defaults, row["paper"], row["from"])
        console.print(table)
        console.print()


def print_verification(outcome: dict[str, Any]) -> None:
    """Verdict and reasons of a certificate."""
    _console().print(certificate_line(outcome))


def print_compressed(made: dict[str, Any], certificate: dict[str, Any]) -> None:
    """Before and after, the certificate in a line, what was decided, and where everything is."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    metric = made["rows"][0].get("metric", "accuracy")
    for heading in ("", metric, "bytes", "ms", "layers on integers"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in made["rows"]:
        size, ms, value = row["bytes"], row["ms"], row[metric]
        shown = "-" if value is None else f"{value:.2%}" if row.get("share", True) else f"{value:.4g}"
        figures = ("-" if size is None else f"{size:,}", "-" if ms is None else f"{ms:.3f}")
        table.add_row(row["network"], shown, *figures, row["layers on integers"])
    console = _console()
    console.print(table)
    console.print(certificate_line(certificate))
    for note in made["notes"]:
        console.print(note, soft_wrap=True)
    for label, key in (("ONNX file", "onnx"), ("report", "report")):
        console.print(f"{label + ':':<12}{made[key]}", soft_wrap=True)
    console.print(f"again:      flatcompress run {made['recipe']}", soft_wrap=True)


def print_diagnosis(found: dict[str, Any]) -> None:
    """A row per layer and activation, and what to do."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("place", "bits", "local dB", "its bits allow", "cumulative dB", "clipped", "dead", "what is wrong"):
        table.add_column(heading, justify="left" if heading in ("place", "what is wrong") else "right")
    for row in found["rows"]:
        figures = [f"{row[key]:.1f}" for key in ("local_db", "possible_db", "cumulative_db")]
        clipped, dead = f"{row['clipped']:.2%}", str(row["dead"])
        table.add_row(row["name"], str(row["bits"]), *figures, clipped, dead, "; ".join(row["bad"]))
    console = _console()
    console.print(table)
    console.print(f"compared on {found['samples']} samples with {found['float']}", soft_wrap=True)
    console.print(found["proposal"], soft_wrap=True)


def print_comparison(found: dict[str, Any]) -> None:
    """The figures, the layers that differ and the recipe keys that differ, a column a run."""
    names = [run["name"] for run in found["runs"]]
    different = [row for row in found["layers"] if row["differs"]]
    layers = [{"name": row["name"], "texts": [_layer(cell) for cell in row["cells"]]} for row in different]
    verdicts = {"name": "Certificate", "texts": [run["verdict"] for run in found["runs"]]}
    parts = (("", [verdicts, *found["figures"]]), ("layers that differ", layers), ("recipe", found["recipe"]))
    for title, rows in parts:
        if not rows:
            continue
        table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), title_style="bold")
        for heading in ("", *names):
            table.add_column(heading, justify="right" if heading else "left", overflow="fold")
        for row in rows:
            best = row.get("best")
            cells = [Text(t, style="green" if i == best else "") for i, t in enumerate(row["texts"])]
            table.add_row(Text(row["name"]), *cells)
        _console().print(table)
    if not found["recipe"]:
        _console().print("The recipes are the same.")


def _layer(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    return f"{''.join(cell['bits']) or 'float'} {cell['channels_text']}"


def print_bench(outcome: dict[str, Any]) -> None:
    """Latency, load time, size."""
    for row in outcome["files"]:
        print_mapping({"file": row["path"], "bytes": row["bytes"]})
        for threads, timing in row["latency"].items():
            print_mapping({f"{threads} thread(s)": timing})
    print_mapping({k: v for k, v in outcome.items() if k != "files"})


def print_mapping(values: dict[str, Any], indent: str = "") -> None:
    """Keys and values, one a line, nested by indentation."""
    console = _console()
    width = max((len(str(k)) for k in values), default=0)
    for key, value in values.items():
        if isinstance(value, dict):
            console.print(f"{indent}{key}:")
            print_mapping(value, indent + "  ")
        else:
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            console.print(f"{indent}{key!s:<{width}}  {text}", soft_wrap=True)
