"""Data that cannot be used, through the command line: exit code 2, one message, no run folder."""

from __future__ import annotations

import json
import re
import wave
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from flatcompress.cli import app as cli

SIZE, COUNT = 8, 12


def picture(path: Path, level: int = 100, size: tuple[int, int] = (SIZE, SIZE)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0]), level, np.uint8)).save(path)


def table(folder: Path, text: str | None = None) -> None:
    """Twelve images with a class, two labels, a number and a part."""
    for i in range(COUNT):
        picture(folder / f"{i}.png", 20 * i)
    lines = [
        f"{i}.png,{'ab'[i % 2]},{i % 2},{i % 3 // 2},{i / 10},{('train', 'test')[i % 4 // 3]}" for i in range(COUNT)
    ]
    (folder / "t.csv").write_text(text or "\n".join(["file,kind,one,two,level,part", *lines]))


def cell(row: int, column: int, value: str):
    """Replace one value of the table."""

    def change(folder: Path) -> None:
        lines = [line.split(",") for line in (folder / "t.csv").read_text().splitlines()]
        lines[row][column] = value
        (folder / "t.csv").write_text("\n".join(map(",".join, lines)))

    return change


def masks(folder: Path) -> None:
    for i in range(COUNT):
        picture(folder / "images" / f"{i}.png", 20 * i)
        put(folder, i, np.arange(SIZE * SIZE).reshape(SIZE, SIZE) % 3)


def put(folder: Path, i: int, values: np.ndarray) -> None:
    path = folder / "masks" / f"{i}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


def tone(path: Path, rate: int = 4000, steps: int = 1000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((8000 * np.sin(np.arange(steps) / 3)).astype("<i2").tobytes())


def sounds(folder: Path) -> None:
    for i in range(COUNT):
        tone(folder / "ab"[i % 2] / f"{i}.wav")


def series(folder: Path) -> None:
    for i in range(COUNT):
        path = folder / "ab"[i % 2] / f"{i}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x,y\n" + "\n".join(f"{t},{t % (i + 2)}" for t in range(20)))


def arrays(**given):
    def write(folder: Path) -> None:
        rng = np.random.default_rng(0)
        base = {"x": rng.random((COUNT, 3, SIZE, SIZE), np.float32), "y": np.arange(COUNT) % 2}
        np.savez(folder / "a.npz", **{**base, **given})

    return write


def text(name: str, content: str | bytes):
    def write(folder: Path) -> None:
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

    return write


def both(*steps):
    def write(folder: Path) -> None:
        for step in steps:
            step(folder)

    return write


def coco(change=None):
    """Twelve images with a box each, and one change to the annotations."""

    def write(folder: Path) -> None:
        table(folder)
        (folder / "t.csv").unlink()
        raw = {
            "images": [{"id": i, "file_name": f"{i}.png", "width": SIZE, "height": SIZE} for i in range(COUNT)],
            "annotations": [
                {"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": [1, 1, 4, 5]} for i in range(COUNT)
            ],
            "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        }
        if change is not None:
            change(raw)
        (folder / "boxes.json").write_text(json.dumps(raw))

    return write


def box(**given):
    return coco(lambda raw: raw["annotations"][3].update(given))


def yolo(row: str = "0 0.5 0.5 0.4 0.4", name: str = "3", yaml_file: str = "names: [cat, dog]"):
    """Twelve images with a box each, and one row that is another."""

    def write(folder: Path) -> None:
        for i in range(COUNT):
            picture(folder / "images" / f"{i}.png", 20 * i)
            text(f"labels/{i}.txt", f"{i % 2} 0.5 0.5 0.4 0.4\n")(folder)
        text(f"labels/{name}.txt", row)(folder)
        text("data.yaml", yaml_file)(folder)

    return write


COCO = {"name": "coco", "size": SIZE, "corruptions": "none"}
YOLO = {"name": "yolo", "size": SIZE, "corruptions": "none"}
TABLE = {"name": "image-table", "target": "kind", "size": SIZE, "channels": 3, "corruptions": "none"}
MASKS = {"name": "image-masks", "size": SIZE, "channels": 3, "corruptions": "none"}
SOUNDS = {"name": "sounds", "rate": 4000, "seconds": 0.25, "bands": 16, "corruptions": "none"}
SERIES = {"name": "series", "window": 10, "corruptions": "none"}
SEGMENT, REGRESS, SEVERAL = {"task": "segmentation"}, {"task": "regression"}, {"task": "multilabel"}
NAN = np.full((COUNT, 3, SIZE, SIZE), np.nan, np.float32)

# what is written, the data section, other keys of the recipe, what the message says
CASES = {
    "a file that is not there": (both(table, cell(3, 0, "9999.png")), TABLE, {}, r"t\.csv:4: '9999\.png' is not in"),
    "a file named twice": (both(table, cell(3, 0, "0.png")), TABLE, {}, r"t\.csv:4: '0\.png' is there twice, .*:2"),
    "an empty cell": (both(table, cell(5, 1, "")), TABLE, {}, r"t\.csv:6: column 'kind' is empty"),
    "no such target column": (table, {**TABLE, "target": "kinds"}, {}, "'kinds'. Did you mean 'kind'"),
    "no target": (table, {**TABLE, "target": None}, {}, "say which column is learned"),
    "NaN to be predicted": (
        both(table, cell(2, 4, "nan")),
        {**TABLE, "target": "level"},
        REGRESS,
        r"t\.csv:3: .*finite",
    ),
    "text to be predicted": (table, {**TABLE, "target": "kind"}, REGRESS, r"t\.csv:2: column 'kind' holds 'a'"),
    "numbers as classes": (table, {**TABLE, "target": "level"}, {}, "no class: numbers .* task: regression"),
    "class -1": (both(table, cell(4, 2, "-1")), {**TABLE, "target": "one"}, {}, "the class is -1"),
    "label 2": (both(table, cell(4, 2, "2")), {**TABLE, "target": ["one", "two"]}, SEVERAL, "zeros and ones"),
    "two columns of classes": (table, {**TABLE, "target": ["one", "two"]}, {}, "a class is one column"),
    "masks from a table": (table, TABLE, SEGMENT, "one value a file"),
    "an unknown part": (both(table, cell(1, 5, "hold")), {**TABLE, "split": "part"}, {}, "part 'hold' is none of"),
    "a class that training has not": (
        both(table, cell(4, 1, "c")),
        {**TABLE, "split": "part"},
        {},
        "test part has samples of c",
    ),
    "a split without a training part": (
        both(table, *(cell(i, 5, "test") for i in range(1, COUNT + 1))),
        {**TABLE, "split": "part"},
        {},
        "0 train",
    ),
    "a held-out domain without its column": (table, {**TABLE, "held_out": "a"}, {}, "name their column with 'domain'"),
    "no such domain": (table, {**TABLE, "domain": "kind", "held_out": "z"}, {}, "held_out domain 'z'"),
    "rows of other lengths": (
        lambda f: table(f, "file,kind\n0.png\n"),
        TABLE,
        {},
        r"t\.csv:2: 1 values, the header has 2",
    ),
    "a table without rows": (lambda f: table(f, "file,kind\n"), TABLE, {}, "no row in it"),
    "two tables": (both(table, text("u.csv", "file,kind\n0.png,a\n")), TABLE, {}, "name the table with 'table'"),
    "a broken image": (both(table, text("5.png", b"no image")), TABLE, {}, r"5\.png: not an image"),
    "a link out of the folder": (
        both(table, cell(1, 0, "../outside.png"), lambda f: picture(f.parent / "outside.png")),
        TABLE,
        {},
        "outside",
    ),
    "COCO boxes": (
        both(table, text("t.csv", ""), text("boxes.json", json.dumps({"images": [], "annotations": []}))),
        {**TABLE, "table": "boxes.json"},
        {},
        "its boxes are read by the data set 'coco'",
    ),
    "JSON that is none": (both(table, text("t.json", "{")), {**TABLE, "table": "t.json"}, {}, r"t\.json: no JSON"),
    "JSON with a missing key": (
        both(table, text("t.json", json.dumps([{"file": "0.png", "kind": "a"}, {"file": "1.png"}]))),
        {**TABLE, "table": "t.json"},
        {},
        "item 2: 'kind' is missing",
    ),
    "detection": (table, TABLE, {"task": "detection"}, "detection"),
    "a mask of another size": (
        both(masks, lambda f: put(f, 3, np.zeros((SIZE, SIZE + 2)))),
        MASKS,
        SEGMENT,
        r"3\.png: the mask is 10 x 8, its image 8 x 8",
    ),
    "an image without a mask": (
        both(masks, lambda f: (f / "masks/3.png").unlink()),
        MASKS,
        SEGMENT,
        r"3\.png: it has no mask",
    ),
    "a mask without an image": (
        both(masks, lambda f: (f / "images/3.png").unlink()),
        MASKS,
        SEGMENT,
        r"3\.png: it has no image",
    ),
    "a mask of 0 and 255": (
        both(masks, lambda f: put(f, 0, 255 * (np.eye(SIZE) > 0))),
        MASKS,
        SEGMENT,
        r"values: \[0, 255\]",
    ),
    "a grey value that is no class": (
        masks,
        {**MASKS, "values": [0, 1]},
        SEGMENT,
        "it holds 2, which is none of 'values'",
    ),
    "a mask in colours": (
        both(masks, lambda f: put(f, 0, np.random.default_rng(0).integers(0, 9, (SIZE, SIZE, 3)))),
        MASKS,
        SEGMENT,
        "a mask in colours",
    ),
    "too few names of classes": (
        masks,
        {**MASKS, "classes": ["a", "b"]},
        SEGMENT,
        "2 classes are named, but .* class 2",
    ),
    "no masks": (table, MASKS, SEGMENT, "there is no folder"),
    "two folders that are the same part": (
        both(text("train/images/a.png", ""), text("training/images/a.png", ""), text("test/images/a.png", "")),
        MASKS,
        SEGMENT,
        "are both the train part",
    ),
    "a WAV of another rate": (
        both(sounds, lambda f: tone(f / "a/0.wav", 8000)),
        SOUNDS,
        {},
        r"0\.wav: 8000 samples a second",
    ),
    "no WAV": (both(sounds, text("a/0.wav", b"OggS")), SOUNDS, {}, r"0\.wav: no WAV file"),
    "an empty WAV": (both(sounds, lambda f: tone(f / "a/0.wav", steps=0)), SOUNDS, {}, r"0\.wav: no sample"),
    "a WAV that is cut off": (
        both(sounds, lambda f: (f / "a/0.wav").write_bytes((f / "a/0.wav").read_bytes()[:500])),
        SOUNDS,
        {},
        "cut off",
    ),
    "a class without sounds": (both(sounds, lambda f: (f / "c").mkdir()), SOUNDS, {}, r"c: no \.wav file"),
    "a window longer than a sound": (sounds, {**SOUNDS, "window": 400}, {}, "is longer than a sample"),
    "more bands than frequencies": (sounds, {**SOUNDS, "bands": 400}, {}, "bands is from 2 to 40"),
    "sounds to be measured without a table": (sounds, SOUNDS, REGRESS, "name a 'table' and its 'target'"),
    "NaN in a series": (
        both(series, text("a/0.csv", "x,y\n1,2\nnan,3\n")),
        SERIES,
        {},
        r"0\.csv:3: column 'x' holds 'nan'",
    ),
    "series of other channels": (both(series, text("a/0.csv", "x\n" + "1\n" * 20)), SERIES, {}, "channels"),
    "series of other lengths a row": (
        both(series, text("a/0.csv", "x,y\n1\n")),
        SERIES,
        {},
        "1 values, the header has 2",
    ),
    "inputs and targets of other lengths": (
        arrays(y=np.arange(COUNT - 2) % 2),
        {"name": "arrays"},
        {},
        "12 inputs and 10 targets",
    ),
    "NaN in an array": (arrays(x=NAN), {"name": "arrays"}, {}, "NaN or infinity"),
    "classes as floats": (arrays(y=np.arange(COUNT) / 7), {"name": "arrays"}, {}, "class numbers"),
    "mask 8 x 6 for images 8 x 8": (arrays(y=np.zeros((COUNT, 8, 6), np.int64)), {"name": "arrays"}, SEGMENT, "8, 6"),
    "a box outside the image": (box(bbox=[6, 1, 4, 5]), COCO, {}, r"annotation 3: the box .* lies outside .* 8 x 8"),
    "a box before the image": (box(bbox=[-3, 1, 4, 5]), COCO, {}, "lies outside of its image"),
    "a box without area": (box(bbox=[1, 1, 0, 5]), COCO, {}, "annotation 3: the box .* has no area"),
    "a box of three numbers": (box(bbox=[1, 1, 4]), COCO, {}, r"bbox is \[x, y, width, height\]"),
    "a box of NaN": (box(bbox=[1, 1, float("nan"), 4]), COCO, {}, r"bbox is \[x, y, width, height\]"),
    "a box of no category": (box(category_id=9), COCO, {}, "annotation 3: category_id 9 is none of the file's"),
    "a box of no image": (box(image_id=99), COCO, {}, "annotation 3: image_id 99 is none of the file's"),
    "two boxes with one id": (box(id=4), COCO, {}, "two annotations have the id 4"),
    "two images with one id": (coco(lambda r: r["images"][1].update(id=0)), COCO, {}, "two images have the id 0"),
    "two categories with one name": (
        coco(lambda r: r["categories"][1].update(name="cat")),
        COCO,
        {},
        "two categories are called 'cat'",
    ),
    "an image that is not there": (
        both(coco(), lambda f: (f / "5.png").unlink()),
        COCO,
        {},
        r"5\.png: there is no such image",
    ),
    "an image in two records": (
        coco(lambda r: r["images"][1].update(file_name="0.png")),
        COCO,
        {},
        r"0\.png is in the annotations twice",
    ),
    "an image of another size": (
        both(coco(), lambda f: picture(f / "5.png", size=(SIZE, SIZE + 1))),
        COCO,
        {},
        r"image 5 is 8 x 8 by the annotations, and 5\.png is 8 x 9",
    ),
    "no box at all": (coco(lambda r: r["annotations"].clear()), COCO, {}, "no box in 12 images"),
    "a COCO file without images": (coco(lambda r: r["images"].clear()), COCO, {}, "no image in it"),
    "a COCO file without categories": (coco(lambda r: r.pop("categories")), COCO, {}, "no list 'categories'"),
    "a category that is not there": (coco(), {**COCO, "classes": ["cow"]}, {}, "category of boxes.json 'cow'"),
    "a held-out domain of nothing": (coco(), {**COCO, "held_out": "a"}, {}, "say with 'domain'"),
    "boxes to be classified": (coco(), COCO, {"task": "classification"}, "targets for task 'detection'"),
    "a class beyond the names": (yolo("2 0.5 0.5 0.1 0.1"), YOLO, {}, r"3\.txt:1: class 2; there are 2 names"),
    "a class of -1": (yolo("-1 0.5 0.5 0.1 0.1"), YOLO, {}, r"3\.txt:1: class -1"),
    "pixels as shares": (yolo("0 4 4 3 3"), YOLO, {}, r"3\.txt:1: .* looks like pixels"),
    "a share beyond the image": (yolo("0 0.9 0.5 0.6 0.1"), YOLO, {}, r"3\.txt:1: the box .* lies outside"),
    "an empty share": (yolo("0 0.5 0.5 0 0.1"), YOLO, {}, r"3\.txt:1: the box .* has no area"),
    "a polygon": (yolo("0 0.1 0.1 0.2 0.2 0.3 0.1"), YOLO, {}, "7 values; .* Polygons .* are not read"),
    "text in a row": (yolo("cat 0.1 0.1 0.2 0.2"), YOLO, {}, "are no numbers"),
    "boxes of no image": (yolo(name="lost"), YOLO, {}, r"lost\.txt: it has no image"),
    "no names of classes": (yolo(yaml_file="nc: 2"), YOLO, {}, r"data\.yaml: names is a list"),
    "a name twice": (yolo(yaml_file="names: [cat, cat]"), YOLO, {}, r"data\.yaml: names is a list of different names"),
    "a path that is nowhere": (table, {**TABLE, "path": "nowhere"}, {}, "does not exist"),
    "an option of another set": (table, {**TABLE, "window": 3}, {}, "option of data set image-table 'window'"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_wrong_data_is_one_message_and_exit_code_2(case, tmp_path, capsys):
    write, section, keys, said = CASES[case]
    root = tmp_path / "data"
    root.mkdir()
    write(root)
    where = root / "a.npz" if section["name"] == "arrays" else root
    recipe = {
        "name": "wrong",
        "device": "cpu",
        "threads": 1,
        "output_dir": str(tmp_path / "runs"),
        **keys,
        "data": {"path": str(where), "batch_size": 2, **section},
        "stages": [{"train": {"epochs": 1}}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code = cli._guarded(["run", str(tmp_path / "recipe.yaml"), "--quiet"])
    error = capsys.readouterr().err.strip()
    assert code == 2, error
    assert error.startswith("flatcompress: ") and error.count("flatcompress: ") == 1 and "Traceback" not in error
    assert re.search(said, error), error
    assert not (tmp_path / "runs" / "wrong").exists()
