"""Every recipe under configs: it parses, and on a made-up folder of the same layout it gets to its first batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from flatcompress import Pipeline, models
from flatcompress.recipe import load_recipe
from flatcompress.sweep.pool import check_all
from flatcompress.sweep.spec import load_sweep
from flatcompress.training.batches import epoch_batches, loader

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
LARGE = 8  # images per class: enough for three parts


def images(folder: Path, count: int, size: tuple[int, int] = (20, 24), grey: bool = False) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(len(str(folder)))
    for i in range(count):
        pixels = random.integers(0, 256, size if grey else (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def classes_in(root: Path, recipe: dict) -> None:
    grey = recipe["data"].get("channels") == 1
    for name in ("yes", "no", "other"):
        images(root / name, LARGE, grey=grey)


def train_and_val(root: Path, recipe: dict) -> None:
    for part, count in (("train", LARGE), ("val", 3)):
        for name in ("n01440764", "n01443537"):
            images(root / part / name, count)


def imagenet_tests(root: Path, recipe: dict) -> list[str]:
    for severity in "135":
        images(root / "c" / "fog" / severity / "n01443537", 2)
    for number in "01":  # ImageNet-V2 names its classes by number
        images(root / "v2" / number, 2)
    return [f"data.corrupted_path={root / 'c'}", f"data.held_out_path={root / 'v2'}"]


def cifar_c_files(root: Path, recipe: dict) -> list[str]:
    (root / "c").mkdir()
    np.save(root / "c" / "labels.npy", np.arange(10) % 10)
    np.save(root / "c" / "fog.npy", np.zeros((10, 32, 32, 3), np.uint8))
    return [f"data.corrupted_path={root / 'c'}"]


PUBLISHED = {"folder": imagenet_tests, "cifar10": cifar_c_files}


def domain_folders(root: Path, recipe: dict) -> None:
    held_out = str(recipe["data"]["held_out"])
    for domain in dict.fromkeys([held_out, "first", "second"]):
        for name in ("dog", "house"):
            images(root / domain / name, 10)


def cifar_files(root: Path, recipe: dict) -> None:
    root.mkdir()
    random = np.random.default_rng(0)
    for name, count in (("data_batch_1.bin", 60), ("test_batch.bin", 20)):
        records = random.integers(0, 256, (count, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(count) % 10
        (root / name).write_bytes(records.tobytes())


LAYOUTS: dict[str, Callable[[Path, dict], None]] = {
    "folder": classes_in,
    "domains": domain_folders,
    "cifar10": cifar_files,
}


def fabricate(raw: dict, root: Path) -> list[str]:
    """Data in ``raw``'s layout and weights for its model; the overrides that point to them and keep the test small."""
    name = raw["data"]["name"]
    settings = ["device=cpu", "precision=no", "data.workers=0", "data.batch_size=4"]
    if name in LAYOUTS:
        make = train_and_val if "imagenet" in raw["name"] else LAYOUTS[name]
        make(root / "data", raw)
        settings.append(f"data.path={root / 'data'}")
        if "corrupted_path" in raw["data"]:
            settings += PUBLISHED[name](root, raw)
        if isinstance(raw["data"].get("size"), int):
            settings.append("data.size=32")
    if raw["model"].get("weights"):
        own_head = raw["model"].get("new_head", False)  # ImageNet weights have other classes
        classes = 5 if own_head else 2
        state = models.build(raw["model"]["name"], num_classes=classes, input_shape=(3, 224, 224), seed=1).state_dict()
        save_file(state, root / "weights.safetensors")
        settings += [f"model.weights={root / 'weights.safetensors'}", "data.size=96"]
    return settings


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_recipe_is_valid_and_named_after_its_file(path):
    assert load_recipe(path).name == path.stem


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[pytest.mark.slow] if "resnet50" in p.read_text() else []) for p in FILES],
    ids=lambda p: p.stem,
)
def test_recipe_reaches_its_first_batch(path, tmp_path):
    raw = yaml.safe_load(path.read_text())
    work = Pipeline.from_yaml(path, fabricate(raw, tmp_path)).prepare()
    train = work.data.train
    batch = epoch_batches(len(train), work.batch_size, 0, 0)[0]
    x, y = next(iter(loader(train, [batch])))
    loss = work.task.loss(work.model.train()(x), y)
    loss.backward()
    assert torch.isfinite(loss)
    if "corrupted_path" in raw["data"]:
        assert {key.partition("/")[0] for key in work.data.corrupted} == {"fog"}
    drawn = raw["data"]["name"].startswith("drawn-")  # these have one of their own
    assert (work.data.held_out is None) != ("held_out_path" in raw["data"] or "held_out" in raw["data"] or drawn)


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_sweep_file_is_valid_with_all_its_runs(path):
    sweep = load_sweep(path)
    assert sweep.name == path.stem
    assert len(check_all(sweep)) >= len(sweep.methods) * len(sweep.seeds)
