"""Intel Neural Compressor: static quantization of an exported program, given images; writes logits of the tests."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from neural_compressor.torch.quantization import StaticQuantConfig, convert, prepare


def main(given: str, made: str) -> None:
    """``given``: images (.pt) beside the program (.pt2); ``made``: where the logits go."""
    torch.set_num_threads(1)
    images = torch.load(given, weights_only=True)
    program = torch.export.load(str(Path(given).with_suffix(".pt2"))).module()
    program._exported = True  # its own export() marks what it made by these two
    program.dynamic_shapes = ({0: torch.export.Dim.DYNAMIC},)
    start = time.process_time()
    model = prepare(program, StaticQuantConfig())
    with torch.no_grad():
        for batch in images["draw"].split(32):
            model(batch)
    model = convert(model)
    seconds = time.process_time() - start
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in images["test"].split(64)])
    torch.save({"logits": logits, "seconds": seconds}, made)


if __name__ == "__main__":
    main(*sys.argv[1:])
