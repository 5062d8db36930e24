"""Losses over classes: class weights, label smoothing, focal loss, targets that are ignored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flatcompress.errors import UserError

BALANCED = "balanced"


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of logits with the classes on ``axis`` 1, or last, and class numbers, mean over what counts.

    weight: [classes]. focal: gamma of the focal loss (arXiv 1708.02002, eq. 4): each term times (1 - p)^gamma.
    ignore: the target that counts for nothing. smoothing: label smoothing.
    """

    weight: Tensor | None = None
    focal: float = 0.0
    ignore: int | None = None
    smoothing: float = 0.0
    last: bool = False

    def __call__(self, output: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        if self.last:
            output = output.movedim(-1, 1)
        weight = None if self.weight is None else self.weight.to(output)
        given = {"weight": weight, "label_smoothing": self.smoothing}
        if not self.focal and self.ignore is None:
            return F.cross_entropy(output, y, reduction=reduction, **given)  # type: ignore[arg-type]
        ignore = -100 if self.ignore is None else self.ignore
        terms = F.cross_entropy(output, y, reduction="none", ignore_index=ignore, **given)  # type: ignore[arg-type]
        if self.focal:
            surprise = F.cross_entropy(output, y, reduction="none", ignore_index=ignore)
            terms = terms * (1 - torch.exp(-surprise)).clamp(min=1e-12) ** self.focal
        counted = (y != ignore).to(terms)
        if reduction == "sum":
            return terms.sum()
        if weight is not None:
            counted = counted * weight[torch.where(y == ignore, 0, y)]
        return terms.sum() / counted.sum().clamp(min=1e-12)

    def summed(self, output: Tensor, y: Tensor) -> Tensor:
        """Summed over the batch."""
        return self(output, y, "sum")

    def smoothed(self, share: float) -> CrossEntropy:
        """With label smoothing."""
        return replace(self, smoothing=share)


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Binary cross-entropy of logits [B, labels] and zeros and ones, mean over both. weight: of the ones, [labels]."""

    weight: Tensor | None = None
    focal: float = 0.0
    smoothing: float = 0.0

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(output)
        soft = y * (1 - self.smoothing) + self.smoothing / 2
        terms = F.binary_cross_entropy_with_logits(output, soft, pos_weight=weight, reduction="none")
        if self.focal:
            right = torch.sigmoid(torch.where(y > 0.5, output, -output))
            terms = terms * (1 - right).clamp(min=1e-12) ** self.focal
        return terms.mean()

    def smoothed(self, share: float) -> BinaryCrossEntropy:
        """With every target moved towards one half by ``share``."""
        return replace(self, smoothing=share)


def check_focal(task: str, value: Any) -> float:
    """The exponent of a focal loss. UserError for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 10:
        raise UserError(f"task {task}: focal is an exponent from 0 (off) to 10, found {value!r}.")
    return float(value)


def check_weights(task: str, given: Any) -> Any:
    """Class weights as a recipe gives them. UserError for anything but ``balanced``, numbers, or numbers by name."""
    values = list(given.values()) if isinstance(given, Mapping) else given
    numbers = isinstance(values, list | tuple) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < 1e6 for v in values
    )
    if given is None or given == BALANCED or (numbers and values):
        return given
    raise UserError(
        f"task {task}: class_weights is 'balanced', a list of numbers above 0, one a class, or numbers by class name; "
        f"found {given!r}."
    )


def class_weights(task: str, given: Any, counts: Tensor, names: Sequence[str]) -> Tensor | None:
    """[classes] float32; ``balanced``: the inverse of each class's count, mean 1 over the samples. UserError."""
    if given is None:
        return None
    if given == BALANCED:
        return (counts.sum() / (len(names) * counts.clamp(min=1))).float()
    if isinstance(given, Mapping):
        strange = next((name for name in given if str(name) not in names), None)
        if strange is not None:
            raise UserError(f"task {task}: class_weights names {strange!r}; the classes are {', '.join(names)}.")
        return torch.tensor([float(given.get(name, 1.0)) for name in names])
    if len(given) != len(names):
        raise UserError(f"task {task}: {len(given)} class_weights for {len(names)} classes ({', '.join(names[:8])}).")
    return torch.tensor([float(v) for v in given])
