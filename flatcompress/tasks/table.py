"""The tasks, one row each, and the door to them: `build`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flatcompress.errors import UserError, unknown
from flatcompress.extensions import GROUP
from flatcompress.registry import Registry
from flatcompress.tasks.classification import classification
from flatcompress.tasks.detection import detection
from flatcompress.tasks.multilabel import multilabel
from flatcompress.tasks.reconstruction import reconstruction
from flatcompress.tasks.regression import regression
from flatcompress.tasks.segmentation import segmentation
from flatcompress.tasks.sequence import sequence
from flatcompress.tasks.task import Task

TASKS = Registry("task")
TASKS.add("classification", classification, "one class a sample")
TASKS.add("regression", regression, "numbers, one or several a sample, or maps of them")
TASKS.add("multilabel", multilabel, "any number of labels a sample")
TASKS.add("segmentation", segmentation, "one class a pixel")
TASKS.add("sequence", sequence, "one class a step")
TASKS.add("detection", detection, "boxes of classes, by an anchor-free detector on one feature map", "1904.01355")
TASKS.add("reconstruction", reconstruction, "the input again; its error is the anomaly score")


def built_in(name: str) -> bool:
    """Is it one of this package's own rows? Their targets are theirs alone."""
    return name in TASKS and TASKS[name].origin == GROUP


def build(given: Any = None) -> Task:
    """The `Task` of a name, a mapping with ``name`` and the task's keys, a Task, or None: classification. UserError."""
    if isinstance(given, Task):
        return given
    section = {"name": given} if isinstance(given, str) else given
    if section is None:
        return TASKS["classification"]()
    if not isinstance(section, Mapping) or not isinstance(section.get("name"), str):
        raise UserError(f"task: a name, or a mapping with 'name' and its keys, found {given!r}.")
    options = {key: value for key, value in section.items() if key != "name"}
    name = section["name"]
    entry = TASKS[name]
    for key in options:
        if key not in entry.defaults:
            raise unknown(f"key of task {name}", key, entry.defaults)
    found = entry(**options)
    if not isinstance(found, Task):
        raise UserError(f"task {name!r}: its function returned {type(found).__name__}, not a Task.")
    return found if found.name == name else found.changed(name=name)
