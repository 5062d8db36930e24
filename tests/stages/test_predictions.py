from __future__ import annotations

import torch

from flatcompress import tasks
from flatcompress.stages.predictions import Watched


def batches(*sizes):
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 3, generator=draw), torch.randint(3, (n,), generator=draw)) for n in sizes]


def test_what_is_watched_is_what_the_task_measures():
    task = tasks.TASKS["classification"]()
    watched = Watched(task)
    found = watched.measure(batches(5, 1, 8))
    assert found == task.measure(batches(5, 1, 8))
    assert len(watched.labels) == 14
    assert sum(a == b for a, b in zip(watched.labels, watched.predicted)) / 14 == found["accuracy"]
    expected = [round(1000 * v) for output, _ in batches(5, 1, 8) for v in output.double().softmax(1).max(1)[0].tolist()]
    assert watched.confidence == expected


def test_a_task_without_classes_leaves_only_its_metrics():
    watched = Watched(tasks.TASKS["regression"]())
    watched.measure([(torch.zeros(4, 1), torch.ones(4, 1))])
    assert watched.labels == []
