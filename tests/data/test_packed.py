"""Images in tar shards and in Arrow folders: what is read is what was packed."""

from __future__ import annotations

import gzip
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from flatcompress import data
from flatcompress.data.images import packed
from flatcompress.errors import UserError
from flatcompress.training.batches import Feed, epoch_batches

COUNT = 24


def encoded(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((10, 12), 10 * i, np.uint8)).save(file, format="PNG")
    return file.getvalue()


def shard(path, samples) -> None:
    """samples: name -> bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def members(numbers, target: str = "cls") -> dict[str, bytes]:
    found = {}
    for i in numbers:
        kind = ("cat", "dog")[i % 2]
        found[f"{i:03}.png"] = encoded(i)
        found[f"{i:03}.{target}"] = (json.dumps({"kind": kind}) if target == "json" else kind).encode()
    return found


def arrow(folder, numbers, named: bool = True) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    rows = {
        "image": [{"bytes": encoded(i), "path": None} for i in numbers],
        "label": [i % 2 if named else ("cat", "dog")[i % 2] for i in numbers],
    }
    table = pyarrow.table(rows)
    with pyarrow.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink, \
            pyarrow.ipc.new_stream(sink, table.schema) as writer:  # fmt: skip
        writer.write_table(table)
    label = {"names": ["cat", "dog"], "_type": "ClassLabel"} if named else {"dtype": "string", "_type": "Value"}
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"image": {"_type": "Image"}, "label": label}}))
    (folder / "state.json").write_text("{}")


def load(name, root, **options):
    return data.load(name, path=str(root), size=8, channels=1, corruptions="none", **options)


def check(found, parts=None) -> None:
    assert found.classes == ("cat", "dog")
    seen = []
    for name in ("train", "val", "test"):
        part = getattr(found, name)
        numbers = [round(int(part.pixels([i])[0, 0, 0, 0]) / 10) for i in range(len(part))]
        assert torch.equal(part.labels, torch.tensor(numbers) % 2)
        assert parts is None or len(numbers) == parts[name]
        seen += numbers
    assert sorted(seen) == list(range(COUNT))


@pytest.mark.parametrize("target", ["cls", "json"])
def test_shards_are_split_by_the_seed_or_by_their_names(target, tmp_path):
    options = {"target": "kind"} if target == "json" else {}
    shard(tmp_path / "a" / "0.tar", members(range(10), target))
    shard(tmp_path / "a" / "1.tar", members(range(10, COUNT), target))
    check(load("webdataset", tmp_path / "a", **options))
    for name, numbers in {"train-0": range(12), "val-0": range(12, 18), "test-0": range(18, COUNT)}.items():
        shard(tmp_path / "b" / f"{name}.tar", members(numbers, target))
    check(load("webdataset", tmp_path / "b", **options), {"train": 12, "val": 6, "test": 6})


@pytest.mark.parametrize("named", [True, False])
def test_a_saved_data_set_is_one_split_or_several(named, tmp_path):
    arrow(tmp_path / "one", range(COUNT), named)
    check(load("hf-dataset", tmp_path / "one"))
    for name, numbers in {"train": range(12), "validation": range(12, 18), "test": range(18, COUNT)}.items():
        arrow(tmp_path / "dict" / name, numbers, named)
    (tmp_path / "dict" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation", "test"]}))
    check(load("hf-dataset", tmp_path / "dict"), {"train": 12, "val": 6, "test": 6})


WRONG = {
    "no image": ({**members(range(8)), "009.cls": b"cat"}, {}, "sample /009 has 0 images"),
    "no class": ({**members(range(8)), "009.png": encoded(9)}, {}, "sample /009 has no cls or txt"),
    "an empty class": ({**members(range(8)), "007.cls": b" "}, {}, "sample /007: its class is empty"),
    "no key": (members(range(8), "json"), {"target": "size"}, "no JSON with a key 'size'"),
    "no image data": ({**members(range(8)), "007.png": b"none"}, {}, "sample /007: not an image"),
    "another task": (members(range(8)), {"task": "regression"}, "targets for task 'classification'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_sample_that_cannot_be_used_is_named(case, tmp_path):
    samples, options, reason = WRONG[case]
    shard(tmp_path / "0.tar", samples)
    with pytest.raises(UserError, match=reason) as caught:
        load("webdataset", tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_shard_and_a_folder_that_is_no_data_set_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no \.tar file"):
        load("webdataset", tmp_path)
    (tmp_path / "0.tar").write_bytes(b"x" * 700)
    with pytest.raises(UserError, match="cannot be read as a tar file"):
        load("webdataset", tmp_path)
    with pytest.raises(UserError, match=r"neither state\.json nor dataset_dict\.json"):
        load("hf-dataset", tmp_path)
    arrow(tmp_path / "one", range(COUNT))
    with pytest.raises(UserError, match="column 'picture'"):
        load("hf-dataset", tmp_path / "one", image="picture")
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"x" * 50)
    with pytest.raises(UserError, match="cannot be read as Arrow"):
        load("hf-dataset", tmp_path / "one")


@pytest.mark.parametrize("packing", ["", "gz"])
def test_a_set_larger_than_memory_gives_the_same_batches_from_its_shards(tmp_path, monkeypatch, packing):
    for number in range(3):
        shard(tmp_path / f"{number}.tar", members(range(8 * number, 8 * number + 8)))
        if packing:
            path = tmp_path / f"{number}.tar"
            path.write_bytes(gzip.compress(path.read_bytes()))
    whole = load("webdataset", tmp_path, augment="domainbed")
    monkeypatch.setattr(packed, "MOST_BYTES", 0)
    streamed = load("webdataset", tmp_path, augment="domainbed")
    assert streamed.train.on_disk and not whole.train.on_disk
    assert (streamed.mean, streamed.std) == (whole.mean, whole.std)
    kept = {type(sample.image) for sample in streamed.train.part.pixels.samples}
    assert kept == ({bytes} if packing else {packed.Place})
    order = epoch_batches(len(whole.train), 4, seed=3, epoch=1)
    for ours, theirs in zip(Feed(streamed.train, workers=2).epoch(order), Feed(whole.train).epoch(order)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_a_sample_that_cannot_be_read_any_more_is_named(tmp_path, monkeypatch):
    content = members(range(COUNT))
    content["006.png"] = b"no image at all"
    shard(tmp_path / "a.tar", content)
    monkeypatch.setattr(packed, "MOST_BYTES", 0)
    found = load("webdataset", tmp_path, mean=[0.5], std=[0.2])
    pixels = found.train.part.pixels
    with pytest.raises(UserError, match=r"a\.tar: sample /006: not an image"):
        pixels.gather(torch.tensor([5, 6]))
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:2000])
    with pytest.raises(UserError, match="has become shorter"):
        pixels.gather(torch.tensor([20]))
