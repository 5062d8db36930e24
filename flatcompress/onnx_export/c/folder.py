"""The folder of a C model: its sources, a Makefile, CMakeLists, an example and a page with its figures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from flatcompress.errors import UserError
from flatcompress.onnx_export.c import choosing, costs, emit, ir, layer_text, weights
from flatcompress.onnx_export.c.layers import Decided
from flatcompress.onnx_export.c.text import Sources
from flatcompress.storage import write_output

KERNELS = "fc_kernels.h"
FEATURES = (
    *("QUANTIZE", "DEQUANTIZE", "CONV", "LINEAR", "DEPTHWISE", "FUSED", "ADD", "FLOAT_ADD", "POOL", "MAX", "TABLE"),
    *("REALS", "FLOATS", "FAR", "NUDGED", "LIMITS", "RAISED", "WIDE_BIAS", "NARROW", "BITS_1", "BITS_2", "BITS_4"),
    *("BITS_8", "PLANES", "GROUPS", "SPARSE", "SPARSE_LINE", "SPARSE_WIDE", "SPARSE_BYTES", "SPARSE_WORDS", "SPLIT"),
    *("MASKED", "GATE", "CONCAT", "MOVE", "RANGE", "LATE", "DILATED", "SMALL", "PACKED", "CODED", "SHORT", "TURNED"),
    *("SPARSE_ENDED", "WHOLE", "RUNS", "DEEP", "EVEN"),
    *("ROWS", "ROW_CODES", "ROW_COPY", "ROW_PRODUCT", "ROW_SCALE", "ROW_DIVIDE", "ROW_ADD", "ROW_TIMES", "ROW_NORM"),
    *("ROW_SOFTMAX", "ROW_GELU", "ROW_SIGMOID", "ROW_TANH", "ROW_HARD", "ROW_RELU", "ROW_PLANES", "ROW_QUANTIZE"),
)
TRACE = """
#ifndef FC_TRACE
#define FC_TRACE(from, count) ((void)0) /* for whoever wants to see a step's result */
#endif
"""
RESERVED = {"main", "in", "out", "arena", "bytes", "int", "float", "char", "void", "const", "static", "if", "for"}


def identifier(stem: str) -> str:
    """A file name as a C name: ``my-model`` is ``my_model``. UserError where nothing of it is left."""
    name = re.sub(r"\W", "_", stem, flags=re.ASCII).lower()
    if not re.fullmatch(r"[a-z]\w*", name) or name in RESERVED or name.startswith("fc_"):
        raise UserError(f"{stem!r} cannot name a C model: call the file like 'model.onnx', letters first.")
    return name


def write(decided: Decided, name: str, folder: Path) -> dict[str, Any]:
    """Write everything into ``folder``; returns the figures that the certificate and the README show."""
    made = emit.write(decided, name)
    figures = _figures(decided, made)
    files = {
        f"{name}.h": _header(decided, name),
        f"{name}.c": _source(decided, made),
        f"{name}_weights.h": _weights(made),
        KERNELS: emit.kernels(),
        "main.c": _example(name),
        "Makefile": _makefile(name),
        "CMakeLists.txt": _cmake(name),
        "README.md": _readme(name, decided, figures),
    }
    for file, text in files.items():
        write_output(folder / file, text.encode())
    return {**figures, "name": name, "files": sorted(files)}


def _figures(decided: Decided, made: Sources) -> dict[str, Any]:
    plan, program = decided.plan, decided.program
    return {
        "weight_bytes": made.weight_bytes,
        "true_weight_bytes": round(sum(weights.true_bytes(conv) for conv in program.convs)),
        "parameter_bytes": made.parameter_bytes,
        "channels": sum(conv.outputs for conv in program.convs),
        "ram_bytes": plan.arena,
        "ram_bound_bytes": plan.bound,
        "scratch_bytes": max(plan.scratch_bytes, default=0),
        "packed_tensors": sum(isinstance(tensor, ir.Codes) and tensor.packed for tensor in program.tensors),
        "macs": program.macs,
        "estimate": costs.estimate(decided).to_json(),
    }


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _header(decided: Decided, name: str) -> str:
    upper, program = name.upper(), decided.program
    shapes = [" x ".join(map(str, shape)) for shape in (program.inputs, program.outputs)]
    return f"""/* {name}: written by flatcompress. */
#ifndef {upper}_H
#define {upper}_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {{
#endif

#define {upper}_INPUT_COUNT {_count(program.inputs)}u /* {shapes[0]}, as the ONNX file takes it */
#define {upper}_OUTPUT_COUNT {_count(program.outputs)}u /* {shapes[1]} */
#define {upper}_ARENA_BYTES {max(8, decided.plan.arena)}u
#define {upper}_ARENA_ALIGNMENT 8u

/* One sample. arena: {upper}_ARENA_BYTES bytes, aligned to {upper}_ARENA_ALIGNMENT; nothing in it is kept between two
 * calls. Returns 0, or -1 for a null pointer or a misaligned arena. Several threads may run at once, each with an
 * arena of its own. */
int {name}_run(const float *in, float *out, void *arena);

#ifdef __cplusplus
}}
#endif

#endif
"""


def _source(decided: Decided, made: Sources) -> str:
    name, upper = made.name, made.name.upper()
    features = "\n".join(f"#define FC_{part} {int(part in made.uses)}" for part in FEATURES)
    features += "".join(f"\n#define FC_{key} {value}" for key, value in {**_word(decided), **_even(decided)}.items())
    constants = "\n\n".join(made.constants)
    calls = "\n".join(f"    {call}" for call in made.calls)
    return f"""/* {name}: written by flatcompress; see README.md. */
#include "{name}.h"

{features}
#include "{KERNELS}"

#include "{name}_weights.h"
{TRACE}
{constants}

int {name}_run(const float *in, float *out, void *arena)
{{
    uint8_t *const bytes = (uint8_t *)arena;
    if ((in == NULL) || (out == NULL) || (arena == NULL) || (((uintptr_t)arena % {upper}_ARENA_ALIGNMENT) != 0u)) {{
        return -1;
    }}
{calls}
    return 0;
}}
"""


def _word(decided: Decided) -> dict[str, int]:
    """Bits of a distance and of a weight in words of a sparse stream; 0 where layers differ."""
    made = {"WORD_GAP": set(), "WORD_BITS": set()}  # type: dict[str, set[int]]
    for layer in decided.layers.values():
        if layer.entries is not None and layer.entries.form in (weights.WORDS, weights.ENDED):
            made["WORD_BITS"].add(layer.entries.bits)
            made["WORD_GAP"] |= {layer.entries.gap} if layer.kernel == choosing.SPARSE else set()
    return {name: found.pop() if len(found) == 1 else 0 for name, found in made.items()}


def _even(decided: Decided) -> dict[str, int]:
    """The bits that all sums are shifted by and that their codes have, where all layers end alike."""
    end = layer_text.even(decided)
    return {"EVEN_SHIFT": end.shift + end.trim, "EVEN_BITS": 8 - end.trim} if end is not None else {}


def _weights(made: Sources) -> str:
    arrays = "\n\n".join(made.weights)
    return f"/* {made.name}: weights, multipliers and biases; included by {made.name}.c alone. */\n\n{arrays}\n"


def _example(name: str) -> str:
    upper = name.upper()
    return f"""/* Runs {name} once on zeros and prints what comes out. */
#include <stdint.h>
#include <stdio.h>

#include "{name}.h"

static uint64_t arena[({upper}_ARENA_BYTES + 7u) / 8u];
static float in[{upper}_INPUT_COUNT];
static float out[{upper}_OUTPUT_COUNT];

int main(void)
{{
    if ({name}_run(in, out, arena) != 0) {{
        return 1;
    }}
    for (unsigned i = 0u; i < {upper}_OUTPUT_COUNT; i++) {{
        (void)printf("%u: %.9g\\n", i, (double)out[i]);
    }}
    return 0;
}}
"""


def _makefile(name: str) -> str:
    return f"""# make: lib{name}.a and the example.
# For a board: make lib{name}.a CC=arm-none-eabi-gcc AR=arm-none-eabi-ar CFLAGS="-O2 -mcpu=cortex-m4"
CC ?= cc
AR ?= ar
CFLAGS ?= -O2 -Wall -Wextra -Wconversion
override CFLAGS += -std=c99

all: lib{name}.a example

lib{name}.a: {name}.o
\t$(AR) rcs $@ $^

{name}.o: {name}.c {name}.h {name}_weights.h {KERNELS}
\t$(CC) $(CFLAGS) -c $< -o $@

example: main.c lib{name}.a
\t$(CC) $(CFLAGS) $^ -o $@

clean:
\trm -f {name}.o lib{name}.a example

.PHONY: all clean
"""


def _cmake(name: str) -> str:
    return f"""cmake_minimum_required(VERSION 3.13)
project({name} C)

add_library({name} STATIC {name}.c)
set_target_properties({name} PROPERTIES C_STANDARD 99 C_EXTENSIONS OFF)
target_include_directories({name} PUBLIC ${{CMAKE_CURRENT_SOURCE_DIR}})

if(NOT CMAKE_CROSSCOMPILING)
  add_executable({name}_example main.c)
  target_link_libraries({name}_example {name})
endif()
"""


def _readme(name: str, decided: Decided, figures: dict[str, Any]) -> str:
    proof = decided.proof()
    return f"""# {name}

C99 written by flatcompress: `{name}.c`, `{name}.h`, `{name}_weights.h` and `{KERNELS}`. No allocation, no library, no
state; constant data only, so it stays in flash.

```c
#include "{name}.h"
static uint64_t arena[({name.upper()}_ARENA_BYTES + 7u) / 8u];
{name}_run(in, out, arena); /* floats, laid out as in {name}.onnx */
```

Compile `{name}.c` as ISO C (`-std=c99`: a compiler may then not fuse a multiplication with an addition) and without
`-ffast-math`. On Armv7E-M and Armv8-M with DSP it uses SMLAD by `arm_acle.h`; `-DFC_PORTABLE` turns that off.

| | |
|---|---|
| weights as stored | {figures["weight_bytes"]} bytes |
| weights at their true bits | {figures["true_weight_bytes"]} bytes |
| multipliers and biases | {figures["parameter_bytes"]} bytes for {figures["channels"]} channels |
| arena | {figures["ram_bytes"]} bytes |
| largest set of live tensors, nothing overlapping, a byte a code | {figures["ram_bound_bytes"]} bytes |
| tensors with two codes to a byte | {figures["packed_tensors"]} of {len(decided.program.tensors)} |
| products | {figures["macs"]} |

{_equality(proof)} Proved when this was written: the roundings of {proof["channels"]} channels for
all {proof["sums"]} sums that their weights can reach ({proof["channels_float"]} of them multiply in float32, as
onnxruntime does), {proof["pools"]} pools, {proof["additions"]} additions over all {proof["pairs"]} pairs of codes.

{_estimated(figures["estimate"])}
"""


def _estimated(estimate: dict[str, Any]) -> str:
    rows = [f"| {s['module'] or '-'} | {s['kind']} | {s['macs']} | {s['instructions']} |" for s in estimate["steps"]]
    return "\n".join(
        [
            f"Estimated for a Cortex-M4 ({estimate['compiler']}, {' '.join(estimate['flags'])}; fitted on an emulator,",
            f"which counts instructions, not cycles): {estimate['flash']} bytes of flash, {estimate['instructions']}",
            "instructions of one inference.",
            *_without(estimate["unknown"]),
            "",
            "| module | step | products | instructions |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def _without(unknown: list[str]) -> list[str]:
    """What an estimate says of the parts that it knows nothing of."""
    return (
        [f"Not in these figures, because the table has nothing of the kind: {', '.join(unknown)}."] if unknown else []
    )


def _equality(proof: dict[str, Any]) -> str:
    if not proof["float_steps"]:
        return "Every output bit equals onnxruntime's."
    steps = [f"- {row['module'] or 'forward'}: {', '.join(row['computes']) or 'mean'}" for row in proof["float_steps"]]
    return "\n".join(
        [
            "Between integers these steps compute in float32, by routines that give the same bits on every board:",
            "",
            *steps,
            "",
            "onnxruntime adds in another order there, so a value at the edge of two codes may become either;",
            "certificate.json says how far the outputs are from the reference's. All other steps are onnxruntime's",
            "in every bit.",
        ]
    )
