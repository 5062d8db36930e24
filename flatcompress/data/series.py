"""Sensor series in CSV, NPY and Parquet files, cut into windows [C, T]."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flatcompress.data.arrays import read
from flatcompress.data.bundle import DataBundle
from flatcompress.data.corruptions import how_many
from flatcompress.data.corruptions.series import corrupted
from flatcompress.data.in_memory import bundle
from flatcompress.data.split import check_fractions
from flatcompress.data.tables import parquet
from flatcompress.errors import UserError, unknown
from flatcompress.randomness import generator
from flatcompress.tasks import Task, build

_MOST_ROWS = 20_000_000
_READ = (".csv", ".npy", ".parquet")


@dataclass(frozen=True)
class Recording:
    """One file: values [T, C], a target a step or None, and the folder's class or None."""

    path: Path
    values: Tensor
    targets: list[str] | None
    folder: str


def series(
    seed: int,
    *,
    path: Any = None,
    window: int = 128,
    hop: int = 0,
    channels: Any = None,
    target: Any = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    corruptions: Any = "default",
    corrupted_count: int = 500,
    task: Any = None,
) -> DataBundle:
    """Windows of files with a row a step: one file PATH, or PATH/*.csv, or PATH/CLASS/*.csv.

    CSV has a header line; the columns of NPY arrays [T, C] are called 0, 1 ...; Parquet needs pyarrow.

    window, hop: steps of a window, and from one to the next (0: no overlap). channels: columns that are inputs
    (default: all but the target). target: the column to learn, read at a window's last step; for reconstruction 1 marks
    an anomaly anywhere in the window; without one the folder is the class. Whole files go to one part each, drawn by
    the seed; a single file is cut in time, the test part last. Channels are normalised by the training part. UserError
    names file and line of what cannot be used.
    """
    check_fractions({"val": val_fraction, "test": test_fraction})
    learned, root = build(task), Path(str(path)).expanduser()
    if path is None or not root.exists():
        raise UserError(f"data set 'series': give a CSV file or a folder of them with 'path', found {path!r}.")
    if window < 2 or hop < 0:
        raise UserError(f"data set 'series': window is at least 2 steps and hop at least 0, found {window} and {hop}.")
    recordings = _recordings(root, channels, None if target is None else str(target))
    classes = _classes(recordings, learned, target)
    cut = {part: _windows(some, window, hop or window, learned, classes)
           for part, some in _split(recordings, val_fraction, test_fraction, seed).items()}  # fmt: skip
    for part, (x, _) in cut.items():
        if not len(x):
            raise UserError(f"data set 'series': the {part} part has no window of {window} steps; give longer files.")
    mean = cut["train"][0].mean((0, 2), keepdim=True)
    std = cut["train"][0].std((0, 2), keepdim=True).clamp(min=1e-6)
    parts: dict[str, Any] = {part: ((x - mean) / std, y) for part, (x, y) in cut.items()}
    named: dict[str, Any] = {"classes": classes} if classes else {}
    named |= {"mean": mean.flatten().tolist(), "std": std.flatten().tolist()}
    x, y = parts["test"]
    changed = _corrupted(x, y, corruptions, corrupted_count, seed)
    return bundle({"name": root.stem, **named, **parts, "corrupted": changed}, learned)


def _corrupted(x: Tensor, y: Any, corruptions: Any, count: int, seed: int) -> dict[str, Any]:
    if how_many("series", corruptions, count) is None:
        return {}
    if count and count < len(x):
        chosen = torch.randperm(len(x), generator=generator(seed, "corrupted"))[:count].sort().values
        x, y = x[chosen], None if y is None else y[chosen]
    return dict(corrupted(x, y, seed))


def _recordings(root: Path, channels: Any, target: str | None) -> list[Recording]:
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix.lower() in _READ)
    if not files:
        raise UserError(f"{root}: no .csv file there, and no .npy or .parquet file.")
    found = [_read(file, channels, target, file.parent.name if file.parent != root else "") for file in files]
    widths = dict.fromkeys(r.values.shape[1] for r in found)
    if len(widths) > 1:
        raise UserError(f"{root}: files with {' and '.join(map(str, widths))} channels; name them with 'channels'.")
    return found


def _read(path: Path, channels: Any, target: str | None, folder: str) -> Recording:
    if path.suffix.lower() in (".npy", ".parquet"):
        return _columned(path, channels, target, folder)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            header = [name.strip() for name in next(rows, [])]
            chosen = _columns(path, header, channels, target)
            values: list[list[float]] = []
            told: list[str] = []
            for line, row in enumerate(rows, 2):
                if len(row) != len(header):
                    raise UserError(f"{path}:{line}: {len(row)} values, the header has {len(header)} columns.")
                if line > _MOST_ROWS:
                    raise UserError(f"{path}: more than {_MOST_ROWS:,} rows.")
                values.append([_number(path, line, header[i], row[i]) for i in chosen])
                if target is not None:
                    told.append(row[header.index(target)].strip())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV ({error}).") from None
    return Recording(path, torch.tensor(values).reshape(len(values), len(chosen)), told if target else None, folder)


def _columned(path: Path, channels: Any, target: str | None, folder: str) -> Recording:
    """A recording of a file that has its values by column."""
    if path.suffix.lower() == ".npy":
        array = read(path)["x"]
        if array.ndim not in (1, 2) or array.dtype.kind not in "iufb" or not len(array):
            raise UserError(f"{path}: a series is [T, C] or [T] numbers, found {array.dtype} {array.shape}.")
        columns = {str(i): column for i, column in enumerate(array.reshape(len(array), -1).T)}
    else:
        found = parquet(path)
        names, values = (
            map(str, found.column_names),
            (column.to_numpy(zero_copy_only=False) for column in found.columns),
        )
        columns = dict(zip(names, values))
    header = list(columns)
    chosen = [_finite(path, header[i], columns[header[i]]) for i in _columns(path, header, channels, target)]
    told = None if target is None else [str(value) for value in columns[target]]
    return Recording(path, torch.from_numpy(np.stack(chosen, 1)), told, folder)


def _finite(path: Path, column: str, values: Any) -> NDArray[np.float32]:
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{path}: column {column!r} holds no numbers ({values[0]!r} ...).") from None
    bad = ~np.isfinite(numbers)
    if bad.any():
        raise UserError(f"{path}: row {int(bad.argmax()) + 1}: column {column!r} holds no finite number.")
    return numbers.astype(np.float32)


def _columns(path: Path, header: Sequence[str], channels: Any, target: str | None) -> list[int]:
    twice = next((name for i, name in enumerate(header) if name in header[:i]), None)
    if twice is not None:
        raise UserError(f"{path}: the column {twice!r} is there twice.")
    wanted = [str(c) for c in channels] if isinstance(channels, list | tuple) else [c for c in header if c != target]
    for name in [*wanted, *([target] if target is not None else [])]:
        if name not in header:
            raise unknown(f"column of {path.name}", name, header)
    if not wanted:
        raise UserError(f"{path}: no column is left as an input.")
    return [header.index(name) for name in wanted]


def _number(path: Path, line: int, column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{path}:{line}: column {column!r} holds {text[:40]!r}, which is no finite number.")
    return value


def _classes(recordings: Sequence[Recording], task: Task, target: Any) -> tuple[str, ...]:
    """The classes by name, where the task has classes."""
    if not task.of_classes:
        if target is None and task.name != "reconstruction":
            raise UserError(f"data set 'series': task {task.name!r} needs the column to learn, as 'target'.")
        return ()
    if task.name != "classification":
        raise UserError(f"data set 'series' has no targets for task {task.name!r}; give windows as arrays.")
    every = {r.folder for r in recordings} if target is None else {t for r in recordings for t in r.targets or ()}
    if target is None and "" in every:
        raise UserError("data set 'series': classes are folders, PATH/CLASS/*.csv, or a column, named as 'target'.")
    return tuple(sorted(every))


def _split(recordings: list[Recording], val: float, test: float, seed: int) -> dict[str, list[Recording]]:
    if len(recordings) == 1:
        one, steps = recordings[0], len(recordings[0].values)
        ends = [0, round(steps * (1 - val - test)), round(steps * (1 - test)), steps]
        return {
            part: [Recording(one.path, one.values[a:b], one.targets[a:b] if one.targets else None, one.folder)]
            for part, a, b in zip(("train", "val", "test"), ends, ends[1:])
        }
    parts: dict[str, list[Recording]] = {"train": [], "val": [], "test": []}
    for folder in dict.fromkeys(r.folder for r in recordings):  # each class in every part
        some = [r for r in recordings if r.folder == folder]
        order = torch.randperm(len(some), generator=generator(seed, "series", folder)).tolist()
        cuts = [max(1, round(test * len(some))), max(1, round(val * len(some)))]
        if sum(cuts) >= len(some):
            where = repr(folder) if folder else "the folder"
            raise UserError(f"data set 'series': {len(some)} files in {where}; at least 3 are needed.")
        for at, index in enumerate(order):
            parts["test" if at < cuts[0] else "val" if at < sum(cuts) else "train"].append(some[index])
    return parts


def _windows(
    recordings: Sequence[Recording], window: int, hop: int, task: Task, classes: tuple[str, ...]
) -> tuple[Tensor, Any]:
    """[N, C, window], and a target each."""
    inputs: list[Tensor] = []
    targets: list[Any] = []
    for r in recordings:
        for start in range(0, len(r.values) - window + 1, hop):
            inputs.append(r.values[start : start + window].T)
            targets.append(_target(r, start, start + window, task, classes))
    if not inputs:
        return torch.zeros(0, 1, window), torch.zeros(0)
    unknown_kind = task.name == "reconstruction" and recordings[0].targets is None
    return torch.stack(inputs), None if unknown_kind else torch.tensor(targets)


def _target(r: Recording, start: int, end: int, task: Task, classes: tuple[str, ...]) -> Any:
    if r.targets is None:
        return classes.index(r.folder) if classes else -1
    if classes:
        return classes.index(r.targets[end - 1])
    values = [_number(r.path, line, "the target", t) for line, t in enumerate(r.targets[start:end], start + 2)]
    return int(any(v != 0 for v in values)) if task.name == "reconstruction" else values[-1]
