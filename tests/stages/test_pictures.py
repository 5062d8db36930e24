"""The pictures of a run are of the very samples that were measured, and nothing is corrupted for them alone."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from stage_pieces import context

from flatcompress.data.bundle import ImageSet, Part
from flatcompress.data.images.pixels import ChunkedPixels, MemoryPixels
from flatcompress.stages import budget, pictures
from flatcompress.stages.measure import measure
from flatcompress.store.runfolder import RunFolder

COUNT = 96


def numbered() -> torch.Tensor:
    """Grey images [96, 3, 8, 8], each of its own shade."""
    return torch.arange(COUNT, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()


class Plain:
    """A user's own part: pictures and labels, and no way to be narrowed."""

    def __init__(self, part: ImageSet) -> None:
        self.part, self.labels = part, part.labels

    def __len__(self) -> int:
        return len(self.part)

    def __getitems__(self, indices):
        return self.part.__getitems__(indices)

    def pixels(self, indices):
        return self.part.pixels(indices)


@pytest.fixture(params=[True, False], ids=["narrowed", "own"])
def measured_run(request, tmp_path):
    """A run whose one corrupted part (all shades + 100) is measured on 16 of its 96 samples."""
    made = []

    def change(images, chunk):
        made.append(len(images))
        return images + 100

    labels, nothing = torch.arange(COUNT) % 4, torch.zeros(COUNT, dtype=torch.int64)
    rows = torch.arange(COUNT)
    pixels = ChunkedPixels(MemoryPixels(numbered()), rows, change)
    corrupted = ImageSet(Part(pixels, rows, labels, nothing, rows, None), [0.0] * 3, [1.0] * 3)
    plain = ImageSet(Part(MemoryPixels(numbered()), rows, labels, nothing, rows, None), [0.0] * 3, [1.0] * 3)
    run = context(measuring="quick")
    part = corrupted if request.param else Plain(corrupted)
    run.data = replace(run.data, train=plain, test=plain, held_out=None, corrupted={"shade/3": part}, domains=())
    run.planned, run.folder = budget.Planned(8, 1), tmp_path
    return run, made, request.param


def test_the_sheet_corrupts_what_is_measured_and_no_more(measured_run):
    run, made, narrowed = measured_run
    assert pictures.sheet(run).startswith(b"\x89PNG")
    before = sum(made)
    measure(run, "train", "none", 0.0, 1, flatness=False)
    assert sum(made) == before and (before == budget.FEWEST or not narrowed)


def test_an_example_of_a_corruption_is_the_sample_that_was_judged(measured_run, monkeypatch):
    run, _, _ = measured_run
    log = (run.folder / "log.jsonl").open("w")
    run.emit = lambda event, **fields: print(json.dumps({"event": event, "stage": "0-train", **fields}), file=log)
    measure(run, "train", "none", 0.0, 1, flatness=False)
    log.close()
    monkeypatch.setattr(pictures.preview, "_picture", lambda pixels: Shade(int(pixels[0, 0, 0])))
    monkeypatch.setattr(pictures.preview, "_uri", lambda picture: str(picture.value))
    pictures.draw_examples(run, RunFolder(run.folder))
    rows = json.loads((run.folder / "examples.json").read_text())["pictures"]
    drawn = {row["index"]: int(row["image"]) for row in rows if row["part"] == "shade/3"}
    spread = torch.linspace(0, COUNT - 1, budget.FEWEST).round().int().tolist()
    assert len(drawn) >= 4 and drawn == {i: spread[i] + 100 for i in drawn}


class Shade:
    """A picture that is its shade."""

    def __init__(self, value: int) -> None:
        self.value = value

    def thumbnail(self, size) -> None:
        pass
