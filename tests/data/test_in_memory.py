"""What a Python program may pass as data, and one clear sentence for everything else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from flatcompress import data
from flatcompress.data import preview
from flatcompress.errors import UserError

X = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3


class Items(Dataset):
    def __init__(self, items: list) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int):
        return self.items[index]


def picture(x: torch.Tensor) -> Image.Image:
    return Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy())


SOURCES = {
    "tensors": lambda: (X, Y),
    "list of two": lambda: [X, Y],
    "arrays": lambda: (X.numpy(), Y.numpy().astype(np.uint8)),
    "lists": lambda: (list(X), Y.tolist()),
    "TensorDataset": lambda: TensorDataset(X, Y),
    "map style": lambda: Items(list(zip(X, Y.tolist()))),
    "three things an item": lambda: Items([(x, y, "name") for x, y in zip(X, Y)]),
    "numpy items": lambda: Items([(x.numpy(), np.int64(y)) for x, y in zip(X, Y)]),
    "dicts": lambda: Items([{"image": x, "label": y} for x, y in zip(X, Y)]),
    "transformers dicts": lambda: Items([{"pixel_values": x, "labels": int(y)} for x, y in zip(X, Y)]),
    "a list of pairs": lambda: list(zip(X, Y)),
    "pictures": lambda: Items([(picture(x), int(y)) for x, y in zip(X, Y)]),
    "a list of pictures": lambda: ([picture(x) for x in X], Y),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_accepted_source_gives_the_same_samples(name: str):
    source = SOURCES[name]()
    found = data.bundle({"train": source, "test": source})
    x, y = found.test.__getitems__(list(range(12)))
    assert torch.equal(y, Y) and y.dtype == torch.int64
    assert x.dtype == torch.float32
    assert torch.allclose(x, X, atol=1 / 255 if "pictures" in name else 0)
    assert len(found.train) + len(found.val) == 12
    assert preview.png(found).startswith(b"\x89PNG")


def test_a_loader_stands_for_its_dataset_and_says_so():
    loader = DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True)
    with pytest.warns(UserWarning, match="the DataLoader's dataset is read"):
        found = data.bundle({"train": loader, "test": (X, Y)})
    assert len(found.train) + len(found.val) == 12


def test_a_dataset_that_draws_is_read_anew_in_every_epoch_also_where_validation_was_cut_off():
    class Drawing(Items):
        def __getitem__(self, index: int):
            return torch.rand(3, 8, 8), self.items[index]

    found = data.bundle({"train": Drawing(Y.tolist()), "test": (X, Y)})
    assert not torch.equal(found.train[0][0], found.train[0][0])


def one(y):
    return {"train": (X, y), "test": (X, Y)}


def items(*pairs):
    return {"train": Items(list(pairs)), "test": (X, Y)}


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y)


def nan() -> torch.Tensor:
    x = X.clone()
    x[3, 0, 0, 0] = float("nan")
    return x


WRONG = {
    "float targets": (lambda: one(torch.rand(12)), r"for regression \(task: regression\)"),
    "whole float targets": (lambda: one(Y.float()), r"y\.long\(\)"),
    "float targets of a dataset": (lambda: items(*zip(X, torch.rand(12))), "task: regression"),
    "float columns": (lambda: one(torch.rand(12, 2)), "task: regression"),
    "one number in a column": (lambda: one(Y[:, None]), r"squeeze\(1\)"),
    "one-hot": (lambda: one(torch.eye(3)[Y]), r"argmax\(1\)"),
    "multi-hot": (lambda: one(torch.tensor([[1, 0, 1], [1, 1, 0]] * 6)), "task: multilabel"),
    "multi-hot of a dataset": (lambda: items(*((x, [1, 1, 0]) for x in X)), "task: multilabel"),
    "masks": (lambda: one(torch.zeros(12, 8, 8, dtype=torch.long)), "task: segmentation"),
    "mask pictures": (lambda: items(*((x, picture(x)) for x in X)), "task: segmentation"),
    "boxes": (lambda: items(*((x, {"boxes": [1, 2, 3, 4]}) for x in X)), "no numbers or class numbers"),
    "classes per step": (lambda: one(torch.full((12, 5), 2)), "task: sequence"),
    "label below zero": (lambda: one(Y - 1), "label -1 at position 0"),
    "text labels": (lambda: one(["cat", "dog", "cow"] * 4), "labels are text"),
    "text labels in an array": (lambda: one(np.array(["cat", "dog", "cow"] * 4)), "labels are text"),
    "huge label": (lambda: one(Y + 10**9), "at most"),
    "one label for all": (lambda: one(3), "one number"),
    "unequal lengths": (lambda: one(Y[:5]), "N = 5 labels"),
    "empty": (lambda: {"train": (X[:0], Y[:0]), "test": (X, Y)}, "is empty"),
    "empty dataset": (lambda: items(), "is empty"),
    "one number an input": (lambda: {"train": (X[:, 0, 0, 0], Y), "test": (X, Y)}, r"inputs are \[N, C, H, W\]"),
    "series beside images": (lambda: {"train": (X[:, 0], Y), "test": (X, Y)}, r"those of 'train' are \(8, 8\)"),
    "NaN": (lambda: {"train": (nan(), Y), "test": (X, Y)}, "image 3 holds NaN"),
    "several sizes": (lambda: items(*((X[0, :, :s], 0) for s in (6, 7, 8))), "several sizes"),
    "several sizes in a list": (lambda: {"train": ([X[0], X[0, :, :5]], Y[:2]), "test": (X, Y)}, "several sizes"),
    "another size in test": (lambda: {"train": (X, Y), "test": (X[:, :, :4], Y)}, r"'test'\]: images are \(3, 4, 8\)"),
    "several inputs": (lambda: items(*(((x, x), 0) for x in X)), "several inputs"),
    "several inputs in a pair": (lambda: {"train": ((X, X), Y), "test": (X, Y)}, "several inputs"),
    "dict without labels": (lambda: items(*({"image": x} for x in X)), "item 0: an item of the dataset is"),
    "images alone": (lambda: {"train": X, "test": (X, Y)}, "images without labels"),
    "an iterable dataset": (lambda: {"train": Stream(), "test": (X, Y)}, "IterableDataset"),
    "a loader over a stream": (lambda: {"train": DataLoader(Stream()), "test": (X, Y)}, "IterableDataset"),
    "a loader that collates": (
        lambda: {"train": DataLoader(TensorDataset(X, Y), collate_fn=list), "test": (X, Y)}, "collate_fn",
    ),
    "a path": (lambda: {"train": "images/train", "test": (X, Y)}, "expected"),
    "a mapping": (lambda: {"train": {"x": X, "y": Y}, "test": (X, Y)}, "a mapping with 'x', 'y'"),
    "nothing": (lambda: {"train": (X, Y)}, "'test' is missing"),
    "a class that is not trained": (lambda: {"train": (X, Y % 2), "test": (X, Y)}, r"has samples of 2, of which"),
    "too few class names": (lambda: {**one(Y), "classes": ["a"]}, "1 classes are named"),
    "class names in one text": (lambda: {**one(Y), "classes": "abc"}, "list of names"),
    "a class name twice": (lambda: {**one(Y), "classes": ["a", "b", "a"]}, "'a' twice"),
    "corrupted is a part": (lambda: {**one(Y), "corrupted": (X, Y)}, "maps names to parts"),
    "mean of another length": (lambda: {**one(Y), "mean": [0.5]}, r"\['mean'\] is 3 numbers"),
    "std of zero": (lambda: {**one(Y), "std": [0.0] * 3}, r"\['std'\]"),
    "complex images": (lambda: {"train": (X.to(torch.complex64), Y), "test": (X, Y)}, "complex"),
    "one sample": (lambda: {"train": (X[:1], Y[:1]), "test": (X[:1], Y[:1])}, "selection needs one"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_used_is_refused_in_one_sentence(case: str):
    make, reason = WRONG[case]
    with pytest.raises(UserError, match=f"(?i){reason}") as caught:
        data.bundle(make())
    assert "\n" not in str(caught.value)
