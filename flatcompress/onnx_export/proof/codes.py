"""The codes that a file has inside, read out of onnxruntime as the reference counts them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from flatcompress.onnx_export.emit.catalogue import PROFILES
from flatcompress.onnx_export.exporting import Exported
from flatcompress.onnx_export.runtime.sessions import feed, session


def read_out(
    exported: Exported, names: Sequence[str], inputs: Sequence[torch.Tensor], output: int = 0
) -> tuple[dict[str, NDArray[np.int16]], NDArray[Any]]:
    """{node of the reference: codes}, and the output; from one optimized session, of one batch.

    The quantized tensors are made outputs of the file, which leaves its integer kernels as they are. A form that stores
    codes as int8 has them shifted; the shift is undone.
    """
    form = PROFILES[exported.profile]().form
    kind = TensorProto.INT8 if form is not None and form.codes is np.int8 else TensorProto.UINT8
    model = onnx.load(exported.path)
    name = model.graph.output[output].name
    present = {entry.name for entry in model.graph.output}
    wanted = [t for t in dict.fromkeys(exported.tensors[n] for n in names) if t not in present]
    model.graph.output.extend(helper.make_tensor_value_info(t, kind, None) for t in wanted)
    handle = session(model.SerializeToString())
    given = feed(handle, tuple(value.numpy() for value in inputs))
    results = dict(zip([*wanted, name], handle.run([*wanted, name], given)))
    found = {n: results[tensor].astype(np.int16) + exported.shifts.get(n, 0)
             for n in names if (tensor := exported.tensors[n]) in results}  # fmt: skip
    return found, results[name]
