"""AMD Quark: its A8W8 preset on a float ONNX file, given images; writes logits of the test images by onnxruntime."""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from quark.onnx import A8W8_QCONFIG, CalibrationDataReader, ModelQuantizer


class Images(CalibrationDataReader):
    """The images in batches of 32."""

    def __init__(self, name: str, images: torch.Tensor) -> None:
        self.feeds = iter([{name: batch.numpy()} for batch in images.split(32)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, or None behind the last."""
        return next(self.feeds, None)


def main(given: str, made: str) -> None:
    """``given``: images (.pt) beside the float file (.onnx); ``made``: where the logits go."""
    images = torch.load(given, weights_only=True)
    source, target = Path(given).with_suffix(".onnx"), Path(made).with_suffix(".onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    start = time.process_time()
    quantizer = ModelQuantizer(copy.deepcopy(A8W8_QCONFIG))
    quantizer.quantize_model(str(source), str(target), Images("input", images["draw"]))
    seconds = time.process_time() - start
    session = onnxruntime.InferenceSession(str(target), options, providers=["CPUExecutionProvider"])
    found = [session.run(None, {"input": batch.numpy()})[0] for batch in images["test"].split(64)]
    torch.save({"logits": torch.from_numpy(np.concatenate(found)), "seconds": seconds}, made)


if __name__ == "__main__":
    main(*sys.argv[1:])
