"""The fixed problem of the reference data, small closures over it, and models that stress the engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from flatcompress import flat

FOLDER = Path(__file__).parent / "reference"
sys.path.insert(0, str(FOLDER))

import problem  # noqa: E402

# What makes each method the base optimizer, bit for bit. gam adds two gradients and bsam has its own update rule.
NULL = {
    "none": {}, "sam": {"rho": 0.0}, "asam": {"rho": 0.0}, "fisher_sam": {"rho": 0.0}, "gsam": {"rho": 0.0},
    "sagm": {"rho": 0.0, "alpha": 0.0}, "wsam": {"rho": 0.0}, "looksam": {"rho": 0.0}, "esam": {"rho": 0.0},
    "friendlysam": {"rho": 0.0}, "rsam": {"rho": 0.0, "sigma": 0.0}, "msam": {"rho": 0.0}, "samon": {"rho": 0.0},
    "ssam": {"rho": 0.0}, "lpf_sgd": {"std": 0.0}, "dpsat": {"rho": 0.0}, "tram": {"scale": 0.0},
    "ggpo": {"sigma": 0.0, "beta": 0.0}, "gnp": {"rho": 0.0}, "stablesam": {"rho": 0.0}, "xsam": {"rho": 0.0},
    "ksam": {"rho": 0.0, "top": 1.0}, "vsam": {"rho": 0.0, "warmup": 2}, "fmtl": {"rho": 0.0},
}  # fmt: skip
NAMES = list(flat.METHODS)
# Small enough to train the tiny problem, and with every branch of the method taken within five steps.
LIVELY = {
    "looksam": {"k": 2}, "ssam": {"every": 2, "mask": "dynamic"}, "tram": {"scale": 50.0}, "bsam": {"num_data": 40},
    "msam": {"rho": 0.1}, "samon": {"layers": "other"}, "lpf_sgd": {"std": 0.05, "samples": 2},
    "ggpo": {"sigma": 0.3, "beta": 1.0}, "xsam": {"every": 2, "points": 3, "ascents": 2},
    "vsam": {"warmup": 1, "window": 2, "blocks": 1, "reuse": 1},
}  # fmt: skip


def sgd(model: nn.Module, lr: float = 0.1, **options: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, **{"momentum": 0.9, "weight_decay": 5e-4, **options})


def adamw(model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)


def closure_of(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[..., Tensor] = problem.loss_fn) -> Callable:
    def closure() -> Tensor:
        value = loss(model(x), y)
        value.backward()
        return value

    return closure


def halves(model: nn.Module, t: int) -> list[Callable]:
    x, y = problem.batch(t)
    return [closure_of(model, x[i : i + 4], y[i : i + 4]) for i in (0, 4)]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def make(name: str, kind: str = "mlp_bn", base: Callable = sgd, **hyper: object):
    model = problem.build(kind)
    return model, flat.create(name, model, base(model), **{**LIVELY.get(name, {}), **hyper})


def train(model: nn.Module, optimizer, steps: range | list[int]) -> None:
    for t in steps:
        optimizer.step(closure_of(model, *problem.batch(t)))


def load(file: str) -> dict:
    return json.loads((FOLDER / file).read_text())


def compare(model: nn.Module, after: dict, rtol: float, atol: float = 1e-9) -> None:
    for key, value in after.items():
        expected = torch.tensor(value, dtype=torch.float64)
        torch.testing.assert_close(
            model.state_dict()[key], expected, rtol=rtol, atol=atol, msg=lambda m, k=key: f"{k}: {m}"
        )


class Stateful(nn.Module):
    """Everything that a second forward may spoil: BatchNorm, InstanceNorm, a custom norm, a counter, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4, momentum=None)
        self.instance = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4, 3)
        self.register_buffer("observed", torch.tensor(-1e9))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        x = self.instance(self.bn(self.conv(x)))
        self.observed = torch.maximum(self.observed, x.detach().max())  # rebinds the buffer instead of writing into it
        self.calls += 1
        return self.head(self.drop(x.relu()).mean(dim=(2, 3)))


def stateful_batch(t: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(t)
    return torch.randn(6, 1, 5, 5, generator=g), torch.randint(0, 3, (6,), generator=g)


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """The same tensors in both, up to ``tolerance``."""
    assert a.keys() == b.keys()
    for key in b:
        torch.testing.assert_close(a[key], b[key], rtol=tolerance, atol=tolerance)


def on_two(module: str, folder: Path) -> list:
    """What two processes that run ``module.work(rank, folder)`` leave there as ``rank.pt``."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    code = f"import sys; from {module} import work; work(int(sys.argv[1]), {str(folder)!r})"
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([sys.executable, "-c", code, str(r)], env=env, stderr=subprocess.PIPE) for r in (0, 1)]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
