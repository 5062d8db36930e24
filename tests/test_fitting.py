"""`flatcompress init --data FOLDER`: the recipe fits what is in the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image

from flatcompress.cli import fitting
from flatcompress.cli.app import _guarded
from flatcompress.errors import UserError
from flatcompress.recipe import load_recipe


def draw(folder: Path, count: int, side: int = 30) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (side + number, side + 9), (number, 90, 0)).save(folder / f"{number}.png")


def recipe(path: Path) -> dict:
    return yaml.safe_load(fitting.fitted(path)[0])


def test_size_and_batches_come_from_the_images_and_the_recipe_is_valid(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        draw(tmp_path / "my photos" / name, 20)
    assert _guarded(["init", "mine.yaml", "--data", "my photos"]) == 0
    out = capsys.readouterr().out
    assert "2 classes (cat, dog), 40 images" in out and out.endswith("run mine.yaml\n")
    found = load_recipe(Path("mine.yaml"))
    assert found.name == "my-photos" and found.data.options["size"] == 32 and found.data.batch_size == 8
    assert _guarded(["validate", "mine.yaml"]) == 0


def test_the_fewer_images_the_more_epochs_and_all_within_bounds(tmp_path, monkeypatch):
    epochs = []
    for training in (8, 300, 3_000, 10**6):
        monkeypatch.setattr(fitting, "look", lambda path, n=training: fitting.Found(("a", "b"), (), 2 * n, n, 500))
        stages = [next(iter(entry.values())) for entry in recipe(tmp_path)["stages"][:3]]
        epochs.append([stage["epochs"] for stage in stages])
    assert epochs == sorted(epochs, reverse=True)
    assert epochs[0][0] == fitting.EPOCHS[1] and epochs[-1][0] == fitting.EPOCHS[0] and epochs[-1][-1] >= 3


def test_folders_that_hold_the_same_folders_are_domains_and_one_is_held_out(tmp_path):
    for domain in ("day", "night"):
        for name in ("cat", "dog"):
            draw(tmp_path / domain / name, 3)
    found = fitting.look(tmp_path)
    assert found.domains == ("day", "night") and found.classes == ("cat", "dog") and found.images == 12
    assert recipe(tmp_path)["data"] | {"path": ""} == {
        "name": "domains", "path": "", "held_out": "night", "size": 24, "batch_size": 8
    }  # fmt: skip


def test_parts_that_are_there_are_counted_as_they_are(tmp_path):
    for part, count in (("train", 5), ("test", 2)):
        for name in ("cat", "dog"):
            draw(tmp_path / part / name, count)
    found = fitting.look(tmp_path)
    assert (found.training, found.images, found.domains) == (10, 14, ())


def test_a_picture_that_cannot_be_read_is_left_to_the_loader(tmp_path):
    for name in ("cat", "dog"):
        draw(tmp_path / name, 3)
        (tmp_path / name / "broken.png").write_bytes(b"no image")
    assert fitting.look(tmp_path).side == 31


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        ({}, "one a class"),
        ({"one": 3}, r"one class alone \(one\)"),
        ({"one": 3, "two": 0, "six": 3}, "class two is empty"),
    ],
)
def test_folders_that_are_not_two_classes_of_images_are_refused(tmp_path, folders, said):
    for name, count in folders.items():
        draw(tmp_path / name, count)
        (tmp_path / name).mkdir(exist_ok=True)
    with pytest.raises(UserError, match=said):
        fitting.fitted(tmp_path)


def test_a_folder_that_is_not_there_is_named_with_the_option(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist: --data takes"):
        fitting.look(tmp_path / "nowhere")


def test_a_template_beside_data_is_refused(tmp_path, capsys):
    assert _guarded(["init", str(tmp_path / "x.yaml"), "--template", "folder", "--data", str(tmp_path)]) == 2
    assert "--template and --data: give one" in capsys.readouterr().err
