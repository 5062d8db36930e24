"""Small networks that between them hold every kind of step, and a way to export them to C."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from torch import nn

from flatcompress import quant
from flatcompress.onnx_export import Exported, export
from flatcompress.onnx_export.c import build
from flatcompress.onnx_export.c.model import bit_equal
from flatcompress.onnx_export.proof import parity
from flatcompress.onnx_export.runtime.sessions import run, session


def block(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """An odd image, odd channels, strides, dilation, groups, two additions, a max pool, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(nn.Conv2d(3, 6, 3, stride=(2, 1), padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.left = block(nn.Conv2d(6, 10, 3, padding=2, dilation=2, groups=2), nn.ReLU())
        self.back = block(nn.Conv2d(10, 6, 1), nn.BatchNorm2d(6))
        self.right = block(nn.Conv2d(6, 7, (1, 3), padding=(0, 1)), nn.BatchNorm2d(7))
        self.also = block(nn.Conv2d(6, 7, 1), nn.BatchNorm2d(7))
        self.relu = nn.ReLU()
        self.fc = nn.Linear(7 * 5 * 6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.stem(x))
        x = self.relu(self.back(self.left(x)) + x)
        x = self.relu(self.right(x) + self.also(x))
        return self.fc(torch.flatten(x, 1))


class Deep(nn.Module):
    """Depthwise layers with strides, dilation and a multiplier, pointwise ones, a global pool."""

    def __init__(self) -> None:
        super().__init__()
        self.body = block(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU6(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU(),
            nn.Conv2d(6, 11, 1), nn.ReLU(), nn.Conv2d(11, 11, 3, stride=2, padding=1, groups=11), nn.BatchNorm2d(11),
            nn.ReLU(), nn.Conv2d(11, 8, 1), nn.Conv2d(8, 16, (3, 5), padding=(2, 2), dilation=(2, 1), groups=8),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class Line(nn.Module):
    """One dimension, and linear layers that end in real values."""

    def __init__(self) -> None:
        super().__init__()
        self.body = block(
            nn.Conv1d(2, 5, 5, stride=2, padding=2), nn.ReLU(), nn.Conv1d(5, 5, 3, padding=1, groups=5), nn.ReLU(),
            nn.MaxPool1d(2), nn.Flatten(), nn.Linear(5 * 5, 9), nn.ReLU(), nn.Linear(9, 3),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class Vectors(nn.Module):
    """Linear layers alone, one of them to fewer features than fit a group of entries."""

    def __init__(self) -> None:
        super().__init__()
        sizes, layers = (44, 30, 3, 30, 44), []
        for first, second in itertools.pairwise(sizes):
            layers += [nn.Linear(first, second), nn.BatchNorm1d(second), nn.ReLU()]
        self.body = block(*layers[:-2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def made(
    model: nn.Module,
    shape: tuple[int, ...],
    weights: int,
    activations: int,
    path: Path,
    seed: int = 0,
    sparsity: float = 0.0,
    pack_activations: bool = False,
) -> Exported:
    """The model quantized and exported to C; inputs and BatchNorms are random, some gammas negative."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5 + 0.5)
        elif sparsity and hasattr(module, "weight"):
            module.weight.data *= torch.rand(module.weight.shape, generator=generator) >= sparsity
    x = torch.randn(16, *shape, generator=generator)
    quant.quantize(model, weight_bits=weights, activation_bits=activations, example_input=x[:2])
    quant.calibrate(model, [x])
    return export(model.eval(), x[:2], path, "c", pack_activations=pack_activations)


def samples(shape: tuple[int, ...], count: int = 40) -> np.ndarray:
    """Normal inputs, large and tiny ones, infinities and NaN."""
    x = np.random.default_rng(1).normal(size=(count, *shape)).astype(np.float32)
    x[1::4] *= np.logspace(-3, 6, len(x[1::4]), dtype=np.float32).reshape(-1, *[1] * len(shape))
    flat = x.reshape(count, -1)
    flat[2, ::3], flat[2, 1::3], flat[3, ::5] = np.inf, -np.inf, np.nan
    return x


def wrong(exported: Exported, x: np.ndarray, flags: tuple[str, ...]) -> list[int]:
    """The samples whose outputs are not onnxruntime's bit for bit, where onnxruntime is exact itself: on a processor
    without VNNI it saturates sums of two 8-bit products, and the torch reference says what is right."""
    assert exported.c is not None
    found = exported.c.run(x, flags)
    assert found is not None
    expected = run(session(exported.path), [x])
    reference = parity.reference_outputs(exported.reference, [torch.from_numpy(x)])
    exact = bit_equal(found[0], reference) & ~bit_equal(expected, reference)
    return np.flatnonzero(~bit_equal(found[0], expected) & ~exact).tolist()


STRICT = (*build.WARNINGS, *build.SANITIZERS, "-O0")  # compiles in a third of the time of -O1
NETS = {
    "residual": (Residual, (3, 17, 12)),
    "deep": (Deep, (3, 9, 8)),
    "line": (Line, (2, 20)),
    "vectors": (Vectors, (44,)),
}
