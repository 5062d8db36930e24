"""The loss scaler of half precision is part of a job's state."""

from __future__ import annotations

from dataclasses import replace

import torch
from test_divergence import Kept, job

from flatcompress import flat
from flatcompress.training.loop import fit


def scaled(progress, **options):
    made = job(progress, **options)
    made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    base = torch.optim.SGD(made.model.parameters(), lr=0.1, momentum=0.9)
    return replace(made, optimizer=flat.create("sam", made.model, base, scaler=made.accelerator.scaler))


def test_a_resumed_job_goes_on_with_the_scale_it_had():
    whole = scaled(Kept())
    fit(whole)
    states = whole.progress.states
    assert [state["scaler"]["scale"] for state in states] == [2.0**e for e in (10, 10, 11, 11, 11, 12, 12, 12)]
    resumed = scaled(Kept(), resume=states[3])
    fit(resumed)
    assert resumed.accelerator.scaler.state_dict() == whole.accelerator.scaler.state_dict()


def test_without_a_scaler_there_is_none_in_the_state():
    trained = job(Kept())
    fit(trained)
    assert "scaler" not in trained.progress.states[0]
