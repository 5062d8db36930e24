"""A stage is a record: one more is one more record, with its keys, its phases and its order rules."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import Field
from small_runs import pipeline
from stage_pieces import config, context
from torch import nn

from flatcompress import quant
from flatcompress.errors import Interrupted, RunError, UserError
from flatcompress.recipe import json_schema, parse_recipe
from flatcompress.stages import STAGES, Phase, Stage, StageKeys, order_problem, run_stage, stage_of
from flatcompress.stages.callbacks import Distillation
from flatcompress.stages.quantize import qat_job
from flatcompress.training.loop import fit

TRAIN = {"train": {"method": "none", "epochs": 1}}


class ShrinkConfig(StageKeys):
    """Multiply every weight by a factor, twice."""

    factor: float = Field(0.5, gt=0, description="what weights are multiplied by")


def shrink_phases(run, keys):
    def half(facts):
        with torch.no_grad():
            for p in run.model.parameters():
                p.mul_(keys.factor)
        return {"done": facts.get("done", 0) + 1}

    return [Phase("first", half), Phase("second", half)]


@pytest.fixture
def shrink(monkeypatch):
    """A stage kind that is there for one test: its record, and nothing else."""
    monkeypatch.setattr(STAGES, "_entries", dict(STAGES._entries))
    record = Stage(
        ShrinkConfig,
        shrink_phases,
        refuses_after={"quantize": "the scales would not fit. Shrink first."},
        needs_weights="has no weights to shrink. Train first.",
    )
    STAGES.add("shrink", lambda: record, "multiply the weights")


def test_a_new_kind_is_a_record_and_nothing_else(shrink, tmp_path):
    result = pipeline(TRAIN, {"shrink": {"factor": 0.25}}).run(tmp_path / "run")
    plain = pipeline(TRAIN).run(tmp_path / "plain")
    assert [row["stage"] for row in result.ledger] == ["train", "shrink"]
    weights = plain.model.state_dict()
    for name, value in result.model.named_parameters():
        assert torch.equal(value, weights[name] * 0.25 * 0.25)
    assert {"ShrinkConfig"} <= set(json_schema()["$defs"])


@pytest.mark.parametrize(
    ("stages", "message"),
    [([TRAIN, {"shrink": {"factr": 1}}], r"stages\.1\.shrink\.factr: unknown key\. Did you mean 'factor'"),
     ([TRAIN, {"shrink": {"factor": 0}}], r"stages\.1\.shrink\.factor: .*greater than 0"),
     ([TRAIN, {"quantize": {}}, {"shrink": {}}], "'shrink' comes after 'quantize': the scales would not fit"),
     ([{"shrink": {}}], "'shrink' has no weights to shrink"),
     ([TRAIN, {"export": {"profile": "float32"}}, {"shrink": {}}], "'shrink' comes after 'export'"),
     ([TRAIN, {"shrnk": {}}], "unknown stage. Did you mean 'shrink'")],
)  # fmt: skip
def test_its_keys_and_its_order_are_checked_like_any_other_s(stages, message, shrink):
    with pytest.raises(UserError, match=message):
        parse_recipe({"stages": stages})


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("before", STAGES)
def test_every_refused_order_says_why(before, kind):
    earlier = [("train", None), (before, None)]
    reason = stage_of(kind).refuses_after.get(before)
    if reason is not None:
        assert reason in order_problem(kind, None, earlier, True)
        assert reason.endswith(".") and len(reason) > 30


def test_a_later_phase_resumes_with_what_earlier_ones_found():
    seen = []

    def phases(run, keys):
        return [
            Phase(
                "one", lambda facts: seen.append("one") or {"a": 1}, lambda facts: seen.append(("again", facts["a"]))
            ),
            Phase("two", lambda facts: seen.append(("two", dict(facts), run.resume))),
        ]

    run = context()
    STAGES.add("probe", lambda: Stage(StageKeys, phases), "")
    try:
        run_stage("probe", run, None)
        assert seen == ["one", ("two", {"a": 1}, None)]
        assert run.phase == {"name": "two", "facts": {"a": 1}, "passes": 0}
        seen.clear()
        resumed = context()
        resumed.resume = {"context": {"name": "two", "facts": {"a": 1}, "passes": 7}}
        run_stage("probe", resumed, None)
        assert [item[0] for item in seen] == ["again", "two"] and resumed.passes == 7
        stranger = context()
        stranger.resume = {"context": {"phase": "remove"}}
        with pytest.raises(RunError, match=r"no phase of the stage 'probe' \(one, two\).*--restart"):
            run_stage("probe", stranger, None)
    finally:
        del STAGES._entries["probe"]


class Stopping:
    """A progress that asks to stop at once."""

    on_divergence, on_out_of_memory, max_rollbacks, stop_requested = "stop", "stop", 0, True

    def due(self, step):
        return False

    def save(self, step, state):
        pass


@pytest.mark.parametrize("stop", [False, True])
def test_distillation_leaves_no_hook_and_no_teacher_behind(stop):
    run = context()
    run.progress = Stopping() if stop else None
    c = config("quantize", method="lsq", distill=0.5, epochs=1)
    quant.quantize(run.model, 4, 4, example_input=run.example())
    quant.calibrate(run.model, [run.example()])
    job = qat_job(run, c, copy.deepcopy(context().model))
    if stop:
        with pytest.raises(Interrupted):
            fit(job)
    else:
        fit(job)
    assert not any(m._forward_pre_hooks for m in run.model.modules())
    (distillation,) = [callback for callback in job.callbacks if isinstance(callback, Distillation)]
    assert distillation._input is None and distillation._logits is None


def test_a_distilled_model_trains_on_without_its_teacher():
    run = run_stage("quantize", context(), config("quantize", method="lsq", distill=0.5, epochs=1))
    x, y = run.data.train.__getitems__([0, 1, 2, 3])
    loss = nn.functional.cross_entropy(run.model.train()(x), y)
    loss.backward()
    assert torch.isfinite(loss)
