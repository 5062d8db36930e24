"""A convolution or linear layer as the constants that its kernel reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatcompress.onnx_export.c import ir, requantize, sums, weights
from flatcompress.onnx_export.c.layers import Decided, Layer
from flatcompress.onnx_export.c.text import Sources, number, offset_of, struct, window_fields


def add_fields(rule: sums.AddRule, operands: Sequence[ir.Codes], out: ir.Codes) -> dict[str, Any]:
    found: dict[str, Any] = {"first": rule.first, "second": rule.second, "offset": rule.offset}
    if rule.floats:
        found |= {f"ratio_{which}": number(ratio) for which, ratio in zip(("first", "second"), rule.ratios)}
        found |= {"fixed": number(rule.ratios[2]), "floats": 1}
        found |= {"base_a": operands[0].base, "base_b": operands[1].base, "base_out": out.base}
    return found | {"shift": rule.shift, "low": out.low, "high": out.high}


def uses_of_add(made: Sources, rule: sums.AddRule, kind: str) -> None:
    made.uses |= {kind} | ({"FLOAT_ADD", "FLOATS"} if rule.floats else set())


def _fused(made: Sources, decided: Decided, index: int, layer: Layer) -> str:
    added, rule, out = layer.step.add, layer.add, layer.step.out
    if added is None or rule is None or out is None:
        return "NULL"
    uses_of_add(made, rule, "FUSED")
    operands = [added.between, added.other] if added.first else [added.other, added.between]
    fields = add_fields(rule, operands, out)
    fields |= {"b": decided.plan.offsets[added.other.name], "swapped": int(not added.first)}
    made.constants.append(struct("fc_add", f"add_{index}", fields))
    return f"&add_{index}"


def ranged(program: ir.Program) -> bool:
    """Whether a layer is wanted for some pixels at a time."""
    return any(isinstance(step, ir.Rows) and step.convolution is not None for step in program.steps)


def layer_struct(made: Sources, decided: Decided, index: int, step: ir.Conv, scratch: int) -> str:
    """Write a layer's constants; returns its kernel's name. scratch: where its own begins."""
    layer, source = decided.layers[index], step.sources[0]
    real, found = step.out is None, layer.digits
    result = step.add.between if step.add is not None else step.out
    kind = "FC_REAL" if real else "FC_SCALED" if layer.rule.floats else "FC_CODES"
    window = step.window
    fields = {
        "offset": "0" if result is None else offset_of(layer.rule, result.zero),
        **_parameters(made, index, layer, kind),
        "add": _fused(made, decided, index, layer),
        "source": f"{decided.plan.offsets[source.name]}u",
        "target": f"{decided.plan.offsets[step.out.name]}u" if step.out is not None else "0u",
        **({"late": made.array("float", f"late_{index}", map(number, step.late))} if step.late is not None else {}),
        "scratch": f"{scratch}u",
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
        **window_fields(window),
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
    made.constants.append(struct("fc_layer", f"layer_{index}", fields))
    made.uses |= _uses_of_conv(layer, kind)
    return "fc_depthwise" if step.depthwise else "fc_conv" if layer.entries is None else "fc_sparse"


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
