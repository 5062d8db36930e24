"""A decided program as the text of its C files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatcompress.onnx_export.c import ir, requantize, sums, weights
from flatcompress.onnx_export.c.layers import Decided, Layer

KERNELS = ("common.h", "conv.h", "sparse.h", "depthwise.h", "others.h")


def kernels() -> str:
    """The kernels' text, the same for every model."""
    folder = resources.files(__package__) / "kernels"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in KERNELS)


@dataclass
class Sources:
    """``weights``: const arrays. ``constants``: descriptors. ``calls``: the body of run. ``uses``: kernel parts."""

    name: str
    weights: list[str] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    uses: set[str] = field(default_factory=set)
    parameter_bytes: int = 0
    weight_bytes: int = 0

    def array(self, kind: str, name: str, values: Iterable[Any]) -> str:
        """A const array; returns its name."""
        values = list(values)
        self.weights.append(f"static const {kind} {name}[{len(values)}] = {{\n{_lines(values)}\n}};")
        return name


def write(decided: Decided, name: str) -> Sources:
    """The parts of ``NAME.c`` and ``NAME_weights.h``."""
    made = Sources(name)
    for index, step in enumerate(decided.program.steps):
        _WRITERS[type(step)](made, decided, index, step)
    return made


def _lines(values: Sequence[Any]) -> str:
    rows, row = [], "   "
    for value in values:
        text = f" {value},"
        if len(row) + len(text) > 118:
            rows.append(row)
            row = "   "
        row += text
    return "\n".join([*rows, row])


def number(value: float | np.floating) -> str:
    """A float32 in C, with every bit."""
    return float(np.float32(value)).hex() + "f"


def _struct(kind: str, name: str, fields: dict[str, Any]) -> str:
    body = ",\n".join(f"    .{key} = {value}" for key, value in fields.items())
    return f"static const {kind} {name} = {{\n{body},\n}};"


def _window(window: ir.Window) -> dict[str, int]:
    pairs = {"kernel": window.kernel, "stride": window.stride, "dilation": window.dilation}
    sides = {f"{name}_{side}": pair[index] for name, pair in pairs.items() for index, side in enumerate("hw")}
    return {**sides, "pad_t": window.pads[0], "pad_l": window.pads[1]}


def _offset(rule: requantize.Rule, zero: int) -> str:
    """The rule's offset with the zero point in it, as a literal that fits its type."""
    return f"INT64_C({rule.offset + (zero << rule.shift)})"


def _quantize(made: Sources, decided: Decided, index: int, step: ir.Quantize) -> None:
    out = step.out
    assert out is not None
    made.uses.add("QUANTIZE")
    made.calls.append(
        f"fc_quantize(in, &bytes[{decided.plan.offsets[out.name]}u], {out.pixels}u, {out.channels}u, "
        f"{number(out.grid.scale)}, {out.low}, {out.high}, {out.zero});"
    )


def _dequantize(made: Sources, decided: Decided, index: int, step: ir.Dequantize) -> None:
    source = step.sources[0]
    made.uses.add("DEQUANTIZE")
    made.calls.append(
        f"fc_dequantize(&bytes[{decided.plan.offsets[source.name]}u], out, {source.pixels}u, {source.channels}u, "
        f"{number(source.grid.scale)}, {source.zero});"
    )


def _add_fields(rule: sums.AddRule, operands: Sequence[ir.Codes], out: ir.Codes) -> dict[str, Any]:
    found: dict[str, Any] = {"first": rule.first, "second": rule.second, "offset": rule.offset}
    if rule.floats:
        found |= {f"ratio_{which}": number(ratio) for which, ratio in zip(("first", "second"), rule.ratios)}
        found |= {"fixed": number(rule.ratios[2]), "floats": 1}
        found |= {"base_a": operands[0].base, "base_b": operands[1].base, "base_out": out.base}
    return found | {"shift": rule.shift, "low": out.low, "high": out.high}


def _uses_of_add(made: Sources, rule: sums.AddRule, kind: str) -> None:
    made.uses |= {kind} | ({"FLOAT_ADD", "FLOATS"} if rule.floats else set())


def _add(made: Sources, decided: Decided, index: int, step: ir.Add) -> None:
    rule, out, where = decided.adds[index], step.out, decided.plan.offsets
    assert out is not None
    _uses_of_add(made, rule, "ADD")
    fields = _add_fields(rule, step.sources, out)
    places = {"a": where[step.sources[0].name], "b": where[step.sources[1].name], "target": where[out.name]}
    fields |= {**places, "count": out.bytes}
    made.constants.append(_struct("fc_add", f"add_{index}", fields))
    made.calls.append(f"fc_addition(&add_{index}, bytes); /* {_comment(step.path)} */")


def _fused(made: Sources, decided: Decided, index: int, layer: Layer) -> str:
    added, rule, out = layer.step.add, layer.add, layer.step.out
    if added is None or rule is None or out is None:
        return "NULL"
    _uses_of_add(made, rule, "FUSED")
    operands = [added.between, added.other] if added.first else [added.other, added.between]
    fields = _add_fields(rule, operands, out)
    fields |= {"b": decided.plan.offsets[added.other.name], "swapped": int(not added.first)}
    made.constants.append(_struct("fc_add", f"add_{index}", fields))
    return f"&add_{index}"


def _conv(made: Sources, decided: Decided, index: int, step: ir.Conv) -> None:
    layer, source = decided.layers[index], step.sources[0]
    real, found = step.out is None, layer.digits
    result = step.add.between if step.add is not None else step.out
    kind = "FC_REAL" if real else "FC_SCALED" if layer.rule.floats else "FC_CODES"
    window = step.window
    fields = {
        "offset": "0" if result is None else _offset(layer.rule, result.zero),
        **_parameters(made, index, layer, kind),
        "add": _fused(made, decided, index, layer),
        "source": f"{decided.plan.offsets[source.name]}u",
        "target": f"{decided.plan.offsets[step.out.name]}u" if step.out is not None else "0u",
        "scratch": f"{decided.plan.scratch[index]}u",
        "in_h": source.height,
        "in_w": source.width,
        "in_c": source.channels,
        "out_h": step.height,
        "out_w": step.width,
        "out_c": step.outputs,
        **({"groups": step.groups} if any(_grouped(conv) for conv in decided.program.convs) else {}),
        "taps": step.taps,
        "words": layer.words,
        "lowest": found.lowest,
        **_window(window),
        "bits": found.bits,
        "headroom": step.headroom,
        "shift": layer.rule.shift - 32,
        "kind": kind,
        "wide": int(_wide(layer)),
        "narrow": int(layer.rule.narrow),
        **({"gap": layer.entries.gap, "pairs": layer.entries.pairs} if layer.entries is not None else {}),
        "in_zero": source.zero,
        **({"out_zero": result.zero, "low": result.low, "high": result.high} if result is not None else {}),
    }
    made.constants.append(_struct("fc_layer", f"layer_{index}", fields))
    made.uses |= _uses_of_conv(layer, kind)
    kernel = "fc_conv" if layer.entries is None else "fc_sparse"
    call = f"fc_depthwise(&layer_{index}, bytes)" if step.depthwise else f"{kernel}(&layer_{index}, bytes, out)"
    made.calls.append(f"{call}; /* {_comment(step.path)} */")


def _grouped(step: ir.Conv) -> bool:
    return step.groups > 1 and not step.depthwise


def _uses_of_conv(layer: Layer, kind: str) -> set[str]:
    found = {"DEPTHWISE"} if layer.step.depthwise else {"CONV"} if layer.entries is None else {"SPARSE"}
    planes, window = weights.PLANES[layer.digits.bits], layer.step.window
    if layer.entries is not None:
        found.add(("SPARSE_WIDE", "SPARSE_BITS", "SPARSE_BYTES")[layer.entries.pairs])
    elif not layer.step.depthwise:
        found |= {f"BITS_{bits}" for bits in planes} | ({"PLANES"} if len(planes) > 1 else set())
    elif window.kernel == (3, 3) and window.dilation == (1, 1) and window.stride[0] <= 3:
        found.add("THREE")
    found |= {"WIDE_BIAS"} if _wide(layer) else set()
    found |= {"NARROW"} if layer.rule.narrow else set()
    found |= {"GROUPS"} if _grouped(layer.step) else set()
    return found | {"FC_SCALED": {"FLOATS"}, "FC_REAL": {"REALS"}}.get(kind, set())


def _wide(layer: Layer) -> bool:
    return bool(layer.bias.min() < -(1 << 15) or layer.bias.max() >= 1 << 15)


def _parameters(made: Sources, index: int, layer: Layer, kind: str) -> dict[str, Any]:
    """The arrays of a layer: weights, multipliers or scales, biases."""
    step, found = layer.step, layer.digits
    values, width = _stored(layer)
    text = [f"0x{value:0{2 * width}X}u" for value in values.tolist()]
    weight = made.array("uint8_t" if width == 1 else "uint32_t", f"weight_{index}", text)
    if kind == "FC_CODES":
        unit = requantize.UNIT if layer.rule.narrow else 1
        scale = made.array(
            "int16_t" if layer.rule.narrow else "int32_t", f"scale_{index}", (layer.rule.multiplier // unit).tolist()
        )
    else:  # a negated channel's sum comes back by a negated scale: float products are symmetric
        scales = [number(v) for v in step.scale * found.signs.astype(np.float32)]
        scale = made.array("float", f"scale_{index}", scales)
    bias = made.array("int32_t" if _wide(layer) else "int16_t", f"bias_{index}", layer.bias.tolist())
    made.weight_bytes += values.size * width
    made.parameter_bytes += step.outputs * ((4 if _wide(layer) else 2) + (2 if layer.rule.narrow else 4))
    return {"weight": weight, "scale": scale, "bias": bias}


def _stored(layer: Layer) -> tuple[NDArray[Any], int]:
    """A layer's weights as numbers, and their bytes each."""
    if layer.step.depthwise:
        return weights.stream(layer.digits), 1
    if layer.entries is not None:
        return layer.entries.stream, 1
    return weights.rows(layer.digits).reshape(-1), 4


def _pool(made: Sources, decided: Decided, index: int, step: ir.GlobalPool) -> None:
    rule, source, out = decided.pools[index], step.sources[0], step.out
    assert out is not None
    made.uses |= {"POOL"} | ({"FLOATS"} if rule.floats else set())
    fields = {
        "offset": _offset(rule, out.zero),
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
    }
    made.constants.append(_struct("fc_mean", f"mean_{index}", fields))
    made.calls.append(f"fc_pool(&mean_{index}, bytes); /* {_comment(step.path)} */")


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
        **_window(window),
    }
    made.constants.append(_struct("fc_window", f"window_{index}", fields))
    made.calls.append(f"fc_max_pool(&window_{index}, bytes); /* {_comment(step.path)} */")


def _table(made: Sources, decided: Decided, index: int, step: ir.Table) -> None:
    source, out, where = step.sources[0], step.out, decided.plan.offsets
    assert out is not None
    made.uses.add("TABLE")
    name = made.array("uint8_t", f"table_{index}", step.values.tolist())
    made.calls.append(
        f"fc_table({name}, &bytes[{where[source.name]}u], &bytes[{where[out.name]}u], {out.bytes}u);"
        f" /* {_comment(step.path)} */"
    )


def _concat(made: Sources, decided: Decided, index: int, step: ir.Concat) -> None:
    out, where, channel = step.out, decided.plan.offsets, 0
    assert out is not None
    made.uses.add("CONCAT")
    for source in step.sources:
        made.calls.append(
            f"fc_concat(&bytes[{where[source.name]}u], &bytes[{where[out.name] + channel}u], {out.pixels}u, "
            f"{source.channels}u, {out.channels}u);"
        )
        channel += source.channels


def _comment(path: str) -> str:
    return path.replace("*/", "* /").replace("\\", "/")


_WRITERS: dict[type, Any] = {
    ir.Quantize: _quantize,
    ir.Dequantize: _dequantize,
    ir.Add: _add,
    ir.Conv: _conv,
    ir.GlobalPool: _pool,
    ir.MaxPool: _max_pool,
    ir.Table: _table,
    ir.Concat: _concat,
}
