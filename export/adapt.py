#!/usr/bin/env python3
"""Predict a stream of images with a model that adapts to it: SAR on the normalisation layers (arXiv 2302.12400).

    python adapt.py runs/NAME images/ --batch 64         # one line per file: name, class, confidence
    python adapt.py runs/NAME images/ --batch 1 --reset-every 500

The ONNX file has its normalisation folded into integers and no gradients, so this one script of the kit runs the
quantized network in torch, from the run folder, and needs flatcompress itself. The run folder is left as it is. Files
are taken in the order of their names, as the stream would bring them; what is learned from a batch serves the next.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from runner import Model
from torch import Tensor

from flatcompress import quant
from flatcompress.cli.commands import load_run
from flatcompress.errors import UserError
from flatcompress.flat.adapting import Sar


def answers(sar: Sar, batches: Iterable[Tensor], reset_every: int | None = None) -> Iterator[Tensor]:
    """The probabilities [B, classes] of each batch; everything learned is forgotten after so many samples."""
    seen = 0
    for batch in batches:
        yield sar(batch).softmax(1)
        seen += len(batch)
        if reset_every is not None and seen >= reset_every:
            sar.reset()
            seen = 0


def files_of(paths: Sequence[Path], suffixes: Sequence[str]) -> list[Path]:
    """The files among ``paths`` and in folders among them, each folder's by name."""
    found: list[Path] = []
    for path in paths:
        found += sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes) if path.is_dir() else [path]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Adapt and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with its checkpoints and model.onnx")
    parser.add_argument("inputs", type=Path, nargs="+", help="images, or folders of them")
    parser.add_argument("--batch", type=int, default=64, help="images that are predicted and learned from at once")
    parser.add_argument("--lr", type=float, default=2.5e-4, help="learning rate for batches of 64")
    parser.add_argument("--prior", type=float, default=16.0, help="samples that BatchNorm's own statistics count as")
    parser.add_argument("--chance", type=float, default=2.0, help="its own stay up to so often what chance explains")
    parser.add_argument("--memory", type=float, default=64.0, help="samples over which what was seen fades")
    parser.add_argument("--reset-every", type=int, help="forget what was learned after so many images")
    options = parser.parse_args(argv)
    try:
        run = load_run(options.run)
        reader = Model(options.run / "model.onnx")  # its metadata says how an image becomes an input
        files = files_of(options.inputs, reader.suffixes())
        if quant.is_quantized(run.model):
            quant.set_bias_rounding(run.model, False)  # biases move from here on
        sar = Sar(run.model, lr=options.lr, prior=options.prior, memory=options.memory, chance=options.chance)
        parts = [files[i : i + options.batch] for i in range(0, len(files), options.batch)]
        batches = (torch.stack([torch.from_numpy(reader.preprocess(reader.load(f))) for f in part]) for part in parts)
        for part, probabilities in zip(parts, answers(sar, batches, options.reset_every)):
            for file, row in zip(part, probabilities):
                print(file, reader.name(int(row.argmax())), f"{float(row.max()):.3f}")
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{sar.steps} steps, {sar.resets} resets", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
