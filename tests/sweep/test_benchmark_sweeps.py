"""The benchmarks that train: every run of theirs is a valid recipe, claims are judged as they say, pages say it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks import (
    _common,
    _sweeps,
    adasap_ablation,
    domain_generalization,
    flat_family,
    pipeline_vs_parts,
    robust_pruning,
)
from benchmarks._sweeps import Claim, judge
from flatcompress import flat
from flatcompress.sweep import pool
from flatcompress.sweep.pool import Finished
from flatcompress.sweep.spec import parse_sweep, runs_of

RECIPE = {"data": {"name": "styled-shapes"}, "model": {"name": "resnet8"}, "stages": [{"train": {}}]}
METHODS = {
    "domain_generalization": domain_generalization.methods([4, 3, 2], (12, 6), False),
    "robust_pruning": robust_pruning.methods([0.5, 0.25], (12, 12), False),
    "adasap_ablation": adasap_ablation.methods([0.25, 0.125], (12, 12), list(adasap_ablation.PHASES)),
    "pipeline_vs_parts": pipeline_vs_parts.methods((12, 12, 6)),
    "flat_family": flat_family.methods([n for n in flat.METHODS if n not in flat_family.LEFT_OUT], 12, False),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_run_of_a_benchmark_is_a_valid_recipe(name):
    sweep = parse_sweep({"recipe": RECIPE, "methods": METHODS[name], "seeds": [0], "held_out": ["sketch"]})
    assert len(pool.check_all(sweep)) >= len(METHODS[name])


def test_benchmarks_claim_only_what_they_run():
    pairs = {
        "domain_generalization": domain_generalization.claims([4, 3, 2]),
        "robust_pruning": robust_pruning.claims([0.5, 0.25]),
        "adasap_ablation": adasap_ablation.claims([0.25, 0.125], list(adasap_ablation.PHASES)),
        "pipeline_vs_parts": pipeline_vs_parts.CLAIMS,
    }
    for name, claims in pairs.items():
        names = {m["name"] for m in METHODS[name]}
        assert {c.method for c in claims} | {c.other for c in claims} <= names


def finished(method: str, values: list[float]) -> list[Finished]:
    sweep = parse_sweep({"recipe": RECIPE, "methods": [{"name": method}], "seeds": list(range(len(values)))})
    runs = runs_of(sweep, sweep.methods[0], {}, sweep.seeds, ["sketch"])
    row = {"passes": 1, "seconds": 1.0}
    return [
        Finished(r, Path(), [{**row, "accuracy": {"held_out": v, "test": v, "corrupted": None}}], 0.5)
        for r, v in zip(runs, values)
    ]


@pytest.mark.parametrize(
    ("gains", "keys", "holds"),
    [([0.1, 0.1], {}, True), ([-0.1, 0.05], {}, False), ([0.04, 0.04], {"least": 0.05}, False),
     ([0.0, 0.1], {"standard_errors": 2}, False), ([0.09, 0.1], {"standard_errors": 2}, True)],
)  # fmt: skip
def test_claims_hold_by_paired_gain_and_standard_error(gains, keys, holds):
    runs = finished("new", [0.5 + g for g in gains]) + finished("old", [0.5] * len(gains))
    assert judge(runs, [Claim("new", "old", **keys)])[0].holds is holds


def test_a_claim_without_runs_is_said_not_to_be_run():
    verdict = judge(finished("new", [0.5]), [Claim("new", "old")])[0]
    assert not verdict.holds and "not run" in verdict.text()


def test_page_names_what_does_not_hold_and_check_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_sweeps, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(_common, "RESULTS", tmp_path / "results")
    runs = finished("new", [0.4, 0.4]) + finished("old", [0.5, 0.5])
    options = argparse.Namespace(quick=False, check=True)
    code = _sweeps.publish("demo", "Demo", "Words.", {"All": runs}, [Claim("new", "old")], options)
    page = (tmp_path / "docs" / "demo.md").read_text()
    assert code == 1 and "DOES NOT HOLD: new against old" in page and "-10.0 points" in page
    assert "new against old" in (tmp_path / "docs" / "what-did-not-work.md").read_text()
    assert "MISSED" in capsys.readouterr().out
