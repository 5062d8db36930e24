"""Images with a table or with masks: what is read is what was written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from flatcompress import data
from flatcompress.errors import UserError

SIZE = 8


def draw(path, level: int, size: int = SIZE, mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size), level, np.uint8)).convert(mode).save(path)


@pytest.fixture
def pictures(tmp_path):
    """Forty grey images; level, class and labels follow from the number."""
    for i in range(40):
        draw(tmp_path / "shots" / f"{i}.png", 6 * i)
    return tmp_path


def rows(count: int = 40):
    return [
        {"file": f"shots/{i}.png", "level": i / 10, "kind": "dark" if i % 2 else "light", "spot": i % 2,
         "line": i % 3 // 2, "tags": "a;b" if i % 2 else "c",
         "part": ("train", "train", "Valid", "test")[i % 4], "place": f"p{i % 5}"}
        for i in range(count)
    ]  # fmt: skip


def write_csv(folder, some) -> None:
    lines = [",".join(some[0]), *(",".join(str(v) for v in row.values()) for row in some)]
    (folder / "table.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")


def load(folder, **options):
    return data.load("image-table", path=str(folder), size=SIZE, channels=1, corruptions="none", **options)


def number(part) -> torch.Tensor:
    """The images' numbers, read off their grey levels."""
    return torch.tensor([int(part.pixels([i])[0, 0, 0, 0]) // 6 for i in range(len(part))])


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "mapping", "parquet"])
def test_a_class_of_a_table_is_that_of_its_image(kind, pictures):
    if kind == "csv":
        write_csv(pictures, rows())
    elif kind == "json":
        (pictures / "t.json").write_text(json.dumps(rows()))
    elif kind == "jsonl":
        (pictures / "t.jsonl").write_text("\n".join(map(json.dumps, rows())))
    elif kind == "mapping":
        (pictures / "t.json").write_text(json.dumps({row.pop("file"): row for row in rows()}))
    else:
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(arrow.Table.from_pylist(rows()), pictures / "t.parquet")
    found = load(pictures, target="kind")
    assert found.classes == ("dark", "light")
    for part in (found.train, found.val, found.test):
        assert torch.equal(part.labels, 1 - number(part) % 2)
    assert len(found.train) + len(found.val) + len(found.test) == 40


def test_numbers_labels_and_lists_of_names_become_targets(pictures):
    write_csv(pictures, rows())
    numbers = load(pictures, target=["level", "spot"], task="regression")
    assert numbers.classes == ("level", "spot") and numbers.task.name == "regression"
    torch.testing.assert_close(numbers.train.targets[:, 0], number(numbers.train) / 10)
    several = load(pictures, target=["spot", "line"], task="multilabel")
    assert torch.equal(several.test.targets[:, 0], (number(several.test) % 2).float())
    named = load(pictures, target="tags", task="multilabel")
    assert named.classes == ("a", "b", "c")
    assert torch.equal(named.test.targets[:, 2], 1 - (number(named.test) % 2).float())


def test_the_table_says_the_split_and_the_domain(pictures):
    write_csv(pictures, rows())
    found = load(pictures, target="kind", split="part", domain="place", held_out="p3")
    parts = {"train": (0, 1), "val": (2,), "test": (3,)}
    for name, wanted in parts.items():
        numbers = number(getattr(found, name))
        assert set((numbers % 4).tolist()) == set(wanted) and 3 not in (numbers % 5).tolist()
    assert set((number(found.held_out) % 5).tolist()) == {3} and found.held_out_domain == "p3"


def test_an_image_that_no_row_names_is_counted_and_a_name_in_the_other_form_is_found(tmp_path):
    for i in range(12):
        draw(tmp_path / f"cafe\u0301-{i}.png", 6 * i)
    write_csv(tmp_path, [{"file": f"caf\u00e9-{i}.png", "y": i} for i in range(10)])
    with pytest.warns(UserWarning, match="2 images are not in the table"):
        found = load(tmp_path, target="y", task="regression")
    assert len(found.train) + len(found.val) + len(found.test) == 10


def mask(i: int) -> np.ndarray:
    found = np.zeros((SIZE, SIZE), np.uint8)
    found[: i % SIZE, : 1 + i % 3] = 1
    found[-1] = 2
    return found


def scenes(folder, prefix: str = "", coded=lambda m: m, ending: str = "_mask", count: int = 20) -> None:
    for i in range(count):
        draw(folder / prefix / "images" / f"{i}.png", 6 * i)
        path = folder / prefix / "masks" / f"{i}{ending}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coded(mask(i))).save(path)


def masks(folder, **options):
    return data.load("image-masks", path=str(folder), size=SIZE, channels=1, corruptions="none", **options)


COLOURS = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)


@pytest.mark.parametrize(
    ("coded", "options"),
    [
        (lambda m: m, {}),
        (lambda m: np.array([0, 100, 255], np.uint8)[m], {"values": [0, 100, 255]}),
        (lambda m: COLOURS[m], {"values": COLOURS.tolist(), "classes": ["ground", "thing", "edge"]}),
    ],
    ids=["numbers", "grey", "colours"],
)  # fmt: skip
def test_a_mask_is_that_of_its_image(coded, options, tmp_path):
    scenes(tmp_path, coded=coded)
    found = masks(tmp_path, **options)
    assert found.task.name == "segmentation" and len(found.classes) == 3
    for part in (found.train, found.val, found.test):
        x, y = part.__getitems__(list(range(len(part))))
        assert y.dtype == torch.int64 and y.shape[1:] == x.shape[2:]
        for i, n in enumerate(number(part).tolist()):
            assert np.array_equal(y[i].numpy(), mask(n))


def test_masks_of_parts_a_palette_and_what_counts_for_nothing(tmp_path):
    for part in ("Train", "validation", "TEST"):
        scenes(tmp_path, part, coded=lambda m: np.where(m == 2, 255, m).astype(np.uint8), ending="", count=6)
    for path in (tmp_path / "Train" / "masks").iterdir():
        indexed = Image.fromarray(np.asarray(Image.open(path))).convert("P")
        indexed.putdata(list(np.asarray(Image.open(path)).flatten()))
        indexed.save(path)
    found = masks(tmp_path, task={"name": "segmentation", "ignore_index": 255})
    assert len(found.classes) == 2 and (len(found.train), len(found.val), len(found.test)) == (6, 6, 6)
    assert set(found.train.targets.unique().tolist()) == {0, 1, 255}


def test_a_mask_keeps_its_classes_when_it_is_resized(tmp_path):
    scenes(tmp_path)
    found = data.load("image-masks", path=str(tmp_path), size=[12, 20], channels=3, corruptions="none")
    assert found.train.targets.shape[1:] == (12, 20)
    assert set(found.train.targets.unique().tolist()) == {0, 1, 2}


def test_a_run_of_another_task_is_refused(tmp_path):
    scenes(tmp_path)
    with pytest.raises(UserError, match="segmentation"):
        masks(tmp_path, task="regression")
