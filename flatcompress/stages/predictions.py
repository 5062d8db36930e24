"""What a classifier said of each sample, kept while its accuracy is measured: no second pass over the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from flatcompress.stages.context import RunContext
from flatcompress.tasks import Task

MOST = 10_000  # samples of a part that are listed one by one; the confusion counts have them all
MOST_CORRUPTED = 64


class Watched:
    """A task that also notes, while it measures, the largest logit of every row and its softmax.

    ``labels``, ``predicted`` and ``confidence`` (per mille) are of the samples in the order they came. Of a task whose
    targets are no classes, and of outputs that are not [B, classes] beside labels [B], nothing is noted.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self.labels: list[int] = []
        self.predicted: list[int] = []
        self.confidence: list[int] = []

    def measure(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """`Task.measure` of (output, y) batches."""
        return self._task.measure(self._noted(pairs))

    def _noted(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        for output, y in pairs:
            if self._task.of_classes and output.ndim == 2 and y.ndim == 1:
                values = output.detach().cpu().double()  # float64: no matter how the batches were cut
                sure, said = values.softmax(1).max(1)
                self.labels += y.tolist()
                self.predicted += said.tolist()
                self.confidence += (1000 * sure).round().int().tolist()
            yield output, y


def emit(run: RunContext, parts: Mapping[str, Watched], of: str = "") -> None:
    """Log what was said of ``parts`` (the test part, the held-out one, "corruption/severity").

    ``of``: which network, where it is not the stage's own.
    """
    told = {name: _told(name, seen) for name, seen in parts.items() if seen.labels}
    if told:
        run.emit("predictions", of=of, parts=told)


def _told(part: str, seen: Watched) -> dict[str, Any]:
    pairs, counts = np.unique(np.array([seen.labels, seen.predicted]), axis=1, return_counts=True)
    most = MOST_CORRUPTED if "/" in part else MOST
    return {
        "samples": len(seen.labels),
        "counts": [[int(a), int(b), int(n)] for (a, b), n in zip(pairs.T, counts)],
        "labels": seen.labels[:most],
        "predicted": seen.predicted[:most],
        "confidence": seen.confidence[:most],
    }
