"""onnxruntime: post-training quantization of any float ONNX file, as its documentation advises for x86."""

from __future__ import annotations

import argparse

# user code
import numpy as np
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

# end
from benchmarks.peer_scripts.given import Given, run


# user code
class Reader(CalibrationDataReader):
    def __init__(self, given: Given) -> None:
        batches = np.split(given.train_set[0][:512].numpy(), 8)
        self.batches = iter({"x": batch} for batch in batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def work(given: Given) -> None:
    ready = given.out / "ready.onnx"
    quant_pre_process(given.options.model, str(ready))
    quantize_static(
        str(ready), given.onnx, Reader(given), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType[given.options.weights],
        calibrate_method=CalibrationMethod[given.options.calibrate],
    )  # fmt: skip


# end


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", default="QInt8")
    parser.add_argument("--calibrate", default="MinMax")


if __name__ == "__main__":
    run(work, arguments)
