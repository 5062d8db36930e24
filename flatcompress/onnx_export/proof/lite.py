"""The certificate's section ``litert``: the LiteRT file, run here and held against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatcompress.onnx_export.litert import model as litert
from flatcompress.onnx_export.proof import judging, parity
from flatcompress.onnx_export.proof.samples import Samples

STEPS, FURTHER = 1.5, 0.01  # of samples: a sum that lies just between two codes may go either way
SLOWLY = 256  # samples for the built-in kernels
KEPT = ("samples", "largest_error_steps", "mean_error_steps", "equal_argmax", "decisions", "flips")


def section(
    made: litert.LiteRTModel, inputs: Samples, output: int, reference: NDArray[np.float32], agreement: str
) -> dict[str, Any]:
    """What was written, and its outputs beside the reference's: with XNNPACK on all samples, and with the built-in
    kernels, which round twice, on the first ones. What goes wrong in LiteRT is in ``error``.
    """
    step, row = parity.output_step(reference), dict(made.figures)
    batches = inputs.arrays()
    try:
        outputs, how = litert.run(made.path, inputs.names, batches, output)
        row["xnnpack"] = _compared(reference, outputs, step, agreement)
        row["how"] = how["how"]
        few = batches[: max(1, SLOWLY // max(1, len(batches[0][0])))]
        slowly, _ = litert.run(made.path, inputs.names, few, output, delegates=False)
        row["builtin"] = _compared(reference[: len(slowly)], slowly, step, agreement)
    except Exception as error:  # a foreign runtime may raise anything; that it does is the finding
        row["error"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
    return row


def _compared(
    reference: NDArray[np.float32], found: NDArray[np.float32], step: float, agreement: str
) -> dict[str, Any]:
    row = judging.compare(reference, found, step, 0.0, agreement)
    further = np.abs(found - reference).reshape(len(found), -1).max(1) > STEPS * step
    return {**{key: row[key] for key in KEPT}, "further": int(further.sum())}


def failures(row: dict[str, Any], narrow: bool) -> list[str]:
    """Why the LiteRT file does not hold. ``narrow``: of int4 weights, whose biases are coarser, only classes count."""
    if "error" in row:
        return [f"LiteRT does not run the file ({row['error']})."]
    found, reasons = row["xnnpack"], []
    if found["largest_error_steps"] is None:
        return ["LiteRT: an output is not finite."]
    if not narrow and judging.too_many(found["further"], found["samples"], FURTHER):
        reasons.append(f"LiteRT: {found['further']} of {found['samples']} outputs are more than {STEPS} steps from the "
                       f"reference, the largest {found['largest_error_steps']:.3g}; {FURTHER:.0%} may be.")  # fmt: skip
    if judging.too_many(found["flips"], found["decisions"], judging.FLIPPED):
        reasons.append(f"LiteRT: argmax differs from the reference's on {found['flips']} of {found['decisions']} "
                       f"samples; {judging.FLIPPED:.1%} is allowed.")  # fmt: skip
    return reasons
