"""The outputs of a file beside the one that its certificate is about: features, hidden states, masks."""

from __future__ import annotations

from typing import Any

import numpy as np

from flatcompress.onnx_export.emit.catalogue import PROFILES
from flatcompress.onnx_export.emit.writer import output_names
from flatcompress.onnx_export.exporting import Exported
from flatcompress.onnx_export.proof import judging, parity
from flatcompress.onnx_export.proof.samples import Samples, flat
from flatcompress.onnx_export.runtime.sessions import run, session


def compared(exported: Exported, inputs: Samples, output: int) -> dict[str, Any]:
    """{name: largest error in steps of that output, or for whole numbers and masks the share that is equal}."""
    returned = next(node for node in reversed(exported.reference.graph.nodes) if node.op == "output").args[0]
    names = output_names(exported.reference, len(flat(returned)))
    rows: dict[str, Any] = {}
    for index, name in enumerate(names):
        if index == output:
            continue
        expected = parity.reference_outputs(exported.reference, inputs.batches, index)
        handle = session(exported.path, fused=PROFILES[exported.profile]().fused)
        found = run(handle, inputs.arrays(), index)
        if expected.dtype.kind != "f":
            rows[name] = {"equal": float((expected == found).mean())}
            continue
        error = np.abs(expected.astype(np.float64) - found).max() / parity.output_step(expected)
        rows[name] = {"largest_error_steps": float(error) if np.isfinite(error) else None}
    return rows


def failures(rows: dict[str, Any]) -> list[str]:
    """What these rows prove against a file, one sentence each."""
    found = []
    for name, row in rows.items():
        steps = row.get("largest_error_steps")
        if "equal" in row and row["equal"] != 1.0:
            found.append(f"output {name!r}: only {row['equal']:.2%} of its values are the reference's.")
        elif "equal" not in row and (steps is None or steps > judging.LARGEST_STEPS):
            found.append(f"output {name!r} is {steps} steps from the reference; at most 1 is allowed.")
    return found
