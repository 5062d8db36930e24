"""Measuring takes at most its share of a stage's training, by samples and layers that are the same every time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stage_pieces import context

from flatcompress.stages import budget
from flatcompress.stages.measure import FULL, measure

TRAINED = [3_000, 20_000, 200_000, 10**7]


def forwards(sizes: budget.Sizes) -> int:
    """What the three cost, in forward passes of one sample."""
    whole = (budget.GRADIENT + 2) * sizes.whole
    return whole + (budget.GRADIENT + sizes.layers) * sizes.each + budget.PROBES * budget.HESSIAN * sizes.map


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("layers", [1, 9, 50, 400])
def test_a_quarter_of_the_training_is_not_exceeded(trained: int, layers: int) -> None:
    found = budget.sizes("quick", trained, layers, FULL)
    assert forwards(found) <= budget.SHARE * budget.GRADIENT * trained
    assert found.layers <= layers


def test_a_long_training_has_everything_measured_and_a_short_one_the_least() -> None:
    assert budget.sizes("quick", 10**7, 50, FULL) == budget.Sizes(FULL.whole, FULL.each, 50, FULL.map)
    assert budget.sizes("quick", 0, 50, FULL) == budget.Sizes(32, 16, 8, 8)
    assert budget.sizes("full", 0, 50, FULL) == FULL


@pytest.mark.parametrize("count", [2, 3, 8, 9, 40])
def test_layers_are_taken_from_the_first_to_the_last(count: int) -> None:
    names = [str(i) for i in range(9)]
    found = budget.spread(names, count)
    assert len(set(found)) == min(count, 9) and found == sorted(found) and {found[0], found[-1]} == {"0", "8"}


def test_what_is_left_out_is_said_and_the_rest_is_what_full_measures() -> None:
    events = []
    run = context(emit=lambda event, **fields: events.append((event, fields)))
    full = measure(run, "train", "none", 0.0, 0)
    everything = {r["name"]: r["sharpness"] for event, f in events if event == "layers" for r in f["layers"]}
    events.clear()
    run.measuring = "quick"
    run.batch_size, passes = 64, 11  # 16 samples of 8 layers
    quick = measure(run, "train", "none", 0.0, passes)
    (said,) = (fields for event, fields in events if event == "sampled")
    rows = {r["name"]: r["sharpness"] for event, f in events if event == "layers" for r in f["layers"]}
    measured = [name for name, value in rows.items() if value is not None]
    assert said == {"layers": 8, "of": len(everything), "samples": 16} and len(measured) == 8
    assert None not in everything.values() and quick["accuracy"] == full["accuracy"]
    assert quick["sharpness"] is not None


@pytest.mark.parametrize(("passes", "told"), [(40, True), (400, False)])
def test_fewer_samples_of_every_layer_are_said_too(passes: int, told: bool) -> None:
    events = []
    run = context(emit=lambda event, **fields: events.append((event, fields)), measuring="quick", batch_size=64)
    measure(run, "train", "none", 0.0, passes)
    said = [fields for event, fields in events if event == "sampled"]
    assert bool(said) == told and all(f["layers"] == f["of"] and 16 < f["samples"] < FULL.each for f in said)


def test_accuracy_no_better_than_guessing_is_a_warning() -> None:
    events = []
    run = context(emit=lambda event, **fields: events.append((event, fields)))
    for parameter in run.model.parameters():
        torch.nn.init.zeros_(parameter)  # one answer for every image
    measure(run, "train", "none", 0.0, 4)
    (said,) = (fields["message"] for event, fields in events if event == "warning")
    assert said.startswith("test accuracy 25.0% on 32 samples is no better than a guess among 4 classes (25.0%)")


def test_off_measures_no_sharpness_and_nothing_under_corruption() -> None:
    run = context()
    run.data = replace(run.data, corrupted={"noise": run.data.test})
    run.measuring = "off"
    row = measure(run, "train", "none", 0.0, 4)
    assert row["sharpness"] is None and row["corruptions"] == {} and row["accuracy"]["test"] is not None
    run.measuring = "quick"
    assert set(measure(run, "train", "none", 0.0, 4)["corruptions"]) == {"noise"}
