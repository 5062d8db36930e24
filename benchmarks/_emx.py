"""The same network through emx-onnx-cgen (PyPI, 1.4.0) on the same emulated board; to compare with."""

from __future__ import annotations

import dataclasses
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks import _peer_envs
from flatcompress.errors import RunError, UserError
from flatcompress.onnx_export import export
from flatcompress.onnx_export.c import board
from flatcompress.onnx_export.c.model import bit_equal

# Its tensors lie on the stack: megabytes, which only the board's 16 MB of PSRAM hold.
BOARD = dataclasses.replace(board.BOARDS["m4"], name="m4 with PSRAM", data=0x21000000, memory="16M")
PROFILES = ("int8", "packed")
# The board has no C library. nearbyintf is exact where its file uses it, on codes. expf (Cephes) and erff (Abramowitz
# and Stegun 7.1.26) err by 4e-7 at most and take some forty instructions, so that nobody's library is measured with it.
# A network that needs another function says so when it is linked.
MATH = """#ifndef MATH_H
#define MATH_H
#include <stdint.h>
static inline float fmaxf(float a, float b) { return __builtin_isnan(a) || a < b ? b : a; }
static inline float fminf(float a, float b) { return __builtin_isnan(b) || b < a ? b : a; }
static inline float fabsf(float v) { return __builtin_fabsf(v); }
static inline float nearbyintf(float v)
{
    return v > 4194304.0f || v < -4194304.0f ? v : (v + 12582912.0f) - 12582912.0f;
}
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define isnan(v) __builtin_isnan(v)
#define isinf(v) __builtin_isinf(v)
#ifdef __arm__
static inline float sqrtf(float v)
{
    float root;
    __asm__("vsqrt.f32 %0, %1" : "=t"(root) : "t"(v));
    return root;
}
#endif
static inline float expf(float v)
{
    if (v > 88.0f || v < -87.0f) {
        return v > 0.0f ? INFINITY : 0.0f;
    }
    const float n = nearbyintf(v * 1.44269504f), r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
    float sum = 1.9875691500e-4f, scale;
    sum = sum * r + 1.3981999507e-3f;
    sum = sum * r + 8.3334519073e-3f;
    sum = sum * r + 4.1665795894e-2f;
    sum = sum * r + 1.6666665459e-1f;
    sum = sum * r + 5.0000001201e-1f;
    const uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    __builtin_memcpy(&scale, &bits, sizeof scale);
    return (sum * r * r + r + 1.0f) * scale;
}
static inline float erff(float v)
{
    const float t = 1.0f / (1.0f + 0.3275911f * fabsf(v));
    float sum = 1.061405429f * t - 1.453152027f;
    sum = sum * t + 1.421413741f;
    sum = sum * t - 0.284496736f;
    sum = (sum * t + 0.254829592f) * t * expf(-v * v);
    return v < 0.0f ? sum - 1.0f : 1.0f - sum;
}
float logf(float v);
float tanhf(float v);
float powf(float a, float b);
#endif
"""
STRING = "#include <stddef.h>\nvoid *memcpy(void *, const void *, size_t);\nvoid *memset(void *, int, size_t);\n"


@cache
def problem() -> str | None:
    """Why its environment cannot be made, or None."""
    return _peer_envs.ensure("emx").problem or None


def row(
    model: nn.Module, example: torch.Tensor, samples: NDArray[np.float32], expected: NDArray[np.float32], folder: Path
) -> dict[str, Any]:
    """Columns of one network: samples [N, ...] and the outputs they should have; without an environment none."""
    if problem() is not None:
        return {}
    found = [_profile(model, example, samples, expected, folder / name, name) for name in PROFILES]
    whole = [columns for columns in found if "emx instructions" in columns]
    return min(whole, key=lambda columns: columns["emx instructions"]) if whole else found[0]


def _profile(
    model: nn.Module,
    example: torch.Tensor,
    samples: NDArray[np.float32],
    expected: NDArray[np.float32],
    folder: Path,
    name: str,
) -> dict[str, Any]:
    """Columns of the file of one profile."""
    try:
        file = export(model, example, folder / "model.onnx", name).path
        _write(file, folder, tuple(example.shape[1:]), expected.shape[1])
        found = board.measure(folder, "emx", samples, expected.shape[1], BOARD, ("-O2",))
    except (RunError, UserError) as error:
        return {"emx profile": name, "emx says": _line(str(error))}
    return {
        "emx profile": name,
        "emx flash": found.flash,
        "emx stack": found.stack,
        "emx instructions": max(found.instructions),
        "emx equal": bool(bit_equal(found.outputs, expected).all()),
        "emx largest error": float(np.abs(found.outputs - expected).max()),
    }


def _write(file: Path, folder: Path, shape: tuple[int, ...], outputs: int) -> None:
    """``emx.c`` and ``emx.h`` as the board's harness wants them. RunError with the generator's message."""
    python = _peer_envs.ensure("emx").python
    assert python is not None
    line = [str(python.parent / "emx-onnx-cgen"), "compile", "--model-name", "emx_model", "--input-dim", "batch=1"]
    line += ["--large-temp-threshold", "0", "--large-weight-threshold", "0", str(file), str(folder / "emx.c")]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=_peer_envs.surroundings())
    if done.returncode or not (folder / "emx.c").exists():
        raise RunError(done.stderr.strip() or done.stdout.strip())
    sides = "".join(f"[{size}]" for size in shape)
    with (folder / "emx.c").open("a") as text:
        text.write(f"""
int emx_run(const float *in, float *out, void *arena)
{{
    (void)arena;
    emx_model((const float (*){sides})in, (float (*)[{outputs}])out);
    return 0;
}}
""")
    (folder / "emx.h").write_text(
        f"#define EMX_ARENA_BYTES 8u\n#define EMX_OUTPUT_COUNT {outputs}u\n"
        "int emx_run(const float *in, float *out, void *arena);\n"
    )
    (folder / "math.h").write_text(MATH)
    (folder / "string.h").write_text(STRING)


def _line(text: str) -> str:
    """The line that says why, without paths."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for word in ("Reason", "undefined reference", "error:", "overflowed"):
        for line in lines:
            if word in line:
                return line[line.index(word) :][:200]
    return lines[-1][:200] if lines else "no message"
