"""Trained float networks with images to calibrate on and a test set, for `post_training` and `targets`.

Weights that were trained here are kept in ``benchmarks/results/networks.partial/``, so that a run that was stopped
does not train again; remove the folder to train anew.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks._common import RESULTS
from flatcompress import data, flat, models
from flatcompress.graph import install, trace

KEPT = RESULTS / "networks.partial"
CALIBRATION = 128
OPTIONS: dict[str, dict[str, Any]] = {
    "resnet18": {"width": 16}, "resnet50": {"width": 8}, "mobilenet_v2": {"width": 0.35},
}  # fmt: skip


@dataclass
class Case:
    """A trained float network, images to calibrate on, and a test set."""

    name: str
    model: nn.Module
    pool: Tensor
    test: tuple[Tensor, Tensor]
    logits: Tensor

    def draw(self, index: int) -> Tensor:
        """The calibration images of one draw."""
        order = torch.randperm(len(self.pool), generator=torch.Generator().manual_seed(index))
        return self.pool[order[:CALIBRATION]]

    def first(self, count: int) -> Case:
        """The same with the first ``count`` test images."""
        return replace(self, test=(self.test[0][:count], self.test[1][:count]), logits=self.logits[:count])

    def score(self, logits: Tensor) -> dict[str, float]:
        """Accuracy and agreement with the float network, in percent."""
        guess = logits.argmax(1)
        return {"accuracy": 100 * float((guess == self.test[1]).float().mean()),
                "agree": 100 * float((guess == self.logits.argmax(1)).float().mean())}  # fmt: skip


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """Logits of all of ``x``."""
    return torch.cat([model(batch) for batch in x.split(64)])


def case(name: str, model: nn.Module, pool: Tensor, test: tuple[Tensor, Tensor]) -> Case:
    """The network's graph is taken once, so that its copies need not be traced again."""
    model = install(model.eval(), trace(model, pool[:2]))
    return Case(name, model, pool, test, outputs(model, test[0]))


@cache
def lite0(quick: bool) -> Case:
    """EfficientNet-Lite0 on crops of photographs. ImportError where its packages are not installed."""
    from benchmarks import _lite0
    from benchmarks._photographs import NAMES, crops

    count = 20 if quick else 40
    kept = KEPT / f"lite0-{count}.safetensors"
    images, labels = crops("train", count)
    if kept.exists():
        model = _lite0.lite0(len(NAMES))
        model.load_state_dict(load_file(kept))
    else:
        model = _lite0.with_head(images, labels, len(NAMES))
        KEPT.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), kept)
    return case("efficientnet-lite0", model, images, crops("test", 10 if quick else 100))


@cache
def digits() -> tuple[Any, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The bundle, its training and its test images."""
    bundle = data.load("rotated-digits", held_out="75", seed=0)
    return bundle, *(split.__getitems__(list(range(len(split)))) for split in (bundle.train, bundle.test))


@cache
def trained(name: str, method: str = "none", seed: int = 0, epochs: int = 2, images: int | None = None) -> Case:
    """A built-in network trained on rotated digits with a flat method (``none``: plainly), or as it was kept.

    ``images``: the first ones alone.
    """
    bundle, (x, y), test = digits()
    model = models.build(name, num_classes=len(bundle.classes), input_shape=bundle.input_shape, seed=seed,
                         **OPTIONS.get(name, {}))  # fmt: skip
    kept = KEPT / f"{name}-{method}-{seed}-{epochs}{f'-{images}' if images else ''}.safetensors"
    if kept.exists():
        model.load_state_dict(load_file(kept))
    else:
        _train(model, method, seed, epochs, x[:images], y[:images])
        KEPT.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), kept)
    return case(name, model, x, test)


def _train(model: nn.Module, method: str, seed: int, epochs: int, x: Tensor, y: Tensor) -> None:
    torch.manual_seed(seed)
    base = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(base, 4e-3, total_steps=epochs * -(-len(x) // 64))
    step = flat.create(method, model, base, **({"rho": 0.05} if method == "sam" else {}))
    model.train()
    for _ in range(epochs):
        for picked in torch.randperm(len(x)).split(64):

            def closure(picked: Tensor = picked) -> Tensor:
                loss = nn.functional.cross_entropy(model(x[picked]), y[picked])
                loss.backward()
                return loss

            base.zero_grad()
            step.step(closure)
            schedule.step()
