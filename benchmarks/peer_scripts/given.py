"""What every user has before a library comes in, the same for all and not counted: data, network, a clock.

Needs torch, numpy and safetensors alone, so that it runs in every peer's environment.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flatcompress import models

MODEL = {"name": "resnet8", "stem_stride": 2}
BATCH = 64

Arguments = Callable[[argparse.ArgumentParser], object]


@dataclass
class Given:
    """``model``: the float network with the starting weights; ``train``: shuffled batches; ``val``: images, labels.

    ``epochs`` is the whole budget; ``options`` holds the flags of the script's own; ``out`` is a folder to write to.
    """

    model: nn.Module
    train: DataLoader[Any]
    train_set: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    epochs: int
    seed: int
    out: Path
    data: Path
    options: argparse.Namespace

    @property
    def example(self) -> Tensor:
        """One image, as a batch."""
        return self.val[0][:1]

    @property
    def onnx(self) -> str:
        """The file to write."""
        return str(self.out / "model.onnx")


def network(classes: int, shape: tuple[int, ...], seed: int) -> nn.Module:
    """The float network, weights as initialised."""
    options = {k: v for k, v in MODEL.items() if k != "name"}
    return models.build(str(MODEL["name"]), num_classes=classes, input_shape=shape, seed=seed, **options)


def fresh(given: Given) -> nn.Module:
    """The network before any training."""
    return network(int(given.train_set[1].max()) + 1, tuple(given.example.shape[1:]), given.seed)


@torch.no_grad()
def accuracy(model: nn.Module, given: Given) -> float:
    """Share of the validation images that the model gets right."""
    model.eval()
    x, y = given.val
    return (model(x).argmax(1) == y).float().mean().item()


def run(work: Callable[[Given], None], arguments: Arguments = lambda parser: None) -> None:
    """Read the flags, prepare everything, call ``work`` on the clock, write ``made.json``.

    Seconds are CPU seconds of ``work`` on one thread: others who use the machine do not lengthen them.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    given = prepare(options)
    start = time.process_time()
    work(given)
    seconds = time.process_time() - start
    (given.out / "made.json").write_text(json.dumps({"seconds": seconds, "torch": torch.__version__}) + "\n")


def prepare(options: argparse.Namespace) -> Given:
    """Data and network from the folder that the driver wrote."""
    from safetensors.torch import load_file

    train, val = pair(options.data / "train.npz"), pair(options.data / "val.npz")
    shuffled = torch.Generator().manual_seed(options.seed)
    batches = DataLoader(TensorDataset(*train), BATCH, shuffle=True, drop_last=True, generator=shuffled)
    model = network(int(train[1].max()) + 1, tuple(train[0].shape[1:]), options.seed)
    start = options.data / "start.safetensors"
    if start.exists():
        model.load_state_dict(load_file(start))
    options.out.mkdir(parents=True, exist_ok=True)
    return Given(model, batches, train, val, options.epochs, options.seed, options.out, options.data, options)


def pair(path: Path) -> tuple[Tensor, Tensor]:
    """Images and labels of a file."""
    with np.load(path) as held:
        return torch.from_numpy(held["x"]), torch.from_numpy(held["y"])
