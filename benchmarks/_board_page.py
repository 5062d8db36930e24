"""The page of `benchmarks.microcontroller`, and the tables that it keeps in the guide; from the results file alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import _common, _published_boards
from benchmarks._published_boards import SOURCES

DOCS = Path(__file__).parent.parent / "docs"
PAGE, GUIDE = DOCS / "results" / "microcontroller.md", DOCS / "microcontroller.md"
BEGIN, END = "<!-- written by python -m benchmarks.microcontroller -->", "<!-- until here -->"
NAMES = {
    "resnet8": "ResNet-8",
    "ds_cnn": "DS-CNN",
    "mobilenet_v1_025": "MobileNetV1 x0.25, 96 px",
    "autoencoder": "autoencoder",
    "vit_tiny": "vit_tiny, 16 px",
}
TINY = ("resnet8", "ds_cnn", "mobilenet_v1_025", "autoencoder")
PARTS = {"test": "test", "held_out": "held out", "corrupted": "corrupted"}
Row = Mapping[str, Any]


def write(results: Path) -> None:
    """Page and guide anew, from the results file."""
    found = json.loads(results.read_text())
    PAGE.write_text(page(found))
    GUIDE.write_text(guide(GUIDE.read_text(), found))


def guide(text: str, found: Mapping[str, Any]) -> str:
    """The guide's text with what lies between the two marks written anew. ValueError without the marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{GUIDE.name} must hold the lines {BEGIN} and {END}: its tables stand between them.")
    return f"{before}{BEGIN}\n\n{tables(found)}\n{END}{after}"


def tables(found: Mapping[str, Any]) -> str:
    """MLPerf Tiny's four networks: ours untrained, ours trained, and what is published."""
    dense = [r for r in found["rows"] if r["net"] in TINY and not r["zeros"] and r["bits"] in ("W8A8", "W4A4")]
    lines = [_UNTRAINED, "", _common.markdown([_memory(row) for row in dense]), ""]
    if found.get("trained"):
        lines += [_TRAINED, "", _common.markdown([_accuracy(row) for row in found["trained"]]), ""]
    lines += [_PUBLISHED, "", _common.markdown(_published_memory()), "", _SPEED, ""]
    lines += [_common.markdown(_published_speed(found["rows"])), "", _verdict(found["rows"]), ""]
    return "\n".join(lines)


def page(found: Mapping[str, Any]) -> str:
    """docs/results/microcontroller.md."""
    rows, trained = found["rows"], found.get("trained", [])
    right = sum(row["bits right"] and row.get("packed right", True) for row in [*rows, *trained])
    lines = [_HEAD.strip(), "", "## What holds", ""]
    lines += [f"Every output bit is right in {right} of {len(rows) + len(trained)} networks."]
    lines += _missed(found["missed"])
    lines += ["", "## All cells", "", _CELLS, "", _common.markdown(_cells(rows)), ""]
    lines += ["## Two activations to a byte", "", _PACKED, ""]
    lines += [_common.markdown([_packed(r) for r in [*rows, *trained] if "packed ram" in r]), ""]
    lines += ["## Beside other C", "", _OTHERS, ""]
    compared = [r for r in [*rows, *trained] if "at -O2" in r]
    lines += [_common.markdown([_other(row) for row in compared]), "", *_emx_said(found, compared)]
    lines += ["## Estimates", "", _ESTIMATES, ""]
    lines += [f"- {name}: {value:g}" for name, value in found["estimates"].items()]
    lines += ["", f"Made by `python -m benchmarks.microcontroller` with torch {found['machine']['torch']}.", ""]
    return "\n".join(line.rstrip() for line in lines)


def _missed(missed: Sequence[str]) -> list[str]:
    if not missed:
        return ["Every target is met."]
    return [f"{len(missed)} targets are missed (the docstring of the benchmark states all of them):", "",
            *[f"- {text}" for text in missed]]  # fmt: skip


def _n(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}"


def _million(value: float) -> str:
    return f"{value / 1e6:.2f}"


def _name(row: Row) -> str:
    return NAMES.get(row["net"], row["net"])


def _zeros(row: Row) -> str:
    return f"{row['zeros']:.0%}".replace("%", " %") if row["zeros"] else "none"


def _memory(row: Row) -> dict[str, Any]:
    return {
        "network": _name(row),
        "bits": row["bits"],
        "flash": _n(row["flash"]),
        "arena": _n(row["ram"]),
        "packed arena": _n(row.get("packed ram")),
        "stack": str(row["stack"]),
        "floats in and out": _n(row["in and out"]),
        "million instructions": _million(row["instructions"]),
    }


def _accuracy(row: Row) -> dict[str, Any]:
    told = {
        "recipe": row["net"],
        "network": NAMES.get(row["kind"], row["kind"]).split(",")[0],
        "input": " x ".join(map(str, row["input"])),
        "bits": row["bits"],
        "products left": f"{row['macs'] / row['macs before']:.2f}",
        "flash": _n(row["flash"]),
        "arena": _n(row["ram"]),
        "million instructions": _million(row["instructions"]),
        "metric": row["metric"],
    }
    return {**told, **{title: None if row[part] is None else f"{row[part]:.3f}" for part, title in PARTS.items()}}


def _source(key: str) -> str:
    name, address = SOURCES[key]
    return f"[{name}]({address})"


def _published_memory() -> list[dict[str, Any]]:
    return [{"network": NAMES[m.net], "runtime": m.runtime, "core": m.core, "flash": m.flash, "RAM": m.ram,
             "source": _source(m.source)} for m in _published_boards.MEMORY]  # fmt: skip


def _published_speed(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A row per runtime: million cycles and accuracy by network; the first is ours, in instructions."""
    table: list[dict[str, Any]] = [{"runtime": "flatcompress W8A8 (instructions)"}]
    for net in TINY:
        table[0][NAMES[net]] = _million(ours) if (ours := _eight(rows, net)) else None
    table[0]["source"] = "this benchmark"
    for runtime in dict.fromkeys(s.runtime for s in _published_boards.SPEED):
        own = {s.net: s for s in _published_boards.SPEED if s.runtime == runtime}
        cells = {NAMES[net]: f"{own[net].cycles:.2f} ({own[net].accuracy})" for net in TINY}
        table.append({"runtime": runtime, **cells, "source": _source(own[TINY[0]].source)})
    return table


def _eight(rows: Sequence[Row], net: str) -> int | None:
    """Instructions at W8A8, dense."""
    return next((r["instructions"] for r in rows if (r["net"], r["bits"], r["zeros"]) == (net, "W8A8", 0.0)), None)


def _verdict(rows: Sequence[Row]) -> str:
    """Where a published runtime is surely faster: its cycles are below our instructions."""
    faster = [
        f"{s.runtime} on {NAMES[s.net]} ({s.cycles:.1f} million cycles, {ours / 1e6:.1f} million instructions)"
        for s in _published_boards.SPEED
        if (ours := _eight(rows, s.net)) and 1e6 * s.cycles < ours
    ]
    if not faster:
        return "No published runtime takes fewer cycles than our C takes instructions."
    return (
        "An instruction takes a cycle at best, and on a Cortex-M4 a load often two, so these are faster than our 8-bit "
        f"C at `-Os`: {'; '.join(faster)}. Of the others nothing can be said without a board."
    )


def _cells(rows: Sequence[Row]) -> list[dict[str, Any]]:
    dense = {(r["net"], r["bits"]): r["instructions"] for r in rows if not r["zeros"]}
    return [
        {
            "network": _name(r), "bits": r["bits"], "zeros": _zeros(r), "flash": _n(r["flash"]), "true": _n(r["true"]),
            "channels": _n(r["channels"]), "RAM": _n(r["ram"]), "bound": _n(r["bound"]), "stack": str(r["stack"]),
            "instructions": _n(r["instructions"]), "a product": f"{r['a product']:.2f}",
            "of dense": f"{r['instructions'] / dense[r['net'], r['bits']]:.2f}" if r["zeros"] else "",
            "float channels": str(r["float channels"]), "bits right": "all" if r["bits right"] else "NOT ALL",
        }
        for r in rows
    ]  # fmt: skip


def _packed(row: Row) -> dict[str, Any]:
    return {
        "network": _name(row),
        "bits": row["bits"],
        "zeros": _zeros(row),
        "RAM": _n(row["packed ram"]),
        "of the bound": f"{row['packed ram'] / row['bound']:.2f}",
        "a byte a code": _n(row["ram"]),
        "flash": _n(row["packed flash"]),
        "instructions": _n(row["packed instructions"]),
        "times those with bytes": f"{row['packed instructions'] / row['instructions']:.2f}",
    }


def _other(row: Row) -> dict[str, Any]:
    own, naive, emx = row["at -O2"], row.get("naive instructions"), row.get("emx instructions")
    return {
        "network": _name(row),
        "ours": _n(own),
        "our arena and stack": _n(row["ram"] + row["stack"]),
        "plain C": _n(naive),
        "times ours": f"{naive / own:.1f}" if naive else None,
        "its flash": _n(row.get("naive flash")),
        "emx": _n(emx),
        "emx, times ours": f"{emx / own:.1f}" if emx else None,
        "emx flash": _n(row.get("emx flash")),
        "emx stack": _n(row.get("emx stack")),
        "file": row.get("emx profile"),
        "differs by": f"{row['emx largest error']:.0e}" if emx else row.get("emx says"),
    }


def _emx_said(found: Mapping[str, Any], compared: Sequence[Row]) -> list[str]:
    """Why columns of emx are empty, where they are."""
    if found.get("emx"):
        return [f"emx-onnx-cgen could not be installed, so that its columns are empty: {found['emx']}", ""]
    empty = [_name(row) for row in compared if "emx profile" not in row]
    return [f"Not measured with emx-onnx-cgen: {', '.join(empty)}.", ""] if empty else []


_HEAD = """
# C on a microcontroller

`python -m benchmarks.microcontroller`: what profile `c` writes ([From recipe to board](../microcontroller.md)),
compiled with arm-none-eabi-gcc for a Cortex-M4 with FPU, `-Os`, run on QEMU's mps2-an386. Flash is the linked image
less the same image without a model; RAM is the arena; the stack was painted and read. Emulation counts **instructions,
not cycles**: wait states of the flash, loads of two cycles and caches are not in them. The networks of *All cells* are
untrained (BatchNorms as training leaves them, some gammas negative, first and last layer 8 bits), so they have no
accuracy; networks that recipes trained, beside what is published for other runtimes, are in the
[guide](../microcontroller.md#the-four-networks-of-mlperf-tiny).
"""
_CELLS = """
*true*: bytes of the weights at their bits, or of a mask and the weights that are not zero. *bound*: the largest set of
live tensors if none overlapped, a byte a code. *a product*: instructions for each multiply-accumulate of the dense
network. *float channels*: of those that round in float32, because no integer multiplier agrees with it on all reachable
sums; all others are proved. vit_tiny has steps on real values: its bits are those of the same C on this machine.
""".strip()
_PACKED = """
`pack_activations: true`; the target is 0.65 of the bound. The bits are the same.
""".strip()
_OTHERS = """
W4A4, dense, all at -O2; bytes and instructions. *plain C*: what one writes first, with the same outputs: int8 weights,
a loop a dimension, float roundings. *emx*: emx-onnx-cgen 1.4.0 on the same network's ONNX file (int8 or packed,
whichever takes fewer instructions), all its tensors on the stack, here in 16 MB of emulated PSRAM, since most boards
have no room for them. *differs by*: its largest error on the one sample that was run. The board has no C library: for
emx the benchmark brings `expf` and `erff` of some forty instructions.
""".strip()
_ESTIMATES = """
What the cost model says before anything is compiled, against what was linked and run, over all rows:
""".strip()
_UNTRAINED = """
As MLPerf Tiny has them, unpruned. **Their weights are untrained, so they have no accuracy**; flash and instructions at
these bits do not depend on it unless training leaves many zeros. Bytes; Cortex-M4, `-Os`, emulated. *packed arena*:
with `pack_activations`. *floats in and out*: the caller's buffers, which count beside the arena and are four times
those of runtimes that take bytes.
""".strip()
_TRAINED = """
The same architectures as recipes of `configs/` train, prune and quantize them (seed 0, 4-bit weights), on data that the
project makes itself: smaller inputs than MLPerf Tiny's, and accuracies that say nothing about its data sets, on which
nothing was trained here. Accuracy is the exported file's; the C gives its every output bit. Three seeds of the recipes
`task-*`: [tasks](results/tasks.md).
""".strip()
_PUBLISHED = """
Published for the same networks with 8 bits. The figures are not of one kind: some count a runtime, an operating system
or the buffers of input and output, ours do not.
""".strip()
_SPEED = f"""
Million cycles of one inference, from inferences a second as submitted on a Nucleo-L4R5ZI (Cortex-M4 at
{_published_boards.MHZ} MHz), with the accuracy that was submitted on MLPerf Tiny's data; ours are instructions:
""".strip()
