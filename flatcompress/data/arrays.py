"""Arrays in a file: ``.npz`` with inputs and labels, as numpy writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatcompress.data.bundle import DataBundle
from flatcompress.data.in_memory import bundle
from flatcompress.errors import UserError
from flatcompress.tasks import Task, build

INPUTS, LABELS = ("x", "images", "X", "inputs", "data", "arr_0"), ("y", "labels", "targets", "arr_1")
_TEST, _VAL = 0.3, 0.1


def arrays(
    seed: int,
    *,
    path: Any = None,
    test_fraction: float = _TEST,
    val_fraction: float = _VAL,
    missing_classes: bool = False,
    task: Any = None,
) -> DataBundle:
    """Inputs [N, C, H, W] and labels [N] of an ``.npz`` file, as they are: whoever wrote it has normalised them.

    Series [N, C, T], features [N, F] and the targets of every task are taken as well.

    Keys ``x`` and ``y`` (or images, inputs, data; labels, targets) are split at random by ``seed``; ``x_train``,
    ``y_train``, ``x_test``, ``y_test`` are taken as the split. ``classes``: names. Whole numbers 0..255 are divided by
    255 and [N, H, W, C] is turned into [N, C, H, W]. ``missing_classes``: the training part may lack classes, as where
    nothing is trained. UserError names what is missing.
    """
    if path is None:
        raise UserError("data set 'arrays': give its file as path: FILE.npz")
    found = read(Path(path).expanduser())
    learned = build(task)
    names = [str(name) for name in found["classes"]] if "classes" in found else None
    parts: dict[str, Any] = {"name": Path(path).stem, **({"classes": names} if names else {})}
    if "x_train" in found:
        for part in ("train", "val", "test"):
            if f"x_{part}" in found:
                parts[part] = as_inputs(found[f"x_{part}"], path, learned), _told(found, f"y_{part}", path, learned)
        return bundle(parts, learned, learnable=not missing_classes)
    x, key = as_inputs(first(found, INPUTS, "inputs", path), path, learned), next((n for n in LABELS if n in found), "")
    y = _told(found, key, path, learned)
    if y is None and learned.name != "reconstruction":
        raise UserError(f"{path}: no labels ({', '.join(LABELS)}); `flatcompress compress` can do without them.")
    if y is not None and len(y) != len(x):
        raise UserError(f"{path}: {len(x)} inputs and {len(y)} targets; one target an input is needed.")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, val = (max(1, round(len(x) * share)) for share in (test_fraction, val_fraction))
    if len(x) <= test + val:
        raise UserError(f"{path}: {len(x)} samples are too few for three parts ({test} for the test, {val} to select).")
    cuts = [test, test + val]
    for part, chosen in zip(("test", "val", "train"), order.tensor_split(cuts)):
        parts[part] = x[chosen], None if y is None else y[chosen]
    return bundle(parts, learned, learnable=not missing_classes)


def _told(found: dict[str, np.ndarray], name: str, path: Any, task: Task) -> Any:
    """The targets called ``name``: class numbers checked here, those of other tasks by the task; None without any."""
    if name not in found and (not name or task.name == "reconstruction"):
        return None
    if task.name == "classification":
        return as_labels(found, name, path)
    if name not in found:
        raise UserError(f"{path}: {name!r} is missing; it has {', '.join(found)}.")
    return torch.from_numpy(np.ascontiguousarray(found[name]))


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` (by name) or ``.npy`` file (as ``x``); nothing in it is run. UserError if damaged."""
    try:
        loaded = np.load(path, allow_pickle=False)
        return {"x": loaded} if isinstance(loaded, np.ndarray) else {key: loaded[key] for key in loaded.files}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except Exception as error:  # numpy raises whatever zip, header or dtype make it raise
        raise UserError(f"{path}: cannot be read as .npz or .npy ({type(error).__name__}: {error}).") from None


def first(found: dict[str, np.ndarray], names: tuple[str, ...], what: str, path: Any) -> np.ndarray:
    """The first of ``names`` that the file has. UserError with what it has instead."""
    for name in names:
        if name in found:
            return found[name]
    raise UserError(f"{path}: no {what} ({', '.join(names)}); it has {', '.join(found) or 'nothing'}.")


def labels_of(found: dict[str, np.ndarray], path: Any) -> Tensor | None:
    """Labels [N] int64, or None where the file has none."""
    name = next((n for n in LABELS if n in found), None)
    return None if name is None else as_labels(found, name, path)


def as_labels(found: dict[str, np.ndarray], name: str, path: Any) -> Tensor:
    """Labels [N] int64. UserError for what are no class numbers."""
    if name not in found:
        raise UserError(f"{path}: {name!r} is missing; it has {', '.join(found)}.")
    values = np.asarray(found[name]).squeeze()
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer) or (values < 0).any():
        raise UserError(f"{path}: {name!r} must be class numbers [N], found {values.dtype} of shape {values.shape}.")
    return torch.from_numpy(values.astype(np.int64))


def as_inputs(values: np.ndarray, path: Any, task: Task | None = None) -> Tensor:
    """Inputs as float32 [N, C, H, W]; with a ``task`` series [N, C, T] and features [N, F] as well."""
    if values.ndim == 4 and values.shape[-1] in (1, 3, 4) and values.shape[1] not in (1, 3, 4):
        values = values.transpose(0, 3, 1, 2)
    if (values.ndim != 4 and not (task is not None and values.ndim in (2, 3))) or not len(values):
        raise UserError(f"{path}: inputs are [N, C, H, W] or [N, H, W, C], found {values.shape}.")
    scale = 255.0 if values.dtype == np.uint8 else 1.0
    found = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)) / scale
    if not bool(torch.isfinite(found).all()):
        raise UserError(f"{path}: the inputs contain NaN or infinity.")
    return found
