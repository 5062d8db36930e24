"""Callbacks: one list, fixed when the job is built, every event in its order, closed whatever happens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_divergence import Kept, exploding_at, job

from flatcompress.errors import RunError
from flatcompress.training.callback import Callback
from flatcompress.training.loop import fit


class Noted(Callback):
    """Writes down what it is told."""

    def __init__(self, name, events):
        self.name, self.events, self.steps = name, events, 0

    def open(self, job):
        self.events.append((self.name, "open"))

    def before_epoch(self, epoch):
        self.events.append((self.name, f"before epoch {epoch}"))

    def after_backward(self):
        self.events.append((self.name, "backward"))

    def after_step(self, step):
        self.steps += 1
        self.events.append((self.name, f"step {step}"))

    def after_epoch(self, epoch):
        self.events.append((self.name, f"after epoch {epoch}"))

    def close(self):
        self.events.append((self.name, "close"))

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def test_every_event_goes_through_the_list_in_its_order():
    events = []
    fit(job(None, epochs=1, callbacks=[Noted("a", events), Noted("b", events)]))
    assert events[:4] == [("a", "open"), ("b", "open"), ("a", "before epoch 0"), ("b", "before epoch 0")]
    step = [(name, what) for what in ("backward", "backward", "step 1") for name in "ab"]  # SAM: two passes a step
    assert events[4:10] == step
    assert events[-4:] == [("a", "after epoch 0"), ("b", "after epoch 0"), ("b", "close"), ("a", "close")]


def test_callbacks_are_closed_after_an_error_too():
    events = []
    with pytest.raises(RunError):
        fit(job(Kept(), callbacks=[Noted("a", events)], loss=exploding_at(step=2)))
    assert events[-1] == ("a", "close")


def test_state_is_saved_and_handed_back():
    progress = Kept()
    fit(job(progress, epochs=1, callbacks=[Noted("a", []), Callback()]))
    assert [state["callbacks"] for state in progress.states[:2]] == [{"a": {"steps": 1}}, {"a": {"steps": 2}}]
    resumed = Noted("a", [])
    fit(job(None, epochs=1, callbacks=[resumed, Callback()], resume=progress.states[1]))
    assert resumed.steps == 4


def test_terms_of_the_loss_are_added_in_every_pass():
    class Term(Callback):
        def loss_term(self, output, y):
            return 0 * output.sum() + 3.0

    plain, more, losses = job(None, epochs=1), job(None, epochs=1, callbacks=[Term(), Callback(), Term()]), []
    output, y = torch.zeros(2, 2), torch.zeros(2, dtype=torch.long)
    assert float(more.total_loss(output, y)) == pytest.approx(float(plain.total_loss(output, y)) + 6)
    for trained in (plain, more):
        fit(trained)
        losses.append([p.detach() for p in trained.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))  # a constant moves nothing


def test_nothing_is_assigned_to_a_job_after_it_is_built():
    made = job(None, callbacks=[Callback()])
    assert isinstance(made.callbacks, tuple)
    for field in dataclasses.fields(made):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, None)


def test_two_callbacks_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two callbacks of a job are named 'a'"):
        job(None, callbacks=[Noted("a", []), Noted("a", [])])
