"""Other samples of a training part: some more often than others, or rare classes made rarer (a long tail)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flatcompress.data.bundle import Batch, ImageSet, Part
from flatcompress.data.raw_data import RawData
from flatcompress.errors import UserError
from flatcompress.randomness import generator


class Resampled(Dataset[Batch]):
    """The samples ``rows`` of another data set, in that order; a row may come several times."""

    def __init__(self, source: Any, rows: Tensor) -> None:
        self.source, self.rows = source, rows.tolist()
        domains = getattr(source, "domain_ids", None)
        self.domain_ids = torch.zeros(len(rows), dtype=torch.int64) if domains is None else domains[rows]

    @property
    def persistent(self) -> bool:
        """May loading processes stay from epoch to epoch?"""
        return bool(getattr(self.source, "persistent", False))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        return self.source[self.rows[index]]  # type: ignore[no-any-return]

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.source.__getitems__([self.rows[i] for i in indices])  # type: ignore[no-any-return]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that augmentation draws for."""
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch)


def resampled(train: Any, rows: Tensor) -> Any:
    """A training set of the samples ``rows`` of ``train``; of images, one that comes twice is augmented twice."""
    if type(train) is not ImageSet:
        return Resampled(train, rows)
    found = copy.copy(train)
    found.part = train.part.take(rows)
    found.labels, found.domain_ids, found.identities = found.part.labels, found.part.domain_ids, found.part.identities
    found.targets = train.targets[rows]
    return found


def tail_counts(counts: Sequence[int], factor: float) -> list[int]:
    """Samples that each class keeps: n_max factor^(-i / (C - 1)) of class i (arXiv 1901.05555, section 5.1).

    n_max is the largest of ``counts``; a class has at most what it had, and at least one.

    >>> tail_counts([100, 100, 100], 100)
    [100, 10, 1]
    """
    last = max(1, len(counts) - 1)
    most = max(counts)
    return [min(n, max(1, int(most * factor ** (-i / last) + 1e-9))) for i, n in enumerate(counts)]


def with_long_tail(name: str, raw: RawData, factor: Any, seed: int) -> RawData:
    """``raw`` whose first class has ``factor`` times as many training samples as its last. UserError."""
    if factor is None or factor == 1:
        return raw
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 <= factor <= 1e6:
        raise UserError(f"data option 'long_tail' is the largest class over the smallest, from 1, found {factor!r}.")
    if raw.task != "classification":
        raise UserError(f"data set {name!r} has no classes ({raw.task}): leave 'long_tail' out.")
    train = raw.train
    wanted = tail_counts(torch.bincount(train.labels, minlength=len(raw.classes)).tolist(), factor)
    note = f"long_tail {factor:g}: {sum(wanted)} of {len(train.labels)} training samples, {wanted[0]} to {wanted[-1]}"
    return replace(raw, train=_thinned(train, wanted, seed), notes=(*raw.notes, f"{note} of a class"))


def _thinned(part: Part, wanted: Sequence[int], seed: int) -> Part:
    """The first ``wanted`` samples of each class in an order drawn by the seed, kept in the part's own order."""
    order = torch.randperm(len(part.labels), generator=generator(seed, "long_tail"))
    chosen = [order[part.labels[order] == label][:n] for label, n in enumerate(wanted)]
    return part.take(torch.cat(chosen).sort().values)
