"""Unstructured and N:M masks: which weights, and that they stay exactly zero."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from prune_nets import images, net
from torch import nn

from flatcompress.errors import UserError
from flatcompress.plan import Plan, apply_plan
from flatcompress.prune import WeightSchedule, masks
from flatcompress.prune.srste import SparseRefined

TARGETS = torch.tensor([0, 1, 2])


def backward(model: nn.Module) -> None:
    nn.functional.cross_entropy(model.train()(images()), TARGETS).backward()


def zeros(model: nn.Module) -> dict[str, float]:
    return {n: float((m.weight == 0).float().mean()) for n, m, _ in masks.masked_layers(model)}


@pytest.mark.parametrize("target", [0.0, 0.3, 0.9])
def test_global_masks_reach_their_target_with_the_smallest_weights(target: float) -> None:
    model = net("residual")
    dense = copy.deepcopy(model)
    masks.sparsify(model, target)
    flat = torch.cat([dense.get_submodule(n).weight[~mask].abs() for n, _, mask in masks.masked_layers(model)])
    kept = torch.cat([m.weight[mask].abs() for _, m, mask in masks.masked_layers(model)])
    assert masks.sparsity(model) == pytest.approx(target, abs=1e-3)
    assert not len(flat) or flat.max() <= kept.min()


def test_layer_scope_gives_every_layer_the_same_share() -> None:
    model = net("residual")
    masks.sparsify(model, 0.5, scope="layer")
    assert all(share == pytest.approx(0.5, abs=0.01) for share in zeros(model).values())


@pytest.mark.parametrize("shape", [(4, 8), (3, 8, 3, 3), (2, 8, 5)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_nm_masks_keep_the_best_pattern_of_every_group(shape: tuple[int, ...], n: int, m: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    groups = weight.abs().movedim(1, -1).reshape(-1, m)
    mask = masks.nm_mask(weight, n, m).movedim(1, -1).reshape(-1, m)
    assert bool((mask.sum(1) == n).all())
    patterns = torch.tensor([[i in chosen for i in range(m)] for chosen in itertools.combinations(range(m), n)])
    best = (groups @ patterns.T.float()).max(1).values
    torch.testing.assert_close((groups * mask).sum(1), best)


def test_ties_of_nm_masks_keep_the_earlier_weight() -> None:
    assert masks.nm_mask(torch.ones(1, 8), 2, 4).tolist() == [[True, True, False, False] * 2]


def test_nm_leaves_out_layers_that_cannot_have_it_and_says_why() -> None:
    model = net("grouped")
    found = masks.WeightMasks(model, "2:4")
    assert "3 input channels are no multiple of 4" in found.skipped["conv"]
    assert "depthwise" in found.skipped["depthwise"]
    assert "transposed" in found.skipped["transposed"]
    found.update()
    assert zeros(model) == {"grouped": 0.5, "up": 0.5}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_masked_weights_stay_exactly_zero_through_momentum_and_decay(pattern: str) -> None:
    model = net("residual")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    backward(model)
    optimizer.step()  # momentum that would move the weights again
    masks.sparsify(model, 0.6, pattern)
    before = zeros(model)
    for _ in range(3):
        optimizer.zero_grad()
        backward(model)
        masks.mask_gradients_(model)
        optimizer.step()
        masks.enforce_(model)
    assert zeros(model) == before
    assert all(not m.weight[~mask].any() for _, m, mask in masks.masked_layers(model))


def test_masks_only_grow() -> None:
    model = net("residual")
    found = masks.WeightMasks(model)
    before: dict[str, torch.Tensor] = {}
    for target in (0.2, 0.5, 0.3, 0.8):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        found.update(target)
        now = {name: mask.clone() for name, _, mask in masks.masked_layers(model)}
        assert not any(bool((now[n] & ~before[n]).any()) for n in before)
        before = now
    assert masks.sparsity(model) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:4"])
def test_plan_and_state_dict_bring_the_masks_back(pattern: str) -> None:
    model, fresh = net("residual"), net("residual")
    plan = masks.sparsify(model, 0.5, pattern)
    apply_plan(fresh, Plan.from_json(plan.to_json()))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(images()), model(images()))
    with torch.no_grad():
        fresh.conv2.weight.add_(1.0)
    masks.enforce_(fresh)
    assert torch.equal(fresh.conv2.weight == 0, model.conv2.weight == 0)


def test_plan_of_another_model_is_refused_with_the_first_layer() -> None:
    plan = masks.sparsify(net("plain"), 0.5)
    wide = net("plain")
    wide.conv2 = nn.Conv2d(8, 17, 3)
    with pytest.raises(UserError, match=r"conv2: the plan masks a weight of \[16, 8, 3, 3\]"):
        apply_plan(wide, plan)
    assert not list(masks.masked_layers(wide))
    with pytest.raises(UserError, match=r"conv1: .* Sequential does not have"):
        apply_plan(nn.Sequential(nn.Linear(2, 2)), plan)


def test_ignored_layers_stay_dense() -> None:
    model = net("plain")
    masks.sparsify(model, 0.5, ignore=["fc", "re:conv1"])
    assert set(zeros(model)) == {"conv2"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 1.0}, "below 1"),
        ({"target": None}, "found None"),
        ({"target": 0.5, "pattern": "4:2"}, "sparsity pattern"),
        ({"pattern": "2:5000"}, "no layer of Plain can take 2:5000"),
        ({"target": 0.5, "scope": "local"}, "mask scope"),
        ({"target": 0.5, "ignore": ["conv9"]}, "matches no layer"),
    ],
)
def test_bad_input_is_a_clear_error(options: dict, message: str) -> None:
    model = net("plain")
    with pytest.raises(UserError, match=message):
        masks.sparsify(model, **options)
    assert not list(masks.masked_layers(model))


def test_srste_runs_masked_restores_dense_and_decays_what_is_left_out() -> None:
    model = net("residual")
    dense = copy.deepcopy(model)
    seen = {}
    refined = SparseRefined(model, "2:4", strength=0.5)
    with refined:
        seen = {n: m.weight.detach().clone() for n, m in model.named_modules() if hasattr(m, "weight")}
        backward(model)
    mask = masks.nm_mask(dense.conv2.weight, 2, 4)
    assert torch.equal(seen["conv2"], dense.conv2.weight * mask)
    assert torch.equal(model.conv2.weight, dense.conv2.weight)
    reference = copy.deepcopy(dense)
    with torch.no_grad():
        for name, weight in seen.items():
            reference.get_submodule(name).weight.copy_(weight)
    backward(reference)
    wanted = reference.conv2.weight.grad + 0.5 * (~mask) * dense.conv2.weight
    torch.testing.assert_close(model.conv2.weight.grad, wanted)
    torch.testing.assert_close(model.conv1.weight.grad, reference.conv1.weight.grad)  # 3 inputs: not 2:4


def test_srste_restores_dense_weights_when_the_forward_fails() -> None:
    model = net("plain")
    before = model.conv2.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), SparseRefined(model):
        raise ZeroDivisionError
    assert torch.equal(model.conv2.weight, before)


def test_cubic_schedule_of_weights_holds_between_events_and_resumes() -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, WeightSchedule]:
        model = net("residual")
        schedule = WeightSchedule(masks.WeightMasks(model), 0.8, events=4, every=2)
        return model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), schedule

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: WeightSchedule, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
            schedule.step()
            found.append(masks.sparsity(model))
        return found

    model, optimizer, schedule = start()
    found = run(model, optimizer, schedule, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    found += run(model, optimizer, schedule, 5)
    wanted = [0, 0.4625, 0.4625, 0.7, 0.7, 0.7875, 0.7875, 0.8, 0.8, 0.8]
    assert found == pytest.approx(wanted, abs=1e-3) and schedule.done
    assert all(not m.weight[~mask].any() for _, m, mask in masks.masked_layers(model))

    again, other, resumed = start()
    apply_plan(again, schedule.masks.plan())
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    run(again, other, resumed, 5)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_nm_masks_come_at_once_after_dense_training() -> None:
    model = net("residual")
    schedule = WeightSchedule(masks.WeightMasks(model, "2:4"), every=2)
    assert [schedule.step() for _ in range(4)] == [False, True, False, False]
    assert masks.sparsity(model) == 0.5 and schedule.done


@pytest.mark.parametrize("options", [{"target": 1.0}, {"target": None}, {"target": 0.5, "every": 0}])
def test_impossible_weight_schedules_are_clear_errors(options: dict) -> None:
    with pytest.raises(UserError):
        WeightSchedule(masks.WeightMasks(net("plain")), **options)
