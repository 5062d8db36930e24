"""Flash, RAM and instructions of a decided program before anything is compiled.

RAM is the plan's own. Weights, multipliers and biases are counted as they are written. What code takes, and how many
instructions a pass of each loop does, was fitted on an emulated Cortex-M4 (``python -m benchmarks.board_costs``, which
writes ``costs.json``); `benchmarks.microcontroller` says how far these figures are from what is measured.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any

from flatcompress.onnx_export.c import choosing, coding, emit, ir, weights, work
from flatcompress.onnx_export.c.layers import Decided, Layer

BOARD, FLAGS = "m4", ("-Os",)  # what the table is of
DECODER = 64  # bytes of the table that coded rows are read with


@dataclass(frozen=True)
class StepCost:
    """``module``: the path it comes from. ``kind``: its kernel, or what it does. instructions: estimated, without the
    kinds of work that the table does not have (``unknown``)."""

    module: str
    kind: str
    macs: int
    instructions: int
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """flash: bytes that a linked image grows by. ram: bytes of the arena. instructions: of one inference. unmeasured:
    parts of the code that the table does not have."""

    flash: int
    ram: int
    steps: tuple[StepCost, ...]
    unmeasured: tuple[str, ...] = ()

    @property
    def instructions(self) -> int:
        """Of all steps."""
        return sum(step.instructions for step in self.steps)

    @property
    def unknown(self) -> tuple[str, ...]:
        """What flash and instructions are without: the table was fitted on programs that have nothing of the kind."""
        return tuple(sorted({*self.unmeasured, *(name for step in self.steps for name in step.unknown)}))

    def to_json(self) -> dict[str, Any]:
        """For the certificate."""
        found = table()
        on = {"board": found["board"], "flags": found["flags"], "compiler": found["compiler"]}
        figures = {"flash": self.flash, "instructions": self.instructions, "unknown": list(self.unknown)}
        return {**on, **figures, "steps": [asdict(step) for step in self.steps]}


@cache
def table() -> dict[str, Any]:
    """The fitted table: ``instructions`` a pass of each kind of work, ``flash`` bytes of each part of the code."""
    return json.loads((resources.files(__package__) / "costs.json").read_text(encoding="utf-8"))


def estimate(decided: Decided) -> Estimate:
    """What a program costs. Its C is made for that, not written."""
    return with_code(decided, parts(decided))


def with_code(decided: Decided, made_of: Mapping[str, float]) -> Estimate:
    """What a program costs whose code is made of these `parts`."""
    steps = tuple(step_cost(decided, index) for index in range(len(decided.program.steps)))
    flash, fitted = constants(decided) + code_bytes(made_of), table()["flash"]
    return Estimate(round(flash), decided.plan.arena, steps, unknown(made_of, fitted))


def step_cost(decided: Decided, index: int) -> StepCost:
    """One step's estimate."""
    step, layer = decided.program.steps[index], decided.layers.get(index)
    kind = layer.kernel if layer is not None else work.kind(step)
    macs = layer.step.macs if layer is not None else _products(step)
    counts, fitted = work.of_step(decided, index), table()["instructions"]
    return StepCost(step.path, kind, macs, round(times(counts, fitted)), unknown(counts, fitted))


def _products(step: ir.Step) -> int:
    made = step.begin if isinstance(step, ir.Rows) else None
    return made.heads * made.rows * made.columns * made.depth if isinstance(made, ir.Product) else 0


def times(counts: Mapping[str, float], fitted: Mapping[str, float]) -> float:
    """Counts times what each takes; what the table does not have (`unknown`) counts nothing."""
    return sum(count * (_of(name, fitted) or 0.0) for name, count in counts.items())


def unknown(counts: Mapping[str, float], fitted: Mapping[str, float]) -> tuple[str, ...]:
    """Names of counts that the table does not have."""
    return tuple(sorted(name for name, count in counts.items() if count and _of(name, fitted) is None))


def _of(name: str, fitted: Mapping[str, float]) -> float | None:
    """What a table has; of a kernel that is called once alone, if there is nothing of that, what one of many takes."""
    return fitted.get(name, fitted.get(name.removesuffix(work.ALONE)))


def code_bytes(made_of: Mapping[str, float]) -> float:
    """Bytes of flash beside weights, multipliers, biases and tables. made_of: see `parts`."""
    return times(made_of, table()["flash"])


def parts(decided: Decided) -> Counter[str]:
    """What the code is made of: the parts of the kernels that are compiled, and how many steps of each kind."""
    made = emit.write(decided, "model")
    return Counter({f"part {name}": 1 for name in made.uses}) + _descriptors(decided, made.constants)


def _descriptors(decided: Decided, constants: Iterable[str]) -> Counter[str]:
    found = Counter({"program": 1, "steps": len(decided.program.steps)})
    found["words of constants"] = sum(text.count("\n    .") for text in constants)
    for index, step in enumerate(decided.program.steps):
        if isinstance(step, ir.Rows):
            found["row functions"] += 1
            found["row calls"] += len(step.changes)
        elif index in decided.layers:
            found["layers"] += 1
        else:
            found[f"{work.kind(step)} calls"] += 1
    return found


def constants(decided: Decided) -> int:
    """Bytes of weights, multipliers, biases and tables, as they are written."""
    total = sum(stored(decided, layer) + channel_bytes(layer) for layer in decided.layers.values())
    total += DECODER if any(layer.block for layer in decided.layers.values()) else 0
    for step in decided.program.steps:
        if isinstance(step, ir.Table):
            total += len(step.values)
        elif isinstance(step, ir.Rows):
            total += 4 * sum(_numbers(operand) for _, operand in step.changes)
            total += 4 * (step.convolution.outputs if step.convolution is not None and _late(step) else 0)
    return total


def _late(step: ir.Rows) -> bool:
    return step.convolution is not None and step.convolution.late is not None


def _numbers(operand: Any) -> int:
    """Floats of an operand of a row's change."""
    if isinstance(operand, list | tuple):
        return sum(_numbers(part) for part in operand)
    return int(operand.size) if getattr(operand, "ndim", 0) else 0


def stored(decided: Decided, layer: Layer) -> int:
    """Bytes of a layer's weights."""
    if layer.block:
        return len(coding.stream(layer.digits, decided.ranks))
    if layer.entries is not None and layer.kernel != choosing.DEPTHWISE:
        return layer.entries.stream.nbytes
    found = layer.digits
    outputs, taps = found.values.shape
    if not layer.step.depthwise:
        unit = weights.unit(found.bits)
        return outputs * (-(-taps // unit) * unit * found.bits // 8)
    bits = found.values.size * found.bits
    if weights.masked(found):
        bits = found.values.size + int((found.values + found.lowest != 0).sum()) * found.bits
    return -(-bits // 8)


def channel_bytes(layer: Layer) -> int:
    """Bytes of a layer's multipliers and biases."""
    narrow = layer.rule.narrow and layer.result is not None and not layer.rule.floats
    return layer.step.outputs * ((4 if layer.wide else 2) + (2 if narrow else 4))
