"""The elastic stage: one width is plain training, a stopped run ends in the same bits, every width's file holds."""

from __future__ import annotations

import json

import pytest
import torch
from stage_pieces import StopAt, config, context

from flatcompress import Pipeline, quant
from flatcompress.errors import Interrupted, UserError
from flatcompress.plan import apply_plan
from flatcompress.recipe import parse_recipe
from flatcompress.stages import members, run_stage
from flatcompress.stages.families import Widths
from flatcompress.training.devices import seed_everything

THREE = {"widths": [0.25, 0.5, 1.0], "method": "sam"}


def test_the_full_width_alone_is_plain_training_bit_for_bit():
    plain = run_stage("train", context(), config("train", method="sam"))
    family = run_stage("elastic", context(), config("elastic", method="sam", widths=[1.0]))
    assert family.passes == plain.passes
    found = family.model.full.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in plain.model.state_dict().items())


def test_narrow_widths_are_drawn_as_often_as_one_over_their_width():
    family = run_stage("elastic", context(), config("elastic", epochs=1, **THREE)).model
    counts = {}
    for sampling, power in (("one", 1.0), ("narrow", 1.0), ("narrow", 0.5)):
        widths = Widths(family, sampling, 0, torch.nn.functional.cross_entropy, power)
        drawn = []
        for step in range(2100):
            widths.after_step(step)
            assert not widths.others
            drawn.append(family.active)
        counts[sampling, power] = [drawn.count(index) for index in range(3)]
    assert family.widths == [0.25, 0.5, 1.0]
    assert all(abs(count - 700) < 70 for count in counts["one", 1.0])
    assert all(abs(count - share) < 70 for count, share in zip(counts["narrow", 1.0], (1200, 600, 300)))
    root = [2100 * share / (2 + 2**0.5 + 1) for share in (2, 2**0.5, 1)]
    assert all(abs(count - share) < 70 for count, share in zip(counts["narrow", 0.5], root))


def test_a_stopped_stage_ends_in_the_same_bits():
    keys = config("elastic", sampling="sandwich", **THREE)
    whole = run_stage("elastic", context(), keys)
    stopped = context()
    stopped.progress = StopAt(5)
    with pytest.raises(Interrupted):
        run_stage("elastic", stopped, keys)
    resumed = context()
    resumed.resume = stopped.progress.state
    seed_everything(1234)
    resumed = run_stage("elastic", resumed, keys)
    assert resumed.plan.to_json() == whole.plan.to_json() and resumed.passes == whole.passes
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_all_widths_share_the_loss_and_every_pass_is_counted():
    one = run_stage("elastic", context(), config("elastic", epochs=1, widths=[0.5, 1.0], method="none"))
    run = context()
    run = run_stage("elastic", run, config("elastic", epochs=1, widths=[0.5, 1.0], sampling="all", method="none"))
    assert run.passes == 2 * one.passes
    family = run.model
    widths = Widths(family, "all", 0, torch.nn.functional.cross_entropy)
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    widths._choose()
    widths._input = (x,)
    outputs = []
    for index in (1, 0):
        with family.eval().at(index):
            outputs.append(family(x))
    losses = [torch.nn.functional.cross_entropy(out, y) for out in outputs]
    term = widths.loss_term(outputs[0], y)
    torch.testing.assert_close(losses[0] + term, sum(losses) / 2)


def test_every_width_has_scales_of_its_own_and_the_plan_builds_it_again():
    run = run_stage("elastic", context(), config("elastic", epochs=1, widths=[0.5, 1.0], method="none"))
    run = run_stage("quantize", run, config("quantize", method="lsq_sam", epochs=1))
    family = run.model
    steps = [quant.scale_parameters(network)["conv1"] for network in (*family.narrower, family.full)]
    assert [len(s) for s in steps] == [4, 8]
    x = run.data.test.x
    for index in range(2):
        part = members.trained(run, index)
        again = apply_plan(run.build(), part.plan, x[:2])
        again.load_state_dict(part.model.state_dict())
        quant.set_bias_rounding(again)
        assert torch.equal(again.eval()(x), part.model.eval()(x))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"elastic": {}}, {"quantize": {"method": "gaqat"}}], "'gaqat' follows the quantizers of one network"),
        ([{"elastic": {}}, {"quantize": {"epochs": 0}}], "made for one network"),
        ([{"elastic": {}}, {"quantize": {"method": "lsq", "scale_steps": "relative"}}], "scales of one network"),
        ([{"elastic": {}}, {"train": {}}], "Put those epochs into the elastic stage"),
        ([{"elastic": {}}, {"prune": {}}], "Prune channels first"),
        ([{"train": {}}, {"quantize": {}}, {"elastic": {}}], "Put 'quantize' after it"),
        ([{"train": {}}, {"export": {"profile": "float32", "widths": [0.5]}}], "nothing before it trains widths"),
        ([{"elastic": {"widths": [0.5, 0.25, 1.0]}}], "must rise to 1.0"),
        ([{"elastic": {"importance": "taylor"}}], "needs gradients"),
        ([{"elastic": {"narrow_power": 0.5}}], "is for sampling: narrow"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(stages, message):
    with pytest.raises(UserError, match=message):
        parse_recipe(
            {"name": "x", "data": {"name": "rotated-digits"}, "model": {"name": "resnet8"}, "stages": stages}, ""
        )


@pytest.mark.slow
def test_one_run_gives_a_family_of_files_that_hold(tmp_path):
    pipeline = Pipeline(
        model={"name": "resnet8"},
        data={"name": "rotated-digits", "domains": ["0"], "size": 8, "test_fraction": 0.6, "corruptions": "none"},
        stages=[
            {"elastic": {**THREE, "epochs": 8}},
            {"quantize": {"method": "lsq_sam", "epochs": 2}},
            {"export": {"latency": False, "widths": [0.4, 0.5], "mix": {"conv1": 0.5}}},
        ],
        device="cpu", threads=1, batch_size=64, measure="off",
    )  # fmt: skip
    result = pipeline.run(tmp_path / "run")
    folders = ["", "width-0.4", "width-0.5", "mix"]
    certificates = [json.loads((tmp_path / "run" / f / "certificate.json").read_text()) for f in folders]
    assert [c["holds"] for c in certificates] == [True] * 4
    rows = {row["method"]: row["params"] for row in result.ledger}
    assert rows["packed, width-0.4"] < rows["packed, width-0.5"] < rows["packed"]
    again = pipeline.run(tmp_path / "run")
    assert [row["stage"] for row in again.ledger] == [row["stage"] for row in result.ledger]
