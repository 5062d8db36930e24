"""The prune stage: every method cuts to the budget, and the plan repeats the cut."""

from __future__ import annotations

import pytest
import torch
from stage_pieces import config, workpiece

from flatcompress.errors import UserError
from flatcompress.plan import apply_plan
from flatcompress.stages import latency_table, prune
from flatcompress.stages.latency_table import LatencyTable
from flatcompress.stages.methods import PRUNE_METHODS
from flatcompress.stages.prune import event_steps, soft_epochs


def outputs(model, x):
    model.eval()
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("method", PRUNE_METHODS)
def test_method_halves_the_channels_and_the_plan_repeats_it(method):
    work = workpiece()
    before = sum(p.numel() for p in work.model.parameters())
    prune.run(work, config("prune", method=method, ratio=0.5, epochs=3))
    assert sum(p.numel() for p in work.model.parameters()) < 0.5 * before
    again = apply_plan(work.build(), work.plan, work.example())
    again.load_state_dict(work.model.state_dict())
    assert torch.equal(outputs(again, work.example()), outputs(work.model, work.example()))


@pytest.mark.parametrize(("key", "value"), [("macs", 0.5), ("params", 0.4), ("bytes", 0.4), ("bytes", "3k")])
def test_budget_is_met(key, value):
    work = workpiece()
    model = work.build()
    costs = prune.prune.CostModel(model, work.example())
    measure = getattr(costs, key)
    dense = measure(costs.dense)
    prune.run(work, config("prune", method="magnitude", epochs=2, **{key: value}))
    after = prune.prune.CostModel(work.model, work.example())
    limit = 3000 if value == "3k" else value * dense
    assert getattr(after, key)(after.dense) <= limit


def test_latency_table_interpolates_what_it_measured_and_keeps_it(tmp_path, monkeypatch):
    work = workpiece()
    cache = tmp_path / "table.json"
    table = LatencyTable(work.model, work.example(), cache)
    dense = table(table.dense)
    assert dense > 0 and dense == pytest.approx(table._whole(work.model, work.example()), rel=1e-6)
    inputs, outputs, grid = table._grids["layer2.0.conv2"]
    width = prune.prune.Width(inputs[1], outputs[2], 1)
    assert table._layer("layer2.0.conv2", width) == grid[1][2] <= grid[-1][-1]
    between = table._layer("layer2.0.conv2", width._replace(outputs=(outputs[2] + outputs[3]) // 2))
    assert min(grid[1][2:4]) <= between <= max(grid[1][2:4])
    monkeypatch.setattr(latency_table, "kernel_ms", None)  # nothing is measured twice
    assert LatencyTable(work.model, work.example(), cache)(table.dense) == dense


def test_latency_budget_is_met_by_the_estimate(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # times as a machine with nothing else to do would find them: in proportion to the work
    monkeypatch.setattr(LatencyTable, "_ms", lambda self, shape, inputs, outputs: 1e-5 * inputs * outputs)
    monkeypatch.setattr(latency_table, "int8_ms", lambda model, example: 0.2)
    work = workpiece()
    table = LatencyTable(work.model, work.example())
    removal = prune.Removal(work, config("prune", latency=0.8), PRUNE_METHODS["magnitude"].make())
    keep = removal.choose(removal.budget)
    assert table(removal.costs.widths(removal.groups, keep)) <= 0.8 * table(table.dense) * 1.0001
    with pytest.raises(UserError, match="smallest that can"):
        prune.rehearse(work.build(), work.example(), config("prune", latency_ms=1e-9))


def test_events_end_before_step_3_and_never_repeat():
    c = config("prune", epochs=5, schedule_steps=6)
    steps = event_steps(c, 10)
    assert steps == sorted(set(steps))
    assert steps[0] > 0 and steps[-1] <= soft_epochs(c) * 10 < 50


def test_removed_channels_have_no_gradient_and_no_weight_while_training():
    work = workpiece()
    seen = []
    removal = prune.Removal(work, config("prune", method="sam"), PRUNE_METHODS["sam"].make())
    removal.mask.remove_(removal.choose(removal.budget))
    x, y = work.data.train.__getitems__(list(range(16)))
    torch.nn.functional.cross_entropy(work.model(x), y).backward()
    removal.mask.mask_gradients_()
    for group, keep in zip(removal.groups, removal.mask.keep, strict=True):
        for member in group.outs:
            weight = member.module.weight
            dropped = ~keep[member.owner] if (member.owner >= 0).all() else ~member.spread(keep, True)
            seen.append(int(dropped.sum()))
            assert not weight.grad[dropped].any()
            assert not weight[dropped].any()
    assert sum(seen) > 0


@pytest.mark.parametrize("method", ["masksparsity", "growing_reg"])
def test_pull_chooses_once_and_what_it_chose_is_what_goes(method):
    work = workpiece()
    removal = prune.Removal(work, config("prune", method=method), PRUNE_METHODS[method].make())
    pull = removal.start_pull(PRUNE_METHODS[method].make(), start=1)
    params = list(work.model.parameters())
    grads = [torch.zeros_like(p) for p in params]
    pull.compose(params, [grads], grads)
    assert pull.keep is None and not any(g.any() for g in grads)
    pull.compose(params, [grads], grads)
    chosen = [k.clone() for k in pull.keep]
    assert any(g.any() for g in grads)
    with torch.no_grad():
        for p in params:
            p.mul_(torch.rand(p.shape, generator=torch.Generator().manual_seed(1)))
    removal.after_step(5, [5])
    assert all(torch.equal(a, b) for a, b in zip(chosen, removal.mask.keep, strict=True))


def test_removal_state_round_trip():
    work = workpiece()
    method = PRUNE_METHODS["growing_reg"].make()
    removal = prune.Removal(work, config("prune", method="growing_reg"), method)
    removal.start_pull(method, start=0).compose(
        list(work.model.parameters()), [], [torch.zeros_like(p) for p in work.model.parameters()]
    )
    removal.after_step(1, [1, 2])
    other = prune.Removal(workpiece(), config("prune", method="growing_reg"), method)
    other.start_pull(method, start=0)
    other.load_state_dict(removal.state_dict())
    assert other.event == 1 and other.pull.steps == 1
    assert all(torch.equal(a, b) for a, b in zip(other.mask.keep, removal.mask.keep, strict=True))
