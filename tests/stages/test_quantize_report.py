"""What a real quantize stage measures stands in the log and in the report."""

from __future__ import annotations

import pytest
from tiny import recipe, write

from flatcompress import Pipeline
from flatcompress.report import build
from flatcompress.store.runlog import read_events


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    keys = {"method": "gaqat", "epochs": 2, "K": 2, "bits": "auto", "effective_bits": 4.0, "optimizer": {"lr": 1e-3}}
    raw = recipe(stages=[{"quantize": keys}])
    raw["data"]["corruptions"] = "none"
    folder = tmp_path_factory.mktemp("run")
    return Pipeline.from_yaml(write(folder, raw)).run().folder


def events(run, kind):
    return [e for e in read_events(run / "log.jsonl") if e["event"] == kind]


def test_gaqat_timeline_is_in_the_log_and_the_report(run):
    rows = events(run, "conflict")
    assert rows and all(
        {"disorder", "conflict", "frozen", "scale_ratio"} <= set(q) for q in rows[-1]["quantizers"].values()
    )
    page = build(run).read_text(encoding="utf-8")
    assert "Scale-gradient conflict" in page and "s / s₀" in page
    assert all(f"<th>{name}</th>" in page for name in rows[-1]["quantizers"])


def test_chosen_bits_and_the_flatness_map_are_in_the_log_and_the_report(run):
    (chosen,) = events(run, "bits")
    (mapped,) = events(run, "flatness")
    bits = {row["name"]: row["bits"] for row in mapped["layers"]}
    assert chosen["bits"].items() <= bits.items()  # the ends of the network keep their own
    assert all(row["grid_move"] > 0 for row in mapped["layers"])
    assert any(row["strain"] is not None for row in mapped["layers"])
    page = build(run).read_text(encoding="utf-8")
    assert "Bits and flatness" in page and "a budget of 4 bits per weight" in page
    assert all(
        f'<tr><th>{name}</th><td class="bits"><span class="bit w">W{b}</span>' in page for name, b in bits.items()
    )
