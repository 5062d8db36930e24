"""Files that are wrong on purpose, and whether their certificate says so.

One thing is changed in the file of a network with 4-bit weights: a ResNet-8 trained on scikit-learn's digits, or an
untrained ResNet-18, whose classes lie so near one another that rounding decides some of them. It is a weight by one,
the scale of one channel, of a layer or of a tensor of activations by 1 %, two output channels swapped, or a zero point
off by one, in every layer or tensor of its kind (each third of the ResNet-18's). Judged on 9, 100 and 1,795 samples by
`verify`, with the hash in the certificate adapted to the wrong file. Targets: every file that moves any output by more
than one output step, with optimizations on or off, is refused at every number of samples, and no file without a fault
is.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from sklearn.datasets import load_digits

from benchmarks._common import arguments, finish
from flatcompress import models, quant
from flatcompress.onnx_export import certify, export, verify
from flatcompress.onnx_export.exporting import Exported
from flatcompress.onnx_export.runtime.sessions import run, session
from flatcompress.storage import sha256_file

SAMPLES = (9, 100, 1795)
KINDS = ("weight", "channel scale", "layer scale", "activation scale", "swapped channels", "zero point")
Change = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True)
class Fault:
    """Of one node: ``node`` and ``place`` say which of its inputs is changed, for this node alone."""

    kind: str
    node: int
    place: int
    change: Change

    def plant(self, good: Path, bad: Path) -> None:
        """Write ``good`` with the fault to ``bad``."""
        model = onnx.load(good)
        node = model.graph.node[self.node]
        found = next(t for t in model.graph.initializer if t.name == node.input[self.place])
        wrong = numpy_helper.from_array(self.change(numpy_helper.to_array(found).copy()), "wrong")
        model.graph.initializer.append(wrong)
        node.input[self.place] = "wrong"
        onnx.save(model, bad)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The 1,795 first images of scikit-learn's digits, float32 [N, 1, 8, 8], and labels."""
    found = load_digits()
    count = max(SAMPLES)
    return torch.tensor(found.images[:count] / 16, dtype=torch.float32)[:, None], torch.tensor(found.target[:count])


def trained(epochs: int = 3) -> torch.nn.Module:
    """A ResNet-8 of width 8 at 4 bits, in eval mode."""
    model = models.build("resnet8", num_classes=10, input_shape=(1, 8, 8), seed=0, width=8)
    x, y = digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    return _quantized(model)


def untrained() -> torch.nn.Module:
    """A ResNet-18 of width 8 with 4-bit weights and 8-bit activations, in eval mode."""
    model = models.build("resnet18", num_classes=10, input_shape=(1, 8, 8), seed=0, width=8)
    return _quantized(model, activation_bits=8)


def _quantized(model: torch.nn.Module, activation_bits: int = 4) -> torch.nn.Module:
    x, _ = digits()
    quant.quantize(model, weight_bits=4, activation_bits=activation_bits, first_last_bits=4, example_input=x[:2])
    quant.calibrate(model, [x[:256]])
    return model.eval()


NETWORKS = {"trained": (trained, 1), "untrained": (untrained, 3)}


def faults(path: Path) -> Iterator[Fault]:
    """Every fault of every kind that a file of profile int8 has room for."""
    graph = onnx.load(path).graph
    values = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    for number, node in enumerate(graph.node):
        if node.op_type == "DequantizeLinear":
            for kind, place, change in _of([values.get(name) for name in node.input]):
                yield Fault(kind, number, place, change)


def _of(inputs: Sequence[NDArray[Any] | None]) -> Iterator[tuple[str, int, Change]]:
    stored, scale, zero = [*inputs, None][:3]
    if stored is not None and stored.dtype == np.int8:
        yield "weight", 0, _off_by_one
        yield "swapped channels", 0, lambda w: w[[1, 0, *range(2, len(w))]]
        if scale is not None:
            yield "channel scale", 1, lambda s: np.concatenate([s[:1] * np.float32(1.01), s[1:]])
            yield "layer scale", 1, lambda s: s * np.float32(1.01)
    elif stored is None and scale is not None and scale.size == 1:
        yield "activation scale", 1, lambda s: s * np.float32(1.01)
        if zero is not None:
            yield "zero point", 2, lambda z: np.where(z > 0, z - 1, z + 1).astype(z.dtype)


def _off_by_one(weight: NDArray[np.int8]) -> NDArray[np.int8]:
    """The middle weight one step of its grid further in, which is what a wrong digit in a packed file would do."""
    flat = weight.reshape(-1)
    steps = np.abs(flat[flat != 0]).astype(np.int16)
    step = int(np.gcd.reduce(steps)) if steps.size else 1
    flat[flat.size // 2] -= step if flat[flat.size // 2] > 0 else -step
    return weight


def moved(good: Path, bad: Path, x: NDArray[np.float32], step: float) -> float:
    """How far the fault moves any output, in steps, with optimizations on or off."""
    return max(
        float(np.abs(run(session(good, optimized=on), [x]) - run(session(bad, optimized=on), [x])).max()) / step
        for on in (True, False)
    )


def refused(exported: Exported, bad: Path) -> bool:
    """Whether the certificate of the good file, its hash adapted, is refused for ``bad``, which lies beside it."""
    path = bad.with_name("certificate.json")
    certificate = json.loads(path.read_text())
    certificate["file"] |= {"name": bad.name, "sha256": sha256_file(bad)}
    path.write_text(json.dumps(certificate))
    return not verify(path).holds


def rows(name: str, samples: Sequence[int], folder: Path, every: int = 1) -> tuple[list[dict[str, Any]], list[str]]:
    """A row per kind and number of samples, and what was missed. every: take one fault of so many of a kind."""
    make, fewer = NETWORKS[name]
    x, y = digits()
    exported = export(make(), x[:2], folder / "good.onnx", "int8")
    chosen = [f for kind in KINDS for f in [f for f in faults(exported.path) if f.kind == kind][:: every * fewer]]
    found, missed = [], []
    for count in samples:
        good = certify(exported, [x[:count]], y[:count], latency_runs=0)
        missed += [f"{name}, {count} samples, no fault: {reason}" for reason in good["failures"]]
        slack = good["parity"]["unoptimized"]["roundoff_steps"]
        for kind in KINDS:
            results = [_result(f, exported, x[:count], good["parity"]["step"]) for f in chosen if f.kind == kind]
            told = [r for r in results if r[0] > 1]
            missed += [f"{name}, {count} samples, {kind}: {m:.2f} steps not refused" for m, no in told if not no]
            found.append(
                {
                    "network": name,
                    "samples": count,
                    "fault": kind,
                    "files": len(results),
                    "beyond a step": len(told),
                    "refused": sum(no for _, no in told),
                    "refused within a step": sum(no for m, no in results if m <= 1),
                    "roundoff steps": round(slack, 3),
                }
            )
    return found, missed


def _result(fault: Fault, exported: Exported, x: torch.Tensor, step: float) -> tuple[float, bool]:
    bad = exported.path.with_name("bad.onnx")
    fault.plant(exported.path, bad)
    return moved(exported.path, bad, x.numpy(), step), refused(exported, bad)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(__doc__, argv)
    found, missed = [], []
    for name in NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            samples, every = (SAMPLES[:2], 3) if options.quick else (SAMPLES, 1)
            more, wrong = rows(name, samples, Path(folder), every)
        found, missed = found + more, missed + wrong
    return finish("planted_faults", found, missed, options)


if __name__ == "__main__":
    sys.exit(main())
