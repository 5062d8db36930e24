"""Measuring takes at most its share of a stage's training, by samples and layers that are the same every time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stage_pieces import context

from flatcompress.data.bundle import ImageSet, Part
from flatcompress.data.images.pixels import ChunkedPixels, MemoryPixels
from flatcompress.stages import budget
from flatcompress.stages.measure import FULL, measure, some

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
    assert budget.sizes("quick", 0, 50, FULL) == budget.Sizes(16, 8, 4, 4)
    assert budget.sizes("full", 0, 50, FULL) == FULL


@pytest.mark.parametrize("trained", [0, 32, 320, 1200, 5000, 10**6])
@pytest.mark.parametrize("most", [16, 320, 512])
def test_scales_and_statistics_take_an_eighth_of_the_training_or_the_least_or_all(trained: int, most: int) -> None:
    found = budget.deciding(most, trained, 32)
    within = found <= budget.DECIDING * budget.GRADIENT * trained
    assert found <= most and (within or found == min(32, most))
    assert found == most or found + 1 > budget.DECIDING * budget.GRADIENT * trained


def test_recipes_that_train_on_enough_keep_their_calibration_and_statistics() -> None:
    for epochs, images, batch in ((5, 6295, 64), (6, 420, 64), (3, 800, 64), (6, 500, 32)):  # of configs/
        assert budget.deciding(512, epochs * images, batch) == 512
        assert budget.deciding(10 * batch, epochs * images, 2 * batch) == 10 * batch


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
    run.batch_size, passes = 64, 5  # 8 samples of 4 layers
    quick = measure(run, "train", "none", 0.0, passes)
    (said,) = (fields for event, fields in events if event == "sampled")
    rows = {r["name"]: r["sharpness"] for event, f in events if event == "layers" for r in f["layers"]}
    measured = [name for name, value in rows.items() if value is not None]
    assert said == {"layers": 4, "of": len(everything), "samples": 8} and len(measured) == 4
    assert None not in everything.values() and quick["accuracy"] == full["accuracy"]
    assert quick["sharpness"] is not None


@pytest.mark.parametrize(("passes", "told"), [(40, True), (400, False)])
def test_fewer_samples_of_every_layer_are_said_too(passes: int, told: bool) -> None:
    events = []
    run = context(emit=lambda event, **fields: events.append((event, fields)), measuring="quick", batch_size=64)
    measure(run, "train", "none", 0.0, passes)
    said = [fields for event, fields in events if event == "sampled"]
    assert bool(said) == told and all(f["layers"] == f["of"] and 16 < f["samples"] < FULL.each for f in said)


class Twice(torch.utils.data.Dataset):
    """A data set after itself."""

    def __init__(self, source):
        self.source = source

    def __len__(self) -> int:
        return 2 * len(self.source)

    def __getitems__(self, indices: list[int]):
        return self.source.__getitems__([i % len(self.source) for i in indices])


PARTS = {f"{kind}/{severity}": 80 for kind in ("noise", "blur", "fog") for severity in (1, 3, 5)}


@pytest.mark.parametrize("samples", [10**4, 10**5, 10**6])
@pytest.mark.parametrize("rows", [1, 4])
def test_corrupted_images_take_their_share_of_the_whole_training(samples: int, rows: int) -> None:
    parts = dict.fromkeys(PARTS, 5000)
    names, each = budget.corrupted("quick", budget.Planned(samples, rows), parts)
    assert len(names) * each * rows <= max(
        budget.SHARE * budget.GRADIENT * samples / budget.PARTS, rows * budget.FEWEST * 3
    )
    assert {name.split("/")[0] for name in names} == {"noise", "blur", "fog"}


def test_of_a_short_training_one_severity_of_each_kind_is_left_and_of_a_long_one_all() -> None:
    assert budget.corrupted("quick", budget.Planned(10, 2), PARTS) == (["noise/3", "blur/3", "fog/3"], budget.FEWEST)
    paid = 24 * 3 * 2 * 16 // 3  # of 24 samples of each kind, in two rows: fewer samples, and no kind less
    assert budget.corrupted("quick", budget.Planned(paid, 2), PARTS) == (["noise/3", "blur/3", "fog/3"], 24)
    names, each = budget.corrupted("quick", budget.Planned(32 * 6 * 2 * 16 // 3, 2), PARTS)
    assert (names, each) == ([n for n in PARTS if not n.endswith("/1")], 32)
    for planned, measuring in ((10**7, "quick"), (0, "quick"), (10, "full")):
        assert budget.corrupted(measuring, budget.Planned(planned, 2), PARTS) == (list(PARTS), 80)


def test_names_that_are_no_kind_and_severity_are_kinds() -> None:
    assert budget.corrupted("quick", budget.Planned(10), {"rain": 40, "night": 8}) == (["rain", "night"], budget.FEWEST)


def test_the_map_takes_fewer_products_of_a_short_training() -> None:
    assert [budget.probes("quick", trained, 8) for trained in (0, 4 * 10**3, 10**6)] == [1, 3, budget.PROBES]
    assert budget.probes("full", 0, 8) == budget.PROBES
    assert [budget.grids(probes) for probes in (1, budget.PROBES)] == [20, 60]


@pytest.mark.parametrize(
    ("measuring", "samples", "most"), [("full", 10, 256), ("quick", 0, 256), ("quick", 10**8, 256)]
)
def test_roundoff_is_looked_for_as_often_as_the_training_buys(measuring: str, samples: int, most: int) -> None:
    assert budget.evaluations(measuring, budget.Planned(samples, 2), 256) == most
    assert budget.evaluations("quick", budget.Planned(10, 2), 256) == budget.EVALUATED


def test_the_proof_is_on_all_that_the_training_pays_for_and_memory_holds() -> None:
    assert budget.proof("quick", budget.Planned(10**8, 3), 10_000, 4 * 3 * 32 * 32) == 10_000
    assert budget.proof("quick", budget.Planned(100, 3), 10_000, 4 * 3 * 32 * 32) == budget.PROVED
    assert budget.proof("quick", budget.Planned(100, 3), 20, 4 * 3 * 32 * 32) == 20
    images = 4 * 3 * 224 * 224
    assert budget.proof("quick", budget.Planned(10**8, 3), 50_000, images) * images <= budget.PROOF_BYTES
    assert budget.proof("full", budget.Planned(100, 3), 50_000, images) == 50_000


def test_every_row_is_of_the_same_corrupted_images_and_says_how_many() -> None:
    events = []
    run = context(emit=lambda event, **fields: events.append((event, fields)), measuring="quick")
    run.data = replace(run.data, corrupted={f"noise/{s}": Twice(run.data.test) for s in (1, 3, 5)})
    run.planned = budget.Planned(8, 2)
    rows = [measure(run, "train", "none", 0.0, 4) for _ in range(2)]
    said = {"parts": 1, "of_parts": 3, "samples": budget.FEWEST, "of_samples": 64}
    assert [row["corruptions_sampled"] for row in rows] == [said, said]
    assert list(rows[0]["corruptions"]) == ["noise/3"] and rows[0]["corruptions"] == rows[1]["corruptions"]
    assert [fields for event, fields in events if fields.get("what") == "corruption"] == 2 * [
        {"what": "corruption", **said}
    ]


def test_of_computed_images_only_the_chosen_are_computed() -> None:
    made = []

    def change(images: torch.Tensor, chunk: int) -> torch.Tensor:
        made.append(len(images))
        return 255 - images

    pixels = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    rows = torch.arange(200)
    part = Part(ChunkedPixels(MemoryPixels(pixels), rows, change), rows, rows % 4, rows * 0, rows)
    chosen = some(ImageSet(part, [0.5], [2.0]), 5)
    x, y = chosen.__getitems__([0, 4])
    assert sum(made) == 5 and len(chosen) == 5
    torch.testing.assert_close(x[:, 0, 0, 0], (torch.tensor([255.0, 56.0]) / 255 - 0.5) / 2)
    assert y.tolist() == [0, 3]


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


def test_what_a_stage_does_beside_its_steps_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("flatcompress.stages.context.time.monotonic", lambda: now[0])
    run = context()
    for what, seconds in (("calibration", 2.0), ("validation", 1.0), ("calibration", 4.0)):
        with run.doing(what) if what == "calibration" else run.part(what):
            now[0] += seconds
    with run.timed("sharpness"):
        now[0] += 8.0
    assert run.parts == {"calibration": 6.0, "validation": 1.0} and run.spent == {"sharpness": 8.0}
