"""Pruning during training: schedules, events, holding at zero, resuming in the middle."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from prune_nets import images, net
from torch import nn

from flatcompress.errors import UserError
from flatcompress.prune import SCHEDULES, Budget, ChannelSchedule, CostModel, Limits, SoftMask, find_groups
from flatcompress.prune.radius import unit_radius
from flatcompress.prune.schedule import left_after

TARGETS = torch.tensor([0, 1, 2])
FINE = Limits(round_to=1, floor=0.05)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: ChannelSchedule, steps: int) -> list[bool]:
    events = []
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(images()), TARGETS).backward()
        schedule.observe()
        optimizer.step()
        events.append(schedule.step())
    return events


def start(name: str = "residual", **options) -> tuple[nn.Module, torch.optim.Optimizer, ChannelSchedule]:
    model = net(name)
    schedule = ChannelSchedule(model, images(), limits=FINE, **{"events": 3, "every": 2, **options})
    return model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01), schedule


def test_exponential_schedule() -> None:
    found = [round(left_after("exponential", 100, 20, r, 4), 3) for r in range(5)]
    assert found == [100, 66.874, 44.721, 29.907, 20]


def test_cubic_schedule() -> None:
    found = [round(1 - left_after("cubic", 1, 0.2, r, 4), 4) for r in range(5)]
    assert found == [0, 0.4625, 0.7, 0.7875, 0.8]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_schedule_starts_dense_ends_at_the_target_and_never_grows(kind: str) -> None:
    left = [left_after(kind, 1.0, 0.3, r, 5) for r in range(7)]
    assert left[0] == 1 and left[5] == pytest.approx(0.3) and left[6] == left[5]
    assert all(later <= earlier for earlier, later in itertools.pairwise(left))


def test_events_come_on_time_and_end_at_the_budget() -> None:
    model, optimizer, schedule = start(budget=Budget("ratio", 0.5))
    assert train(model, optimizer, schedule, 8) == [False, True, False, True, False, True, False, False]
    kept, total = schedule.mask.channels
    assert schedule.done and total == 36 and kept == 18


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("budget", [Budget("ratio", 0.5), Budget("macs", 0.4), Budget("params", 0.4, knapsack=True)])
def test_removed_channels_never_come_back(kind: str, budget: Budget) -> None:
    model, optimizer, schedule = start(budget=budget, kind=kind, every=1)
    before = schedule.mask.keep
    for _ in range(3):
        train(model, optimizer, schedule, 1)
        now = schedule.mask.keep
        assert not any(bool((n & ~b).any()) for n, b in zip(now, before, strict=True))
        before = now
    assert schedule.mask.channels[0] < schedule.mask.channels[1]


def test_events_may_be_the_very_steps() -> None:
    model, optimizer, schedule = start(events=[2, 3, 7])
    assert train(model, optimizer, schedule, 8) == [False, True, True, False, False, False, True, False]
    assert schedule.done and schedule.events == 3


def test_what_is_gone_is_not_in_the_scores_of_what_is_left() -> None:
    _, _, calm = start(every=1)
    moved_model, _, moved = start(every=1)
    for schedule in (calm, moved):
        schedule.step()
    with torch.no_grad():  # as momentum would move them before the next event
        for group, keep in zip(moved.groups, moved.mask.keep, strict=True):
            for member in (m for m in group.members if m.axis == "out"):
                moved_model.get_submodule(member.name).weight[~member.spread(keep, True)] = 100.0
    for schedule in (calm, moved):
        schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(calm.mask.keep, moved.mask.keep, strict=True))


def test_radius_follows_the_averaged_scores_and_survives_an_event() -> None:
    model, optimizer, schedule = start(importance="taylor", every=2)
    params = list(model.parameters())
    assert {float(r.max()) for r in schedule.radius(params, 0.0, 2.0) if isinstance(r, torch.Tensor)} == {1.0}
    train(model, optimizer, schedule, 1)
    before = schedule.radius(params, 0.0, 2.0)
    scores = schedule.scores()
    wanted = unit_radius(scores[0], 0.0, 2.0)
    index = next(i for i, p in enumerate(params) if p is schedule.groups[0].outs[0].module.weight)
    torch.testing.assert_close(before[index].flatten(), wanted)
    train(model, optimizer, schedule, 1)
    assert schedule.event == 1 and schedule.state_dict()["running"]["count"] == 0
    after = schedule.radius(params, 0.0, 2.0)[index].flatten()
    assert after.max() == 2.0 and not after[~schedule.mask.keep[0]].any()


def test_budget_of_macs_is_met_by_the_cut_model() -> None:
    model, optimizer, schedule = start(budget=Budget("macs", 0.4))
    dense = CostModel(model, images())
    train(model, optimizer, schedule, 6)
    schedule.shrink()
    small = CostModel(model, images())
    assert small.macs(small.dense) <= 0.4 * dense.macs(dense.dense)


def test_gradient_scores_are_averaged_between_events_and_then_forgotten() -> None:
    model, optimizer, schedule = start(importance="taylor", every=3)
    train(model, optimizer, schedule, 2)
    assert schedule.state_dict()["running"]["count"] == 2
    train(model, optimizer, schedule, 1)
    assert schedule.event == 1 and schedule.state_dict()["running"]["count"] == 0


@pytest.mark.parametrize("importance", ["group_l2", "taylor"])
@pytest.mark.parametrize("cut_after", [1, 3, 4])
def test_resume_in_the_middle_of_the_phase_ends_in_the_same_bits(importance: str, cut_after: int) -> None:
    model, optimizer, schedule = start(importance=importance)
    train(model, optimizer, schedule, cut_after)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    train(model, optimizer, schedule, 7 - cut_after)

    again, other, resumed = start(importance=importance)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    train(again, other, resumed, 7 - cut_after)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert all(torch.equal(a, b) for a, b in zip(schedule.mask.keep, resumed.mask.keep, strict=True))


def test_mask_of_another_model_is_refused() -> None:
    mask = SoftMask(find_groups(net("plain"), images()))
    with pytest.raises(UserError, match="conv1"):
        SoftMask(find_groups(net("residual"), images())).load_state_dict({"conv1": torch.ones(3)})
    assert set(mask.state_dict()) == {"conv1", "conv2"}


def test_shrink_before_the_last_event_still_meets_the_budget() -> None:
    model, optimizer, schedule = start(budget=Budget("ratio", 0.5))
    train(model, optimizer, schedule, 2)
    data = schedule.shrink().of_kind("channels")[0]
    assert data["kept_channels"] == 18


def test_cut_model_equals_the_masked_one_after_the_phase() -> None:
    model, optimizer, schedule = start()
    train(model, optimizer, schedule, 7)
    masked = copy.deepcopy(model).eval()
    schedule.shrink()
    assert float((masked(images()) - model.eval()(images())).detach().abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": Budget("macs", 1e-4)}, "smallest that can"),
        ({"budget": Budget("ratio", 0.999)}, "at most"),
        ({"budget": Budget("params", 1.0)}, "nothing was pruned"),
        ({"kind": "exponental"}, "Did you mean 'exponential'"),
        ({"importance": "l2"}, "unknown importance"),
        ({"events": 0}, "at least one"),
        ({"events": []}, "at least one"),
        ({"every": 0}, "at least 1 step"),
    ],
)
def test_what_cannot_work_is_refused_before_training(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        start(**options)
