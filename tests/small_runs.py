"""Runs of a second or less for the tests of sessions: few digits, the smallest network, nothing measured."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tiny_net import TinyNet

from flatcompress import Pipeline, data

TRAIN = {"train": {"method": "sam", "epochs": 2}}
PRUNE = {"prune": {"method": "magnitude", "epochs": 2, "schedule_steps": 1}}
STEPS = 5  # optimizer steps of an epoch


@functools.cache
def bundle() -> data.DataBundle:
    """About 700 training digits in one domain."""
    return data.load("rotated-digits", domains=["0"], size=8, test_fraction=0.6, corruptions="none", corrupted_count=8)


def pipeline(*stages: dict[str, Any], **options: Any) -> Pipeline:
    """A pipeline over `bundle` whose model is the same every time."""
    torch.manual_seed(7)
    options = {"device": "cpu", "threads": 1, "checkpoint_every": 1, "batch_size": 100, **options}
    return Pipeline(model=TinyNet(10), data=bundle(), stages=list(stages), **options)


def only_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured after a stage has its own tests; here it would only take time."""

    def row(work: Any, stage: str, method: str, seconds: float, passes: int, flatness: bool = True) -> dict[str, Any]:
        return {"stage": stage, "method": method, "passes": passes, "seconds": seconds}

    monkeypatch.setattr("flatcompress.pipeline.measure", row)
    monkeypatch.setattr("flatcompress.pipeline.dry_run", lambda work, stages: None)
    monkeypatch.setattr("flatcompress.session.Session.report", lambda self: None)


def same(first: Any, second: Any) -> bool:
    """Do two results have the same weights, plan and ledger, clocks left out?"""
    a, b = first.model.state_dict(), second.model.state_dict()
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.ledger] for r in (first, second)]
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a) and rows[0] == rows[1]
