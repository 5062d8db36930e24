"""Rows of real values as C: a function of its own for each, which brings rows in, changes them and puts them away."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from flatcompress.onnx_export.c import ir, layers
from flatcompress.onnx_export.c.layer_text import layer_struct
from flatcompress.onnx_export.c.layers import Decided
from flatcompress.onnx_export.c.text import Sources, comment, number, struct

# The changes that take nothing but the row: the routine, its last argument, and the kernel part.
PLAIN = {
    "softmax": ("softmax", "", "SOFTMAX"),
    "gelu": ("gelu", "", "GELU"),
    "gelu_tanh": ("tanh", ", 1u", "TANH"),
    "tanh": ("tanh", ", 0u", "TANH"),
    "silu": ("sigmoid", ", 1u", "SIGMOID"),
    "sigmoid": ("sigmoid", ", 0u", "SIGMOID"),
    "hardswish": ("hard", ", 1u", "HARD"),
    "hardsigmoid": ("hard", ", 0u", "HARD"),
    "relu": ("relu", "", "RELU"),
}


def write(made: Sources, decided: Decided, index: int, step: ir.Rows) -> None:
    """Write the function of a step and its call."""
    made.uses.add("ROWS")
    scratch = decided.plan.scratch[index]
    before, at_once = _begin(made, decided, index, step)
    body = [*before[1:], *_changes(made, decided, index, step), *_end(made, decided, step)]
    columns, out = step.columns, ", float *out" if step.out is None else ""
    lines = [f"static void rows_{index}(uint8_t *bytes{out})", "{"]
    lines.append(f"    float *const rows = (float *)(void *)&bytes[{scratch}u];")
    if step.mean:
        lines.append(f"    float *const mean = &rows[{at_once * columns}u];")
        lines.append(f"    for (uint32_t i = 0u; i < {columns}u; i++) {{\n        mean[i] = 0.0f;\n    }}")
    lines += _loop(step, before[0], body, at_once)
    if step.mean:
        lines += [f"    {line}" for line in _mean(made, decided, step)]
    made.constants.append("\n".join([*lines, "}"]))
    given = "bytes, out" if out else "bytes"
    made.calls.append(f"rows_{index}({given}); /* {comment(step.path)} */")


def _loop(step: ir.Rows, together: str, body: list[str], at_once: int) -> list[str]:
    """The loop over rows; a layer gives ``at_once`` of them at a time."""
    count, columns = f"{step.rows}u", f"{step.columns}u"
    place = ["const uint32_t at = first + i;"] if any(re.search(r"\bat\b", line) for line in body) else []
    if not together:
        inner = [f"        {line}" for line in body]
        return [
            f"    for (uint32_t at = 0u; at < {count}; at++) {{",
            "        float *const row = rows;",
            *inner,
            "    }",
        ]
    return [
        f"    for (uint32_t first = 0u; first < {count}; first += {at_once}u) {{",
        f"        const uint32_t count = ((first + {at_once}u) <= {count}) ? {at_once}u : ({count} - first);",
        f"        {together}",
        "        for (uint32_t i = 0u; i < count; i++) {",
        *(f"            {line}" for line in place),
        f"            float *const row = &rows[i * {columns}];",
        *(f"            {line}" for line in body),
        "        }",
        "    }",
    ]


def _reals(decided: Decided, tensor: ir.Tensor, place: str) -> str:
    return f"&((float *)(void *)&bytes[{decided.plan.offsets[tensor.name]}u])[{place}]"


def _begin(made: Sources, decided: Decided, index: int, step: ir.Rows) -> tuple[list[str], int]:
    """What brings several rows at once, or nothing, then what brings one; how many come at once."""
    columns = f"{step.columns}u"
    if isinstance(step.begin, ir.Conv):
        own = decided.plan.scratch[index] + layers.row_bytes(step)
        kernel = layer_struct(made, decided, index, step.begin, own)
        return [f"{kernel}(&layer_{index}, bytes, rows, first, count);"], step.begin.pixels
    if isinstance(step.begin, ir.Product):
        made.uses.add("ROW_PRODUCT")
        made.constants.append(_product(decided, index, step, step.begin))
        return ["", f"fc_row_product(&product_{index}, bytes, at, row);"], 1
    source = step.sources[0]
    place = f"(at * {step.stride}u) + {step.first}u"
    if isinstance(source, ir.Codes):
        made.uses.add("ROW_CODES")
        from_codes = f"&bytes[{decided.plan.offsets[source.name]}u + {place}]"
        scale, zero = number(source.grid.scale), source.zero
        return ["", f"fc_row_codes({from_codes}, row, {columns}, {scale}, {zero});"], 1
    made.uses.add("ROW_COPY")
    return ["", f"fc_row_copy({_reals(decided, source, place)}, row, {columns});"], 1


def _product(decided: Decided, index: int, step: ir.Rows, product: ir.Product) -> str:
    a, b = step.sources[:2]
    (first, *left), (second, *right) = product.first, product.second
    fields: dict[str, Any] = {"a": decided.plan.offsets[a.name] + first, "b": decided.plan.offsets[b.name] + second}
    fields |= dict(zip(("a_head", "a_row", "a_step", "b_head", "b_column", "b_step"), [*left, *right]))
    fields |= {"heads": product.heads, "columns": product.columns, "depth": product.depth}
    fields |= {"factor": number(product.factor), "a_zero": a.zero, "b_zero": b.zero}
    return struct("fc_product", f"product_{index}", fields)


def _changes(made: Sources, decided: Decided, index: int, step: ir.Rows) -> list[str]:
    columns, lines = f"{step.columns}u", []
    for position, (name, operand) in enumerate(step.changes):
        if name in PLAIN:
            routine, last, part = PLAIN[name]
            made.uses.add(f"ROW_{part}")
            lines.append(f"fc_row_{routine}(row, {columns}{last});")
        elif name in ("scale", "divide"):
            made.uses.add(f"ROW_{name.upper()}")
            lines.append(f"fc_row_{name}(row, {columns}, {number(operand)});")
        elif name == "norm":
            made.uses.add("ROW_NORM")
            weight, bias = (
                _floats(made, f"{what}_{index}_{position}", values) for what, values in zip(("gain", "shift"), operand)
            )
            lines.append(f"fc_row_norm(row, {columns}, {weight}, {bias}, {number(operand[2])});")
        elif name == "add":
            made.uses.add("ROW_ADD")
            lines.append(f"fc_row_add(row, {_reals(decided, operand, f'at * {columns}')}, {columns});")
        else:
            routine = "add" if name == "constant" else "times"
            made.uses.add(f"ROW_{routine.upper()}")
            values = _floats(made, f"constant_{index}_{position}", operand)
            whole = operand.size == step.columns
            lines.append(f"fc_row_{routine}(row, {values if whole else f'&{values}[at * {columns}]'}, {columns});")
    return lines


def _floats(made: Sources, name: str, values: np.ndarray) -> str:
    made.parameter_bytes += 4 * values.size
    return made.array("float", name, [number(value) for value in values])


def _end(made: Sources, decided: Decided, step: ir.Rows) -> list[str]:
    columns = f"{step.columns}u"
    if step.mean:
        made.uses.add("ROW_ADD")
        return [f"fc_row_add(mean, row, {columns});"]
    return [_stored(made, decided, step, "row", f"at * {columns}")]


def _mean(made: Sources, decided: Decided, step: ir.Rows) -> list[str]:
    made.uses.add("ROW_DIVIDE")
    return [
        f"fc_row_divide(mean, {step.columns}u, {number(step.rows)});",
        _stored(made, decided, step, "mean", "0u"),
    ]


def _stored(made: Sources, decided: Decided, step: ir.Rows, row: str, place: str) -> str:
    columns, out = f"{step.columns}u", step.out
    if isinstance(out, ir.Codes):
        made.uses.add("ROW_QUANTIZE")
        scale = number(1.0 if step.rounded else out.grid.scale)
        to = f"&bytes[{decided.plan.offsets[out.name]}u + ({place})]"
        return f"fc_row_quantize({row}, {to}, {columns}, {scale}, {out.low}, {out.high}, {out.zero});"
    if step.planes:
        made.uses.add("ROW_PLANES")
        return f"fc_row_planes({row}, &out[at], {columns}, {step.rows}u);"
    made.uses.add("ROW_COPY")
    to = f"&out[{place}]" if out is None else _reals(decided, out, place)
    return f"fc_row_copy({row}, {to}, {columns});"
