from __future__ import annotations

import math

import pytest
import small_runs
import torch
from torch import nn

from flatcompress import flat
from flatcompress.errors import RunError
from flatcompress.training import divergence
from flatcompress.training.callback import Callback
from flatcompress.training.job import Job
from flatcompress.training.loop import fit, make_accelerator
from flatcompress.training.steps import MOST_SKIPS


class Points(torch.utils.data.Dataset):
    """64 points; those in ``bad`` are not numbers."""

    def __init__(self, bad=()):
        self.x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        self.y = (self.x[:, 0] > 0).long()
        self.x[list(bad)] = math.nan

    def __len__(self):
        return 64

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class Kept:
    """A progress that keeps every state in memory."""

    stop_requested = False

    def __init__(self, policy="stop", rollbacks=3, every=1):
        self.on_divergence, self.max_rollbacks, self.on_out_of_memory = policy, rollbacks, "stop"
        self.every, self.states, self.incidents = every, [], []

    def due(self, step):
        return step % self.every == 0

    def save(self, step, state):
        from flatcompress.store.codec import decode, encode

        self.states.append(decode(*encode(state)))

    def last(self):
        return self.states[-1] if self.states else None

    def incident(self, finding):
        self.incidents.append(finding)


def job(progress, bad=(), epochs=2, method="sam", model=None, lr=0.1, **options):
    torch.manual_seed(1)
    model = model or nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    base = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return Job(
        model=model,
        optimizer=flat.create(method, model, base),
        train=Points(bad),
        accelerator=make_accelerator("cpu"),
        epochs=epochs,
        batch_size=16,
        seed=0,
        schedule="constant",
        select="last",
        validate=lambda: 0.0,
        progress=progress,
        **{"loss": nn.functional.cross_entropy, **options},
    )


class Seen(Callback):
    """Calls back what a test wants to happen."""

    def __init__(self, after_step=None, after_backward=None):
        self.step, self.backward = after_step, after_backward

    def after_step(self, step):
        if self.step is not None:
            self.step(step)

    def after_backward(self):
        if self.backward is not None:
            self.backward()


def exploding_at(step, times=1):
    """A loss that becomes infinite in the first pass of ``step`` (counted from 1), so many times."""
    loss, count = nn.functional.cross_entropy, {"calls": 0, "left": times}
    wanted = 2 * (step - 1)  # SAM: two passes a step

    def exploding(logits, y):
        count["calls"] += 1
        if count["calls"] > wanted and count["left"] > 0:
            count["left"] -= 1
            return loss(logits, y) * math.inf
        return loss(logits, y)

    return exploding


def test_stop_names_the_step_and_the_input_and_leaves_sound_weights():
    trained = job(Kept(), bad=[5])
    with pytest.raises(RunError, match=r"step \d+: the loss became nan; .* input batch\. Lower .*on_divergence"):
        fit(trained)
    assert all(torch.isfinite(v).all() for v in trained.model.state_dict().values())


def test_an_activation_is_named_with_its_layer_and_bits():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model[2].bits = 2
    with torch.no_grad():
        model[2].weight.fill_(3e38)
    finding = divergence.find(model, torch.ones(2, 4) * 1e3, math.inf, 7)
    assert (finding["what"], finding["layer"], finding["bits"], finding["step"]) == ("activation", "2", 2, 7)
    assert "the activation of '2' (2 bit)" in divergence.describe(finding)


def test_a_scale_and_a_gradient_are_named():
    class Quantizer(nn.Module):
        def __init__(self):
            super().__init__()
            self.bits, self.scale = 3, nn.Parameter(torch.tensor(math.nan))

    model = nn.Sequential(nn.Linear(4, 2))
    model[0].weight.grad = torch.full((2, 4), math.inf)
    assert divergence.find(model, torch.ones(2, 4), 1.0, 1)["what"] == "gradient"
    model.add_module("quantizer", Quantizer())
    finding = divergence.find(model, torch.ones(2, 4), 1.0, 1)
    assert (finding["what"], finding["layer"], finding["bits"]) == ("scale", "quantizer.scale", 3)


def test_an_infinite_gradient_under_a_finite_loss_is_seen():
    trained = job(Kept(), callbacks=[Seen(after_backward=lambda: trained.model[0].weight.grad.fill_(math.inf))])
    with pytest.raises(RunError, match=r"the loss is finite; .* gradient of '0.weight'"):
        fit(trained)


def test_skip_leaves_out_the_step_and_nothing_else():
    progress, seen = Kept("skip"), []
    keep = Seen(lambda step: seen.append([v.clone() for v in trained.model.state_dict().values()]))
    trained = job(progress, bad=[5], callbacks=[keep])
    fit(trained)
    assert [f["action"] for f in progress.incidents] == ["skip", "skip"]  # once an epoch
    assert len(seen) == 8
    for finding in progress.incidents:
        before, after = seen[finding["step"] - 2], seen[finding["step"] - 1]
        assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert all(torch.isfinite(v).all() for v in trained.model.state_dict().values())


def test_skip_gives_up_when_it_cannot_help():
    trained = job(Kept("skip"), bad=range(64), epochs=20)
    with pytest.raises(RunError, match="does not help"):
        fit(trained)
    assert len(trained.progress.incidents) == MOST_SKIPS
    broken = job(Kept("skip"))
    with torch.no_grad():
        broken.model[0].weight[0, 0] = math.nan
    with pytest.raises(RunError, match=r"parameter of '0.weight'.*does not help"):
        fit(broken)


def test_rollback_goes_back_to_the_last_state_at_half_the_learning_rate():
    progress, rates = Kept("rollback", every=2), {}
    keep = Seen(lambda step: rates.setdefault(step, []).append(trained.optimizer.param_groups[0]["lr"]))
    trained = job(progress, loss=exploding_at(step=6), callbacks=[keep])
    fit(trained)
    assert [(f["action"], f["step"], f["to_step"]) for f in progress.incidents] == [("rollback", 6, 4)]
    assert rates[4] == [0.1] and rates[5] == [0.1, 0.05] and rates[6] == [0.05]


def test_rollback_before_the_first_checkpoint_goes_back_to_the_start():
    progress = Kept("rollback", every=1000)
    trained = job(progress, loss=exploding_at(step=3, times=2))
    fit(trained)
    assert [(f["to_step"], f["lr_factor"]) for f in progress.incidents] == [(0, 0.5), (0, 0.25)]


def test_rollback_ends_after_so_many_times():
    progress = Kept("rollback", rollbacks=2)
    trained = job(progress, loss=exploding_at(step=3, times=99))
    with pytest.raises(RunError, match="2 times in vain"):
        fit(trained)
    assert len(progress.incidents) == 2


def test_a_resumed_job_keeps_the_smaller_learning_rate():
    progress = Kept("rollback")
    fit(job(progress, loss=exploding_at(step=3)))
    rates = []
    keep = Seen(lambda step: rates.append(resumed.optimizer.param_groups[0]["lr"]))
    resumed = job(Kept(), resume=progress.states[-2], callbacks=[keep])
    assert resumed.resume["recovery"]["rollbacks"] == 1
    fit(resumed)
    assert rates and set(rates) == {0.05}


def test_the_ledger_says_what_diverged(tmp_path, monkeypatch):
    small_runs.only_training(monkeypatch)
    real, calls = divergence.finite, []

    def finite(loss, gradients):
        calls.append(1)
        return len(calls) != 5 and real(loss, gradients)

    monkeypatch.setattr(divergence, "finite", finite)
    result = small_runs.pipeline(small_runs.TRAIN, on_divergence="rollback").run(tmp_path / "run")
    (incident,) = result.ledger[0]["divergences"]
    assert (incident["step"], incident["action"], incident["to_step"]) == (3, "rollback", 2)
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert '"event": "divergence"' in log and "back to step 2, half the learning rate" in log
