"""Data that a Python program brings along: tensors, arrays, torch datasets or loaders, as a `DataBundle`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from flatcompress.data.bundle import Batch, DataBundle
from flatcompress.data.signal_augment import SignalAugment
from flatcompress.errors import UserError, unknown
from flatcompress.tasks import Task, build, built_in

PARTS = ("train", "val", "test", "held_out", "corrupted")
_KEYS = (*PARTS, "name", "classes", "mean", "std")
_VAL_SHARE = 0.1
_ACCEPTED = "(images, labels) as tensors or arrays, a map-style dataset of (image, label), or a DataLoader over one"
_SAMPLE = "an item of the dataset is (image, label)"


class OwnSet(Dataset[Batch]):
    """Inputs [N, C, H, W] (or [N, C, T] series, [N, F] features) and targets [N, ...] as they are, already normalised.

    ``source``: a pair of tensors or arrays, or a map-style dataset of (image [C, H, W], target), read item by item; a
    PIL image becomes [C, H, W] in 0..1. ``task`` says what a target is. ``rows``: the items of it that are this set's.
    UserError names what is wrong.
    """

    def __init__(
        self, source: Any, where: str, task: Task, rows: Tensor | None = None, targets: Tensor | None = None
    ) -> None:
        self.where, self.task = where, task
        self.source = source if rows is not None else _source(source, where, task)
        self.images: Tensor | None = None
        if isinstance(self.source, tuple):
            self.images = _images(self.source[0], where)
            every = task.targets(_said(self.source, self.images, task), where) if targets is None else targets
            self._check(len(every))
        else:
            every = _targets(self.source, where, task) if targets is None else targets
        self.rows = torch.arange(len(every)) if rows is None else rows
        self.every = every
        self.targets = every[self.rows]
        classes = task.of_classes and self.targets.ndim == 1
        self.labels = self.targets if classes else torch.zeros(len(self.targets), dtype=torch.int64)
        self.domain_ids = torch.zeros_like(self.labels)
        self.identities = torch.arange(len(self.labels))
        self.augment: SignalAugment | None = None
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # loader workers must see it change
        if not len(self.labels):
            raise UserError(f"data[{where!r}] is empty.")

    def _check(self, n: int) -> None:
        assert self.images is not None
        shape = tuple(self.images.shape)
        if self.images.ndim < 2 or len(self.images) != n:
            raise UserError(
                f"data[{self.where!r}]: inputs are [N, C, H, W] (or [N, C, T], [N, F]) with N = {n} labels, "
                f"found {shape}."
            )
        if not bool(self.images.isfinite().all()):
            first = int((~self.images.isfinite()).flatten(1).any(1).nonzero()[0])
            raise UserError(f"data[{self.where!r}]: image {first} holds NaN or infinity.")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.__getitems__([range(len(self))[index]])
        return x[0], y[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        rows = self.rows[chosen]
        if self.images is not None:
            x = self.images[rows]
        else:
            x = torch.stack([_image(_pair(self.source[i])[0], self.where) for i in rows.tolist()])
        if self.augment is not None:
            x = self.augment(x, chosen, len(self), int(self._epoch))
        return x, self.task.target(x, self.targets[chosen])

    def augmented(self, augment: SignalAugment | None) -> OwnSet:
        """This set with its inputs augmented."""
        found = copy.copy(self)
        found.augment = augment
        return found

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that augmentation draws for."""
        self._epoch.fill_(epoch)

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """uint8 [B, C, H, W] for the preview sheet: each image stretched to its own range."""
        x, _ = self.__getitems__(list(indices))
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        return ((x - low) / (high - low).clamp(min=1e-8) * 255).round().to(torch.uint8)

    def take(self, indices: Tensor, where: str) -> OwnSet:
        """A part of this set; a dataset is read anew each time, so that what it draws at random stays random."""
        return OwnSet(self.source, where, self.task, self.rows[indices], self.every)


def _source(source: Any, where: str, task: Task) -> Any:
    """A pair, or a map-style dataset. UserError for everything else, saying what is accepted."""
    if isinstance(source, DataLoader):
        if source.collate_fn is not default_collate:
            raise UserError(
                f"data[{where!r}]: the DataLoader has a collate_fn of its own, which the pipeline cannot follow. Give "
                "its dataset, or (images, labels)."
            )
        warnings.warn(
            f"data[{where!r}]: the DataLoader's dataset is read; batch size, order and workers are the recipe's.",
            stacklevel=2,
        )
        source = source.dataset
    if isinstance(source, IterableDataset):
        raise UserError(
            f"data[{where!r}]: an IterableDataset has no length and no order; give {_ACCEPTED}, for example the "
            "samples of one pass as tensors."
        )
    if isinstance(source, TensorDataset) and len(source.tensors) == 2:
        source = source.tensors
    if isinstance(source, tuple | list) and len(source) == 2 and not _is_pair(source[0]):
        return tuple(source)
    if isinstance(source, str | bytes | Mapping) or not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
        raise UserError(f"data[{where!r}]: expected {_ACCEPTED}; found {_described(source)}.")
    if isinstance(source, Tensor | np.ndarray):
        if task.name == "reconstruction":
            return source, None
        raise UserError(f"data[{where!r}]: images without labels; give (images, labels).")
    return source


def _said(source: tuple[Any, Any], inputs: Tensor, task: Task) -> Any:
    """The targets of a pair. Reconstruction takes none, or the inputs themselves: then nothing is known of them."""
    targets = source[1]
    if task.name != "reconstruction":
        return targets
    itself = targets is source[0]
    if not itself and isinstance(targets, Tensor | np.ndarray) and tuple(targets.shape) == tuple(inputs.shape):
        itself = bool(torch.equal(torch.as_tensor(targets).float(), inputs))
    return torch.full((len(inputs),), -1) if targets is None or itself else targets


def _is_pair(item: Any) -> bool:
    """Is ``item`` a sample (image, label) of a list of samples, and not the images of a pair?"""
    return isinstance(item, tuple) and len(item) == 2


def _described(value: Any) -> str:
    return f"a mapping with {', '.join(map(repr, list(value)[:5]))}" if isinstance(value, Mapping) else repr(value)[:80]


def _images(images: Any, where: str) -> Tensor:
    if isinstance(images, Mapping) or (isinstance(images, tuple) and images and isinstance(images[0], Tensor)):
        raise UserError(_several(where))
    if isinstance(images, list | tuple) and images and isinstance(images[0], Image.Image | np.ndarray | Tensor):
        return _stacked([_image(image, where) for image in images], where)
    try:
        found = torch.as_tensor(images)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"data[{where!r}]: the images are no array of one shape ({str(error)[:150]}).") from None
    if found.is_complex():
        raise UserError(f"data[{where!r}]: the images are complex numbers; take their size, or two channels.")
    return found.float()


def _several(where: str) -> str:
    return (
        f"data[{where!r}]: several inputs a sample are not supported by the pipeline yet; flatcompress.prune takes "
        "them as an example input in your own loop."
    )


def _stacked(images: list[Tensor], where: str) -> Tensor:
    shapes = dict.fromkeys(tuple(image.shape) for image in images)
    if len(shapes) > 1:
        raise UserError(f"data[{where!r}]: images of several sizes ({_sizes(shapes)}); resize them to one.")
    return torch.stack(images)


def _sizes(shapes: Mapping[tuple[int, ...], Any]) -> str:
    return ", ".join(map(str, list(shapes)[:3]))


def _image(image: Any, where: str) -> Tensor:
    """float32 [C, H, W] of one sample."""
    if isinstance(image, Image.Image):
        plain = image if image.mode in ("L", "RGB") else image.convert("RGB")
        array = np.asarray(plain, dtype=np.float32).reshape(plain.height, plain.width, -1)
        return torch.from_numpy(array / 255).permute(2, 0, 1).contiguous()
    if isinstance(image, Mapping | tuple | list):
        raise UserError(_several(where))
    try:
        return torch.as_tensor(image).float()
    except (TypeError, ValueError, RuntimeError):
        raise UserError(
            f"data[{where!r}]: an image is {type(image).__name__}: a tensor, an array or a PIL image."
        ) from None


def _pair(item: Any) -> tuple[Any, Any]:
    """Image and label of a dataset's item: the first two of a sequence, or the usual keys of a dict."""
    if isinstance(item, Mapping):
        image = next((item[k] for k in ("image", "pixel_values", "img") if k in item), None)
        label = next((item[k] for k in ("label", "labels", "target") if k in item), None)
        if image is None or label is None:
            raise UserError(f"{_SAMPLE}, or a dict with image and label; found keys {', '.join(map(str, item))}.")
        return image, label
    if isinstance(item, tuple | list) and len(item) >= 2:
        return item[0], item[1]
    raise UserError(f"{_SAMPLE}; found {type(item).__name__}.")


def _targets(source: Any, where: str, task: Task) -> Tensor:
    """The targets of a map-style dataset; every item is read once, and the inputs must have one shape."""
    labels: list[Any] = []
    shapes: dict[tuple[int, ...], None] = {}
    for i in range(len(source)):
        try:
            image, label = _pair(source[i])
            shapes[tuple(_image(image, where).shape)] = None
        except UserError as error:
            text = str(error)
            raise UserError(text if text.startswith("data[") else f"data[{where!r}], item {i}: {text}") from None
        labels.append(_plain(label))
    if len(shapes) > 1:
        raise UserError(f"data[{where!r}]: images of several sizes ({_sizes(shapes)}); resize them to one.")
    if shapes and not len(next(iter(shapes))):
        raise UserError(f"data[{where!r}]: an input is [C, H, W], [C, T] or [F], found one number.")
    maps = {label.shape: None for label in labels if isinstance(label, np.ndarray)}
    if len(maps) > 1 and not task.ragged:
        raise UserError(f"data[{where!r}]: targets of several sizes ({_sizes(maps)}); resize them to one.")
    if maps and not task.ragged:
        labels = np.stack(labels)  # type: ignore[assignment]
    return task.targets(labels, where) if len(labels) else torch.zeros(0, dtype=torch.int64)


def _plain(label: Any) -> Any:
    """A label as Python numbers, so that a list of them can be told apart by type and shape."""
    if isinstance(label, Image.Image):
        label = np.asarray(label)
    if isinstance(label, Tensor | np.ndarray) and label.ndim > 1:
        return np.asarray(label)
    return label.tolist() if isinstance(label, Tensor | np.ndarray | np.generic) else label


def bundle(data: Mapping[str, Any] | DataBundle, task: Any = None, *, learnable: bool = True) -> DataBundle:
    """A `DataBundle` from ``data``: ``train`` and ``test``, perhaps ``val``, ``held_out``, ``corrupted``, ``classes``.

    Each part is ``(images, labels)``, a map-style dataset (of tensors, arrays or PIL images) or a DataLoader over one;
    ``corrupted`` maps names to parts. ``task``: name, mapping or `Task` (default: classification, whose labels are
    class numbers); it says what a target is. Without ``val`` a tenth of the training part is set
    aside. ``mean`` and ``std`` only describe the preprocessing for the exported file. UserError names the part that is
    wrong, and the task that targets of another kind belong to. ``learnable``: whether a class that the training part
    has no sample of is refused, or a note (what is only calibrated on need not show every class).
    """
    if isinstance(data, DataBundle):
        return data if task is None else _for_task(data, build(task))
    chosen = build(task)
    if not isinstance(data, Mapping):
        raise UserError(f"data is a DataBundle or a mapping with 'train' and 'test', found {type(data).__name__}.")
    for key in data:
        if key not in _KEYS:
            raise unknown("part of data", key, _KEYS)
    for key in ("train", "test"):
        if key not in data:
            raise UserError(f"data: {key!r} is missing; give {_ACCEPTED}.")
    given = {part: OwnSet(data[part], part, chosen) for part in PARTS[:4] if data.get(part) is not None}
    corrupted = {k: OwnSet(v, f"corrupted.{k}", chosen) for k, v in _corrupted(data).items()}
    _check_shapes({**given, **corrupted}, chosen)
    train, test, held_out = given["train"], given["test"], given.get("held_out")
    classes = _names(data.get("classes"), [*given.values(), *corrupted.values()], chosen)
    unseen = _unlearnable(given, classes, chosen)
    if unseen and learnable:
        raise UserError(unseen[0])
    fitted = chosen.fit(train.targets, classes)
    val = given.get("val")
    if val is None:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        cut = max(1, round(_VAL_SHARE * len(train)))
        if cut >= len(train):
            raise UserError("data['train']: one sample, and selection needs one of its own: give more, or 'val'.")
        val, train = train.take(order[:cut], "val"), train.take(order[cut:], "train")
    shape = tuple(train[0][0].shape)
    return DataBundle(
        name=str(data.get("name", "python")),
        classes=classes,
        input_shape=shape,  # type: ignore[arg-type]
        mean=_per_channel(data, "mean", 0.0, shape[0]),
        std=_per_channel(data, "std", 1.0, shape[0]),
        train=train,  # type: ignore[arg-type]
        val=val,  # type: ignore[arg-type]
        test=test,  # type: ignore[arg-type]
        held_out=held_out,  # type: ignore[arg-type]
        corrupted=corrupted,  # type: ignore[arg-type]
        held_out_domain="held_out" if held_out is not None else None,
        task=fitted,
        notes=tuple(unseen),
    )


def _for_task(given: DataBundle, task: Task) -> DataBundle:
    """A bundle whose targets are this task's: the one it was made for, or one that only changes loss and metrics."""
    if task.name != given.task.name and built_in(task.name):
        raise UserError(
            f"the DataBundle was made for task {given.task.name!r}, not {task.name!r}: give the task where it is made, "
            "data.bundle(..., task=...)."
        )
    return replace(given, task=task.fit(given.train.targets, given.classes))


def _corrupted(data: Mapping[str, Any]) -> Mapping[str, Any]:
    found = data.get("corrupted") or {}
    if not isinstance(found, Mapping):
        raise UserError(f"data['corrupted'] maps names to parts, found {type(found).__name__}.")
    return found


def _check_shapes(parts: Mapping[str, OwnSet], task: Task) -> None:
    skipped = 1 + task.ragged
    first, targets = tuple(parts["train"][0][0].shape), parts["train"].targets.shape[skipped:]
    for name, part in parts.items():
        shape = tuple(part[0][0].shape)
        if shape != first:
            raise UserError(f"data[{name!r}]: images are {shape}, those of 'train' are {first}.")
        if part.targets.shape[skipped:] != targets:
            raise UserError(
                f"data[{name!r}]: a target is {tuple(part.targets.shape[1:])}, those of 'train' are {tuple(targets)}."
            )
        problem = task.fits(shape, tuple(part.targets.shape[1:]))
        if problem is not None:
            raise UserError(f"data[{name!r}]: {problem}")


def _names(named: Any, parts: Sequence[OwnSet], task: Task) -> tuple[str, ...]:
    """What the outputs stand for: as the user says, or numbered."""
    found = max((task.names(part.targets) for part in parts), key=len)
    if named is None:
        return found
    if isinstance(named, str) or not isinstance(named, Sequence):
        raise UserError(f"data['classes'] is a list of names, one a class, found {named!r}.")
    classes, count = tuple(str(c) for c in named), len(found)
    if task.of_classes and len(classes) < count:
        raise UserError(f"data: {len(classes)} classes are named, but a label is {count - 1}.")
    if not task.of_classes and len(classes) != count:
        raise UserError(f"data: {len(classes)} names for targets of {count} columns.")
    twice = next((c for i, c in enumerate(classes) if c in classes[:i]), None)
    if twice is not None:
        raise UserError(f"data['classes'] names {twice!r} twice.")
    return classes


def _unlearnable(given: Mapping[str, OwnSet], classes: Sequence[str], task: Task) -> list[str]:
    """A sentence per part with classes that the training part does not show."""
    known = _occurring(given["train"], task)
    said = []
    for name, part in given.items():
        unseen = sorted(_occurring(part, task) - known)
        if unseen:
            named = ", ".join(classes[label] for label in unseen[:5])
            said.append(f"data[{name!r}] has samples of {named}, of which data['train'] has none to learn from.")
    return said


def _occurring(part: OwnSet, task: Task) -> set[int]:
    """The classes or labels that a part has; nothing where targets are numbers."""
    if task.occurring is not None:
        return task.occurring(part.targets)
    if task.agreement == "threshold":
        return set(part.targets.any(0).nonzero().flatten().tolist())
    if not task.of_classes:
        return set()
    return set(part.targets.unique().tolist()) - {task.options.get("ignore_index")}


def _per_channel(data: Mapping[str, Any], key: str, default: float, channels: int) -> tuple[float, ...]:
    values = data.get(key)
    if values is None:
        return (default,) * channels
    try:
        found = tuple(float(v) for v in values)
    except (TypeError, ValueError):
        found = ()
    if len(found) != channels or not all(np.isfinite(found)) or (key == "std" and min(found) <= 0):
        raise UserError(f"data[{key!r}] is {channels} numbers, one a channel (std above 0), found {values!r}.")
    return found
