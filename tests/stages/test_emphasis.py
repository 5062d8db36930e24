"""Emphasis: clusters, weights and radii by hand; neutral keys are plain training bit for bit; it resumes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stage_pieces import StopAt, config, context

from flatcompress.errors import Interrupted, UserError
from flatcompress.stages import run_stage
from flatcompress.stages.emphasis import ClassBalanced, DeferredWeights, effective_weights, slow_samples
from flatcompress.tasks import build
from flatcompress.tasks.losses import CrossEntropy
from flatcompress.training.devices import seed_everything

SAM = {"method": "sam"}


def weights(run):
    return run.model.state_dict()


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_the_cluster_of_the_higher_loss_is_the_slow_one_in_every_class():
    outputs = torch.tensor([[5.0, 0], [5.1, 0], [0.2, 0], [0, 4.0], [0, 0.3], [0, 0.1]])
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    losses = torch.nn.functional.cross_entropy(outputs, labels, reduction="none")
    assert slow_samples(outputs, losses, labels) == [2, 4, 5]
    assert slow_samples(torch.ones(4, 2), torch.ones(4), torch.tensor([0, 0, 1, 1])) == []


@pytest.mark.parametrize(
    "emphasis",
    [{"name": "useful", "upsample": 1}, {"name": "reweight", "beta": 0}, {"name": "drw", "beta": 0, "late_rho": 0.05}],
    ids=lambda given: given["name"],
)
def test_neutral_keys_are_plain_training_bit_for_bit(emphasis):
    plain = run_stage("train", context(), config("train", **SAM))
    found = run_stage("train", context(), config("train", emphasis=emphasis, **SAM))
    assert same(weights(plain), weights(found))


def test_useful_trains_anew_on_more_of_what_is_slow_and_resumes_in_the_same_bits():
    keys = config("train", emphasis="useful", **SAM)
    events = []
    whole = context()
    whole.emit = lambda event, **fields: events.append((event, fields))
    whole = run_stage("train", whole, keys)
    slow = next(fields["slow"] for event, fields in events if event == "useful")
    steps = [16 * (4 + (64 + slow) // 16 * 2)]  # one separating epoch of four steps, then two longer ones
    assert 0 < slow < 64 and whole.passes * 8 == steps[0]
    assert len(whole.data.train) == 64 and not same(
        weights(whole), weights(run_stage("train", context(), config("train", **SAM)))
    )
    for stop in (2, 6):  # in either phase
        stopped = context()
        stopped.progress = StopAt(stop)
        if stop == 6:
            stopped.progress.due = after_phase(stopped)
        with pytest.raises(Interrupted):
            run_stage("train", stopped, keys)
        resumed = context()
        resumed.resume = stopped.progress.state
        seed_everything(99)
        assert same(weights(run_stage("train", resumed, keys)), weights(whole))


def test_max_steps_bounds_the_longer_epochs_too():
    whole = run_stage("train", context(), config("train", emphasis="useful", method="none", epochs=5, max_steps=17))
    assert whole.passes == 4 + 17  # one separating epoch


def after_phase(run):
    def due(step):
        run.progress.stop_requested = run.phase["name"] == "train" and step >= 3
        return run.progress.stop_requested

    return due


def test_effective_numbers_by_hand():
    # (1 - b)/(1 - b^n) with b = 0.5: n = 1: 1; n = 2: 0.5/0.75 = 2/3; n = 3: 0.5/0.875 = 4/7; their sum is 47/21.
    want = torch.tensor([1, 2 / 3, 4 / 7]) * 3 * 21 / 47
    torch.testing.assert_close(effective_weights(torch.tensor([1, 2, 3]), 0.5), want)
    assert torch.equal(effective_weights(torch.tensor([3, 1, 900]), 0.0), torch.ones(3))


class _Open:
    def __init__(self, groups):
        self.optimizer = type("O", (), {"param_groups": groups})()


def test_weights_and_the_larger_radius_begin_in_their_epoch():
    groups = [{"rho": 0.05}]
    found = DeferredWeights(ClassBalanced(0.5, 0.5, 0.3), CrossEntropy(), torch.tensor([2, 1]), begins=2)
    found.open(_Open(groups))
    output, y = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])
    terms = torch.nn.functional.cross_entropy(output, y, reduction="none")
    found.before_epoch(1)
    torch.testing.assert_close(found(output, y), terms.mean())
    assert groups[0]["rho"] == 0.05
    found.before_epoch(2)
    torch.testing.assert_close(found(output, y), (0.8 * terms[0] + 1.2 * terms[1]) / 2)
    assert groups[0]["rho"] == 0.3


def test_the_late_radius_is_what_the_optimizer_climbs_with():
    late = config("train", emphasis={"name": "reweight", "beta": 0, "late_rho": 0.2}, **SAM)
    wide = config("train", rho=0.2, **SAM)
    assert same(weights(run_stage("train", context(), late)), weights(run_stage("train", context(), wide)))


@pytest.mark.parametrize(
    ("emphasis", "said"),
    [("usefull", "useful"), ({"name": "useful", "upsampel": 2}, "upsample"), ({"name": "drw", "beta": 1.5}, "below 1"),
     ({"name": "useful", "separating": 0}, "share of the epochs"), ({"beta": 0.5}, "a name")],
)  # fmt: skip
def test_wrong_keys_are_said(emphasis, said):
    with pytest.raises(ValueError, match=said):
        config("train", emphasis=emphasis)


def test_what_has_no_classes_or_two_sets_of_weights_is_refused():
    run = context()
    run.data = replace(run.data, task=build("regression"))
    with pytest.raises(UserError, match="one class a sample"):
        run_stage("train", run, config("train", emphasis="useful"))
    run = context()
    run.data = replace(run.data, task=run.task.changed(loss=CrossEntropy(torch.ones(4))))
    with pytest.raises(UserError, match="leave one of them out"):
        run_stage("train", run, config("train", emphasis="drw"))
    with pytest.raises(UserError, match="has none"):
        run_stage("train", context(), config("train", method="none", emphasis={"name": "drw", "late_rho": 0.1}))
