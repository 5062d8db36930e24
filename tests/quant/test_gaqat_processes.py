"""GAQAT under two gloo processes: both take the decisions of the reduced gradients, whatever each one's batch says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nets import Net
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flatcompress import flat, quant

STEPS = 8
REMEDIES = ("freeze", "slow", "project")


def _signs(scales: list[nn.Parameter]) -> list[float]:
    return torch.cat([s.grad.flatten().sign() for s in scales if s.grad is not None]).tolist()


def train(rank: int, perturb: str, remedy: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Net()
    model.dropout = nn.Identity()
    generator = torch.Generator().manual_seed(10 + rank)  # every process its own data
    quant.quantize(model, 3, 3, per_channel=False)
    quant.calibrate(model, [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))])
    ddp = DistributedDataParallel(model.train())
    conflict = quant.ScaleConflict(model, K=4, tau=0.5, tau_kind="quantile", remedy=remedy)
    scales = list(quant.scale_parameters(model).values())
    base = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    step = flat.create("sagm", ddp, base, perturb=perturb, compose=conflict.compose, rho=0.05, alpha=1e-3)
    local = []
    for _ in range(STEPS):
        x, y = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(0, 4, (8,), generator=generator)

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            loss = nn.functional.cross_entropy(ddp(x), y)
            loss.backward()
            local.append(_signs(scales))
            return loss

        step.step(closure)
        conflict.after_step()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return {"frozen": conflict.frozen, "timeline": conflict.timeline(), "weights": weights, "local": local}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, __file__, str(rank), str(folder)] for rank in range(2)]
    running = [subprocess.Popen(c, env=env, stderr=subprocess.PIPE, text=True) for c in commands]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("perturb", ["per_replica", "synced"])
@pytest.mark.parametrize("remedy", REMEDIES)
def test_processes_agree_on_what_is_frozen_and_stay_the_same_model(found: list[Any], perturb: str, remedy: str) -> None:
    first, second = (one[f"{perturb}-{remedy}"] for one in found)
    assert first["local"] != second["local"]  # their own gradients disagree in sign
    assert torch.equal(first["frozen"], second["frozen"]) and first["timeline"] == second["timeline"]
    assert bool(first["frozen"].any()) == (remedy != "project")
    assert all(torch.equal(w, second["weights"][name]) for name, w in first["weights"].items())


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {f"{p}-{r}": train(rank, p, r) for p in ("per_replica", "synced") for r in REMEDIES}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
