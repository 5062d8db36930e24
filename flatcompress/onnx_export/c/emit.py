"""A decided program as the text of its C files."""

from __future__ import annotations

from importlib import resources
from typing import Any

from flatcompress.onnx_export.c import ir, rows
from flatcompress.onnx_export.c.layer_text import add_fields, layer_struct, ranged, short
from flatcompress.onnx_export.c.layers import Decided
from flatcompress.onnx_export.c.text import Sources, comment, number, offset, packed_bits, window_fields

KERNELS = (
    "common.h",
    "results.h",
    "conv.h",
    "linear.h",
    "sparse.h",
    "sparse_image.h",
    "sparse_line.h",
    "depthwise.h",
    "others.h",
    "rows.h",
)


def kernels() -> str:
    """The kernels' text, the same for every model."""
    folder = resources.files(__package__) / "kernels"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in KERNELS)


def write(decided: Decided, name: str) -> Sources:
    """The parts of ``NAME.c`` and ``NAME_weights.h``."""
    made = Sources(name)
    made.uses |= {"RANGE"} if ranged(decided.program) else set()
    made.uses |= {"SMALL"} if decided.plan.arena < 1 << 16 else set()
    made.uses |= {"SHORT"} if short(decided) else set()
    made.uses |= {"PACKED"} if decided.packed else set()
    made.uses |= {"LATE"} if any(conv.late is not None for conv in decided.program.convs) else set()
    for index, step in enumerate(decided.program.steps):
        if isinstance(step, ir.Rows):
            rows.write(made, decided, index, step)
        else:
            _WRITERS[type(step)](made, decided, index, step)
        if step.out is not None:
            made.calls.append(f"FC_TRACE(&bytes[{decided.plan.offsets[step.out.name]}u], {step.out.bytes}u);")
    return made


def _flags(decided: Decided, *tensors: ir.Tensor | None) -> str:
    """The last argument of kernels that are told what is packed, where anything is."""
    return f", {packed_bits(*tensors)}u" if decided.packed else ""


def _field(decided: Decided, *tensors: ir.Tensor | None) -> dict[str, int]:
    return {"packed": packed_bits(*tensors)} if decided.packed else {}


def _quantize(made: Sources, decided: Decided, index: int, step: ir.Quantize) -> None:
    out = step.out
    assert out is not None
    made.uses.add("QUANTIZE")
    made.calls.append(
        f"fc_quantize(in, &bytes[{decided.plan.offsets[out.name]}u], {out.pixels}u, {out.channels}u, "
        f"{number(out.grid.scale)}, {out.low}, {out.high}, {out.zero}{_flags(decided, out, None)});"
    )


def _dequantize(made: Sources, decided: Decided, index: int, step: ir.Dequantize) -> None:
    source = step.sources[0]
    made.uses.add("DEQUANTIZE")
    made.calls.append(
        f"fc_dequantize(&bytes[{decided.plan.offsets[source.name]}u], out, {source.pixels}u, {source.channels}u, "
        f"{number(source.grid.scale)}, {source.zero});"
    )


def _add(made: Sources, decided: Decided, index: int, step: ir.Add) -> None:
    rule, out, where = decided.adds[index], step.out, decided.plan.offsets
    assert out is not None
    made.uses.add("ADD")
    fields = add_fields(made, rule, step.sources, out)
    places = {"a": where[step.sources[0].name], "b": where[step.sources[1].name], "target": where[out.name]}
    fields |= {**places, "count": out.whole_bytes}
    fields |= _field(decided, step.sources[0], out, step.sources[1])
    made.step("fc_addition", "fc_add", f"add_{index}", fields, step.path)


def _conv(made: Sources, decided: Decided, index: int, step: ir.Conv) -> None:
    kernel = layer_struct(made, decided, index, step, decided.plan.scratch[index])
    pixels = f", 0u, {step.height * step.width}u" if ranged(decided.program) else ""
    given = f"&layer_{index}, bytes" + ("" if step.depthwise else f", out{pixels}")
    made.calls.append(f"{kernel}({given}); /* {comment(step.path)} */")


def _pool(made: Sources, decided: Decided, index: int, step: ir.GlobalPool) -> None:
    rule, source, out = decided.pools[index], step.sources[0], step.out
    assert out is not None
    made.uses |= {"POOL"} | ({"FLOATS"} if rule.floats else set())
    fields = {
        "offset": f"INT64_C({offset(rule, out.zero)})",
        "source": decided.plan.offsets[source.name],
        "target": decided.plan.offsets[out.name],
        "pixels": source.pixels,
        "channels": source.channels,
        "multiplier": int(rule.multiplier[0]),
        "start": -source.pixels * source.zero,
        "factor": number(step.factor),
        "shift": rule.shift - 32,
        "low": out.low,
        "high": out.high,
        "zero": out.zero,
        "floats": int(rule.floats),
        **_field(decided, source, out),
    }
    made.step("fc_pool", "fc_mean", f"mean_{index}", fields, step.path)


def _max_pool(made: Sources, decided: Decided, index: int, step: ir.MaxPool) -> None:
    source, out, window = step.sources[0], step.out, step.window
    assert out is not None
    made.uses.add("MAX")
    fields = {
        "source": decided.plan.offsets[source.name],
        "target": decided.plan.offsets[out.name],
        "in_h": source.height,
        "in_w": source.width,
        "channels": source.channels,
        "out_h": out.height,
        "out_w": out.width,
        **window_fields(window),
        **_field(decided, source, out),
    }
    made.step("fc_max_pool", "fc_window", f"window_{index}", fields, step.path)


def _table(made: Sources, decided: Decided, index: int, step: ir.Table) -> None:
    source, out, where = step.sources[0], step.out, decided.plan.offsets
    assert out is not None
    made.uses.add("TABLE")
    name = made.array("uint8_t", f"table_{index}", step.values.tolist())
    made.calls.append(
        f"fc_table({name}, &bytes[{where[source.name]}u], &bytes[{where[out.name]}u], {out.whole_bytes}u"
        f"{_flags(decided, source, out)});"
        f" /* {comment(step.path)} */"
    )


def _concat(made: Sources, decided: Decided, index: int, step: ir.Concat) -> None:
    out, where, channel = step.out, decided.plan.offsets, 0
    assert out is not None
    made.uses.add("CONCAT")
    for source in step.sources:
        made.calls.append(
            f"fc_concat(&bytes[{where[source.name]}u], &bytes[{where[out.name]}u], {out.pixels}u, "
            f"{source.channels}u, {channel}u, {out.pixel_bytes}u{_flags(decided, source, out)});"
        )
        channel += source.channels


def _gate(made: Sources, decided: Decided, index: int, step: ir.Gate) -> None:
    (a, b), out, where = step.sources, step.out, decided.plan.offsets
    made.uses.add("GATE")
    (a_pixel, a_channel), (b_pixel, b_channel) = step.strides
    fields = {
        "a": where[a.name],
        "b": where[b.name],
        "target": where[out.name],
        "pixels": out.pixels,
        "channels": out.channels,
        "a_pixel": a_pixel,
        "a_channel": a_channel,
        "b_pixel": b_pixel,
        "b_channel": b_channel,
        "factor": number(step.factor),
        "a_zero": a.zero,
        "b_zero": b.zero,
        "zero": out.zero,
        "low": out.low,
        "high": out.high,
    }
    made.step("fc_gates", "fc_gate", f"gate_{index}", fields, step.path)


def _move(made: Sources, decided: Decided, index: int, step: ir.Move) -> None:
    where, filled = decided.plan.offsets, [(1, 0)] * (6 - len(step.loops)) + step.loops
    made.uses.add("MOVE")
    sizes, strides = (", ".join(str(pair[i]) for pair in filled) for i in (0, 1))
    fields: dict[str, Any] = {"source": where[step.sources[0].name] + step.offset, "target": where[step.out.name]}
    fields |= {"sizes": f"{{{sizes}}}", "strides": f"{{{strides}}}"}
    made.step("fc_move", "fc_loops", f"loops_{index}", fields, step.path)


_WRITERS: dict[type, Any] = {
    ir.Quantize: _quantize,
    ir.Dequantize: _dequantize,
    ir.Add: _add,
    ir.Conv: _conv,
    ir.GlobalPool: _pool,
    ir.MaxPool: _max_pool,
    ir.Table: _table,
    ir.Concat: _concat,
    ir.Gate: _gate,
    ir.Move: _move,
}
