"""Scores: hand-computed cases, and the properties that hold for every entry of the registry."""

from __future__ import annotations

import pytest
import torch
from prune_nets import images, net
from torch import nn

from flatcompress.errors import UserError
from flatcompress.prune import IMPORTANCES, NEEDS_GRADIENTS, RunningScore, find_groups, score
from flatcompress.prune.importance import raw_scores
from flatcompress.prune.oneshot import observe


def two_layers() -> nn.Sequential:
    """Linear(2, 3), BatchNorm, Linear(3, 1) with weights that can be summed by hand."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 1, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]]))
        model[1].weight.copy_(torch.tensor([2.0, 0.0, 1.0]))
        model[1].bias.copy_(torch.tensor([0.5, 0.0, -1.0]))
        model[2].weight.copy_(torch.tensor([[1.0, 0.0, 4.0]]))
    return model


def groups_of(model: nn.Module) -> list:
    return find_groups(model, torch.ones(2, 2))


def set_gradients(model: nn.Sequential) -> None:
    model[0].weight.grad = torch.tensor([[1.0, -1.0], [1.0, 1.0], [2.0, 5.0]])
    model[1].weight.grad = torch.tensor([0.5, 1.0, -1.0])
    model[1].bias.grad = torch.tensor([2.0, 1.0, 1.0])
    model[2].weight.grad = torch.tensor([[3.0, 1.0, 0.5]])


@pytest.mark.parametrize(
    ("importance", "expected"),
    [
        ("group_l2", [(5 + 4 + 1) / 3, 0.0, (9 + 1 + 16) / 3]),
        ("bn_scale", [2.0, 0.0, 1.0]),
        # g*w summed per member: rows -1, 0, 6; norm 1 + 1, 0, -1 - 1; columns 3, 0, 2
        ("taylor", [(1 + 4 + 9) / 3, 0.0, (36 + 4 + 4) / 3]),
        ("taylor_abs", [(3 + 2 + 3) / 3, 0.0, (6 + 2 + 2) / 3]),
        ("bn_taylor", [2.0, 0.0, 2.0]),
        # w^2 g^2 per member: rows 1 + 4, 0, 36; norm 1 + 1, 0, 1 + 1; columns 9, 0, 4
        ("hessian", [(5 + 2 + 9) / 3, 0.0, (36 + 2 + 4) / 3]),
        # distances between rows: |r0-r1| = sqrt 5, |r0-r2| = sqrt 8, |r1-r2| = 3
        ("fpgm", [5**0.5 + 8**0.5, 5**0.5 + 3, 8**0.5 + 3]),
        ("lamp", [10 / 36, 0.0, 1.0]),
    ],
)
def test_hand_computed_scores(importance: str, expected: list[float]) -> None:
    model = two_layers()
    set_gradients(model)
    found = raw_scores(groups_of(model), importance)[0]
    wanted = torch.tensor(expected)
    if importance == "fpgm":  # divided by its layer's mean
        wanted = wanted / wanted.mean()
    torch.testing.assert_close(found, wanted)


def test_scores_are_divided_by_the_mean_of_their_group() -> None:
    found = score(groups_of(two_layers()))[0]
    torch.testing.assert_close(found.mean(), torch.tensor(1.0))
    torch.testing.assert_close(score(groups_of(two_layers()), normalize="max")[0].max(), torch.tensor(1.0))


@pytest.mark.parametrize("importance", sorted(set(IMPORTANCES) - NEEDS_GRADIENTS - {"random"}))
def test_factor_per_layer_changes_no_normalised_score(importance: str) -> None:
    model = net("plain")
    groups = find_groups(model, images())
    before = score(groups, importance)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    for one, other in zip(before, score(groups, importance), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("importance", sorted(IMPORTANCES))
def test_every_importance_scores_every_unit_and_is_repeatable(importance: str) -> None:
    model, x = net("residual"), images()
    nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2])).backward()
    groups = [g for g in find_groups(model, x) if any("bn" in m.name for m in g.members)]
    first, second = score(groups, importance), score(groups, importance)
    for group, one, other in zip(groups, first, second, strict=True):
        assert one.shape == (group.units,) and bool(one.isfinite().all()) and bool((one >= 0).all())
        assert torch.equal(one, other)


def test_random_scores_follow_their_seed() -> None:
    groups = find_groups(net("plain"), images())
    assert not torch.equal(score(groups, "random", seed=1)[0], score(groups, "random", seed=2)[0])
    assert not torch.equal(score(groups, "random")[0], score(groups, "random")[1][:8])


def test_duplicate_filters_are_the_most_redundant_and_a_zero_filter_is_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(0)))
        middle = model[0].weight[2:].mean(0)
        model[0].weight[0] = middle
        model[0].weight[1] = middle
    groups = find_groups(model, images())
    assert set(score(groups, "fpgm")[0].argsort()[:2].tolist()) == {0, 1}
    with torch.no_grad():
        model[0].weight[5] = 0
        model[0].weight[:5] += 3
        model[2].weight[:, 5] = 0
    assert score(groups, "group_l2")[0][5] == 0
    assert score(groups, "fpgm")[0].argmax() == 5


def test_coupled_layers_share_one_score() -> None:
    model = net("residual")
    groups = find_groups(model, images())
    index = next(i for i, g in enumerate(groups) if g.name == "conv1")
    before = score(groups, normalize="none")[index]
    with torch.no_grad():
        model.back.weight[3].add_(1.0)  # the other branch of the sum
    after = score(groups, normalize="none")[index]
    assert after[3] > before[3] and torch.equal(after[:3], before[:3])


def test_grouped_convolution_scores_its_own_input_columns() -> None:
    model = net("grouped")
    groups = find_groups(model, images())
    index = next(i for i, g in enumerate(groups) if g.name == "conv")
    before = score(groups, normalize="none")[index]
    with torch.no_grad():
        model.grouped.weight[:, 2] = 10.0  # column 2 of every block is unit 2
    changed = score(groups, normalize="none")[index] > before
    assert changed.tolist() == [False, False, True, False]


def test_largest_lamp_score_of_every_group_is_one() -> None:
    for scores in score(find_groups(net("residual"), images()), "lamp"):
        assert scores.max() == 1 and bool((scores > 0).all())


@pytest.mark.parametrize("importance", sorted(NEEDS_GRADIENTS))
def test_missing_gradients_are_a_clear_error(importance: str) -> None:
    with pytest.raises(UserError, match="gradients"):
        score(find_groups(net("plain"), images()), importance)


def test_missing_norm_and_unknown_names_are_clear_errors() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1))
    groups = find_groups(model, images())
    with pytest.raises(UserError, match="no BatchNorm"):
        score(groups, "bn_scale")
    with pytest.raises(UserError, match="Did you mean 'taylor'"):
        score(groups, "tailor")
    with pytest.raises(UserError, match="normalizer"):
        score(groups, normalize="median")


def test_running_score_is_the_mean_and_skips_broken_iterations() -> None:
    model = two_layers()
    groups = groups_of(model)
    running = RunningScore(groups, "bn_taylor")
    set_gradients(model)
    assert running.update()
    model[1].weight.grad = torch.tensor([float("nan"), 1.0, 1.0])
    assert not running.update()
    model[1].weight.grad = torch.tensor([2.5, 1.0, -3.0])
    assert running.update()
    # |2 * 0.5 + 0.5 * 2| = 2, then |2 * 2.5 + 0.5 * 2| = 6; |-1 - 1| = 2, then |-3 - 1| = 4
    torch.testing.assert_close(running.scores("none")[0], torch.tensor([4.0, 0.0, 3.0]))
    again = RunningScore(groups, "bn_taylor")
    again.load_state_dict(running.state_dict())
    assert torch.equal(again.scores()[0], running.scores()[0]) and again.skipped == 1
    running.reset()
    with pytest.raises(UserError, match="no finite gradients"):
        running.scores()


def test_hessian_diagonal_uses_every_sample() -> None:
    model, x = net("plain"), images(batch=4)
    y = torch.tensor([0, 1, 2, 3])
    groups = find_groups(model, x)
    running = RunningScore(groups, "hessian")
    observe(model, running, [(x, y)], nn.functional.cross_entropy, per_sample=True)
    squares = torch.zeros_like(model.conv1.weight)
    for i in range(4):
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), model.conv1.weight)
        squares += g.square() / 4
    own = (model.conv1.weight.square() * squares).sum((1, 2, 3))
    member = next(g for g in groups if g.name == "conv1").members[0]
    assert member.name == "conv1" and running.count == 4
    others = running.scores("none")[0] * 3 - own  # bn1 and conv2 add what is left of the mean over three members
    assert bool((others > 0).all())
    assert all(p.grad is None for p in model.parameters())
