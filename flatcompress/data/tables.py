"""Tables that say what a file's target is: CSV, JSON, JSON Lines and Parquet, with the place of every row."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatcompress.errors import UserError, unknown

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")
_MOST_BYTES = 2 << 30
PARQUET = "Parquet files need pyarrow: pip install 'flatcompress[parquet]', or write the table as CSV."


@dataclass(frozen=True)
class Table:
    """Named columns and rows of values; ``where(i)`` says where row ``i`` stands."""

    path: Path
    columns: tuple[str, ...]
    rows: list[list[Any]]
    where: Callable[[int], str]

    def position(self, column: Any, key: str) -> int:
        """The column called ``column``. UserError naming the data set's option ``key``."""
        if str(column) not in self.columns:
            raise unknown(f"column of {self.path.name} ({key})", str(column), self.columns)
        return self.columns.index(str(column))

    def text(self, row: int, column: int) -> str:
        """A value as text. UserError for an empty one."""
        found = self.rows[row][column]
        shown = "" if found is None else str(found).strip()
        if not shown:
            raise UserError(f"{self.where(row)}: column {self.columns[column]!r} is empty.")
        return shown

    def number(self, row: int, column: int) -> float:
        """A value as a finite number. UserError for anything else."""
        found = self.rows[row][column]
        try:
            value = math.nan if isinstance(found, bool) else float(found)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            shown = repr(found if not isinstance(found, str) else found[:40])
            raise UserError(
                f"{self.where(row)}: column {self.columns[column]!r} holds {shown}, which is no finite number."
            )
        return value


def read_table(path: Path) -> Table:
    """The table in a file, by its suffix. UserError names the place of what is wrong."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: a table is one of {', '.join(SUFFIXES)}.")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{path}: more than 2 GiB.")
        if suffix == ".parquet":
            found = _parquet(path)
        elif suffix == ".csv":
            found = _csv(path)
        else:
            found = _json(path, suffix == ".jsonl")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from None
    twice = next((name for i, name in enumerate(found.columns) if name in found.columns[:i]), None)
    if twice is not None:
        raise UserError(f"{path}: the column {twice!r} is there twice.")
    if not found.rows:
        raise UserError(f"{path}: no row in it.")
    return found


def _csv(path: Path) -> Table:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        columns = tuple(name.strip() for name in next(reader, []))
        rows, lines = [], []
        for row in reader:
            if not row:
                continue
            if len(row) != len(columns):
                raise UserError(f"{path}:{reader.line_num}: {len(row)} values, the header has {len(columns)} columns.")
            rows.append(list(row))
            lines.append(reader.line_num)
    return Table(path, columns, rows, lambda i: f"{path}:{lines[i]}")


def _json(path: Path, by_line: bool) -> Table:
    try:
        text = path.read_text(encoding="utf-8-sig")
        raw = [json.loads(line) for line in text.splitlines() if line.strip()] if by_line else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no JSON ({str(error)[:120]}).") from None
    if isinstance(raw, dict) and "annotations" in raw and "images" in raw:
        raise UserError(f"{path}: a COCO file; its boxes are read by the data set 'coco'.")
    if isinstance(raw, dict):
        raw = [
            {"file": name, **(value if isinstance(value, dict) else {"target": value})} for name, value in raw.items()
        ]
    if not isinstance(raw, list) or not all(isinstance(item, dict) for item in raw):
        raise UserError(f"{path}: a list of objects, one a file, or an object from file to target is wanted.")
    columns = tuple(dict.fromkeys(str(key) for item in raw for key in item))
    for i, item in enumerate(raw):
        missing = next((name for name in columns if name not in item), None)
        if missing is not None:
            raise UserError(f"{path}, item {i + 1}: {missing!r} is missing, which others have.")
    return Table(path, columns, [[item[c] for c in columns] for item in raw], lambda i: f"{path}, item {i + 1}")


def _parquet(path: Path) -> Table:
    found = parquet(path)
    columns = [column.to_pylist() for column in found.columns]
    return Table(
        path, tuple(map(str, found.column_names)), [list(r) for r in zip(*columns)], lambda i: f"{path}, row {i + 1}"
    )


def parquet(path: Path) -> Any:
    """pyarrow's table. UserError where pyarrow is missing, or the file is none."""
    try:
        from pyarrow import parquet as reader
    except ImportError:
        raise UserError(f"{path}: {PARQUET}") from None
    try:
        return reader.read_table(path)
    except Exception as error:  # pyarrow's own kinds, and whatever a damaged file makes it raise
        raise UserError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0][:120]}).") from None


def found_table(root: Path, given: Any, name: str) -> Path:
    """The table of a data folder: as given (from the folder, or by itself), or the only one there."""
    if given is not None:
        for path in (Path(str(given)).expanduser(), root / str(given)):
            if path.is_file():
                return path
        raise UserError(f"data set {name!r}: there is no table {str(given)!r}, neither by itself nor in {root}.")
    there = sorted(p for p in root.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if len(there) != 1:
        shown = ", ".join(p.name for p in there) or "none"
        raise UserError(f"data set {name!r}: name the table with 'table'; {root} has {shown}.")
    return there[0]


def names_of(option: Any, key: str) -> list[str]:
    """Column names that an option gives: one, or a list."""
    names = list(option) if isinstance(option, list | tuple) else [option]
    if not names or not all(isinstance(n, str | int) and not isinstance(n, bool) for n in names):
        raise UserError(f"data option {key!r} is a column's name, or a list of them, found {option!r}.")
    return [str(n) for n in names]


def classes_in(values: Sequence[str], where: Callable[[int], str]) -> tuple[str, ...]:
    """Class names, sorted, by number where all are whole numbers. UserError for numbers that are no classes."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return tuple(sorted(set(values)))
    for i, number in enumerate(numbers):
        if not number.is_integer():
            raise UserError(
                f"{where(i)}: the target {values[i]!r} is no class: numbers to be predicted are for task: regression."
            )
        if number < 0:
            raise UserError(f"{where(i)}: the class is {values[i]}; classes go from 0 on, or have names.")
    return tuple(sorted(set(values), key=float))
