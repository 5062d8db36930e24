"""The prune stage: every method cuts to the budget, and the plan repeats the cut."""

from __future__ import annotations

import warnings

import pytest
import torch
from stage_pieces import SHAPE, config, context

from flatcompress import models
from flatcompress.errors import UserError
from flatcompress.plan import apply_plan
from flatcompress.recipe import parse_recipe
from flatcompress.recipe.identity import digest
from flatcompress.stages import prune, run_stage
from flatcompress.stages.keys import event_steps, soft_epochs
from flatcompress.stages.prune_methods import PRUNE_METHODS


def outputs(model, x):
    model.eval()
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("method", PRUNE_METHODS)
def test_method_halves_the_channels_and_the_plan_repeats_it(method):
    work = context()
    before = sum(p.numel() for p in work.model.parameters())
    run_stage("prune", work, config("prune", method=method, ratio=0.5, epochs=3))
    assert sum(p.numel() for p in work.model.parameters()) < 0.5 * before
    again = apply_plan(work.build(), work.plan, work.example())
    again.load_state_dict(work.model.state_dict())
    assert torch.equal(outputs(again, work.example()), outputs(work.model, work.example()))


@pytest.mark.parametrize(("key", "value"), [("macs", 0.5), ("params", 0.4), ("bytes", 0.4), ("bytes", "3k")])
def test_budget_is_met(key, value):
    work = context()
    model = work.build()
    costs = prune.prune.CostModel(model, work.example())
    measure = getattr(costs, key)
    dense = measure(costs.dense)
    run_stage("prune", work, config("prune", method="magnitude", epochs=2, **{key: value}))
    after = prune.prune.CostModel(work.model, work.example())
    limit = 3000 if value == "3k" else value * dense
    assert getattr(after, key)(after.dense) <= limit


def test_events_end_before_step_3_and_never_repeat():
    c = config("prune", epochs=5, schedule_steps=6)
    steps = event_steps(c, 10)
    assert steps == sorted(set(steps))
    assert steps[0] > 0 and steps[-1] <= soft_epochs(c) * 10 < 50


def test_removed_channels_have_no_gradient_and_no_weight_while_training():
    work = context()
    seen = []
    removal = prune.Removal(work, config("prune", method="sam"))
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
def test_a_regularizer_chooses_once_and_what_it_chose_is_what_goes(method):
    work = context()
    removal = prune.Removal(work, config("prune", method=method, warmup_share=0.12, epochs=2))
    regularizer = removal.regularizer
    params = list(work.model.parameters())
    grads = [torch.zeros_like(p) for p in params]
    regularizer.compose(params, [grads], grads)
    assert regularizer.start == 1 and regularizer.keep is None and not any(g.any() for g in grads)
    regularizer.compose(params, [grads], grads)
    chosen = [k.clone() for k in regularizer.keep]
    assert any(g.any() for g in grads)
    with torch.no_grad():
        for p in params:
            p.mul_(torch.rand(p.shape, generator=torch.Generator().manual_seed(1)))
    removal.after_step(removal.at[-1])
    assert removal.done and all(torch.equal(a, b) for a, b in zip(chosen, removal.mask.keep, strict=True))


def test_removal_state_round_trip():
    work = context()
    removal = prune.Removal(work, config("prune", method="growing_reg", warmup_share=0))
    params = list(work.model.parameters())
    removal.regularizer.compose(params, [], [torch.zeros_like(p) for p in params])
    removal.after_step(removal.at[0])
    other = prune.Removal(context(), config("prune", method="growing_reg", warmup_share=0))
    other.load_state_dict(removal.state_dict())
    assert other.event == 1 and other.regularizer.steps == 1
    assert all(torch.equal(a, b) for a, b in zip(other.mask.keep, removal.mask.keep, strict=True))


@pytest.mark.parametrize("ranking", prune.prune.RANKINGS)
def test_every_ranking_of_the_room_is_a_recipe_key_and_meets_the_budget(ranking):
    work = context()
    before = prune.prune.CostModel(work.model, work.example())
    run_stage("prune", work, config("prune", method="magnitude", macs=0.5, ranking=ranking))
    after = prune.prune.CostModel(work.model, work.example())
    assert after.macs(after.dense) <= 0.5 * before.macs(before.dense)


def test_floor_of_a_recipe_holds_in_every_group():
    work = context()
    removal = prune.Removal(work, config("prune", method="magnitude", ratio=0.6, floor=0.25, round_to=1))
    keep = removal.choose(removal.budget)
    assert min(float(k.float().mean()) for k in keep) == 0.25


def test_keys_that_are_off_leave_the_identity_alone():
    def key(**keys):
        return digest(parse_recipe({"stages": [{"train": {}}, {"prune": keys}]}))

    off = {"percentile": None, "floor": None}
    assert key() == key(**off) == key(ratio=0.5)
    written = config("prune", percentile=95, floor=0.05).model_dump(mode="json")
    assert (written["percentile"], written["floor"]) == (95.0, 0.05)
    assert config("prune", **written).model_dump(mode="json") == written
    assert len({key(), key(percentile=95), key(floor=0.05)}) == 3


def radii(**keys):
    work = context()
    removal = prune.Removal(work, config("prune", method="adasap", **keys))
    names = [name for name, _ in work.model.named_parameters()]
    return removal, dict(zip(names, removal.ball(list(work.model.parameters())), strict=True))


def test_radius_switches_of_adasap_reach_the_ball():
    _, plain = radii(rho_min=0.1, rho_max=1.5)
    assert (plain["conv1.weight"].min(), plain["conv1.weight"].max()) == (pytest.approx(0.1), 1.5)
    _, clipped = radii(rho_min=0.1, rho_max=1.5, percentile=50)
    assert clipped["conv1.weight"].mean() < plain["conv1.weight"].mean()
    assert int((clipped["conv1.weight"] == clipped["conv1.weight"].min()).sum()) == 4  # the upper half of 8
    _, literal = radii(norm="per_neuron")
    assert literal["bn1.weight"] == 0.0 and literal["conv1.weight"].max() == 2.0


@pytest.mark.parametrize(
    ("key", "value"), [("percentile", 0), ("percentile", 101), ("floor", 1.0), ("floor", -0.1), ("ranking", "local")]
)
def test_switches_out_of_range_are_refused(key, value):
    with pytest.raises(UserError, match=key):
        parse_recipe({"stages": [{"train": {}}, {"prune": {key: value}}]})


@pytest.mark.parametrize("importance", ["taylor", "fpgm"])
def test_radius_follows_the_scores_that_decide_what_goes(importance):
    work = context()
    keys = {"method": "adasap", "importance": importance, "rho_min": 0.0, "rho_max": 2.0}
    removal = prune.Removal(work, config("prune", **keys))
    params = list(work.model.parameters())
    first = removal.ball(params)
    if importance == "taylor":  # no gradient was seen yet
        assert {float(r.max()) for r in first if torch.is_tensor(r)} == {1.0}
    x, y = work.data.train.__getitems__(list(range(16)))
    torch.nn.functional.cross_entropy(work.model(x), y).backward()
    removal.after_step(1)
    wanted = prune.prune.score(removal.groups, importance)
    for _ in range(2):
        found = {id(p): r for p, r in zip(params, removal.ball(params), strict=True)}
        for group, scores in zip(removal.groups, wanted, strict=True):
            own = found[id(group.outs[0].module.weight)].flatten()
            assert own[scores.argmin()] == 2.0 and own[scores.argmax()] == 0.0
        removal._running and removal._running.reset()  # as after a prune event: the scores of before it stay


def test_rehearsal_scores_with_the_recipe_s_importance():
    work = context(lambda: models.build("vit_tiny", num_classes=4, input_shape=SHAPE, seed=0))
    prune.dry_run(work.build(), work.example(), config("prune", importance="taylor"))
    with pytest.raises(UserError, match="no BatchNorm"):
        prune.dry_run(work.build(), work.example(), config("prune", importance="bn_scale"))


def test_radius_per_neuron_that_may_change_signs_is_a_warning_with_one_that_does_not():
    work = context(lambda: models.build("ds_cnn", num_classes=4, input_shape=SHAPE, seed=0))
    keys = {"method": "adasap", "norm": "per_neuron"}
    with pytest.warns(UserWarning, match=r"by 67% of themselves at rho_max 2.*rho_max 1\.5 would"):
        prune.Removal(work, config("prune", **keys))  # depthwise filters have 9 weights
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune.Removal(work, config("prune", **keys, rho_max=1.5))
        prune.Removal(work, config("prune", method="adasap"))
