"""Metrics: a row of statistics per sample, and what the rows of a whole set come to.

Rows add nothing up, so a certificate can swap single samples and ask again. torchmetrics objects and plain functions
of all outputs and targets become metrics too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatcompress.errors import UserError

Rows = Callable[[Tensor, Tensor], Tensor]
DIRECTIONS = {"higher": True, "lower": False}


@dataclass(frozen=True)
class Metric:
    """``rows(output, y)`` -> [B, k] statistics; ``finish([N, k])`` -> the value, NaN where it is not defined.

    higher: is more better? None: nobody said, so it is reported and never selects. share: in 0..1, shown in percent.
    """

    rows: Rows
    finish: Callable[[Tensor], float]
    higher: bool | None = True
    share: bool = False


def as_metric(name: str, given: Any) -> Metric:
    """A `Metric` from what a user gives. UserError for anything else.

    >>> as_metric("bias", (lambda output, y: (output - y).mean(), "lower")).higher
    False
    """
    if isinstance(given, Metric):
        return given
    if isinstance(given, tuple) and len(given) == 2 and given[1] in DIRECTIONS:
        return _whole(_called(given[0]), DIRECTIONS[given[1]])
    if not callable(given):
        raise UserError(
            f"metric {name!r} is a function of (outputs, targets), a torchmetrics object, or a pair of one and "
            f"'higher' or 'lower'; found {given!r}."
        )
    return _whole(_called(given), getattr(given, "higher_is_better", None))


def _called(given: Any) -> Callable[[Tensor, Tensor], Any]:
    """A function of (outputs, targets); a torchmetrics object is asked anew each time."""
    if not (hasattr(given, "update") and hasattr(given, "compute") and hasattr(given, "reset")):
        return given

    def ask(outputs: Tensor, targets: Tensor) -> Any:
        given.reset()
        given.update(outputs, targets)
        return given.compute()

    return ask


class _Whole:
    """A function of everything at once: a sample's row is its output and its target, flattened."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        self.function = function
        self.shapes: tuple[Any, ...] | None = None

    def rows(self, output: Tensor, y: Tensor) -> Tensor:
        self.shapes = (output.shape[1:], output.dtype, y.shape[1:], y.dtype)
        width = y[0].numel() if len(y) else 0
        return torch.cat([output.reshape(len(y), -1).double(), y.reshape(len(y), width).double()], 1)

    def finish(self, rows: Tensor) -> float:
        assert self.shapes is not None
        shape, kind, target_shape, target_kind = self.shapes
        width = math.prod(shape)
        outputs = rows[:, :width].to(kind).reshape(-1, *shape)
        targets = rows[:, width:].to(target_kind).reshape(-1, *target_shape)
        return float(self.function(outputs, targets))


def _whole(function: Callable[[Tensor, Tensor], Any], higher: bool | None) -> Metric:
    whole = _Whole(function)
    return Metric(whole.rows, whole.finish, higher)


def mean(rows: Tensor) -> float:
    """Sum of the first column over the sum of the second, or over the number of rows where there is one column."""
    weight = float(rows[:, 1].sum()) if rows.shape[1] > 1 else len(rows)
    return float(rows[:, 0].sum()) / weight if weight else math.nan


def accuracy(axis: int = 1, ignore_index: int | None = None) -> Metric:
    """The share of decisions whose largest value along ``axis`` is the target's; ignored ones are left out."""

    def rows(output: Tensor, y: Tensor) -> Tensor:
        right = output.argmax(axis) == y
        if right.ndim == 1 and ignore_index is None:
            return right[:, None]
        counted = torch.ones_like(right) if ignore_index is None else y != ignore_index
        return torch.stack([(right & counted).flatten(1).sum(1), counted.flatten(1).sum(1)], 1)

    return Metric(rows, mean, share=True)


def confusion(classes: int | None, axis: int, finish: Callable[[Tensor], float], ignore: int | None = None) -> Metric:
    """``finish`` of the confusion matrix [targets, guesses] of a whole set."""

    def rows(output: Tensor, y: Tensor) -> Tensor:
        k = classes or output.shape[axis]
        guesses, truth = output.argmax(axis).reshape(len(y), -1), y.reshape(len(y), -1)
        counted = (truth >= 0) & (truth < k)
        if ignore is not None:
            counted &= truth != ignore
        cells = torch.where(counted, truth * k + guesses, k * k)
        found = torch.zeros(len(y), k * k + 1, dtype=torch.float64, device=y.device)
        return found.scatter_add_(1, cells, torch.ones_like(cells, dtype=torch.float64))[:, :-1]

    def value(found: Tensor) -> float:
        side = math.isqrt(found.shape[1])
        return finish(found.sum(0).reshape(side, side))

    return Metric(rows, value, share=True)


def mean_iou(matrix: Tensor) -> float:
    """Intersection over union, mean over the classes that occur in targets or guesses."""
    hit, union = matrix.diagonal(), matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    there = union > 0
    return float((hit[there] / union[there]).mean()) if bool(there.any()) else math.nan


def macro_f1(matrix: Tensor) -> float:
    """F1, mean over the classes that occur in targets or guesses."""
    both, hit = matrix.sum(0) + matrix.sum(1), matrix.diagonal()
    there = both > 0
    return float((2 * hit[there] / both[there]).mean()) if bool(there.any()) else math.nan


def balanced_accuracy(matrix: Tensor) -> float:
    """Recall, mean over the classes that occur in the targets."""
    total, hit = matrix.sum(1), matrix.diagonal()
    there = total > 0
    return float((hit[there] / total[there]).mean()) if bool(there.any()) else math.nan


def label_f1() -> Metric:
    """F1 of the labels whose logit is above 0, mean over the labels that occur in targets or guesses."""

    def rows(output: Tensor, y: Tensor) -> Tensor:
        guess, truth = output > 0, y > 0.5
        return torch.cat([(guess & truth).double(), guess.double() + truth.double()], 1)

    def finish(found: Tensor) -> float:
        hit, both = found.sum(0).chunk(2)
        there = both > 0
        return float((2 * hit[there] / both[there]).mean()) if bool(there.any()) else math.nan

    return Metric(rows, finish, share=True)


def average_precision() -> Metric:
    """Average precision, mean over the labels that occur in the targets."""

    def finish(found: Tensor) -> float:
        scores, truth = found.chunk(2, 1)
        each = [_average_precision(s, t > 0.5) for s, t in zip(scores.T, truth.T) if bool((t > 0.5).any())]
        return sum(each) / len(each) if each else math.nan

    return Metric(lambda output, y: torch.cat([output.double(), y.double()], 1), finish, share=True)


def _average_precision(scores: Tensor, truth: Tensor) -> float:
    """Precision at every threshold, weighted by the recall gained there; equal scores share a threshold."""
    order = scores.argsort(descending=True)
    scores, hits = scores[order], truth[order].double().cumsum(0)
    last = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool)])
    hits, seen = hits[last], (last.nonzero().flatten() + 1).double()
    gained = hits.diff(prepend=torch.zeros(1, dtype=hits.dtype)) / hits[-1]
    return float((gained * hits / seen).sum())


def auroc(scores: Tensor, truth: Tensor) -> float:
    """The probability that a positive scores above a negative, ties counting half; NaN where one kind is missing."""
    positive, negative = scores[truth].double(), scores[~truth].double().sort().values
    if not len(positive) or not len(negative):
        return math.nan
    below = torch.searchsorted(negative, positive, right=False).double()
    upto = torch.searchsorted(negative, positive, right=True).double()
    return float(((below + upto) / 2).mean()) / len(negative)


def mean_error(power: int, root: bool = False) -> Metric:
    """Mean of ``|output - y|`` to the power, over samples and columns; its square root where wanted."""

    def rows(output: Tensor, y: Tensor) -> Tensor:
        error = (output.reshape(len(y), -1).double() - y.reshape(len(y), -1).double()).abs() ** power
        return error.mean(1, keepdim=True)

    def finish(found: Tensor) -> float:
        value = mean(found)
        return math.sqrt(value) if root else value

    return Metric(rows, finish, higher=False)


def r2() -> Metric:
    """1 - squared error over the targets' variance, mean over columns; NaN where the targets do not vary."""

    def rows(output: Tensor, y: Tensor) -> Tensor:
        guess, truth = output.reshape(len(y), -1).double(), y.reshape(len(y), -1).double()
        return torch.cat([(guess - truth) ** 2, truth, truth**2], 1)

    def finish(found: Tensor) -> float:
        error, truth, squares = found.mean(0).chunk(3)
        spread = squares - truth**2
        there = spread > 1e-12 * squares.clamp(min=1e-30)
        return float((1 - error[there] / spread[there]).mean()) if bool(there.any()) else math.nan

    return Metric(rows, finish)
