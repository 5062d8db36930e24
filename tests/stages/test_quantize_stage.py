"""The quantize stage: every method trains, its switches reach what they switch, and the plan repeats the result."""

from __future__ import annotations

import pytest
import torch
from stage_pieces import config, context

from flatcompress import quant
from flatcompress.errors import UserError
from flatcompress.plan import apply_plan
from flatcompress.recipe import parse_recipe
from flatcompress.stages import quantize, run_stage
from flatcompress.stages.qat_callbacks import Oscillation
from flatcompress.stages.qat_methods import QAT_METHODS
from flatcompress.stages.quantize import QuantizeConfig
from flatcompress.sweep.spec import key_of


@pytest.mark.parametrize("method", QAT_METHODS)
def test_method_quantizes_and_the_plan_repeats_it(method):
    work = context()
    run_stage("quantize", work, config("quantize", method=method, weight_bits=3, K=2))
    assert quant.is_quantized(work.model)
    again = apply_plan(work.build(), work.plan, work.example())
    again.load_state_dict(work.model.state_dict())
    quant.set_bias_rounding(again, True)
    with torch.no_grad():
        assert torch.equal(again.eval()(work.example()), work.model.eval()(work.example()))


def test_weights_only_method_leaves_activations_float():
    work = context()
    run_stage("quantize", work, config("quantize", method="qt_dog", weight_bits=7))
    assert not quant.activation_quantizers(work.model)
    with pytest.raises(ValueError, match="weights alone"):
        config("quantize", method="qt_dog", activation_bits=4)


@pytest.mark.parametrize("keys", [{"effective_bits": 3.5}, {"bops": "2M"}, {"bytes": "7k", "sensitivity": "gradient"}])
def test_auto_bits_keep_their_budget(keys):
    work = context()
    events = []
    work.emit = lambda event, **fields: events.append((event, fields))
    run_stage("quantize", work, config("quantize", method="lsq", epochs=1, bits="auto", **keys))
    chosen = next(fields["bits"] for event, fields in events if event == "bits")
    layers = quant.quantized_layers(work.model)
    assert chosen and all(layers[name].weight_spec().bits == bits for name, bits in chosen.items())
    if "effective_bits" in keys:
        total = sum(layers[n].weight.numel() for n in chosen)
        assert sum(layers[n].weight.numel() * b for n, b in chosen.items()) <= 3.5 * total


def test_bits_of_single_layers():
    work = context()
    run_stage("quantize", work, config("quantize", method="lsq", epochs=1, bits={r"re:layer2\..*": 3}))
    bits = {n: layer.weight_spec().bits for n, layer in quant.quantized_layers(work.model).items()}
    assert {b for n, b in bits.items() if n.startswith("layer2")} == {3}
    assert {b for n, b in bits.items() if n.startswith("layer3")} == {4}


def test_quantizers_come_in_after_the_float_share():
    work = context()
    seen = []
    work.emit = lambda event, **fields: seen.append((event, fields.get("epoch"), quant.is_quantized(work.model)))
    run_stage("quantize", work, config("quantize", method="lsq", epochs=4, quant_start=0.5))
    assert [(e, q) for kind, e, q in seen if kind == "epoch"] == [(1, False), (2, False), (3, True), (4, True)]


@pytest.mark.parametrize(
    "keys",
    [{"distill": 1.0}, {"dampen": 0.1}, {"bloop": 0.5},
     {"perturb_point": "quantized"}, {"perturb_scales": True}, {"quantizer": "pact"},
     {"remedy": "slow", "tau": 1.0, "K": 2}, {"remedy": "project"}, {"averaging": "swa"}, {"averaging": "swad"}],
    ids=lambda keys: "-".join(map(str, next(iter(keys.items())))),
)  # fmt: skip
def test_option_changes_the_weights(keys):
    plain, changed = context(), context()
    run_stage("quantize", plain, config("quantize", method="gaqat", weight_bits=2, flat="sagm", rho=0.5))
    run_stage("quantize", changed, config("quantize", method="gaqat", weight_bits=2, flat="sagm", rho=0.5, **keys))
    a, b = plain.model.state_dict(), changed.model.state_dict()
    assert any(a[k].shape != b[k].shape or not torch.equal(a[k], b[k]) for k in a if k in b)


def test_oscillation_threshold_falls_from_a_quarter_of_the_stage_on():
    work = context()
    c = config("quantize", method="lsq", oscillation_threshold=0.01)
    quantize.insert(work.model, work.example(), c)
    oscillation = Oscillation(work.model, c.oscillation_threshold, c.dampen, steps=20)
    seen = []
    for step in (4, 5, 12, 20):
        oscillation.after_step(step)
        seen.append(oscillation.tracker.threshold)
    assert seen[0] is None and seen[1] == pytest.approx(0.1) and seen[3] == 0.01 and 0.01 < seen[2] < 0.1


def test_perturbation_after_the_quantizer_leaves_no_offset_behind():
    work = context()
    run_stage("quantize", work, config("quantize", method="saq"))
    assert all(layer.weight_offset is None for layer in quant.quantized_layers(work.model).values())


def test_scales_are_not_perturbed_unless_asked():
    work = context()
    quantize.insert(work.model, work.example(), config("quantize"))
    for asked in (False, True):
        c = config("quantize", perturb_scales=asked)
        scale = next(iter(quant.scale_parameters(work.model).values()))
        assert quantize.not_scales(work.model, c)("any", scale) is asked


def test_gaqat_logs_a_timeline_each_window():
    work = context()
    events = []
    work.emit = lambda event, **fields: events.append((event, fields))
    run_stage("quantize", work, config("quantize", method="gaqat", K=4))
    rows = [fields for event, fields in events if event == "conflict"]
    assert [row["step"] for row in rows] == [4, 8]
    assert {"disorder", "conflict", "frozen"} <= set(next(iter(rows[0]["quantizers"].values())))


def test_frozen_statistics_are_those_of_the_float_model():
    for keys in ({"method": "lsq", "averaging": "swa"}, {"method": "qt_dog"}):  # the second trains float first
        work = context()
        before = {k: v.clone() for k, v in work.model.state_dict().items() if "running" in k}
        weights = {k: v.clone() for k, v in work.model.named_parameters()}
        run_stage("quantize", work, config("quantize", freeze_bn=True, **keys))
        after = work.model.state_dict()
        assert before and all(torch.equal(v, after[k]) for k, v in before.items())
        assert not torch.equal(weights["bn1.weight"], after["bn1.weight"])


def test_statistics_that_are_estimated_once_are_those_of_the_calibrated_network_and_stay():
    work, twin = context(), context()
    run_stage("quantize", work, config("quantize", method="lsq", freeze_bn="estimated"))
    keys = config("quantize", method="lsq")
    quantize.insert(twin.model, twin.example(), keys)
    trained = keys.epochs * len(twin.data.train)
    quant.calibrate(twin.model, quantize.post_training.calibration(twin, quantize.calibration_samples(twin, keys)))
    floats = {k: v.clone() for k, v in twin.model.state_dict().items() if "running" in k}
    quant.reestimate_batchnorm(twin.model, quantize.shipped.statistics_batches(twin, trained))
    found, expected = work.model.state_dict(), twin.model.state_dict()
    assert floats and all(torch.equal(found[k], expected[k]) for k in floats)
    assert not all(torch.equal(found[k], v) for k, v in floats.items())


def test_average_of_the_scales_is_a_scale_too():
    work = context()
    events = []
    work.emit = lambda event, **fields: events.append((event, fields))
    run_stage("quantize", work, config("quantize", method="lsq", averaging="ema"))
    selected = [fields for event, fields in events if event == "selected"]
    assert len(selected) == 1 and 0 <= selected[0]["val_accuracy"] <= 1
    assert all((p > 0).all() for p in quant.scale_parameters(work.model).values())


def test_keys_that_came_later_leave_the_hash_of_older_runs_alone():
    data = {"name": "styled-shapes", "size": 24, "train_count": 600, "corruptions": "none", "batch_size": 64}
    raw = {"name": "any", "device": "cpu", "threads": 1, "data": {**data, "held_out": "photo"}}
    stage = {"method": "gaqat", "weight_bits": 3, "activation_bits": 3, "epochs": 6, "rho": 0.2, "K": 20}
    optimizers = [{"name": "adamw", "lr": 3e-3}, {"name": "adamw", "lr": 1e-3}]

    def key(**more):
        stages = [{"train": {"method": "sagm", "epochs": 12, "rho": 0.4, "optimizer": optimizers[0]}}]
        stages.append({"quantize": {**stage, "tau": 0.3, "tau_kind": "quantile", "optimizer": optimizers[1], **more}})
        recipe = parse_recipe({**raw, "model": {"name": "resnet8", "stem_stride": 2}, "stages": stages})
        assert parse_recipe(recipe.to_dict()).stages == recipe.stages
        return key_of(recipe, 2)

    assert (
        key() == key(remedy="freeze", averaging="none", tau=0.3, sensitivity="measured") == "737df93d6307"
    )  # of schema 6
    assert len({key(), key(remedy="slow"), key(averaging="swa"), key(flatness_map=False)}) == 4


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"method": "gaqat", "flat": "none"}, "compares two gradients"),
     ({"method": "saq", "perturb_scales": True}, "after the quantizer"),
     ({"tau": 1.5}, "at most 1"),
     ({"effective_bits": 4}, "bits: auto"), ({"bits": "auto", "bytes": 9, "bops": 9}, "one budget")],
)  # fmt: skip
def test_switches_that_contradict_each_other_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        QuantizeConfig.model_validate(keys)


@pytest.mark.parametrize(
    ("flat_method", "hyper", "mix"),
    [("sagm", {}, (0.5, 0.5)), ("sam", {}, (0.0, 1.0)), ("gnp", {}, (0.2, 0.8)), ("gnp", {"alpha": 0.5}, (0.5, 0.5)),
     ("wsam", {"gamma": 0.2, "decouple": False}, (0.75, 0.25))],
)  # fmt: skip
def test_gaqat_composes_by_the_shares_that_the_flat_method_has_under_its_hyper_parameters(flat_method, hyper, mix):
    run, keys = context(), config("quantize", method="gaqat", flat=flat_method, **hyper)
    quantize.insert(run.model, run.example(), keys)
    assert quantize.scale_conflict(run.model, keys).mix == pytest.approx(mix)


def test_gaqat_is_refused_where_the_flat_method_moves_weights_beside_the_optimizer():
    with pytest.raises(ValueError, match="decouple: false"):
        config("quantize", method="gaqat", flat="wsam")


def test_what_scales_do_is_switched_by_the_recipe():
    work = context()
    plain = config("quantize", method="lsq")
    assert quantize.scale_course(work, plain, 10) == []  # today's bits
    kept = config("quantize", method="lsq", scale_stop=0.0, epochs=1)
    run_stage("quantize", work, kept)
    learned = list(quant.tensor_quantizers(work.model).values())
    assert all(torch.equal(q.scale, q.initial) for q in learned)


def test_relative_steps_reach_the_scales_of_activations():
    travelled = {}
    for steps in ("absolute", "relative"):
        work = context()
        keys = {"optimizer": {"name": "adam", "lr": 1e-3, "weight_decay": 0}, "scale_lr": 1.0, "epochs": 1}
        run_stage("quantize", work, config("quantize", method="lsq", scale_steps=steps, **keys))
        made = quant.tensor_quantizers(work.model)
        travelled[steps] = [float((q.scale / q.initial).log().abs().max()) for q in made.values()]
    assert max(travelled["relative"]) < 20 * sorted(travelled["relative"])[len(travelled["relative"]) // 4]
    assert max(travelled["absolute"]) / min(travelled["absolute"]) > max(travelled["relative"]) / min(
        travelled["relative"]
    )


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"scale_stop": 0.2, "scale_warmup": 0.3}, "must lie after"),
        ({"scale_stop": 0, "scale_turns": 3}, "that move"),
        ({"method": "squat", "scale_turns": 3}, "takes turns"), ({"mode": "random", "tau_kind": "sigma"}, "quantile"),
    ],
)  # fmt: skip
def test_orders_to_scales_that_make_no_sense_are_refused(keys, reason):
    with pytest.raises(ValueError, match=reason):
        config("quantize", **keys)


def test_relative_steps_of_stock_quantizers_are_refused_before_anything_runs():
    work = context()
    with pytest.raises(UserError, match="take absolute steps"):
        quantize.dry_run(work.model, work.example(), config("quantize", quantizer="brevitas", scale_steps="relative"))
