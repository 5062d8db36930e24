"""Which layer is the first whose codes in onnxruntime are not the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from flatcompress.onnx_export.exporting import Exported
from flatcompress.onnx_export.proof.parity import reference_codes
from flatcompress.onnx_export.runtime.sessions import feed, session


def first_diverging_layer(exported: Exported, batch: torch.Tensor | Sequence[torch.Tensor]) -> dict[str, Any] | None:
    """The first quantized tensor that differs: {"name", "codes", "differing", "largest"}; None when none does.

    The quantized tensors are made outputs of the file, which leaves its integer kernels as they are.
    """
    expected = reference_codes(exported.reference, batch)
    names = [name for name in expected if name in exported.tensors]
    if not names:
        return None
    model = onnx.load(exported.path)
    tensors = list(dict.fromkeys(exported.tensors[name] for name in names))
    model.graph.output.extend(helper.make_tensor_value_info(t, TensorProto.UINT8, None) for t in tensors)
    handle = session(model.SerializeToString())
    given = (batch,) if isinstance(batch, torch.Tensor) else batch
    results = dict(zip(tensors, handle.run(tensors, feed(handle, tuple(value.numpy() for value in given)))))
    for name in names:
        found = results[exported.tensors[name]].astype(np.int16)
        difference = np.abs(found.reshape(-1) - expected[name].astype(np.int16).reshape(-1))
        if difference.any():
            return {
                "name": exported.paths[name],
                "codes": int(difference.size),
                "differing": int((difference > 0).sum()),
                "largest": int(difference.max()),
            }
    return None
