"""Budgets, rankings and limits: met exactly where they can be, refused with the smallest that can be met."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from prune_nets import images, net
from torch import nn

from flatcompress import models
from flatcompress.errors import UserError
from flatcompress.prune import Budget, ChannelSchedule, CostModel, Limits, choose, find_groups, prune, score
from flatcompress.prune.budgets.knapsack import best_choice
from flatcompress.prune.ranking import isomorphic_scope


def resnet8() -> nn.Module:
    return models.build("resnet8", num_classes=4, input_shape=(3, 16, 16), seed=0).eval()


def counted_macs(model: nn.Module, x: torch.Tensor) -> int:
    total = 0

    def count(module: nn.Module, _: object, out: torch.Tensor) -> None:
        nonlocal total
        total += module.weight.numel() * out[0].numel() // module.weight.shape[0]

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    model(x)
    for hook in hooks:
        hook.remove()
    return total


def test_cost_model_counts_what_the_cut_model_has() -> None:
    for name in ("residual", "concat", "gated"):
        model, x = net(name), images()
        groups = find_groups(model, x)
        keep = choose(groups, score(groups), Budget("ratio", 0.5))
        costs = CostModel(model, x)
        widths = costs.widths(groups, keep)
        gone = [int((~k).sum()) for k in keep]
        assert costs.by_count(groups)(gone) == widths
        from flatcompress.prune import shrink

        shrink(model, groups, keep)
        assert costs.macs(widths) == counted_macs(model, x)
        assert costs.params(widths) == sum(p.numel() for p in model.parameters())


def test_attention_products_are_counted() -> None:
    model = models.build("vit_tiny", num_classes=4, input_shape=(3, 16, 16), seed=0, depth=1)
    x = images(16)
    tokens, width = model.pos_embed.shape[1], model.blocks[0].attn.proj.in_features
    costs = CostModel(model, x)
    assert costs.macs(costs.dense) == counted_macs(model, x) + 2 * tokens * tokens * width


@pytest.mark.parametrize("ranking", ["global", "uniform", "isomorphic"])
@pytest.mark.parametrize("kind", ["macs", "params", "bytes"])
def test_budget_is_met_and_not_overdone(kind: str, ranking: str) -> None:
    model, x = resnet8(), images(16)
    costs = CostModel(model, x)
    groups = find_groups(model, x)
    keep = choose(groups, score(groups), Budget(kind, 0.5), Limits(ranking=ranking), costs=costs)
    measure = Budget(kind, 0.5).measure(costs)
    left = measure(costs.widths(groups, keep)) / measure(costs.dense)
    assert 0.4 < left <= 0.5


def test_absolute_budgets() -> None:
    model, x = resnet8(), images(16)
    prune(model, x, params=20_000)
    assert 15_000 < sum(p.numel() for p in model.parameters()) <= 20_000


def test_fewer_bits_leave_room_for_more_channels() -> None:
    four, eight = resnet8(), resnet8()
    prune(four, images(16), bytes=20_000, weight_bits=4)
    prune(eight, images(16), bytes=20_000, weight_bits=8)
    assert sum(p.numel() for p in four.parameters()) > 1.5 * sum(p.numel() for p in eight.parameters())


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7, 0.875])
@pytest.mark.parametrize("name", ["resnet8", "ds_cnn"])
def test_small_nets_reach_their_ratio_with_the_default_rounding(name: str, ratio: float) -> None:
    model = models.build(name, num_classes=4, input_shape=(3, 16, 16), seed=0)
    data = prune(model, images(16), ratio).of_kind("channels")[0]
    assert 1 - data["kept_channels"] / data["total_channels"] == pytest.approx(ratio, abs=0.02)


def test_default_rounding_is_8_where_channels_are_many() -> None:
    model = models.build("ds_cnn", num_classes=4, input_shape=(3, 16, 16), seed=0)
    prune(model, images(16), 0.4)
    widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(w % 8 == 0 for w in widths) and len(set(widths)) > 1


@pytest.mark.parametrize("round_to", [1, 4, 16])
def test_kept_channels_are_multiples_of_round_to(round_to: int) -> None:
    model = resnet8()
    prune(model, images(16), 0.4, round_to=round_to)
    assert all(m.out_channels % round_to == 0 for m in model.modules() if isinstance(m, nn.Conv2d))


def test_uniform_takes_the_same_share_everywhere_and_global_does_not() -> None:
    model = resnet8()
    groups = find_groups(model, images(16))
    scores = [s * (i + 1) for i, s in enumerate(score(groups))]
    uniform = choose(groups, scores, Budget("ratio", 0.5), Limits(ranking="uniform"))
    assert all(float(k.float().mean()) == 0.5 for k in uniform)
    ranked = [float(k.float().mean()) for k in choose(groups, scores, Budget("ratio", 0.5))]
    assert ranked[0] < 0.5 < ranked[-1]


def scopes(model: nn.Module, x: torch.Tensor) -> tuple[list, list[set[str]]]:
    groups = find_groups(model, x)
    return groups, [{groups[i].name for i in scope} for scope in isomorphic_scope(groups)]


def test_isomorphic_scopes_hold_the_same_place_of_every_block() -> None:
    model = models.build("resnet20", num_classes=4, input_shape=(3, 16, 16), seed=0).eval()
    _, found = scopes(model, images(16))
    inner = {f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)}
    assert inner in found  # nine blocks, three widths
    assert {"conv1"} in found and all(len(scope) == 1 for scope in found if scope != inner)


def test_heads_and_mlp_channels_are_never_ranked_together_by_structure() -> None:
    model = models.build("vit_tiny", num_classes=4, input_shape=(3, 16, 16), seed=0, depth=2, num_heads=4).eval()
    groups, found = scopes(model, images(16))
    assert sorted(map(sorted, found)) == [["blocks.0.attn", "blocks.1.attn"], ["blocks.0.fc1", "blocks.1.fc1"]]
    # Each scope loses its own half, however the scores of one kind compare with those of the other.
    scores = [torch.rand(g.units) + (100 if g.kind == "heads" else 0) for g in groups]
    keep = choose(groups, scores, Budget("ratio", 0.5), Limits(ranking="isomorphic", round_to=1, floor=0))
    for kind in ("heads", "channels"):
        mine = torch.cat([k for g, k in zip(groups, keep, strict=True) if g.kind == kind])
        assert float(mine.float().mean()) == 0.5


def test_depthwise_and_dense_convolutions_are_other_structures() -> None:
    dense = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
    depthwise = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    kinds = {g.topology for net in (dense, depthwise) for g in find_groups(net, images())}
    assert len(kinds) == 2  # both groups of the dense net are alike, the one of the depthwise net is not


def test_floor_and_min_channels_hold_against_any_score() -> None:
    model = resnet8()
    groups = find_groups(model, images(16))
    scores = [torch.full((g.units,), float(i)) for i, g in enumerate(groups)]
    keep = choose(groups, scores, Budget("ratio", 0.6), Limits(min_channels=4, floor=0.0, round_to=1))
    assert min(int(k.sum()) for k in keep) == 4
    keep = choose(groups, scores, Budget("ratio", 0.6), Limits(floor=0.25, round_to=1))
    assert min(float(k.float().mean()) for k in keep) == 0.25


@pytest.mark.parametrize(("ratio", "floor"), [(0.5, 0.25), (0.6, 0.2), (0.8, 0.1)])
def test_under_a_ratio_every_layer_keeps_half_of_what_the_ratio_leaves(ratio: float, floor: float) -> None:
    groups = find_groups(resnet8(), images(16))
    scores = [torch.full((g.units,), float(i)) for i, g in enumerate(groups)]  # the first layers lose all they can
    keep = choose(groups, scores, Budget("ratio", ratio), Limits(round_to=1))
    assert min(float(k.float().mean()) for k in keep) == pytest.approx(floor, abs=0.05)
    assert all(float(k.float().mean()) >= floor for k in keep)
    gone = sum(int((~k).sum()) for k in keep) / sum(k.numel() for k in keep)
    assert gone == pytest.approx(ratio, abs=0.03)


def test_a_schedule_holds_the_floor_of_its_final_ratio_at_every_event() -> None:
    model = resnet8()
    schedule = ChannelSchedule(model, images(16), Budget("ratio", 0.5), events=3, every=1)
    assert schedule.limits.floor == 0.25
    assert ChannelSchedule(model, images(16), Budget("macs", 0.5), events=3, every=1).limits.floor is None


def test_least_important_units_go() -> None:
    model = net("plain")
    groups = find_groups(model, images())
    scores = [torch.arange(g.units, dtype=torch.float32) for g in groups]
    keep = choose(groups, scores, Budget("ratio", 0.5), Limits(ranking="uniform", round_to=1))
    assert keep[0].tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"macs": 0.001}, r"macs 0\.001 cannot be met: the smallest that can is 0\.0\d+"),
        ({"bytes": 10}, r"bytes 10 cannot be met: the smallest that can is \d+"),
        ({"ratio": 1.0}, "would empty every layer"),
        ({"ratio": 0.97}, r"at most 0\.\d+ of the channels"),
        ({"ratio": -0.5}, "above 0"),
        ({"ratio": 0.001}, "nothing was pruned"),
        ({"params": 1.0}, "nothing was pruned"),
        ({"macs": -1}, "above 0"),
        ({"ratio": 0.5, "macs": 0.5}, "one pruning budget, not 2"),
        ({"ratio": 0.5, "ranking": "local"}, "unknown ranking"),
        ({"ratio": 0.5, "min_channels": 0}, "no layer may be emptied"),
        ({"ratio": 0.5, "round_to": 0}, "round_to"),
        ({"ratio": 0.5, "floor": 1.0}, "floor"),
        ({"ratio": 0.5, "importance": "magnitude"}, "unknown importance"),
        ({"ratio": 0.5, "importance": "taylor"}, "gradients"),
        ({"ratio": 0.5, "ignore": ["blocks.99"]}, "matches no layer"),
        ({"ratio": 0.5, "ignore": ["re:.*"]}, "nothing in ResNet.* can be pruned.*is ignored"),
    ],
)
def test_bad_input_is_a_clear_error_and_the_model_is_untouched(options: dict, message: str) -> None:
    model = resnet8()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message):
        prune(model, images(16), **options)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)


def test_the_smallest_that_can_be_met_can_be_met() -> None:
    with pytest.raises(UserError) as caught:
        prune(resnet8(), images(16), params=10)
    smallest = float(str(caught.value).split("smallest that can is ")[1].split(" ")[0])
    model = resnet8()
    prune(model, images(16), params=smallest)
    assert sum(p.numel() for p in model.parameters()) == smallest


def test_unknown_budget_and_missing_cost_function() -> None:
    with pytest.raises(UserError, match="Did you mean 'params'"):
        Budget("param", 0.5)
    with pytest.raises(UserError, match="cost function"):
        Budget("cost", 0.5)


def test_gradients_from_batches_are_used_and_left_as_they_were() -> None:
    model, x = resnet8(), images(16, batch=4)
    plan = prune(model, x, 0.5, "taylor", batches=[(x, torch.tensor([0, 1, 2, 3]))] * 2)
    assert plan.steps and all(p.grad is None for p in model.parameters())


# --- knapsack


def test_dynamic_programme_is_optimal() -> None:
    generator = np.random.default_rng(0)
    values = [generator.random(4) for _ in range(4)]
    costs = [generator.integers(0, 6, 4) for _ in range(4)]
    chosen = best_choice(values, costs, 20)
    for capacity in range(21):
        fitting = [
            sum(v[o] for v, o in zip(values, options, strict=True))
            for options in itertools.product(range(4), repeat=4)
            if sum(c[o] for c, o in zip(costs, options, strict=True)) <= capacity
        ]
        options = [int(c[capacity]) for c in chosen]
        if not fitting:
            assert options == [-1] * 4
            continue
        assert sum(c[o] for c, o in zip(costs, options, strict=True)) <= capacity
        assert sum(v[o] for v, o in zip(values, options, strict=True)) == pytest.approx(max(fitting))


def outputs(widths: dict) -> float:
    return sum(widths[name].outputs for name in ("conv1", "conv2"))


def test_unit_costs_make_the_knapsack_a_global_top_k() -> None:
    model = net("plain")
    groups = find_groups(model, images())
    scores = score(groups)
    limits = Limits(round_to=1, floor=0.0)
    costs = CostModel(model, images())
    for left in range(4, 24):
        keep = choose(groups, scores, Budget("cost", left, outputs, absolute=True), limits, costs=costs)
        kept = torch.cat([s[k] for s, k in zip(scores, keep, strict=True)]).sort().values
        assert sum(int(k.sum()) for k in keep) == left
        if all(int(k.sum()) > 1 for k in keep):  # no floor in the way
            torch.testing.assert_close(kept, torch.cat(scores).sort().values[-left:])


def test_flat_step_of_a_latency_staircase_goes_whole_or_not_at_all() -> None:
    model = net("plain")
    groups = find_groups(model, images())

    def staircase(widths: dict) -> float:
        return 3.0 * math.ceil(widths["conv1"].outputs / 4) + 2.0 * math.ceil(widths["conv2"].outputs / 8)

    costs = CostModel(model, images())
    for limit in (9.0, 8.0, 7.0, 5.0):
        budget = Budget("cost", limit, staircase, absolute=True)
        keep = choose(groups, score(groups), budget, Limits(round_to=1, floor=0.0), costs=costs)
        widths = costs.widths(groups, keep)
        assert staircase(widths) <= limit
        assert widths["conv1"].outputs % 4 == 0 and widths["conv2"].outputs % 8 == 0


def test_knapsack_keeps_more_importance_than_the_ranking_at_the_same_cost() -> None:
    model, x = resnet8(), images(16)
    groups = find_groups(model, x)
    scores, costs = score(groups), CostModel(model, x)

    def kept(budget: Budget) -> float:
        keep = choose(groups, scores, budget, costs=costs)
        assert costs.macs(costs.widths(groups, keep)) <= 0.5 * costs.macs(costs.dense)
        return sum(float(s[k].sum()) for s, k in zip(scores, keep, strict=True))

    assert kept(Budget("macs", 0.5, knapsack=True)) > kept(Budget("macs", 0.5))


def staircase(widths: dict) -> float:
    """Ten per layer that is narrower than 7 of 8, less a tenth per channel: floors are dear."""
    return sum(10.0 * (0 < w.outputs < 7) + 0.1 * w.outputs + 1 for w in widths.values())


def test_smallest_cost_is_found_where_narrower_is_dearer() -> None:
    model, x = net("plain"), images()
    costs = CostModel(model, x)
    dense = staircase(costs.dense)
    groups = find_groups(model, x)
    keep = choose(
        groups, score(groups), Budget("cost", dense - 0.15, staircase, absolute=True), Limits(round_to=1), costs=costs
    )
    assert sorted(int(k.sum()) for k in keep)[0] >= 7 and staircase(costs.widths(groups, keep)) <= dense - 0.15
    with pytest.raises(UserError, match="smallest that can is") as error:
        prune(model, x, budget=Budget("cost", 0.1, staircase, absolute=True), round_to=1)
    least = float(str(error.value).split("smallest that can is ")[1].split()[0])
    floors = [round(0.1 * g.units) or 1 for g in groups]
    narrowest = [torch.arange(g.units) < k for g, k in zip(groups, floors, strict=True)]
    assert least < dense < staircase(costs.widths(groups, narrowest))


def test_ratios_take_their_share_of_each_named_group_and_nothing_else() -> None:
    model, x = resnet8(), torch.randn(2, 3, 16, 16)
    groups = find_groups(model, x)
    names = [(g.outs or g.members)[0].name for g in groups]
    scores = score(groups)
    keep = choose(groups, scores, Budget("ratio", 0.0, ratios={names[0]: 0.5, f"re:{names[1]}": 0.25}))
    left = [float(k.float().mean()) for k in keep]
    assert left == [0.5, 0.75, *[1.0] * (len(groups) - 2)]
    for units, values, group in zip(keep[:1], scores[:1], groups[:1], strict=True):
        assert values[~units].max() <= values[units].min() and group.units == len(units)
    rest = choose(groups, scores, Budget("ratio", 0.5, ratios={names[0]: 0.0}))
    assert bool(rest[0].all()) and all(float(k.float().mean()) == 0.5 for k in rest[1:])
    schedule = ChannelSchedule(model, x, Budget("ratio", 0.0, ratios={names[0]: 0.5}), events=3, every=1)
    shares = []
    while not schedule.done:
        schedule.step()
        shares.append(float(schedule.mask.keep[0].float().mean()))
    assert shares == sorted(shares, reverse=True) and shares[-1] == 0.5


def test_ratios_that_fit_no_group_or_leave_too_little_are_refused() -> None:
    model, x = resnet8(), torch.randn(2, 3, 16, 16)
    groups = find_groups(model, x)
    name = (groups[0].outs or groups[0].members)[0].name
    for ratios, message in (({"nowhere": 0.5}, "nowhere"), ({name: 0.99}, "cannot go"), ({name: 1.0}, "below 1")):
        with pytest.raises(UserError, match=message):
            choose(groups, score(groups), Budget("ratio", 0.0, ratios=ratios))
    with pytest.raises(UserError, match="kind ratio"):
        Budget("macs", 0.5, ratios={name: 0.5})
