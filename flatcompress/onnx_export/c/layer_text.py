"""A convolution or linear layer as the constants that its kernel reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatcompress.onnx_export.c import choosing, coding, ir, requantize, sums, weights
from flatcompress.onnx_export.c.ending import Clamp, clamp, end_of
from flatcompress.onnx_export.c.layers import Decided, Layer
from flatcompress.onnx_export.c.text import Sources, number, offset, packed_bits, struct, window_fields


def add_fields(made: Sources, rule: sums.AddRule, operands: Sequence[ir.Codes], out: ir.Codes) -> dict[str, Any]:
    """An addition's constants but for its places in the arena."""
    found: dict[str, Any] = {"first": rule.first, "second": rule.second, "offset": rule.offset}
    if rule.floats:
        found |= {f"ratio_{which}": number(ratio) for which, ratio in zip(("first", "second"), rule.ratios)}
        found |= {"fixed": number(rule.ratios[2]), "floats": 1}
        found |= {"base_a": operands[0].base, "base_b": operands[1].base, "base_out": out.base}
        made.uses |= {"FLOAT_ADD", "FLOATS"}
    end = clamp(out.low, out.high, rule.shift)
    made.uses |= {"LIMITS"} if end.limits and not rule.floats else set()
    found |= {"low": out.low, "high": out.high} if end.limits or rule.floats else {}
    return found | {"shift": end.shift, "trim": end.trim}


def _fused(made: Sources, decided: Decided, index: int, layer: Layer) -> dict[str, str]:
    """The field of a fused addition, in programs that have one."""
    if not any(conv.add is not None for conv in decided.program.convs):
        return {}
    made.uses.add("FUSED")
    added, rule, out = layer.step.add, layer.add, layer.step.out
    if added is None or rule is None or out is None:
        return {"add": "NULL"}
    operands = [added.between, added.other] if added.first else [added.other, added.between]
    fields = add_fields(made, rule, operands, out)
    if rule.floats:
        fields["swapped"] = int(not added.first)
    elif not added.first:
        fields |= {"first": rule.second, "second": rule.first}
    fields["b"] = decided.plan.offsets[added.other.name]
    fields |= {"packed": packed_bits(None, out, added.other)} if decided.packed else {}
    made.constants.append(struct("fc_add", f"add_{index}", fields))
    return {"add": f"&add_{index}"}


def ranged(program: ir.Program) -> bool:
    """Whether a layer is wanted for some pixels at a time."""
    return any(isinstance(step, ir.Rows) and step.convolution is not None for step in program.steps)


def short(decided: Decided) -> bool:
    """Whether the sides of all layers' images take a byte."""
    geometries = [_geometry(layer, False) for layer in decided.layers.values()]
    return all(made[side] < 256 for made in geometries for side in ("in_h", "in_w", "out_h", "out_w"))


def _coded(layer: Layer) -> bool:
    """Whether sums become codes by integer multipliers."""
    return layer.result is not None and not layer.rule.floats


def nudged(decided: Decided) -> bool:
    """Whether an offset has bits in its lower word."""
    return any(_offset(layer) % (1 << 32) for layer in decided.layers.values())


def even(decided: Decided) -> Clamp | None:
    """How all layers whose sums become codes by integers end, where they end alike."""
    return next((end_of(layer) for layer in decided.layers.values() if layer.even is not None), None)


def _offset(layer: Layer) -> int:
    if layer.result is None or not _coded(layer):
        return 0
    return offset(layer.rule, layer.result.zero) << end_of(layer).raised


def layer_struct(made: Sources, decided: Decided, index: int, step: ir.Conv, scratch: int) -> str:
    """Write a layer's constants; returns its kernel's name. scratch: where its own begins."""
    layer, source = decided.layers[index], step.sources[0]
    found, kind = layer.digits, _kind(layer)
    end, whole = end_of(layer), _offset(layer)
    made.uses |= ({"LIMITS"} if end.limits else set()) | ({"RAISED"} if _raise(layer) else set())
    program = decided.program
    fields = {
        "offset": f"INT64_C({whole})" if nudged(decided) else whole >> 32,
        **_parameters(made, decided, index, layer, kind),
        **_fused(made, decided, index, layer),
        "source": f"{decided.plan.offsets[source.name]}u",
        "target": f"{decided.plan.offsets[step.out.name]}u" if step.out is not None else "0u",
        **({"late": made.array("float", f"late_{index}", map(number, step.late))} if step.late is not None else {}),
        "scratch": f"{scratch}u",
        **_coded_fields(made, decided, layer, scratch),
        **_geometry(layer, any(max(conv.window.dilation) > 1 for conv in program.convs)),
        **({"groups": step.groups} if any(_grouped(conv) for conv in program.convs) else {}),
        "taps": step.taps,
        "words": layer.words,
        "lowest": found.lowest,
        "bits": found.bits if layer.entries is None else layer.entries.bits,
        "headroom": step.headroom + end.raised,
        "shift": end.shift,
        "trim": end.trim,
        "in_zero": source.zero,
        **({"packed": packed_bits(source, step.out)} if decided.packed else {}),
        **_kept_fields(decided, layer, kind, end),
        **_stream_fields(layer),
        **({"masked": 1} if layer.step.depthwise and weights.masked(layer.digits) else {}),
    }
    made.constants.append(struct("fc_layer", f"layer_{index}", fields))
    made.uses |= uses_of(layer) | ({"EVEN"} if even(decided) else set()) | ({"NUDGED"} if nudged(decided) else set())
    return f"fc_{layer.kernel}"


def _kept_fields(decided: Decided, layer: Layer, kind: str, end: Clamp) -> dict[str, Any]:
    """What the kernels look at where a layer of the program needs it, and what it is here."""
    result, every = layer.result, decided.layers.values()
    ends = [end_of(one) for one in every]
    fields: dict[str, Any] = {"raise": _raise(layer)} if any(map(_raise, every)) else {}
    real = any(one.result is None or one.rule.floats for one in every)
    fields |= {"kind": kind} if real else {}
    fields |= {"wide": int(layer.wide)} if any(one.wide for one in every) else {}
    fields |= {"narrow": int(layer.rule.narrow)} if any(one.rule.narrow for one in every) else {}
    fields |= {"out_zero": result.zero} if result is not None and layer.rule.floats else {}
    if result is not None and any(one.limits for one in ends):
        fields |= {"low": result.low, "high": result.high}
    return fields


def _geometry(layer: Layer, dilated: bool) -> dict[str, Any]:
    """Sizes and window, as the kernel takes them."""
    step, source, window = layer.step, layer.step.sources[0], layer.step.window
    sides, outs = (source.height, source.width), (step.height, step.width)
    if layer.kernel == choosing.SPARSE:
        outs = choosing.shape(step)
        sides = outs if choosing.flat(step) else sides
    if layer.turned:
        sides, outs = sides[::-1], outs[::-1]
        turned = (pair[::-1] for pair in (window.kernel, window.stride, window.dilation, window.pads))
        window = ir.Window(*turned)
    named = {"in_h": sides[0], "in_w": sides[1], "in_c": source.channels}
    named |= {"out_h": outs[0], "out_w": outs[1], "out_c": step.outputs}
    named |= {key: value for key, value in window_fields(window).items() if dilated or "dilation" not in key}
    return named | ({"turned": 1} if layer.turned else {})


def _coded_fields(made: Sources, decided: Decided, layer: Layer, scratch: int) -> dict[str, Any]:
    """Of a layer whose rows are decoded, and of the others where there is one."""
    if not any(one.block for one in decided.layers.values()):
        return {}
    if not layer.block:
        return {"pairs": "NULL"}
    if "CODED" not in made.uses:
        made.uses.add("CODED")
        made.array("uint8_t", "pairs", coding.pairs(decided.ranks))
    return {"pairs": "pairs", "rows": f"{scratch + layer.decoded_at}u", "block": layer.block}


def _stream_fields(layer: Layer) -> dict[str, int]:
    if layer.entries is None:
        return {}
    lines, columns = choosing.shape(layer.step)
    absent = lines * columns - layer.step.height * layer.step.width if layer.kernel == choosing.SPARSE else 0
    made = layer.entries
    whole = {"whole": 1} if made.whole else {}
    return {"gap": made.gap, "form": made.form, "split": made.parts, "absent": absent, **whole}


def _grouped(step: ir.Conv) -> bool:
    return step.groups > 1 and not step.depthwise


def _kind(layer: Layer) -> str:
    return "FC_REAL" if layer.result is None else "FC_SCALED" if layer.rule.floats else "FC_CODES"


def uses_of(layer: Layer) -> set[str]:
    """The parts of the kernels that a layer needs by itself."""
    found, planes, window = {layer.kernel.upper()}, weights.PLANES[layer.digits.bits], layer.step.window
    if layer.entries is not None:
        found.add(("SPARSE_WIDE", "SPARSE_WORDS", "SPARSE_BYTES", "SPARSE_ENDED")[layer.entries.form])
        found |= {"WHOLE"} if layer.whole else set()
        found |= {"RUNS" if layer.runs else "DEEP"} if layer.kernel == choosing.SPARSE else set()
        found |= {"TURNED"} if layer.turned else set()
        found |= {"SPLIT"} if layer.entries.parts and layer.kernel == choosing.SPARSE else set()
    elif not layer.step.depthwise:
        found |= {f"BITS_{bits}" for bits in planes}
        found |= {"PLANES"} if len(planes) > 1 and layer.kernel == choosing.CONV else set()
    found |= {"WIDE_BIAS"} if layer.wide else set()
    found |= {"NARROW"} if layer.rule.narrow else set()
    found |= {"MASKED"} if layer.step.depthwise and weights.masked(layer.digits) else set()
    found |= {"GROUPS"} if _grouped(layer.step) else set()
    found |= {"FAR"} if layer.far else set()
    found |= {"DILATED"} if max(window.dilation) > 1 else set()
    return found | {"FC_SCALED": {"FLOATS"}, "FC_REAL": {"REALS"}}.get(_kind(layer), set())


def _stored_bias(layer: Layer) -> requantize.Ints:
    """Biases, raised already where that keeps them within 16 bits."""
    raised = layer.bias << end_of(layer).raised
    return raised if np.abs(raised).max() < 1 << 15 else layer.bias


def _raise(layer: Layer) -> int:
    """By how much the kernel has to raise a layer's biases."""
    return 0 if _stored_bias(layer) is not layer.bias else end_of(layer).raised


def _parameters(made: Sources, decided: Decided, index: int, layer: Layer, kind: str) -> dict[str, Any]:
    """The arrays of a layer: weights, multipliers or scales, biases."""
    step, found = layer.step, layer.digits
    values, width = _stored(decided, layer)
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
    bias = made.array("int32_t" if layer.wide else "int16_t", f"bias_{index}", _stored_bias(layer).tolist())
    made.weight_bytes += values.size * width
    made.parameter_bytes += step.outputs * ((4 if layer.wide else 2) + (2 if layer.rule.narrow else 4))
    return {"weight": weight, "scale": scale, "bias": bias}


def _stored(decided: Decided, layer: Layer) -> tuple[NDArray[Any], int]:
    """A layer's weights as numbers, and their bytes each."""
    if layer.step.depthwise:
        return weights.stream(layer.digits, layer.step.window.kernel, layer.turned), 1
    if layer.block:
        return coding.stream(layer.digits, decided.ranks), 1
    if layer.entries is not None:
        return layer.entries.stream, layer.entries.stream.itemsize
    return weights.rows(layer.digits).reshape(-1), 4
