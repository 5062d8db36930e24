"""A C model as one writes it first: int8 weights, a loop for every dimension, one buffer a tensor; to compare with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flatcompress.errors import UserError
from flatcompress.onnx_export.c import ir
from flatcompress.onnx_export.c.layers import Decided

HEAD = """#include <stddef.h>
#include <stdint.h>
#include "{name}.h"
#define MAGIC 12582912.0f

static int32_t clamp(int32_t value, int32_t low, int32_t high)
{{
    return value < low ? low : (value > high ? high : value);
}}

static int32_t nearest(float value)
{{
    return (int32_t)(value + MAGIC) - (int32_t)MAGIC;
}}
"""
CONV = """
static void step_{index}(const uint8_t *x, {kind} *y{given})
{{
    for (int oy = 0; oy < {oh}; oy++)
        for (int ox = 0; ox < {ow}; ox++)
            for (int o = 0; o < {oc}; o++) {{
                int32_t sum = bias_{index}[o], code;
                for (int ky = 0; ky < {kh}; ky++)
                    for (int kx = 0; kx < {kw}; kx++) {{
                        const int iy = oy * {sh} - {pt} + ky * {dh}, ix = ox * {sw} - {pl} + kx * {dw};
                        if (iy < 0 || iy >= {ih} || ix < 0 || ix >= {iw})
                            continue;
                        for (int i = 0; i < {depth}; i++)
                            sum += ((int32_t)x[(iy * {iw} + ix) * {ic} + o / {per} * {depth} + i] - {zero}) *
                                   weight_{index}[((o * {kh} + ky) * {kw} + kx) * {depth} + i];
                    }}
                {end}
            }}
}}
"""


def write(decided: Decided, name: str, folder: Path) -> None:
    """``NAME.c`` and ``NAME.h`` with the same function and the same outputs. UserError for steps that it has not."""
    program, upper = decided.program, name.upper()
    parts, calls = [HEAD.format(name=name)], []
    for tensor in program.tensors:
        parts.append(f"static uint8_t t_{_word(tensor.name)}[{tensor.bytes}];")
    for index, step in enumerate(program.steps):
        made, call = _step(decided, index, step)
        parts.append(made)
        calls.append(f"    {call}")
    body = "\n".join(calls)
    parts.append(
        f"int {name}_run(const float *in, float *out, void *arena)\n{{\n    (void)arena;\n{body}\n    return 0;\n}}"
    )
    outputs = 1
    for size in program.outputs:
        outputs *= size
    header = f"#define {upper}_ARENA_BYTES 8u\n#define {upper}_OUTPUT_COUNT {outputs}u\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.h").write_text(f"{header}int {name}_run(const float *in, float *out, void *arena);\n")
    (folder / f"{name}.c").write_text("\n".join(parts) + "\n")


def _word(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def _array(kind: str, name: str, values: Iterable[Any]) -> str:
    values = list(values)
    return f"static const {kind} {name}[{len(values)}] = {{{', '.join(str(v) for v in values)}}};\n"


def _step(decided: Decided, index: int, step: ir.Step) -> tuple[str, str]:
    if isinstance(step, ir.Quantize):
        return _quantize(index, step)
    if isinstance(step, ir.GlobalPool):
        return _pool(index, step)
    if isinstance(step, ir.Conv):
        return _conv(decided, index, step)
    raise UserError(f"{type(step).__name__} has no naive form here.")


def _quantize(index: int, step: ir.Quantize) -> tuple[str, str]:
    out = step.out
    text = f"""
static void step_{index}(const float *x, uint8_t *y)
{{
    for (int c = 0; c < {out.channels}; c++)
        for (int p = 0; p < {out.pixels}; p++) {{
            float v = x[c * {out.pixels} + p] / {float(out.grid.scale).hex()}f;
            v = v > {out.low - out.zero}.0f ? v : {out.low - out.zero}.0f;
            v = v < {out.high - out.zero}.0f ? v : {out.high - out.zero}.0f;
            y[p * {out.channels} + c] = (uint8_t)(nearest(v) + {out.zero});
        }}
}}
"""
    return text, f"step_{index}(in, t_{_word(out.name)});"


def _pool(index: int, step: ir.GlobalPool) -> tuple[str, str]:
    source, out = step.sources[0], step.out
    text = f"""
static void step_{index}(const uint8_t *x, uint8_t *y)
{{
    for (int c = 0; c < {source.channels}; c++) {{
        int32_t sum = 0;
        for (int p = 0; p < {source.pixels}; p++)
            sum += (int32_t)x[p * {source.channels} + c] - {source.zero};
        y[c] = (uint8_t)clamp(nearest((float)sum * {float(step.factor).hex()}f) + {out.zero}, {out.low}, {out.high});
    }}
}}
"""
    return text, f"step_{index}(t_{_word(source.name)}, t_{_word(out.name)});"


def _conv(decided: Decided, index: int, step: ir.Conv) -> tuple[str, str]:
    source, window, place = step.sources[0], step.window, f"(oy * {step.width} + ox) * {step.outputs} + o"
    result = step.add.between if step.add is not None else step.out
    if result is None:
        end = f"y[{place}] = (float)sum * scale_{index}[o];\n                (void)code;"
    else:
        end = f"code = clamp(nearest((float)sum * scale_{index}[o]) + {result.zero}, {result.low}, {result.high});\n"
        end += " " * 16 + _added(decided, index, step, place) + f"y[{place}] = (uint8_t)code;"
    sizes = {"oh": step.height, "ow": step.width, "oc": step.outputs, "kh": window.kernel[0], "kw": window.kernel[1]}
    sizes |= {"sh": window.stride[0], "sw": window.stride[1], "pt": window.pads[0], "pl": window.pads[1]}
    sizes |= {"dh": window.dilation[0], "dw": window.dilation[1], "ih": source.height, "iw": source.width}
    sizes |= {"ic": source.channels, "depth": step.weight.shape[3], "per": step.outputs // step.groups}
    kind, given = ("float" if result is None else "uint8_t"), (", const uint8_t *other" if step.add is not None else "")
    text = _array("int8_t", f"weight_{index}", (step.weight << step.headroom).reshape(-1).tolist())
    text += _array("int32_t", f"bias_{index}", step.bias.tolist())
    text += _array("float", f"scale_{index}", (f"{float(value).hex()}f" for value in step.scale))
    text += CONV.format(index=index, kind=kind, given=given, end=end, zero=source.zero, **sizes)
    to = "out" if step.out is None else f"t_{_word(step.out.name)}"
    also = f", t_{_word(step.add.other.name)}" if step.add is not None else ""
    return text, f"step_{index}(t_{_word(source.name)}, {to}{also});"


def _added(decided: Decided, index: int, step: ir.Conv, place: str) -> str:
    rule = decided.layers[index].add
    if step.add is None or rule is None:
        return ""
    if rule.floats:
        raise UserError("an addition without integers has no naive form here.")
    first, second = (rule.first, rule.second) if step.add.first else (rule.second, rule.first)
    sum_of = f"(code * {first} + (int32_t)other[{place}] * {second} + {rule.offset}) >> {rule.shift}"
    return f"code = clamp({sum_of}, {step.out.low}, {step.out.high});\n" + " " * 16
