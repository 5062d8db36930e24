"""NNCF: post-training quantization of an exported program, given images; writes logits of the test images."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import nncf
import torch


def main(given: str, made: str) -> None:
    """``given``: images (.pt) beside the program (.pt2); ``made``: where the logits go."""
    torch.set_num_threads(1)
    images = torch.load(given, weights_only=True)
    program = torch.export.load(str(Path(given).with_suffix(".pt2")))
    start = time.monotonic()
    batches = [(batch,) for batch in images["draw"].split(32)]
    model = nncf.quantize(program.module(), nncf.Dataset(batches, lambda item: item[0]), subset_size=len(batches))
    seconds = time.monotonic() - start
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in images["test"].split(64)])
    torch.save({"logits": logits, "seconds": seconds}, made)


if __name__ == "__main__":
    main(*sys.argv[1:])
