"""Which layer is the first whose codes in onnxruntime are not the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flatcompress.onnx_export.exporting import Exported
from flatcompress.onnx_export.proof.codes import read_out
from flatcompress.onnx_export.proof.parity import reference_codes


def first_diverging_layer(exported: Exported, batch: torch.Tensor | Sequence[torch.Tensor]) -> dict[str, Any] | None:
    """The first quantized tensor that differs: {"name", "codes", "differing", "largest"}; None when none does."""
    expected = reference_codes(exported.reference, batch)
    names = [name for name in expected if name in exported.tensors]
    if not names:
        return None
    given = (batch,) if isinstance(batch, torch.Tensor) else batch
    results, _ = read_out(exported, names, given)
    for name, found in results.items():
        difference = np.abs(found.reshape(-1) - expected[name].astype(np.int16).reshape(-1))
        if difference.any():
            return {
                "name": exported.paths[name],
                "codes": int(difference.size),
                "differing": int((difference > 0).sum()),
                "largest": int(difference.max()),
            }
    return None
