"""Averages, BatchNorm re-estimation, loss terms and guards."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from flat_problem import closure_of, load, problem, same, sgd, values
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flatcompress import flat
from flatcompress.flat.averaging import EMA, SWA, SWAD, update_bn
from flatcompress.flat.methods.terms import MESA, SAF, trust_region

CASES = load("swad-lossvalley.json")["cases"]


def _valley(case):
    """Segment i holds the single weight i."""
    model = nn.Linear(1, 1, bias=False).double()
    swad = SWAD(model, case["n_converge"], case["n_tolerance"], case["tolerance_ratio"])
    for i, loss in enumerate(case["losses"]):
        with torch.no_grad():
            model.weight.fill_(i)
        for _ in range(10):
            swad.update()
        swad.evaluate(loss)
    return swad


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['series']}-{c['n_converge']}-{c['n_tolerance']}")
def test_swad_equals_the_published_loss_valley(case):
    swad = _valley(case)
    assert (swad.converged, swad.dead) == (case["converged"], case["dead"])
    assert swad.threshold == (None if case["threshold"] is None else pytest.approx(case["threshold"]))
    swad.finish()
    assert (swad.start_step, swad.end_step, swad.n_averaged) == (
        case["start_step"],
        case["end_step"],
        case["n_averaged"],
    )
    assert float(swad.weights()["weight"]) == pytest.approx(case["mean_weight"])


def test_swad_resumes_in_any_state():
    case = CASES[0]
    for cut in range(1, len(case["losses"])):
        model = nn.Linear(1, 1, bias=False).double()
        swad = SWAD(model, case["n_converge"], case["n_tolerance"], case["tolerance_ratio"])
        for i, loss in enumerate(case["losses"]):
            if i == cut:
                state = copy.deepcopy(swad.state_dict())
                swad = SWAD(model, case["n_converge"], case["n_tolerance"], case["tolerance_ratio"])
                swad.load_state_dict(state)
            with torch.no_grad():
                model.weight.fill_(i)
            for _ in range(10):
                swad.update()
            swad.evaluate(loss)
        swad.finish()
        assert float(swad.weights()["weight"]) == pytest.approx(case["mean_weight"])
        target = nn.Linear(1, 1, bias=False).double()
        swad.copy_to(target)
        assert float(target.weight.detach()) == pytest.approx(case["mean_weight"])


def test_swa_and_ema_equal_torchs_averages():
    model = problem.build("mlp")
    optimizer = sgd(model)
    ours = [SWA(model), EMA(model, 0.8)]
    theirs = [AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))]
    for t in range(5):
        optimizer.zero_grad()
        closure_of(model, *problem.batch(t))()
        optimizer.step()
        for a, b in zip(ours, theirs):
            a.update()
            b.update_parameters(model)
    for a, b in zip(ours, theirs):
        for (_, x), y in zip(a.weights().items(), b.module.parameters()):
            torch.testing.assert_close(x, y.detach(), rtol=1e-13, atol=1e-15)


def test_warmed_up_ema_of_few_steps_is_not_its_start():
    model = nn.Linear(1, 1, bias=False).double()
    plain, warm = EMA(model, 0.99), EMA(model, 0.99, warm_up=True)
    for t in range(3000):
        nn.init.constant_(model.weight, float(t))
        plain.update()
        warm.update()
        if t == 20:
            assert float(plain.weights()["weight"]) < 3 < 14 < float(warm.weights()["weight"]) < 20
    assert float(warm.weights()["weight"]) == pytest.approx(float(plain.weights()["weight"]), abs=1e-3)


def test_applied_average_leaves_the_model_as_it_was_and_state_resumes():
    model = problem.build("mlp")
    average = SWA(model)
    with pytest.raises(ValueError, match="empty"), average.applied():
        pass
    average.update()
    with torch.no_grad():
        model.fc1.weight.add_(1.0)
    average.update()
    before = values(model)
    with average.applied() as averaged:
        torch.testing.assert_close(averaged.fc1.weight.detach(), before["fc1.weight"] - 0.5)
    assert same(values(model), before)
    other = SWA(model)
    other.load_state_dict(copy.deepcopy(average.state_dict()))
    assert other.count == 2 and same(other.weights(), average.weights())
    with pytest.raises(ValueError, match="other parameters"):
        SWA(nn.Linear(2, 2)).load_state_dict(average.state_dict())


def test_update_bn_estimates_the_mean_over_batches():
    model = problem.build("mlp_bn")
    model.eval()
    batches = [problem.batch(t) for t in range(5)]
    momentum = model.bn1.momentum
    assert update_bn(model, batches) == 5
    assert model.bn1.momentum == momentum and not model.bn1.training
    h = [model.fc1(x) for x, _ in batches]
    torch.testing.assert_close(model.bn1.running_mean, torch.stack([x.mean(0) for x in h]).mean(0).detach())
    torch.testing.assert_close(model.bn1.running_var, torch.stack([x.var(0) for x in h]).mean(0).detach())
    assert update_bn(problem.build("mlp"), batches) == 0


def _kl(old, new, tau):
    p, q = (old / tau).softmax(-1), (new / tau).softmax(-1)
    return float((p * (p.log() - q.log())).sum(-1).mean())


def test_saf_pulls_towards_the_logits_of_some_epochs_ago():
    term = SAF(samples=4, classes=3, lam=0.3, tau=5.0, delay=2, start=0, end=5)
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 4, 3, generator=g)
    for epoch in range(7):
        term.set_epoch(epoch)
        index = torch.tensor([2, 0])
        got = float(term(index, logits[epoch, index]))
        if epoch == 3:
            resumed = SAF(samples=4, classes=3, delay=2, start=0, end=5)
            resumed.load_state_dict(copy.deepcopy(term.state_dict()))
            assert float(resumed(index, logits[epoch, index])) == got
        if 2 <= epoch < 5:
            assert got == pytest.approx(0.3 * 25 * _kl(logits[epoch - 2, index], logits[epoch, index], 5.0), rel=1e-4)
        else:
            assert got == 0.0
        if epoch == 2:  # a sample not seen then has nothing to be pulled to
            assert float(term(torch.tensor([3]), logits[epoch, 3:4])) == 0.0


def test_mesa_pulls_towards_the_average_model_and_moves_nothing():
    model = problem.build("mlp_bn")
    term = MESA(model, lam=0.8, tau=5.0, decay=0.5, start=0, end=9)
    term.set_epoch(1)
    start = copy.deepcopy(model)
    with torch.no_grad():
        model.fc2.weight.add_(0.3)
    x, _ = problem.batch(0)
    before = values(model)
    logits = model(x).detach()
    middle = values(model)
    got = term(x, logits.requires_grad_(True))
    assert same(values(model), middle) and not same(before, middle)
    assert float(got.detach()) == pytest.approx(0.8 * 25 * _kl(start(x), logits, 5.0), rel=1e-9)
    term.update()
    torch.testing.assert_close(term.average.weights()["fc2.weight"], start.fc2.weight.detach() + 0.15)
    term.set_epoch(9)
    assert float(term(x, logits).detach()) == 0.0
    assert float(trust_region(logits, start(x), 2.0).detach()) == pytest.approx(2 * _kl(start(x), logits, 1.0))


def test_coordinate_clip_limits_the_largest_share():
    model = problem.build("mlp")
    optimizer = flat.create("none", model, sgd(model), filters=[flat.guards.coordinate_clip(0.25)])
    optimizer.step(closure_of(model, *problem.batch(0)))
    plain = problem.build("mlp")
    closure_of(plain, *problem.batch(0))()
    for p, q in zip(model.parameters(), plain.parameters()):
        limit = q.grad.abs().flatten().sort().values[q.numel() - int(0.25 * q.numel()) - 1]
        torch.testing.assert_close(p.grad, q.grad.clamp(-limit, limit))
    with pytest.raises(ValueError, match="share"):
        flat.guards.coordinate_clip(1.0)


def test_ghost_radius_of_a_linear_model_and_the_safe_step():
    """J v of a linear model is v itself applied to x; the spread and pi over it can be written down."""
    model = nn.Linear(2, 3, bias=False).double()
    v = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, -4.0]], dtype=torch.float64)
    x = torch.tensor([[1.0, 1.0], [2.0, 0.5]], dtype=torch.float64)
    a = x @ (v / 5.0).T
    spread = float((a.amax(1) - a.amin(1)).max())
    assert flat.guards.ghost_radius(model, (x,), [v]) == pytest.approx(math.pi / spread)
    guard = flat.guards.GhostRadius(model)
    optimizer = flat.create("none", model, torch.optim.SGD(model.parameters(), lr=1e3), safety=guard)
    before = model.weight.detach().clone()
    optimizer.step(closure_of(model, x, torch.tensor([0, 1])))
    moved = float((model.weight.detach() - before).norm())
    assert guard.last_scale < 1 and moved == pytest.approx(guard.last_radius)
    assert optimizer.param_groups[0]["lr"] == 1e3
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.step(closure_of(model, x, torch.tensor([0, 1])))
    assert guard.last_scale == 1.0
    guard.close()
    assert not model._forward_hooks
