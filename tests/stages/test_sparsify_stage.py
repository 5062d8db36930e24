"""The sparsify stage: the pattern is reached, and the masks hold bit for bit through everything that comes after."""

from __future__ import annotations

import pytest
import torch
from stage_pieces import config, context

from flatcompress import quant
from flatcompress.errors import UserError
from flatcompress.plan import apply_plan
from flatcompress.prune import masks
from flatcompress.recipe import parse_recipe
from flatcompress.stages import run_stage, sparsify, train
from flatcompress.stages.job import make_job


def zeros(model):
    return {name: (module.weight == 0) for name, module, _ in masks.masked_layers(model)}


@pytest.mark.parametrize(
    ("keys", "share"),
    [({"sparsity": 0.8}, 0.8), ({"sparsity": 0.6, "scope": "layer", "removal": "one_shot"}, 0.6),
     ({"pattern": "2:4"}, 0.5), ({"pattern": "1:4"}, 0.75)],
)  # fmt: skip
def test_pattern_is_reached(keys, share):
    work = context()
    run_stage("sparsify", work, config("sparsify", **keys))
    assert masks.sparsity(work.model) == pytest.approx(share, abs=0.01)
    for _, module, mask in masks.masked_layers(work.model):
        assert not module.weight[~mask].any()


@pytest.mark.parametrize("method", ["sam", "wsam", "asam"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_masks_hold_through_training_and_quantization(method, optimizer):
    work = context()
    run_stage("sparsify", work, config("sparsify", method=method, pattern="2:4"))
    before = {name: mask.clone() for name, _, mask in masks.masked_layers(work.model)}
    run_stage("train", work, config("train", method=method, epochs=1, optimizer={"name": optimizer, "lr": 0.01}))
    for name, module, mask in masks.masked_layers(work.model):
        assert torch.equal(mask, before[name]) and not module.weight[~mask].any()
    run_stage("quantize", work, config("quantize", method="gaqat", epochs=1))
    for name, layer in quant.quantized_layers(work.model).items():
        if name in before:
            assert torch.equal(layer.weight_mask, before[name]) and not layer.weight[~before[name]].any()
            assert not layer.weight_spec().values[~before[name]].any()
    again = apply_plan(work.build(), work.plan, work.example())
    again.load_state_dict(work.model.state_dict())
    assert [s.kind for s in work.plan.steps] == ["masks", "quantizers"]


def test_after_pruning_the_masks_fit_the_cut_layers():
    work = context()
    run_stage("prune", work, config("prune", method="magnitude", ratio=0.4))
    run_stage("sparsify", work, config("sparsify", method="none", sparsity=0.5))
    again = apply_plan(work.build(), work.plan, work.example())
    again.load_state_dict(work.model.state_dict())
    assert masks.sparsity(again) == pytest.approx(0.5, abs=0.01)


def test_perturbation_leaves_masked_weights_at_zero():
    work = context()
    masks.sparsify(work.model, 0.7)
    c = config("train", method="asam", rho=2.0)
    job = make_job(work, c, train.callbacks(work, c))
    seen = []

    def watch(module, inputs):
        seen.append(all(not m.weight[~mask].any() for _, m, mask in masks.masked_layers(work.model)))

    work.model.register_forward_pre_hook(watch)
    x, y = work.data.train.__getitems__(list(range(16)))

    def closure():
        loss = job.loss(work.model(x), y)
        loss.backward()
        for callback in job.callbacks:
            callback.after_backward()
        return loss

    job.optimizer.step(closure)
    assert seen == [True, True]


def test_rehearsal_refuses_a_pattern_that_fits_no_layer():
    work = context()
    with pytest.raises(UserError, match="no multiple"):
        sparsify.dry_run(work.build(), work.example(), config("sparsify", pattern="3:7"))


def test_masking_state_round_trip():
    masking = sparsify.Masking(context(), config("sparsify"), [3, 4])
    masking.after_step(3)
    other = sparsify.Masking(context(), config("sparsify"), [3, 4])
    other.load_state_dict(masking.state_dict())
    assert other.event == 1


TRAIN, SPARSIFY = {"train": {"epochs": 1}}, {"sparsify": {"epochs": 1}}


@pytest.mark.parametrize(
    ("stages", "message"),
    [([SPARSIFY], "random weights"),
     ([TRAIN, {"quantize": {}}, SPARSIFY], "after 'quantize'"),
     ([TRAIN, SPARSIFY, {"prune": {}}], "after 'sparsify'"),
     ([TRAIN, {"sparsify": {"pattern": "4:2"}}], "sparsity pattern '4:2'"),
     ([TRAIN, {"sparsify": {"pattern": "2:4", "sparsity": 0.5}}], "says the sparsity itself"),
     ([TRAIN, {"sparsify": {"sparsity": 1.0}}], "less than 1"),
     ([TRAIN, {"sparsify": {"sparsty": 0.5}}], "'sparsity'")],
)  # fmt: skip
def test_recipes_that_make_no_sense_are_refused(stages, message):
    with pytest.raises(UserError, match=message):
        parse_recipe({"stages": stages})


def test_masks_may_be_tightened_and_trained_on():
    recipe = parse_recipe({"stages": [TRAIN, SPARSIFY, TRAIN, {"sparsify": {"sparsity": 0.8}}, {"quantize": {}}]})
    assert [s.kind for s in recipe.stages] == ["train", "sparsify", "train", "sparsify", "quantize"]
