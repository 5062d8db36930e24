"""What a step makes the processor do, counted by kind of work: what `costs` multiplies with fitted instructions.

Every kind is one loop of the kernels (how often its body runs), so a count times what one pass takes, summed, is an
estimate. The counts follow the kernels' own decisions: which rows of a patch are copied whole, how many columns a
sparse layer makes at once, what depthwise layers skip.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatcompress.onnx_export.c import choosing, ir, weights
from flatcompress.onnx_export.c.layers import Decided, Layer

Work = Counter[str]  # kind of work -> how often
ALONE = ", alone"  # ends the name of work of a kernel that is called once
FORMS = {weights.WIDE: "wide", weights.WORDS: "words", weights.BYTES: "bytes", weights.ENDED: "ended"}


def of_step(decided: Decided, index: int) -> Work:
    """The work of a program's step."""
    step, layer = decided.program.steps[index], decided.layers.get(index)
    if isinstance(step, ir.Rows):
        return _beside(decided, _rows(step, layer))
    found = _layer(layer) if layer is not None else Counter({kind(step): 1}) + _OTHERS[type(step)](step)
    found = _beside(decided, found)
    return Counter({name + ALONE: n for name, n in found.items()}) if _alone(decided, index) else found


def kind(step: ir.Step) -> str:
    """What a step is called where it has no kernel's name."""
    return type(step).__name__.lower()


def _beside(decided: Decided, found: Work) -> Work:
    """Codes of integer rules by what the code that all layers share has to look at for the sake of others."""
    layers = decided.layers.values()
    rules = [*(layer.rule for layer in layers), *decided.pools.values()]
    added = [*(layer.add for layer in layers if layer.add is not None), *decided.adds.values()]
    floats = any(rule.floats for rule in rules) or any(rule.floats for rule in added)
    beside = " beside floats" if floats else ""
    return Counter({name + beside if name in ("code value", "even value") else name: n for name, n in found.items()})


def _alone(decided: Decided, index: int) -> bool:
    """Whether a kernel is called once alone: compilers then make it for the constants of that one call."""
    step, layer = decided.program.steps[index], decided.layers.get(index)
    if layer is not None:
        same = [one for one in decided.layers.values() if one.kernel == layer.kernel]
        return len(same) == 1 and layer.kernel in (choosing.DEPTHWISE, choosing.LINEAR)
    made = type(step)
    return made not in _ONCE and sum(type(one) is made for one in decided.program.steps) == 1


def _layer(layer: Layer) -> Work:
    return Counter({layer.kernel: 1}) + _KERNELS[layer.kernel](layer)


def _values(layer: Layer, count: int, calls: int) -> Work:
    """Sums to what is stored; calls: how often a kernel hands some over."""
    result = "real" if layer.result is None else "float" if layer.rule.floats else "code"
    result = "even" if layer.even is not None else result
    found = Counter({f"{layer.kernel} put": calls, f"{result} value": count})
    if layer.step.add is not None:
        found["added value"] = count
    if layer.step.out is not None and layer.step.out.packed:
        found["packed value"] = count
    return found


def _unpacked(layer: Layer, count: int) -> Work:
    """Reading two codes of a byte; count: of codes."""
    return Counter({f"{layer.kernel} unpacked": count}) if layer.step.sources[0].packed else Counter()


# --- dense convolutions ---------------------------------------------------------------------------------------------


def _conv(layer: Layer) -> Work:
    step = layer.step
    pixels, groups = step.height * step.width, step.groups
    pairs, outputs = -(-pixels // 2), step.outputs // groups
    blocks = -(-outputs // layer.block) if layer.block else 1
    dots = pairs * groups * -(-outputs // 2)
    patches = Counter({name: count * blocks for name, count in _patches(layer).items()})
    found = Counter({"pair of pixels": pairs * blocks, "pair of rows": dots}) + patches
    found["decoded words"] = outputs * layer.words // 8 if layer.block else 0
    for bits in weights.PLANES[layer.digits.bits]:
        found[f"dot {bits}"] += dots
        found[f"words of {bits} bits"] += dots * (2 * layer.words // (32 // bits))
    return found + _values(layer, pixels * step.outputs, pairs * step.outputs)


def _patches(layer: Layer) -> Work:
    """Copying the inputs of every pixel: rows whole where they lie within the image, else tap by tap."""
    step, window, source = layer.step, layer.step.window, layer.step.sources[0]
    depth = step.weight.shape[3]
    inside_rows = int(_inside(window, 0, step.height, source.height).sum())
    inside = _inside(window, 1, step.width, source.width)
    whole = int(inside.all(1).sum()) if window.dilation[1] == 1 and step.groups == 1 else 0
    wholes = inside_rows * whole
    all_rows = step.height * step.width * window.kernel[0]
    taps_inside = inside_rows * int(inside.sum())
    single = taps_inside - wholes * window.kernel[1]
    bytes_inside = taps_inside * depth
    bytes_outside = all_rows * window.kernel[1] * depth - bytes_inside
    outside = all_rows * window.kernel[1] - taps_inside
    found = {"patch": step.height * step.width, "row of a patch": all_rows, "whole row": wholes}
    found |= {"tap of a patch": single, "tap outside": outside}
    if depth % 4 == 0:
        found |= {"widened bytes": bytes_inside, "zeros": bytes_outside}
    else:
        run = depth * window.kernel[1]
        found |= {
            "copied words": wholes * (run // 4) + single * (depth // 4),
            "copied bytes": wholes * (run % 4) + single * (depth % 4) + bytes_outside,
            "widened bytes": step.height * step.width * (-(-step.taps // 4) * 4),
        }
    return Counter({name: count * step.groups for name, count in found.items()}) + _unpacked(layer, bytes_inside)


def _inside(window: ir.Window, axis: int, size: int, given: int) -> NDArray[np.bool_]:
    """[size, kernel]: which taps of each output lie within ``given`` inputs."""
    starts = np.arange(size) * window.stride[axis] - window.pads[axis]
    places = starts[:, None] + np.arange(window.kernel[axis]) * window.dilation[axis]
    return (places >= 0) & (places < given)


def _linear(layer: Layer) -> Work:
    step = layer.step
    found: Work = Counter({"vector": step.taps, "row": step.outputs})
    for bits in weights.PLANES[layer.digits.bits]:
        found[f"row {bits}"] += step.outputs
        found[f"row words of {bits} bits"] += step.outputs * step.taps * bits // 32
    return found + _values(layer, step.outputs, 0)


# --- depthwise ------------------------------------------------------------------------------------------------------


def _depthwise(layer: Layer) -> Work:
    step, window = layer.step, layer.step.window
    sides = (step.height, step.width)
    length, lines = sides[::-1] if not layer.turned else sides
    along, across = (0, 1) if layer.turned else (1, 0)
    source = (step.sources[0].height, step.sources[0].width)
    height = (lines - 1) * window.stride[across] + (window.kernel[across] - 1) * window.dilation[across] + 1
    wide = min(source[along], layer.words - window.pads[along])
    high = min(source[across], height - window.pads[across])
    quads, channels = -(-length // 4), step.outputs
    kept = int(np.count_nonzero(step.weight))
    copied = int(np.count_nonzero(step.weight.reshape(channels, -1).any(1)))  # those that have a weight
    stride = window.stride[along]
    found = Counter(
        {
            "plane": height * layer.words,
            "channel": channels,
            "digit": step.weight.size,
            "digit bits": step.weight.size * layer.digits.bits,
            "copied lines": copied * high,
            "copied pixels": copied * high * wide,
            "lines": channels * lines,
            "quads": channels * lines * quads,
            f"quads of stride {min(stride, 3)}": kept * lines * quads,
        }
    )
    length, lines = (length * lines, 1) if layer.together else (length, lines)
    calls = channels * lines * (int(length > 1) + length % 2)
    found += _unpacked(layer, copied * high * wide)
    return found + _values(layer, channels * step.height * step.width, calls)


# --- sparse ---------------------------------------------------------------------------------------------------------


def _sparse(layer: Layer) -> Work:
    step, window, made = layer.step, layer.step.window, layer.entries
    assert made is not None
    across, along = (1, 0) if layer.turned else (0, 1)
    lines, columns = (choosing.shape(step)[axis] for axis in (across, along))
    twos, blocks = -(-lines // 2), -(-columns // layer.at_once)
    high, wide = window.kernel[across], window.kernel[along]
    gathered = twos * high * ((columns - 1) * window.stride[along] + (wide - 1) * window.dilation[along] + 1)
    depth, walks = step.sources[0].channels, twos * blocks * step.outputs
    parts = 1 if layer.whole else max(1, made.parts) * wide
    form = FORMS[made.form]
    found = Counter(
        {
            "gathered columns": gathered,
            "gathered words": gathered * (depth // 4),
            "gathered rest": gathered * (depth % 4),
            "walks": walks,
            "parts": walks * parts,
            "split parts": walks * parts if made.parts else 0,
            "taps together": twos * blocks * step.taps if layer.whole else 0,
            f"{form} entries": twos * blocks * made.count,
        }
    )
    found += _unpacked(layer, gathered * 2 * depth)
    return found + _values(layer, step.height * step.width * step.outputs, walks)


def _sparse_line(layer: Layer) -> Work:
    made = layer.entries
    assert made is not None
    form = FORMS[made.form]
    found = Counter({f"{form} row": layer.step.outputs, f"{form} row entries": made.count})
    return found + _values(layer, layer.step.outputs, 0)


_KERNELS: dict[str, Any] = {
    choosing.CONV: _conv,
    choosing.LINEAR: _linear,
    choosing.DEPTHWISE: _depthwise,
    choosing.SPARSE: _sparse,
    choosing.LINE: _sparse_line,
}


# --- what has no weights --------------------------------------------------------------------------------------------


def _rows(step: ir.Rows, layer: Layer | None) -> Work:
    """Rows of real values; columns: their length."""
    count = step.rows * step.columns
    found: Work = Counter({"rows": 1, "real row": step.rows})
    if layer is not None:
        found += _layer(layer)
    elif isinstance(step.begin, ir.Product):
        made = step.begin
        found += Counter({"product rows": step.rows, "product values": count, "products": count * made.depth})
    else:
        found["rows of codes" if isinstance(step.sources[0], ir.Codes) else "copied reals"] += count
    for name, _ in step.changes:
        found[f"row {name}"] += count
        found["row changes"] += step.rows
    if step.mean:
        found["row mean"] += count
    ends = step.columns if step.mean else count
    found["quantized reals" if isinstance(step.out, ir.Codes) else "copied reals"] += ends
    return found


def _elements(step: ir.Step) -> Work:
    tensor = step.out if step.out is not None else step.sources[0]
    found = Counter({f"{kind(step)} elements": tensor.pixels * tensor.channels})
    packed = any(isinstance(one, ir.Codes) and one.packed for one in (*step.sources, step.out))
    return found + Counter({f"{kind(step)} of packed": found.total()}) if packed else found


def _channels_first(step: ir.Step) -> Work:
    tensor = step.out if step.out is not None else step.sources[0]
    return _elements(step) + Counter({f"{kind(step)} channels": tensor.channels})


def _pool(step: ir.GlobalPool) -> Work:
    source = step.sources[0]
    found = Counter({"pooled channels": source.channels, "pooled": source.pixels * source.channels})
    return found + Counter({"pooled of packed": found["pooled"]}) if source.packed else found


def _max_pool(step: ir.MaxPool) -> Work:
    out, source, window = step.out, step.sources[0], step.window
    sides = ((out.height, source.height), (out.width, source.width))
    inside = [int(_inside(window, axis, *pair).sum()) for axis, pair in enumerate(sides)]
    taps, width = out.pixels * window.kernel[0] * window.kernel[1], window.kernel[1]
    divided = "max taps" if width & (width - 1) else "max taps by a shift"
    found = {"max pixels": out.pixels, "max values": out.pixels * out.channels, divided: taps * out.channels}
    found |= {"max of packed": taps * out.channels} if out.packed else {}
    return Counter({**found, "max inside": inside[0] * inside[1] * out.channels})


def _move(step: ir.Move) -> Work:
    return _elements(step) + Counter({"move runs": step.out.bytes // step.loops[-1][0]})


def _concat(step: ir.Concat) -> Work:
    return _elements(step) + Counter({"concat pixels": step.out.pixels * len(step.sources)})


_OTHERS: dict[type, Any] = {
    ir.Quantize: _channels_first,
    ir.Dequantize: _channels_first,
    ir.Add: _elements,
    ir.GlobalPool: _pool,
    ir.MaxPool: _max_pool,
    ir.Table: _elements,
    ir.Concat: _concat,
    ir.Gate: _elements,
    ir.Move: _move,
}
_ONCE = (ir.Quantize, ir.Dequantize)  # never called twice
