"""CSV files as windows: what comes out, and one sentence for every file that cannot be used."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flatcompress import data
from flatcompress.errors import UserError


def write(path, columns: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = zip(*columns.values())
    path.write_text("\n".join([",".join(columns), *(",".join(map(str, row)) for row in rows)]) + "\n")


def sine(steps: int, speed: float) -> dict:
    t = np.arange(steps)
    return {"x": np.sin(speed * t).round(4), "y": np.cos(speed * t).round(4)}


@pytest.fixture
def folders(tmp_path):
    for name, speed in (("slow", 0.1), ("fast", 0.5)):
        for i in range(4):
            write(tmp_path / name / f"{i}.csv", sine(64, speed + 0.01 * i))
    return tmp_path


def test_folders_are_classes_and_a_file_is_in_one_part(folders):
    found = data.load("series", path=str(folders), window=16)
    assert found.classes == ("fast", "slow") and found.input_shape == (2, 16)
    assert (len(found.train), len(found.val), len(found.test)) == (16, 8, 8)
    assert torch.allclose(found.train.images.mean((0, 2)), torch.zeros(2), atol=1e-5)


def test_a_column_is_learned_at_the_window_s_last_step(tmp_path):
    write(tmp_path / "one.csv", {**sine(200, 0.1), "load": np.arange(200)})
    found = data.load("series", path=str(tmp_path / "one.csv"), window=20, hop=10, target="load", task="regression")
    assert found.task.name == "regression" and found.input_shape == (2, 20)
    assert found.train.targets[:2, 0].tolist() == [19, 29]
    assert found.train.targets.max() < found.test.targets.min()  # the end of the file is the test part


def test_reconstruction_needs_no_target_and_takes_marks(tmp_path):
    mark = (np.arange(200) > 180).astype(int)
    write(tmp_path / "one.csv", {**sine(200, 0.1), "bad": mark})
    found = data.load("series", path=str(tmp_path / "one.csv"), window=10, target="bad", task="reconstruction")
    assert found.test.targets.tolist() == [0, 0, 1, 1] and not bool(found.train.targets.any())
    assert data.load("series", path=str(tmp_path / "one.csv"), window=10, channels=["x"], task="reconstruction")


def broken(text: str):
    return lambda folder: (folder / "slow" / "0.csv").write_text(text)


WRONG = {
    "NaN": (broken("x,y\n1,2\nnan,3\n"), {}, r"0\.csv:3: column 'x' holds 'nan'"),
    "text": (broken("x,y\n1,two\n"), {}, r"0\.csv:2: column 'y' holds 'two'"),
    "unequal rows": (broken("x,y\n1,2\n3\n"), {}, r"0\.csv:3: 1 values, the header has 2"),
    "unequal channels": (broken("x\n1\n"), {}, "files with 2 and 1 channels"),
    "a column twice": (broken("x,x\n1,2\n"), {}, "'x' is there twice"),
    "no such channel": (lambda folder: None, {"channels": ["z"]}, "column of 0.csv 'z'"),
    "no such target": (lambda folder: None, {"target": "load", "task": "regression"}, "'load'"),
    "regression without a target": (lambda folder: None, {"task": "regression"}, "as 'target'"),
    "masks": (lambda folder: None, {"task": "segmentation"}, "no targets for task"),
    "short files": (lambda folder: None, {"window": 500}, "no window of 500 steps"),
    "a window of one": (lambda folder: None, {"window": 1}, "at least 2"),
    "not UTF-8": (lambda folder: (folder / "slow" / "0.csv").write_bytes(b"\xff\xfe\x00"), {}, "cannot be read as CSV"),
    "augmentation": (lambda folder: None, {"augment": "standard"}, "as they are"),
    "task among the data's keys": (lambda folder: None, {"kind": 3}, "option of data set series"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_cannot_be_used_is_named_in_one_sentence(case, folders):
    change, options, reason = WRONG[case]
    change(folders)
    with pytest.raises(UserError, match=reason) as caught:
        data.load("series", **{"path": str(folders), "window": 16, **options})
    assert "\n" not in str(caught.value)


def test_a_folder_without_files_is_said(tmp_path):
    with pytest.raises(UserError, match=r"no \.csv file"):
        data.load("series", path=str(tmp_path))
    with pytest.raises(UserError, match="give a CSV file"):
        data.load("series")


def test_arrays_hold_every_task_s_targets(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "masks.npz", x=x, y=(x[:, 0] > 0).astype(np.uint8))
    found = data.load("arrays", path=str(tmp_path / "masks.npz"), task="segmentation")
    assert found.classes == ("0", "1") and found.test[0][1].dtype == torch.int64
    np.savez(tmp_path / "table.npz", x=x[:, 0, 0], y=x[:, 1, 0, :2])
    assert data.load("arrays", path=str(tmp_path / "table.npz"), task="regression").input_shape == (8,)
    np.savez(tmp_path / "alone.npz", x=x[:, 0])
    assert data.load("arrays", path=str(tmp_path / "alone.npz"), task="reconstruction").task.name == "reconstruction"
    with pytest.raises(UserError, match="class numbers"):
        data.load("arrays", path=str(tmp_path / "table.npz"))


@pytest.mark.parametrize(
    "name",
    [
        "drawn-gauges",
        "drawn-scenes",
        "drawn-objects",
        "drawn-figures",
        "drawn-words",
        "drawn-heartbeats",
        "drawn-machines",
        "drawn-loads",
    ],
)
def test_stand_ins_are_the_same_every_time_and_have_an_unseen_domain(name):
    task = {"name": "segmentation", "ignore_index": 255} if name == "drawn-scenes" else None
    first, second = (data.load(name, train_count=24, val_count=12, test_count=12, task=task) for _ in range(2))
    for a, b in zip(first.train.__getitems__([0, 5]), second.train.__getitems__([0, 5])):
        assert torch.equal(a, b)
    assert len(first.held_out) == 12 and first.corrupted and first.held_out_domain
    with pytest.raises(UserError, match=r"must be between"):
        data.load(name, train_count=1)


def test_loads_are_forecast_from_what_was_before_them():
    found = data.load("drawn-loads", train_count=150, val_count=12, test_count=12, corruptions="none")
    x, y = found.train.__getitems__([0, 24, 96])
    assert x.shape == (3, 4, 96) and y.shape == (3, 96)
    assert torch.equal(y[0].view(4, 24), x[1, :, -24:]) and torch.equal(x[2][:, :24], y[0].view(4, 24))


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_the_same_series_in_another_file_is_the_same_windows(kind, tmp_path):
    columns = {**sine(200, 0.1), "load": np.arange(200)}
    write(tmp_path / "one.csv", columns)
    wanted = data.load("series", path=str(tmp_path / "one.csv"), window=20, target="load", task="regression")
    if kind == "npy":
        np.save(tmp_path / "one.npy", np.stack(list(columns.values()), 1))
        target = "2"
    else:
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(arrow.table(columns), tmp_path / "one.parquet")
        target = "load"
    found = data.load("series", path=str(tmp_path / f"one.{kind}"), window=20, target=target, task="regression")
    torch.testing.assert_close(found.train.images, wanted.train.images)
    assert torch.equal(found.test.targets, wanted.test.targets)


def test_the_test_part_is_corrupted_and_the_normalisation_is_told(folders):
    found = data.load("series", path=str(folders), window=16)
    assert {name.split("/")[0] for name in found.corrupted} == {"noise", "gain", "drift", "clipping", "missing"}
    assert len(found.mean) == len(found.std) == 2 and any(found.mean)
    assert not data.load("series", path=str(folders), window=16, corruptions="none").corrupted


def test_a_class_that_the_training_part_of_arrays_lacks_is_refused_unless_nothing_is_learned(tmp_path):
    x = np.zeros((8, 1, 4, 4), np.float32)
    parts = {"x_train": x, "y_train": np.arange(8) % 2, "x_test": x, "y_test": np.arange(8) % 3}
    np.savez(tmp_path / "parts.npz", **parts)
    with pytest.raises(UserError, match="has samples of 2, of which"):
        data.load("arrays", path=str(tmp_path / "parts.npz"))
    found = data.load("arrays", path=str(tmp_path / "parts.npz"), missing_classes=True)
    assert len(found.classes) == 3
