"""C models on an emulated Cortex-M4: flash, RAM, stack, instructions, and whether every output bit is right.

    python -m benchmarks.microcontroller [--quick] [--check] [--run FOLDER ...] [--page]

ResNet-8 (3x32x32), DS-CNN (1x49x10), MobileNetV1 x0.25 (3x96x96), the MLPerf Tiny autoencoder (640 inputs) and vit_tiny
(3x16x16, depth 2), at W8A8, W4A8, W4A4 and W2A4 (first and last layer 8 bits), dense and 80 % sparse, untrained,
BatchNorms as training leaves them, some gammas negative; compiled with arm-none-eabi-gcc -Os, run on QEMU's mps2-an386
(-O2 is about 10 % fewer instructions for 300 to 500 bytes).
vit_tiny's norms and softmaxes are floats: of it every bit is held against the same C on this machine. ``true``: bits
per weight, or a mask and the weights that are not zero. ``bound``: the largest set of live tensors if none overlapped.
``in and out``: bytes of the caller's floats. Instructions are not cycles: flash wait states and slow loads are not in
them.

Then the first four networks as recipes train and prune them on the project's own data (`_board_runs`), with their
accuracy; a run that is finished (in runs/microcontroller) is not trained again. ``--run FOLDER``: a row more for every
finished run that ends quantized. Writes docs/results/microcontroller.md and the table of docs/microcontroller.md;
``--page`` does only that, from the results that are there.

Of W4A4, dense, ``naive`` is C as one writes it first (int8 weights, a loop a dimension, float roundings), of the same
compiler at -O2 and with the same outputs, beside our own instructions at -O2.

``emx``: what emx-onnx-cgen 1.4.0 writes from the same network's ONNX file (``emx profile``: int8 or packed, whichever
takes fewer instructions), at -O2, with all its tensors on the stack (``emx stack``) in 16 MB of emulated PSRAM.
``emx says``: why a figure is missing, as the generator, the compiler or the board said it. Its environment is made once
by pip; where it cannot be made the columns are empty, and output and page say why.

``estimated``: what the cost model says before anything is compiled (`flatcompress.onnx_export.c.costs`); how far that
is from the figures is printed.

``packed`` (convolutional networks of 4-bit activations): the same with ``pack_activations``, two codes to a byte.

Targets
  1. every output bit equals the integer reference's, every cell.
  2. flash <= true + 6 B a channel + 2.5 kB (ResNet-8, autoencoder) or 5 kB (depthwise); none for vit_tiny.
  3. RAM <= bound, and with packed activations <= 0.65 of it.
  4. dense: at most 1.7 instructions a product for ResNet-8, 3.0 for the depthwise networks.
  5. at 80 % zeros at most 0.5 of the dense instructions; none for vit_tiny.
The first three are asked of the trained networks too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks import _board_page, _board_runs, _common, _emx, _naive_c
from benchmarks._common import arguments, finish, table
from benchmarks.export_size import normalised
from flatcompress import models, quant
from flatcompress.cli.commands import load_run, open_run
from flatcompress.errors import UserError
from flatcompress.onnx_export import Exported, export, untie
from flatcompress.onnx_export.c import board
from flatcompress.onnx_export.c.model import bit_equal
from flatcompress.onnx_export.proof.parity import reference_outputs
from flatcompress.prune.masks import sparsify

NAME = "microcontroller"
SHAPES: dict[str, tuple[int, ...]] = {
    "resnet8": (3, 32, 32),
    "ds_cnn": (1, 49, 10),
    "mobilenet_v1_025": (3, 96, 96),
    "autoencoder": (640,),
    "vit_tiny": (3, 16, 16),
}
BITS = ((8, 8), (4, 8), (4, 4), (2, 4))
DEPTHWISE = ("ds_cnn", "mobilenet_v1_025")
CONVOLUTIONS = ("resnet8", *DEPTHWISE)
PER_PRODUCT = {"resnet8": 1.7, "ds_cnn": 3.0, "mobilenet_v1_025": 3.0}
SAMPLES = 2


def autoencoder() -> nn.Module:
    """MLPerf Tiny's anomaly detection: 640, four times 128, 8, four times 128, 640."""
    sizes, layers = [640, *[128] * 4, 8, *[128] * 4, 640], []
    for index, (first, second) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(first, second))
        if index < len(sizes) - 2:
            layers += [nn.BatchNorm1d(second), nn.ReLU()]
    return nn.Sequential(*layers)


def network(name: str, weights: int, activations: int, zeros: float) -> tuple[nn.Module, torch.Tensor]:
    """A quantized network, and inputs for it."""
    torch.manual_seed(0)
    shape, generator = SHAPES[name], torch.Generator().manual_seed(1)
    if name == "autoencoder":
        model = autoencoder()
    else:
        depth = {"depth": 2} if name == "vit_tiny" else {}
        model = models.build(name, num_classes=10, input_shape=shape, seed=0, **depth)
    if zeros:
        sparsify(model, zeros, scope="layer")
    x = torch.randn(8, *shape, generator=generator)
    if name not in ("autoencoder", "vit_tiny"):
        normalised(model, shape)  # type: ignore[arg-type]
    quant.quantize(model, weight_bits=weights, activation_bits=activations, example_input=x[:2])
    quant.calibrate(model, [x])
    untie(model.eval(), x[:2])  # as a recipe's quantize stage ends
    return model, x


def measured(name: str, weights: int, activations: int, zeros: float) -> dict[str, Any]:
    """One cell of the table."""
    model, x = network(name, weights, activations, zeros)
    return cell(name, (weights, activations), zeros, model, x)


def trained(folder: Path) -> dict[str, Any]:
    """The network that a run left, on its test samples, with the file's accuracy. ``kind``: whose targets it has."""
    run = load_run(folder)
    layers = quant.quantized_layers(run.model.eval().cpu()).values()
    weights = min(layer.weight_spec().bits for layer in layers)
    activations = min(quantizer.bits for quantizer in quant.activation_quantizers(run.model).values())
    x = run.example(8).cpu()
    recipe = open_run(folder)[0]
    kind = recipe.model.name.split(":")[-1]
    row = cell(kind, (weights, activations), 0.0, run.model, x)
    ledger = json.loads((folder / "ledger.json").read_text())["rows"]
    told = {"input": list(x.shape[1:]), "macs": ledger[-1]["macs"], "macs before": ledger[0]["macs"]}
    return {**row, "net": recipe.name, "kind": kind, **told, **accuracy(ledger[-1])}


def accuracy(row: dict[str, Any]) -> dict[str, Any]:
    """The metric of a ledger's row that says most, by part: a detector's area under the curve before its error."""
    metrics = row.get("metrics") or {"accuracy": row["accuracy"]}
    name = next((known for known in ("accuracy", "auroc") if known in metrics), next(iter(metrics)))
    return {"metric": name, **{part: metrics[name].get(part) for part in ("test", "held_out", "corrupted")}}


def cell(name: str, bits: tuple[int, int], zeros: float, model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """One row. bits: of weights and activations, but for what stays at 8."""
    with tempfile.TemporaryDirectory() as folder:
        exported = export(model, x[:2], Path(folder) / "model.onnx", "c")
        assert exported.c is not None
        samples = x[:SAMPLES].numpy()
        found = board.measure(exported.c.folder, "model", samples, exported.c.outputs, flags=("-Os",))
        right_outputs = _expected(exported, x[:SAMPLES])
        right = bit_equal(found.outputs, right_outputs)
        others: dict[str, Any] = {}
        if (*bits, zeros) == (4, 4, 0.0):
            others = _naive(exported, samples, Path(folder) / "naive")
            others |= _emx.row(model, x[:2], samples[:1], right_outputs[:1], Path(folder) / "emx")
        if bits[1] == 4 and name in CONVOLUTIONS:
            others |= _packed(model, x, Path(folder) / "packed")
    figures = exported.c.figures
    return {
        "net": name,
        "bits": "W{}A{}".format(*bits),
        "zeros": zeros,
        "flash": found.flash,
        "true": figures["true_weight_bytes"],
        "channels": figures["channels"],
        "ram": figures["ram_bytes"],
        "bound": figures["ram_bound_bytes"],
        "stack": found.stack,
        "in and out": 4 * (x[0].numel() + exported.c.outputs),
        "instructions": max(found.instructions),
        "a product": round(max(found.instructions) / figures["macs"], 3),
        "bits right": bool(np.all(right)),
        "sums proved": figures["proof"]["sums"],
        "float channels": figures["proof"]["channels_float"],
        "estimated flash": figures["estimate"]["flash"],
        "estimated instructions": figures["estimate"]["instructions"],
        **others,
    }


def _packed(model: nn.Module, x: torch.Tensor, folder: Path) -> dict[str, Any]:
    """RAM, flash and instructions with two activations to a byte, and whether every bit is right then."""
    exported = export(model, x[:2], folder / "model.onnx", "c", pack_activations=True)
    assert exported.c is not None
    found = board.measure(exported.c.folder, "model", x[:SAMPLES].numpy(), exported.c.outputs, flags=("-Os",))
    return {
        "packed ram": exported.c.figures["ram_bytes"],
        "packed flash": found.flash,
        "packed instructions": max(found.instructions),
        "packed right": bool(bit_equal(found.outputs, _expected(exported, x[:SAMPLES])).all()),
    }


def _naive(exported: Exported, samples: NDArray[np.float32], folder: Path) -> dict[str, Any]:
    """Our instructions at -O2, and flash and instructions of C as one writes it first: none of a transformer."""
    assert exported.c is not None
    own = board.measure(exported.c.folder, "model", samples[:1], exported.c.outputs, flags=("-O2",))
    try:
        _naive_c.write(exported.c.decided, "naive", folder)
    except UserError:
        return {"at -O2": own.instructions[0]}
    found = board.measure(folder, "naive", samples[:1], exported.c.outputs, flags=("-O2",))
    return {
        "naive flash": found.flash,
        "naive instructions": found.instructions[0],
        "at -O2": own.instructions[0],
        "naive equal": bool(bit_equal(found.outputs, own.outputs).all()),
    }


def _expected(exported: Exported, x: torch.Tensor) -> NDArray[np.float32]:
    """The reference's outputs; with steps on real values, those of the C on this machine."""
    assert exported.c is not None
    if not exported.c.figures["proof"]["float_steps"]:
        return reference_outputs(exported.reference, [x])
    here = exported.c.run(x.numpy())
    if here is None:
        raise UserError(
            "C with steps on real values is compared with itself on this machine, which needs a C compiler."
        )
    return here[0]


def missed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for every target that a row misses; a trained network's are those of its ``kind``."""
    dense = {(r["net"], r["bits"]): r["instructions"] for r in rows if not r["zeros"]}
    failures = []
    for row in rows:
        where = f"{row['net']} {row['bits']}" + ("" if "kind" in row else f", {row['zeros']:.0%} zeros")
        failures += [f"{where}: {text}" for text in (*_memory(row), *_instructions(row, dense))]
    return failures


def _memory(row: dict[str, Any]) -> list[str]:
    """Targets 1 to 3."""
    kind = row.get("kind", row["net"])
    limit = row["true"] + 6 * row["channels"] + (5000 if kind in DEPTHWISE else 2500)
    found = []
    if not row["bits right"] or not row.get("packed right", True):
        found.append("output bits differ.")
    if kind in SHAPES and kind != "vit_tiny" and row["flash"] > limit:
        found.append(f"{row['flash']} bytes of flash, {limit} allowed.")
    if row["ram"] > row["bound"]:
        found.append(f"{row['ram']} bytes of RAM, the bound is {row['bound']}.")
    if row.get("packed ram", 0) > 0.65 * row["bound"]:
        found.append(f"{row['packed ram']} bytes of RAM packed, {0.65 * row['bound']:.0f} allowed.")
    return found


def _instructions(row: dict[str, Any], dense: dict[tuple[str, str], int]) -> list[str]:
    """Targets 4 and 5."""
    found = []
    if not row["zeros"] and row["a product"] > PER_PRODUCT.get(row["net"], 99.0):
        found.append(f"{row['a product']} instructions a product, {PER_PRODUCT[row['net']]} allowed.")
    share = row["instructions"] / dense.get((row["net"], row["bits"]), row["instructions"])
    if row["zeros"] and row["net"] != "vit_tiny" and share > 0.5:
        found.append(f"{share:.3f} of the dense instructions, 0.5 allowed.")
    return found


def estimates(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How far the cost model is from what was linked and run."""
    flash = [abs(row["estimated flash"] - row["flash"]) for row in rows]
    share = [abs(row["estimated instructions"] / row["instructions"] - 1) for row in rows]
    return {
        "median error of estimated instructions": round(float(np.median(share)), 4),
        "largest error of estimated instructions": round(max(share), 4),
        "median error of estimated flash, bytes": float(np.median(flash)),
        "largest error of estimated flash, share": round(max(f / r["flash"] for f, r in zip(flash, rows)), 4),
    }


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, nargs="+", default=[], help="finished runs' folders: a row more for each")
    parser.add_argument("--page", action="store_true", help="measure nothing: the page from the results that are there")


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(__doc__, argv, _options)
    if options.page:
        _board_page.write(_common.RESULTS / f"{NAME}.json")
        return 0
    if (lacking := board.missing()) is not None:
        print(f"{NAME}: {lacking}; nothing was measured.")
        return 1 if options.check else 0
    names = ("resnet8", "ds_cnn") if options.quick else tuple(SHAPES)
    bits = ((4, 4),) if options.quick else BITS
    rows = [measured(name, *pair, zeros) for name in names for pair in bits for zeros in (0.0, 0.8)]
    ended = [] if options.quick else [trained(_board_runs.finished(net)) for net in _board_runs.RECIPES]
    ended += [trained(folder) for folder in options.run]
    if (problem := _emx.problem()) is not None:
        print(f"emx-onnx-cgen: {problem}; its columns are empty.")
    if ended:
        print(f"{table(ended)}\n")
    said = estimates([*rows, *ended])
    for name, value in said.items():
        print(f"{name}: {value}")
    code = finish(NAME, rows, missed([*rows, *ended]), options, estimates=said, trained=ended, emx=problem)
    if not options.quick:
        _board_page.write(_common.RESULTS / f"{NAME}.json")
    return code


if __name__ == "__main__":
    sys.exit(main())
