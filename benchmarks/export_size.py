"""Bytes of packed ONNX files against the information-theoretic size of their weights.

    python -m benchmarks.export_size [--quick] [--check]

ResNet-8, ResNet-20, MobileNetV2 and ResNet-18 with W8, W4, W3 and W2 weights (first and last layer 8 bits) and A8
activations, dense, 2:4 and 80 % sparse (magnitude masks), BatchNorms as training leaves them, written with profile
packed. ``limit``: per layer bits x weights, or one mask bit per weight plus bits x non-zeros, whichever is smaller.
``channels``: the bytes of one float32 scale and one int32 bias per output channel, which integer kernels take besides
the weights. ``int8``: the same network in plain int8 containers; ``float32``: the float network.

Targets
  1. file <= 1.10 x limit + 25 kB, every cell.
  2. file <= 1.10 x (limit + channels) + 25 kB, every cell (where a thin layer's scales outweigh its weights).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks._common import arguments, finish
from flatcompress import models, quant
from flatcompress.onnx_export import export
from flatcompress.prune.masks import sparsify

MODELS = {"resnet8": (3, 32, 32), "resnet20": (3, 32, 32), "mobilenet_v2": (3, 96, 96), "resnet18": (3, 224, 224)}
BITS = (8, 4, 3, 2)
SPARSITIES = ("dense", "2:4", "80 %")
GRAPH = 25_000
SLACK = 1.10


def network(name: str, bits: int | None, sparsity: str) -> nn.Module:
    """A network with He-initialised weights, masked, normalised and quantized; float when ``bits`` is None."""
    shape = MODELS[name]
    model = models.build(name, num_classes=10, input_shape=shape, seed=0)
    # One mask for the group size's sake: input layers of three channels have no 2:4 pattern.
    narrow = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.weight.shape[1] % 4]
    if sparsity == "80 %":
        sparsify(model, 0.8, scope="layer")
    elif sparsity != "dense":
        sparsify(model, pattern=sparsity, ignore=narrow)
    normalised(model, shape)
    if bits is not None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, *shape, generator=generator)
        quant.quantize(model, weight_bits=bits, activation_bits=8, example_input=x)
        quant.calibrate(model, [x])
    return model.eval()


def normalised(model: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    """BatchNorms as training leaves them: no two gammas or betas alike, some gammas negative, statistics of data."""
    generator = torch.Generator().manual_seed(1)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.data = torch.rand(norm.num_features, generator=generator) + 0.5
        norm.weight.data[torch.rand(norm.num_features, generator=generator) < 0.05] *= -1
        norm.bias.data = torch.randn(norm.num_features, generator=generator) * 0.3
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, *shape, generator=generator))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def size(model: nn.Module, name: str, profile: str, folder: Path) -> Any:
    """The export of ``model``."""
    return export(model, torch.zeros(2, *MODELS[name]), folder / "model.onnx", profile)


def channels(exported: Any) -> int:
    """Bytes of a float32 scale and an int32 bias for every output channel."""
    return sum(8 * row["shape"][0] for row in exported.layers)


def cell(name: str, bits: int, sparsity: str, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    model = network(name, bits, sparsity)
    packed, plain = size(model, name, "packed", folder), size(model, name, "int8", folder)
    limit, beside = packed.theoretical_bytes, channels(packed)
    return {
        "model": name,
        "weights": f"W{bits}",
        "sparsity": sparsity,
        "file": packed.bytes,
        "limit": limit,
        "ratio": packed.bytes / limit,
        "channels": beside,
        "allowed": round(SLACK * limit + GRAPH),
        "with_channels": round(SLACK * (limit + beside) + GRAPH),
        "int8": plain.bytes,
    }


def missed(row: dict[str, Any]) -> list[str]:
    """The targets a row misses."""
    where = f"{row['model']} {row['weights']} {row['sparsity']}: {row['file']} bytes"
    found = []
    if row["file"] > row["allowed"]:
        found.append(f"target 1: {where}, at most {row['allowed']}")
    if row["file"] > row["with_channels"]:
        found.append(f"target 2: {where}, at most {row['with_channels']}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(__doc__, argv)
    names = list(MODELS)[:1] if options.quick else list(MODELS)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            dense = size(network(name, None, "dense"), name, "float32", Path(folder)).bytes
            for bits in BITS:
                for sparsity in SPARSITIES:
                    rows.append({**cell(name, bits, sparsity, Path(folder)), "float32": dense})
                    print(f"{name} W{bits} {sparsity}: ratio {rows[-1]['ratio']:.3f}", file=sys.stderr)
    return finish("export_size", rows, [sentence for row in rows for sentence in missed(row)], options)


if __name__ == "__main__":
    sys.exit(main())
