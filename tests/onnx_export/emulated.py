"""Run under qemu-user by `test_processors`: every ``*.onnx`` of a folder on its ``*.npy`` inputs. Needs no torch."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort


def main(folder: Path, target: str) -> None:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    found = {}
    for path in sorted(folder.glob("*.onnx")):
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (found[path.stem],) = session.run(None, {session.get_inputs()[0].name: np.load(folder / "input.npy")})
    np.savez(folder / target, **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
