"""Two processes run a share of the samples each and know the metrics of all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tiny import under_torchrun
from torch import nn

from flatcompress import tasks
from flatcompress.training.batches import evaluate
from flatcompress.training.loop import make_accelerator

SIZES = [(1, 4), (7, 4), (16, 4), (33, 4), (33, 512)]  # samples, batch


class Drawn:
    """Samples that labels are mostly right about."""

    def __init__(self, n: int) -> None:
        g = torch.Generator().manual_seed(n)
        self.x = torch.randn(n, 1, 4, 4, generator=g)
        self.y = torch.randint(0, 3, (n,), generator=g)

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, index: list[int]):
        return self.x[index], self.y[index]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def work(folder: Path) -> None:
    make_accelerator("cpu")
    model, seen = network(), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    task, found = tasks.build("classification"), []
    for n, batch in SIZES:
        seen.clear()
        found.append((evaluate(model, Drawn(n), task, batch_size=batch, shared=True), list(seen)))
    torch.save(found, folder / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    return under_torchrun(Path(__file__), folder)


@pytest.mark.parametrize("case", range(len(SIZES)))
def test_metrics_are_those_of_all_samples_and_the_work_is_shared(two, case):
    n, batch = SIZES[case]
    alone = evaluate(network(), Drawn(n), tasks.build("classification"), batch_size=batch)
    (first, seen), (second, other) = two[0][case], two[1][case]
    assert first == second == pytest.approx(alone)
    assert len(seen) == len(other)  # a forward may be a meeting of all processes
    assert sum(seen) <= max(1, n / 2 + batch)
