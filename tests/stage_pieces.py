"""A run small enough to train in a second: four classes of coloured 8x8 squares, 64 training images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress import models
from flatcompress.data import DataBundle
from flatcompress.plan import Plan
from flatcompress.stages import RunContext, stage_of
from flatcompress.training.devices import seed_everything
from flatcompress.training.loop import make_accelerator

SHAPE = (3, 8, 8)


class Squares:
    """``n`` noisy images [3, 8, 8]; the class is the quarter that is bright."""

    def __init__(self, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.y = torch.arange(n) % 4
        self.x = 0.5 * torch.randn(n, *SHAPE, generator=generator)
        for i, label in enumerate(self.y.tolist()):
            row, column = 4 * (label // 2), 4 * (label % 2)
            self.x[i, :, row : row + 4, column : column + 4] += 1.5

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.x[indices], self.y[indices]


class SoftmaxOverChannels(nn.Module):
    """What profile c has no form for, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(SHAPE[0], 4, 3, padding=1), nn.Softmax(1)
        self.fc = nn.Linear(4 * SHAPE[1] * SHAPE[2], 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.after(self.conv(x)).flatten(1))


def bundle() -> DataBundle:
    train, val, test = (Squares(n, seed) for n, seed in ((64, 0), (32, 1), (32, 2)))
    return DataBundle("squares", ("a", "b", "c", "d"), SHAPE, (0.0,) * 3, (1.0,) * 3, train, val, test, Squares(32, 3))


def context(build: Callable[[], nn.Module] | None = None, **options: Any) -> RunContext:
    def resnet() -> nn.Module:
        return models.build("resnet8", num_classes=4, input_shape=SHAPE, seed=0, width=8)

    seed_everything(0)
    build = build or resnet
    defaults: dict[str, Any] = {"batch_size": 16, "seed": 0, **options}
    return RunContext(build(), Plan(), bundle(), build, make_accelerator("cpu"), **defaults)


def config(kind: str, **keys: Any) -> Any:
    return stage_of(kind).config.model_validate({"epochs": 2, "optimizer": {"lr": 1e-3}, **keys})


class StopAt:
    """A progress that is asked to stop after ``step`` and keeps what is saved then."""

    on_divergence, on_out_of_memory, max_rollbacks = "stop", "stop", 0

    def __init__(self, step: int) -> None:
        self.step, self.stop_requested, self.state = step, False, None

    def due(self, step: int) -> bool:
        self.stop_requested = step >= self.step
        return self.stop_requested

    def save(self, step: int, state: dict) -> None:
        self.state = copy.deepcopy(state)
