"""Two gloo processes against one process that sees the same micro-batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from flat_problem import LIVELY, NAMES, close, halves, on_two, problem, sgd, values
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flatcompress import flat

STEPS = 3
# Each micro-batch of one process draws noise or tensors of its own; two processes draw the same. tram hears one batch.
DRAWS_PER_CHUNK = {"rsam", "lpf_sgd", "bsam", "ggpo"}
# A sum of KL terms over half batches is not that of the whole one.
SEES_ONE_BATCH = {"tram"}
# Several closures of one process are tasks, not parts of a batch.
TASKS = {"fmtl"}
PER_REPLICA = [n for n in NAMES if n not in DRAWS_PER_CHUNK | SEES_ONE_BATCH | TASKS]
SYNCED = [n for n in NAMES if n not in SEES_ONE_BATCH | TASKS]


def _options(name):
    return LIVELY.get(name, {})


def _parallel(rank, name, perturb, compose=None):
    torch.manual_seed(rank)
    model = problem.build("mlp")
    ddp = DistributedDataParallel(model)
    optimizer = flat.create(
        name, ddp, sgd(model), perturb=perturb, compose=compose, max_grad_norm=1.0, **_options(name)
    )
    for t in range(STEPS):
        optimizer.step(halves(ddp, t)[rank])
    return values(model), optimizer


def _reductions(name, perturb):
    """How many messages one step sends."""
    model = problem.build("mlp")
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = flat.create(name, ddp, sgd(model), perturb=perturb)
    sent, real = [], dist.all_reduce
    dist.all_reduce = lambda *a, **k: (sent.append(0), real(*a, **k))[1]
    try:
        optimizer.step(halves(ddp, 0)[dist.get_rank()])
    finally:
        dist.all_reduce = real
    return len(sent)


def _scaled(rank):
    """Rank 1 alone overflows at the second step: both must skip it and keep the same scale."""
    model = problem.build("mlp")
    ddp = DistributedDataParallel(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = flat.create("sam", ddp, sgd(model), scaler=scaler)
    for t in range(STEPS):
        x, y = problem.batch(t)

        def closure(x=x[4 * rank : 4 * rank + 4], y=y[4 * rank : 4 * rank + 4], bad=(rank == 1 and t == 1)):
            loss = problem.loss_fn(ddp(x), y)
            scaler.scale(loss * (float("inf") if bad else 1.0)).backward()
            return loss

        optimizer.step(closure)
    return {"weights": values(model), "scale": scaler.get_scale(), "skipped": optimizer.skipped}


class Lopsided(nn.Module):
    """Each rank uses a branch of its own; one branch is used by nobody."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(4, 3) for _ in range(3)).double()
        self.norm = nn.BatchNorm1d(4).double()

    def forward(self, x, which):
        return self.branches[which](self.norm(x))


def _lopsided(rank):
    torch.manual_seed(0)
    model = Lopsided()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = flat.create("sagm", ddp, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5))
    before = values(model)
    x, y = problem.batch(rank)

    def closure():
        loss = problem.loss_fn(ddp(x, rank), y)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    after = values(model)
    return {"after": after, "idle": torch.equal(before["branches.2.weight"], after["branches.2.weight"])}


def _seen_by_compose(rank):
    seen = []
    _parallel(
        rank,
        "sagm",
        "per_replica",
        compose=lambda params, probes, combined: seen.append([p[0].clone() for p in probes]),
    )
    return seen


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for perturb, names in (("synced", SYNCED), ("per_replica", PER_REPLICA)):
        for name in names:
            weights, optimizer = _parallel(rank, name, perturb)
            state = {k: dict(v) for k, v in optimizer.memory.slots.items()}
            found[perturb, name] = {"weights": weights, "state": state, "passes": optimizer.passes}
    found["messages"] = [
        _reductions("sam", "per_replica"),
        _reductions("sagm", "per_replica"),
        _reductions("sam", "synced"),
    ]
    found["scaled"] = _scaled(rank)
    found["lopsided"] = _lopsided(rank)
    found["compose"] = _seen_by_compose(rank)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Both processes' results, in one launch."""
    folder = tmp_path_factory.mktemp("gloo")
    return on_two("test_processes", folder)


def _alone(name, chunks):
    model = problem.build("mlp")
    optimizer = flat.create(name, model, sgd(model), chunks=chunks, max_grad_norm=1.0, **_options(name))
    for t in range(STEPS):
        optimizer.step(halves(model, t))
    return values(model)


@pytest.mark.parametrize("name", SYNCED)
def test_synced_processes_equal_one_process_with_joint_micro_batches(two, name):
    close(two[0]["synced", name]["weights"], _alone(name, "joint"))


@pytest.mark.parametrize("name", PER_REPLICA)
def test_replicas_equal_one_process_with_independent_micro_batches(two, name):
    close(two[0]["per_replica", name]["weights"], _alone(name, "independent"))


def test_replicas_hold_the_same_bits_weights_and_state(two):
    for key in two[0]:
        if isinstance(key, tuple):
            assert all(torch.equal(two[0][key]["weights"][n], w) for n, w in two[1][key]["weights"].items()), key
            for slot, held in two[0][key]["state"].items():
                assert all(torch.equal(t, two[1][key]["state"][slot][j]) for j, t in held.items()), (key, slot)


def test_replicas_reduce_once_a_step(two):
    assert two[0]["messages"] == [1, 1, 2]


def test_overflow_in_one_process_skips_the_step_in_both(two):
    a, b = two[0]["scaled"], two[1]["scaled"]
    assert a["skipped"] == b["skipped"] == 1 and a["scale"] == b["scale"] == 128.0
    close(a["weights"], b["weights"], 0.0)


def test_parameters_unused_in_one_process_or_all(two):
    a, b = two[0]["lopsided"], two[1]["lopsided"]
    assert a["idle"] and b["idle"]
    close(
        {k: v for k, v in a["after"].items() if "running" not in k},
        {k: v for k, v in b["after"].items() if "running" not in k},
        0.0,
    )


def test_compose_decides_by_the_same_probes_everywhere(two):
    for step_a, step_b in zip(two[0]["compose"], two[1]["compose"]):
        assert len(step_a) == 2
        assert all(torch.equal(x, y) for x, y in zip(step_a, step_b))
