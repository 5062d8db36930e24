from __future__ import annotations

import torch

from flatcompress import tasks
from flatcompress.stages.predictions import Watched


def batches(*sizes):
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 3, generator=draw), torch.randint(3, (n,), generator=draw)) for n in sizes]


def test_what_is_watched_is_what_the_task_measures():
    task = tasks.build("classification")
    watched = Watched(task)
    found = watched.measure(batches(5, 1, 8))
    assert found == task.measure(batches(5, 1, 8))
    assert len(watched.labels) == 14
    assert sum(a == b for a, b in zip(watched.labels, watched.predicted)) / 14 == found["accuracy"]
    sure = torch.cat([output.double().softmax(1).max(1).values for output, _ in batches(5, 1, 8)])
    assert watched.confidence == (1000 * sure).round().int().tolist()


def test_a_task_without_classes_leaves_only_its_metrics():
    watched = Watched(tasks.build("regression"))
    watched.measure([(torch.zeros(4, 1), torch.ones(4, 1))])
    assert watched.labels == []
