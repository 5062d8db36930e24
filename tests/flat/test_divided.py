"""Two gloo processes that divide the parameters (FSDP2) against one process that has them whole."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from flat_problem import LIVELY, NAMES, adamw, close, halves, on_two, problem, sgd, values
from torch import nn

from flatcompress import flat, sharded
from flatcompress.errors import UserError
from flatcompress.flat.averaging import EMA
from flatcompress.training import fsdp

STEPS = 4
# tram runs the network with other weights; several closures of one process are tasks to fmtl, not parts of a batch.
MET = [n for n in NAMES if n not in {"tram", "fmtl"}]
BASES = {"sgd": sgd, "adamw": adamw}


def _made(name, base, **options):
    model = problem.build("mlp")
    shell = fsdp.divide(model, least=1)
    optimizer = flat.create(name, model, BASES[base](model), max_grad_norm=1.0, **LIVELY.get(name, {}), **options)
    return model, shell, optimizer


def _trained(rank, name, base):
    """The weights after all steps, and after a resume in the middle from what a checkpoint would have."""
    model, shell, optimizer = _made(name, base)
    for t in range(STEPS):
        if t == STEPS // 2:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            saved = copy.deepcopy(sharded.whole_tree(state))
        optimizer.step(halves(model, t)[rank])
    again, resumed_shell, resumed = _made(name, base)
    sharded.load(again, saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for t in range(STEPS // 2, STEPS):
        resumed.step(halves(again, t)[rank])
    return values(fsdp.gather(model, shell)), values(fsdp.gather(again, resumed_shell))


class Scaled(nn.Module):
    """A network with a scale that every process keeps whole, as a quantizer's, and one without a dimension."""

    def __init__(self):
        super().__init__()
        self.inner = problem.build("mlp")
        self.scale = nn.Parameter(torch.full((1, 3), 2.0, dtype=torch.float64))
        self.shift = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, x):
        return self.inner(x) * self.scale + self.shift


def _scaled(model, closures):
    optimizer = flat.create("sagm", model, sgd(model), chunks="joint")
    for t in range(STEPS):
        optimizer.step(closures(t))


def _kept(rank):
    model = Scaled()
    shell = fsdp.divide(model, [model.scale])
    whole = not sharded.is_sharded(model.scale) and not sharded.is_sharded(model.shift)
    _scaled(model, lambda t: halves(model, t)[rank])
    return whole, values(fsdp.gather(model, shell))


def _refused():
    said = []
    for name, options in (("tram", {}), ("sam", {"scaler": torch.amp.GradScaler("cpu")})):
        try:
            _made(name, "sgd", **options)
        except UserError as error:
            said.append(str(error))
    return said


def _averaged(rank):
    model, shell, optimizer = _made("sam", "sgd")
    average = EMA(model, 0.5)
    for t in range(STEPS):
        optimizer.step(halves(model, t)[rank])
        average.update()
    average.copy_to(model)
    return values(fsdp.gather(model, shell))


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {(name, base): _trained(rank, name, base) for name in MET for base in BASES}
    model, _, _ = _made("sam", "sgd")
    found["parts"] = [(sharded.local(p).numel(), p.numel()) for p in model.parameters()]
    found["kept"], found["refused"], found["averaged"] = _kept(rank), _refused(), _averaged(rank)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Both processes' results, in one launch."""
    folder = tmp_path_factory.mktemp("gloo")
    return on_two("test_divided", folder)


def _alone(name, base):
    model = problem.build("mlp")
    optimizer = flat.create(name, model, BASES[base](model), chunks="joint", max_grad_norm=1.0, **LIVELY.get(name, {}))
    for t in range(STEPS):
        optimizer.step(halves(model, t))
    return values(model)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", MET)
def test_divided_parameters_train_as_whole_ones_and_go_on_from_a_checkpoint(two, name, base):
    straight, resumed = two[0][name, base]
    close(straight, _alone(name, base))
    close(resumed, straight, 1e-12)


def test_every_process_ends_with_the_same_bits(two):
    for key in [key for key in two[0] if isinstance(key, tuple)]:
        for a, b in zip(two[0][key], two[1][key]):
            assert all(torch.equal(a[name], b[name]) for name in a), key


def test_a_process_holds_its_part(two):
    first, second = two[0]["parts"], two[1]["parts"]
    assert all(a + b == total for (a, total), (b, _) in zip(first, second))
    assert sum(a for a, _ in first) < 0.7 * sum(total for _, total in first)


def test_what_stays_whole_is_trained_by_the_mean_gradient(two):
    alone = Scaled()
    _scaled(alone, lambda t: halves(alone, t))
    for whole, weights in (two[0]["kept"], two[1]["kept"]):
        assert whole
        close(weights, values(alone))


def test_averages_are_of_the_whole_weights(two):
    model = problem.build("mlp")
    optimizer = flat.create("sam", model, sgd(model), chunks="joint", max_grad_norm=1.0)
    average = EMA(model, 0.5)
    for t in range(STEPS):
        optimizer.step(halves(model, t))
        average.update()
    average.copy_to(model)
    close(two[0]["averaged"], values(model))


def test_what_cannot_be_exact_is_refused(two):
    tram, scaler = two[0]["refused"]
    assert "runs the model with other weights" in tram and "Give a module as the target" in tram
    assert "fp16" in scaler and "bf16" in scaler
