"""The table of costs of profile ``c``: flash of the kernels' parts, instructions of their loops, on an emulated M4.

    python -m benchmarks.board_costs [--quick] [--check] [--write]

Drawn programs (`_drawn_c`) are compiled with arm-none-eabi-gcc -Os and run on QEMU's mps2-an386, every step's
instructions counted. What a pass of each loop takes, and each part of the code, is the solution of least squares with
no negative part, by relative error for instructions. A quarter of the programs is kept out of the fit. --write puts the
table where the package reads it (flatcompress/onnx_export/c/costs.json); do so after every change of the kernels.

Targets, on the programs that were kept out
  1. instructions of a program: median error <= 5 %, nine in ten within 15 %.
  2. flash: nine in ten within 500 bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks._common import arguments, finish
from benchmarks._drawn_c import Drawn
from flatcompress.onnx_export.c import board, build, costs, folder, layers, work

NAME = "board_costs"
TABLE = Path(costs.__file__).with_name("costs.json")
COUNT, QUICK, KEPT = 400, 40, 4  # programs; every fourth is kept out of the fit
SHORT = 1500  # instructions: errors of shorter steps count as of one of so many
BYTES = 1e6  # more than any program's code: errors of flash count as they are


def measured(seed: int) -> dict[str, Any]:
    """One program: instructions of every step with its work, flash beside the constants with its parts."""
    drawn = Drawn(seed)
    decided = layers.decide(drawn.program, drawn.packed)
    with tempfile.TemporaryDirectory() as place:
        folder.write(decided, "model", Path(place))
        outputs = math.prod(drawn.program.outputs)
        plain = board.measure(Path(place), "model", drawn.input, outputs, costs.BOARD, costs.FLAGS)
        found = board.measure(Path(place), "model", drawn.input, outputs, costs.BOARD, costs.FLAGS, steps=True)
    total = plain.instructions[0]
    steps = [*found.steps, found.instructions[0] - sum(found.steps)]
    assert len(steps) == len(drawn.program.steps)
    return {
        "steps": [(work.of_step(decided, i), count) for i, count in enumerate(steps)],
        "instructions": total,
        "parts": costs.parts(decided),
        "flash": plain.flash,
        "constants": costs.constants(decided),
    }


def fitted(rows: Sequence[tuple[Mapping[str, float], float]], least: float) -> dict[str, float]:
    """What each named count takes, none below 0, so that the sums are nearest to the values, relative to each (but at
    least ``least``)."""
    names = sorted({name for counts, _ in rows for name in counts})
    matrix = np.array([[counts.get(name, 0.0) for name in names] for counts, _ in rows])
    values = np.array([value for _, value in rows], float)
    weight = 1.0 / np.maximum(values, least)
    weighed = matrix * weight[:, None]
    size = np.linalg.norm(weighed, axis=0)
    solved = nnls(weighed / size, values * weight)[0] / size
    return {name: round(float(value), 4) for name, value in zip(names, solved)}


def table(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The table as the package reads it."""
    steps = [step for row in found for step in row["steps"]]
    flash = [(row["parts"], row["flash"] - row["constants"]) for row in found]
    return {
        "board": costs.BOARD,
        "flags": list(costs.FLAGS),
        "compiler": build.version(board.BOARDS[costs.BOARD].compile[0]),
        "programs": len(found),
        "instructions": fitted(steps, SHORT),
        "flash": fitted(flash, BYTES),
    }


def errors(found: Sequence[dict[str, Any]], made: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each program: flash and instructions as estimated and as measured."""
    rows = []
    for row in found:
        flash = row["constants"] + costs.times(row["parts"], made["flash"])
        guess = sum(costs.times(counts, made["instructions"]) for counts, _ in row["steps"])
        rows.append({"flash": row["flash"], "estimated flash": round(flash), "instructions": row["instructions"],
                     "estimated instructions": round(guess), "unknown": _unknown(row, made)})  # fmt: skip
    return rows


def _unknown(row: Mapping[str, Any], made: Mapping[str, Any]) -> list[str]:
    """Kinds of work and parts of the code that the table does not have."""
    work_of = [name for counts, _ in row["steps"] for name in costs.unknown(counts, made["instructions"])]
    return sorted({*work_of, *costs.unknown(row["parts"], made["flash"])})


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The errors of programs that were kept out of the fit."""
    share = [abs(r["estimated instructions"] / r["instructions"] - 1) for r in rows]
    flash = [abs(r["estimated flash"] - r["flash"]) for r in rows]
    return {
        "median error of instructions": round(float(np.median(share)), 4),
        "nine in ten within": round(float(np.quantile(share, 0.9)), 4),
        "largest": round(max(share), 4),
        "median error of flash, bytes": round(float(np.median(flash))),
        "flash: nine in ten within": round(float(np.quantile(flash, 0.9))),
        "flash: largest": max(flash),
        "kinds that the table does not have": len({name for row in rows for name in row["unknown"]}),
    }


def missed(said: Mapping[str, float]) -> list[str]:
    """A sentence for every target missed."""
    limits = {"median error of instructions": 0.05, "nine in ten within": 0.15, "flash: nine in ten within": 500}
    return [f"{name}: {said[name]}, {limit} allowed." for name, limit in limits.items() if said[name] > limit]


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--write", action="store_true", help="put the table where the package reads it")


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(__doc__, argv, _options)
    if options.quick and options.write:
        print(f"{NAME}: --write needs a table fitted on all {COUNT} programs; leave out --quick.")
        return 2
    if (lacking := board.missing(costs.BOARD)) is not None:
        print(f"{NAME}: {lacking}; nothing was measured.")
        return 1 if options.check else 0
    found = [measured(seed) for seed in range(QUICK if options.quick else COUNT)]
    held = found[::KEPT]
    if options.quick:  # the table that is there, on programs it has seen
        made = costs.table()
    else:
        made = table([row for i, row in enumerate(found) if i % KEPT])
        if options.write:
            TABLE.write_text(json.dumps(made, indent=1) + "\n")
    rows = errors(held, made)
    said = summary(rows)
    for name, value in said.items():
        print(f"{name}: {value}")
    return finish(NAME, rows, missed(said), options, summary=said)


if __name__ == "__main__":
    sys.exit(main())
