"""Tasks: what is learned, as one object with its loss, metrics, targets, output and agreement; one file each.

`build` makes one from a name and its keys; ``Task(loss=..., metrics={...})`` is one of your own. The package knows
nothing of data sets, models or training; they all read it.
"""

from __future__ import annotations

from flatcompress.tasks.metrics import Metric
from flatcompress.tasks.table import TASKS, build, built_in
from flatcompress.tasks.task import Loss, Task

__all__ = ["TASKS", "Loss", "Metric", "Task", "build", "built_in"]
