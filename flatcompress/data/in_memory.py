"""Data that a Python program brings along: tensors, arrays or torch datasets, as a `DataBundle`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flatcompress.data.bundle import Batch, DataBundle
from flatcompress.errors import UserError, unknown

PARTS = ("train", "val", "test", "held_out", "corrupted")
_KEYS = (*PARTS, "name", "classes", "mean", "std")
_VAL_SHARE = 0.1


class OwnSet(Dataset[Batch]):
    """Images [N, C, H, W] and labels [N] as they are: the owner has normalised them. ``source``: a pair of tensors or
    arrays, or a map-style dataset of (image [C, H, W], label)."""

    def __init__(self, source: Any, where: str) -> None:
        self.where = where
        self.images: Tensor | None = None
        if isinstance(source, Sequence) and len(source) == 2:
            self.images = torch.as_tensor(source[0]).float()
            labels = torch.as_tensor(source[1])
        elif hasattr(source, "__getitem__") and hasattr(source, "__len__"):
            labels = torch.as_tensor([int(source[i][1]) for i in range(len(source))])
        else:
            raise UserError(f"data[{where!r}]: expected (images, labels) or a dataset with a length, found {source!r}.")
        self.source = source
        self.labels = labels.long()
        self.domain_ids = torch.zeros_like(self.labels)
        self.identities = torch.arange(len(self.labels))
        self._check()

    def _check(self) -> None:
        n = len(self.labels)
        if n == 0:
            raise UserError(f"data[{self.where!r}] is empty.")
        if self.images is not None and (self.images.ndim != 4 or len(self.images) != n):
            shape = tuple(self.images.shape)
            raise UserError(f"data[{self.where!r}]: images are [N, C, H, W] with N = {n} labels, found {shape}.")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.__getitems__([range(len(self))[index]])
        return x[0], y[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        if self.images is not None:
            return self.images[chosen], self.labels[chosen]
        return torch.stack([torch.as_tensor(self.source[i][0]).float() for i in indices]), self.labels[chosen]

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """uint8 [B, C, H, W] for the preview sheet: each image stretched to its own range."""
        x, _ = self.__getitems__(list(indices))
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        return ((x - low) / (high - low).clamp(min=1e-8) * 255).round().to(torch.uint8)

    def take(self, indices: Tensor, where: str) -> OwnSet:
        """A part of this set."""
        return OwnSet(self.__getitems__(indices.tolist()), where)


def bundle(data: Mapping[str, Any] | DataBundle) -> DataBundle:
    """A `DataBundle` from a mapping: ``train`` and ``test``, perhaps ``val``, ``held_out``, ``corrupted``, ``classes``.

    Each part is ``(images, labels)`` or a map-style dataset; ``corrupted`` maps names to parts. Without ``val`` a tenth
    of the training part is set aside. ``mean`` and ``std`` only describe the preprocessing for the exported file.
    UserError names the part that is wrong.
    """
    if isinstance(data, DataBundle):
        return data
    if not isinstance(data, Mapping):
        raise UserError(f"data is a DataBundle or a mapping with 'train' and 'test', found {type(data).__name__}.")
    for key in data:
        if key not in _KEYS:
            raise unknown("part of data", key, _KEYS)
    for key in ("train", "test"):
        if key not in data:
            raise UserError(f"data: {key!r} is missing; give (images, labels) or a dataset.")
    train, test = OwnSet(data["train"], "train"), OwnSet(data["test"], "test")
    if "val" in data:
        val = OwnSet(data["val"], "val")
    else:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        cut = max(1, round(_VAL_SHARE * len(train)))
        val, train = train.take(order[:cut], "val"), train.take(order[cut:], "train")
    held_out = OwnSet(data["held_out"], "held_out") if data.get("held_out") is not None else None
    corrupted = {k: OwnSet(v, f"corrupted.{k}") for k, v in (data.get("corrupted") or {}).items()}
    shape = tuple(train[0][0].shape)
    count = 1 + int(max(int(s.labels.max()) for s in (train, val, test)))
    classes = tuple(str(c) for c in data.get("classes") or range(count))
    if len(classes) < count:
        raise UserError(f"data: {len(classes)} classes are named, but a label is {count - 1}.")
    return DataBundle(
        name=str(data.get("name", "python")),
        classes=classes,
        input_shape=shape,  # type: ignore[arg-type]
        mean=tuple(data.get("mean", (0.0,) * shape[0])),
        std=tuple(data.get("std", (1.0,) * shape[0])),
        train=train,  # type: ignore[arg-type]
        val=val,  # type: ignore[arg-type]
        test=test,  # type: ignore[arg-type]
        held_out=held_out,  # type: ignore[arg-type]
        corrupted=corrupted,  # type: ignore[arg-type]
        held_out_domain="held_out" if held_out is not None else None,
    )
