"""What a table's columns say of a file: class, labels, numbers, its part of the split, its domain."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatcompress.data.images.files import inside
from flatcompress.data.images.layout import PART_OF, PARTS, one_name
from flatcompress.data.split import split_identities
from flatcompress.data.tables import Table, classes_in, names_of
from flatcompress.errors import UserError
from flatcompress.tasks import Task

FILE_COLUMNS = ("file", "filename", "file_name", "image", "path", "name")


def file_column(table: Table, given: Any) -> int:
    """Where the files' names stand: as given, or the column with a usual name."""
    if given is not None:
        return table.position(given, "file")
    found = [i for i, name in enumerate(table.columns) if name.lower() in FILE_COLUMNS]
    if len(found) != 1:
        raise UserError(
            f"{table.path}: say which column names the files, with 'file'; it has {', '.join(table.columns)}."
        )
    return found[0]


def files_told(table: Table, column: int, root: Path) -> list[Path]:
    """The file of each row, whichever Unicode form its name has.

    UserError for one that is not there, is named twice, or lies outside.
    """
    found: list[Path] = []
    seen: dict[str, int] = {}
    by_form: dict[str, Path] | None = None
    for i in range(len(table.rows)):
        name = table.text(i, column)
        path = root / name
        if not path.is_file():
            if by_form is None:  # a name may be in another Unicode form than on disk
                by_form = {one_name(p.relative_to(root).as_posix()): p for p in root.rglob("*") if p.is_file()}
            other = by_form.get(one_name(name))
            if other is None:
                raise UserError(f"{table.where(i)}: {name!r} is not in {root}; names are from there, with suffix.")
            path = other
        inside(path, root)
        key = one_name(path.relative_to(root).as_posix()) if path.is_relative_to(root) else str(path)
        if key in seen:
            raise UserError(f"{table.where(i)}: {name!r} is there twice, first at {table.where(seen[key])}.")
        seen[key] = i
        found.append(path)
    return found


def domains_told(table: Table, column: Any) -> list[str] | None:
    """The domain of each row, where a column says it."""
    if column is None:
        return None
    at = table.position(column, "domain")
    return [table.text(i, at) for i in range(len(table.rows))]


def targets(table: Table, target: Any, task: Task, data_set: str) -> tuple[Any, tuple[str, ...]]:
    """What is learned, a row each, and what outputs stand for. UserError for a table that the task cannot use."""
    if target is None and task.name == "reconstruction":
        return torch.full((len(table.rows),), -1), ()
    if target is None:
        raise UserError(f"data set {data_set!r}: say which column is learned, with 'target'.")
    columns = [table.position(name, "target") for name in names_of(target, "target")]
    rows = range(len(table.rows))
    if task.name == "classification":
        if len(columns) > 1:
            raise UserError(
                f"data set {data_set!r}: a class is one column; several are for task: multilabel or regression."
            )
        told = [one_name(table.text(i, columns[0])) for i in rows]
        classes = classes_in(told, table.where)
        return torch.tensor([classes.index(value) for value in told]), classes
    if task.name == "multilabel" and len(columns) == 1:
        return _listed(table, columns[0])
    if task.name in ("segmentation", "sequence", "detection"):
        raise UserError(
            f"data set {data_set!r} has no targets for task {task.name!r}: a column holds one value a file."
        )
    numbers = torch.tensor([[table.number(i, c) for c in columns] for i in rows])
    named = tuple(table.columns[c] for c in columns)
    if task.name == "reconstruction":
        return numbers[:, 0], ()
    return numbers, named


def _listed(table: Table, column: int) -> tuple[Tensor, tuple[str, ...]]:
    """Zeros and ones from one column of names: a list in JSON, or text with ; | , or blanks between them."""
    told = []
    for value in (row[column] for row in table.rows):
        names = value if isinstance(value, list) else re.split(r"[;|,\s]+", "" if value is None else str(value))
        told.append({one_name(str(name)) for name in names if str(name)})
    every = tuple(sorted(set().union(*told)))
    if len(every) < 2:
        raise UserError(f"{table.path}: column {table.columns[column]!r} has {len(every)} labels; two are needed.")
    return torch.tensor([[float(name in some) for name in every] for some in told]), every


def parts_told(table: Table, column: Any) -> list[str] | None:
    """The part of each row, where a column says it."""
    if column is None:
        return None
    at, found = table.position(column, "split"), []
    for i in range(len(table.rows)):
        said = table.text(i, at).lower()
        if said not in PART_OF:
            raise UserError(f"{table.where(i)}: the part {said!r} is none of train, val and test.")
        found.append(PART_OF[said])
    return found


def split(
    labels: Tensor, told: list[str] | None, unseen: Tensor, fractions: dict[str, float], seed: int, where: str
) -> dict[str, Tensor]:
    """Rows of train, val and test: as ``told``, or drawn in proportion of ``labels``; ``unseen`` ones are in none.

    Where only val or only test is told, that is the test part, and a share of train is for selection.
    """
    known = (~unseen).nonzero().flatten()
    if told is None:
        return {name: known[rows] for name, rows in split_identities(labels[known], fractions, seed).items()}
    parts = {part: torch.tensor([i for i in known.tolist() if told[i] == part], dtype=torch.int64) for part in PARTS}
    if not len(parts["train"]) or not len(parts["val"]) + len(parts["test"]):
        said = ", ".join(f"{len(rows)} {part}" for part, rows in parts.items())
        raise UserError(f"{where}: the split has {said}; train and one other are needed.")
    if not len(parts["test"]):
        parts["test"], parts["val"] = parts["val"], parts["val"][:0]
    if not len(parts["val"]):
        chosen = split_identities(labels[parts["train"]], {"val": fractions["val"]}, seed)
        parts["train"], parts["val"] = (parts["train"][chosen[name]] for name in ("train", "val"))
    return parts


def check_learnable(parts: dict[str, Tensor], labels: Tensor, classes: Sequence[str], where: str) -> None:
    """UserError where a part has a class that the training part has no sample of."""
    known = set(labels[parts["train"]].tolist())
    for name, rows in parts.items():
        unseen = sorted(set(labels[rows].tolist()) - known)
        if unseen:
            named = ", ".join(classes[label] for label in unseen[:5])
            raise UserError(
                f"{where}: the {name} part has samples of {named}, and the train part has none to learn from."
            )
