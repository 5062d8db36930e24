"""AdaSAP's radius, arXiv 2306.14306 eq. 2."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prune_nets import images, net

from flatcompress.errors import UserError
from flatcompress.prune import adaptive_radius, find_groups, relative_sizes, score
from flatcompress.prune.radius import group_radius, unit_radius

SCORES = torch.tensor([1.0, 2.0, 4.0, 5.0])


def test_published_example() -> None:
    torch.testing.assert_close(unit_radius(SCORES, 0.01, 2.0), torch.tensor([2.0, 1.5025, 0.5075, 0.01]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=20), st.integers(1, 50), st.integers(-50, 50))
def test_affine_scores_give_the_same_radius_and_order_is_reversed(values: list[int], a: int, b: int) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    radius = unit_radius(scores, 0.01, 2.0)
    torch.testing.assert_close(unit_radius(a * scores + b, 0.01, 2.0), radius)
    order = scores.argsort()
    assert bool((radius[order].diff() <= 1e-12).all())
    if scores.min() < scores.max():
        assert radius.max() == 2.0 and radius.min() == pytest.approx(0.01)
        torch.testing.assert_close(unit_radius(-a * scores + b, 0.01, 2.0), 2.01 - radius)


def test_equal_scores_get_the_middle() -> None:
    torch.testing.assert_close(unit_radius(torch.ones(3), 0.01, 2.0), torch.full((3,), 1.005))


def test_equal_bounds_are_a_uniform_radius_and_zero_is_none() -> None:
    torch.testing.assert_close(unit_radius(SCORES, 0.5, 0.5), torch.full((4,), 0.5))
    assert not unit_radius(SCORES, 0.0, 0.0).any()


def test_percentile_stops_an_outlier_from_pushing_all_others_up() -> None:
    scores = torch.tensor([*range(99), 1e6], dtype=torch.float64)
    plain, clipped = unit_radius(scores, 0.0, 2.0), unit_radius(scores, 0.0, 2.0, percentile=98)
    assert plain[50] > 1.99 and clipped[50] == pytest.approx(1.0, abs=0.05) and clipped[-1] == 0


def test_removed_units_do_not_count_and_get_nothing() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, 4.0, 5.0])
    found = unit_radius(scores, 0.01, 2.0, keep=torch.tensor([False, True, True, True, True]))
    torch.testing.assert_close(found, torch.tensor([0.0, 2.0, 1.5025, 0.5075, 0.01]))
    assert not unit_radius(scores, 0.01, 2.0, keep=torch.zeros(5, dtype=torch.bool)).any()


def test_global_population_compares_across_groups() -> None:
    parts = [torch.tensor([1.0, 2.0]), torch.tensor([4.0, 5.0])]
    joint = torch.cat(group_radius(parts, 0.01, 2.0, population="global"))
    torch.testing.assert_close(joint, torch.tensor([2.0, 1.5025, 0.5075, 0.01]))
    apart = torch.cat(group_radius(parts, 0.01, 2.0))
    torch.testing.assert_close(apart, torch.tensor([2.0, 0.01, 2.0, 0.01]))


def radii(name: str, **options) -> tuple[dict, list, list]:
    model = net(name)
    groups = find_groups(model, images())
    scores = score(groups)
    found = adaptive_radius(groups, scores, list(model.parameters()), 0.01, 2.0, **options)
    return dict(zip([n for n, _ in model.named_parameters()], found, strict=True)), groups, scores


def test_row_bias_and_norm_of_a_channel_share_its_radius() -> None:
    found, groups, scores = radii("plain")
    index = next(i for i, g in enumerate(groups) if g.name == "conv2")
    wanted = unit_radius(scores[index], 0.01, 2.0)
    assert found["conv2.weight"].shape == (16, 1, 1, 1)
    for name in ("conv2.weight", "conv2.bias", "bn2.weight", "bn2.bias"):
        torch.testing.assert_close(found[name].flatten(), wanted)


def test_layers_that_are_never_pruned_get_the_smallest_radius() -> None:
    found, _, _ = radii("plain")
    assert found["fc.weight"] == 0.01 and found["fc.bias"] == 0.01


def test_coupled_layers_share_radii() -> None:
    found, _, _ = radii("residual")
    torch.testing.assert_close(found["conv1.weight"], found["back.weight"])
    torch.testing.assert_close(found["conv2.weight"], found["short.weight"])


def test_layer_of_two_groups_takes_each_part_from_its_own() -> None:
    found, groups, scores = radii("concat")
    parts = {g.name: unit_radius(s, 0.01, 2.0) for g, s in zip(groups, scores, strict=True)}
    torch.testing.assert_close(found["wide.weight"].flatten(), torch.cat([parts["left"], parts["right"]]))


def test_every_radius_broadcasts_to_its_parameter() -> None:
    model = net("grouped")
    groups = find_groups(model, images())
    params = list(model.parameters())
    for parameter, rho in zip(params, adaptive_radius(groups, score(groups), params, 0.01, 2.0), strict=True):
        assert (torch.as_tensor(rho) * parameter).shape == parameter.shape


def test_per_neuron_perturbs_only_weights() -> None:
    found, _, _ = radii("plain", norm="per_neuron")
    assert found["bn1.weight"] == 0.0 and found["conv2.bias"] == 0.0 and found["conv1.weight"].max() == 2.0


def test_relative_size_is_the_radius_over_the_root_of_the_row() -> None:
    params = [torch.nn.Parameter(torch.zeros(4, 1, 3, 3)), torch.nn.Parameter(torch.zeros(5))]
    assert relative_sizes(params, [torch.tensor([0.1, 1.5, 0.2, 0.3]).view(4, 1, 1, 1), 0.01]) == pytest.approx(
        [0.5, 0.01]
    )
    assert relative_sizes([torch.nn.Parameter(torch.zeros(2, 64, 3, 3))], [2.0]) == pytest.approx([2 / math.sqrt(576)])


@pytest.mark.parametrize(
    "options",
    [
        {"rho_min": 2.0, "rho_max": 1.0},
        {"rho_min": -1.0},
        {"percentile": 0},
        {"norm": "neuron"},
        {"population": "layer"},
    ],
)
def test_impossible_radii_are_clear_errors(options: dict) -> None:
    groups = find_groups(net("plain"), images())
    with pytest.raises(UserError):
        adaptive_radius(groups, score(groups), [], **options)
