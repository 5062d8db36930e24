"""One door to every data set: `load`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from flatcompress.data import augment as augmentation
from flatcompress.data import policies
from flatcompress.data.arrays import arrays
from flatcompress.data.bundle import DataBundle, ImageSet, Part
from flatcompress.data.corruptions import corrupted_parts
from flatcompress.data.embedded.figures import drawn_figures
from flatcompress.data.embedded.gauges import drawn_gauges
from flatcompress.data.embedded.loads import drawn_loads
from flatcompress.data.embedded.messages import drawn_messages
from flatcompress.data.embedded.objects import drawn_objects
from flatcompress.data.embedded.rotated_digits import rotated_digits
from flatcompress.data.embedded.scenes import drawn_scenes
from flatcompress.data.embedded.signals import drawn_heartbeats, drawn_machines
from flatcompress.data.embedded.styled_shapes import styled_shapes
from flatcompress.data.embedded.words import drawn_words
from flatcompress.data.images.cifar_mnist import cifar10, mnist
from flatcompress.data.images.coco import coco
from flatcompress.data.images.folders import domains, folder
from flatcompress.data.images.masked import image_masks
from flatcompress.data.images.packed import hf_dataset, webdataset
from flatcompress.data.images.tabled import image_table
from flatcompress.data.images.yolo import yolo
from flatcompress.data.in_memory import bundle
from flatcompress.data.raw_data import RawData
from flatcompress.data.resampling import with_long_tail
from flatcompress.data.series import series
from flatcompress.data.signal_augment import parse as parse_signals
from flatcompress.data.sounds import sounds
from flatcompress.data.texts import text
from flatcompress.errors import UserError, unknown
from flatcompress.randomness import generator
from flatcompress.registry import Entry, Registry
from flatcompress.tasks import Task, build, built_in

DATASETS = Registry("data set")
DATASETS.add("rotated-digits", rotated_digits, "1,797 real digits under six rotations, one held out; embedded")
DATASETS.add(
    "styled-shapes", styled_shapes, "12 drawn shapes in four styles, one held out; embedded, any size and count"
)
DATASETS.add("drawn-gauges", drawn_gauges, "drawn dials with their readings, for regression; embedded")
DATASETS.add("drawn-scenes", drawn_scenes, "drawn shapes with their masks, for segmentation; embedded")
DATASETS.add("drawn-objects", drawn_objects, "drawn shapes with their boxes, for detection; embedded")
DATASETS.add("drawn-figures", drawn_figures, "drawn pictures with a person or without, for wake words; embedded")
DATASETS.add("drawn-words", drawn_words, "six synthesised words in four voices as MFCC [1, 24, 10]; embedded")
DATASETS.add("drawn-messages", drawn_messages, "short messages to a device as token numbers [16]; embedded")
DATASETS.add("drawn-heartbeats", drawn_heartbeats, "synthesised heartbeats [2, 128], three kinds of beat; embedded")
DATASETS.add("drawn-machines", drawn_machines, "spectra [64] of a synthesised machine, for reconstruction; embedded")
DATASETS.add("drawn-loads", drawn_loads, "synthesised loads [4, 96] and the next 24 hours, for forecasting; embedded")
DATASETS.add("folder", folder, "your images: PATH/CLASS/image, or PATH/train and PATH/val")
DATASETS.add("image-table", image_table, "your images, and a CSV or JSON table of classes, labels or numbers")
DATASETS.add("image-masks", image_masks, "your images and mask images: PATH/images and PATH/masks, for segmentation")
DATASETS.add("coco", coco, "your images with boxes in COCO's JSON files, for detection")
DATASETS.add("yolo", yolo, "your images with boxes in YOLO's text files: PATH/images and PATH/labels, for detection")
DATASETS.add("domains", domains, "your images in domains: PATH/DOMAIN/CLASS/image, one domain held out")
DATASETS.add("webdataset", webdataset, "your images in WebDataset shards: PATH/*.tar")
DATASETS.add("hf-dataset", hf_dataset, "your images in a folder that Hugging Face's datasets saved to disk")
DATASETS.add("arrays", arrays, "an .npz file: x [N, C, H, W] and y [N], normalised already")
DATASETS.add("series", series, "CSV, NPY or Parquet files of sensor series, cut into windows [C, T]")
DATASETS.add("sounds", sounds, "WAV files as log-mel spectrograms or MFCC: PATH/CLASS/sound, or a table")
DATASETS.add("text", text, "a CSV, JSON or Parquet table of texts and classes, as token numbers")
DATASETS.add("cifar10", cifar10, "CIFAR-10, the binary files", "Krizhevsky 2009")
DATASETS.add("mnist", mnist, "MNIST and its likes, idx files, gz or not", "LeCun et al. 1998")

_COMMON = ("augment", "corruptions", "corrupted_count", "mean", "std", "long_tail")
_SAID = ("classes", "domains", "held_out_domain", "skipped", "notes", "intensity")  # bundles say what raw data says
_TOGETHER = 64  # images that are decoded at once for it
_STATISTICS_SAMPLE = 5000  # images that mean and std are computed on: their error is then below 1 %


def load(
    name: str,
    *,
    seed: int = 0,
    augment: Any = None,
    corruptions: Any = "default",
    corrupted_count: int = 500,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    task: Any = None,
    long_tail: float | None = None,
    **options: Any,
) -> DataBundle:
    """Load a data set by name. ``options`` are the data set's own; the same seed gives the same bits.

    ``augment``: None, a preset ("standard", "domainbed") or settings (see `augment.Settings`).
    ``corruptions``: "default", "full" (15 kinds at 5 severities), "none", or a list of "kind" and "kind/severity".
    ``corrupted_count``: how many test images each corruption is measured on (0: all).
    ``mean``, ``std``: per channel on pixels in 0..1; computed on the training part where not given.
    ``task``: name, mapping or `Task`; default: the targets' own. ``long_tail``: how many times as many training samples
    the first class has as the last, with exponentially fewer between. UserError: unknown name or option, unusable data.

    >>> bundle = load("rotated-digits", held_out="75", size=8)
    >>> len(bundle.train), bundle.input_shape, bundle.held_out_domain
    (6295, (1, 8, 8), '75')
    """
    entry = DATASETS[name]
    options |= _own(entry, task=task, corruptions=corruptions, corrupted_count=corrupted_count)
    _check_options(entry, options)
    raw = entry(seed, **options)
    if isinstance(raw, DataBundle):
        _as_they_are(name, mean=mean, std=std, corruptions=corruptions, long_tail=long_tail)
        raw = _with_signals(name, raw, augment, seed)
        return raw if task is None or "task" in options else bundle(raw, task)
    raw = with_long_tail(name, raw, long_tail, seed)
    _refuse_empty(name, train=raw.train, val=raw.val, test=raw.test)
    chosen = _task(name, raw, task)
    mean, std = _statistics(raw.train, mean, std, seed)
    _say(raw.notes)

    def images(part: Part, augmenter: augmentation.Augment | None = None) -> ImageSet:
        return ImageSet(part, mean, std, augmenter, chosen)

    changed = raw.corrupted or corrupted_parts(raw.test, corruptions, corrupted_count, seed)
    return DataBundle(
        name=name,
        input_shape=raw.train.pixels.shape,
        mean=tuple(mean),
        std=tuple(std),
        train=images(raw.train, _augmented(augment, seed, chosen)),
        val=images(raw.val),
        test=images(raw.test),
        held_out=images(raw.held_out) if raw.held_out is not None else None,
        held_out_seen=images(raw.held_out_seen) if raw.held_out_seen is not None else None,
        corrupted={key: images(part) for key, part in changed.items()},
        task=chosen,
        **{key: getattr(raw, key) for key in _SAID},
    )


def _refuse_empty(name: str, **parts: Part) -> None:
    for label, part in parts.items():
        if not len(part.rows):
            raise UserError(f"data set {name!r}: the {label} part is empty; give it more images or another fraction")


def _own(entry: Entry, **shared: Any) -> dict[str, Any]:
    """Those of the shared options that a data set takes itself: it reads targets by the task, or corrupts sound."""
    taken = inspect.signature(entry.make).parameters
    return {key: value for key, value in shared.items() if key in taken}


def _say(notes: Sequence[str]) -> None:
    for note in notes:
        warnings.warn(note, stacklevel=3)


def _with_signals(name: str, given: DataBundle, option: Any, seed: int) -> DataBundle:
    """The training part augmented: series, features and sound; other inputs stay as they are."""
    if option is None:
        return given
    if (len(given.input_shape) == 3 and not given.features) or "text" in given.features:
        _as_they_are(name, augment=option)
    chosen = parse_signals(option, seed, given.input_shape, name)
    return replace(given, train=given.train.augmented(chosen))  # type: ignore[attr-defined]


def _as_they_are(name: str, **given: Any) -> None:
    """Refuse what changes images, for a data set whose inputs stay what they are."""
    for key, value in given.items():
        if value is not None and not (key == "corruptions" and value in ("default", "none")):
            raise UserError(f"data set {name!r} takes its inputs as they are: leave {key!r} out.")


def _task(name: str, raw: RawData, given: Any) -> Task:
    """The task of a data set's targets with the user's keys, for its training part. UserError for another task."""
    task = build(raw.task if given is None else given)
    if task.name != raw.task and built_in(task.name):
        raise UserError(f"data set {name!r} has targets for task {raw.task!r}, not {task.name!r}.")
    targets = raw.train.labels if raw.train.targets is None else raw.train.targets
    return task.fit(targets, raw.classes)


def _augmented(option: Any, seed: int, task: Task) -> augmentation.Augment | None:
    """The augmentation; UserError where it would move pixels and not what their masks say."""
    found = augmentation.parse(option, seed)
    placed = task.moved is not None or task.agreement == "argmax_channels"  # targets that lie at pixels
    if found is None or not placed:
        return found
    if found.named is not None:
        raise UserError(
            f"data option 'augment': transform {found.named.name!r} gets images alone, and the targets of task "
            f"{task.name!r} lie at pixels: leave it out, or take crop, shift and flip, which move both."
        )
    if found.settings.rand or found.settings.trivial:
        found.moving = False
        warnings.warn(
            f"augment: the policy's operations that move pixels ({', '.join(policies.MOVING)}) are left out for task "
            f"{task.name!r}, whose targets would stay behind",
            stacklevel=4,
        )
    if task.agreement != "argmax_channels":
        return found
    moves = found.settings.crop or found.settings.shift or found.settings.flip
    if moves and task.moved is None:
        raise UserError(
            f"data option 'augment': crop, shift and flip move pixels, and task {task.name!r} does not say how its "
            "targets move with them: leave them out."
        )
    if found.settings.shift and task.options.get("ignore_index") is None:
        raise UserError(
            "data option 'augment': shift lets images begin beyond their border, where a mask says nothing: name an "
            "ignore_index of the task, or leave shift out."
        )
    return found


def _check_options(entry: Entry, options: dict[str, Any]) -> None:
    """Names, and types where the default has a telling one."""
    parameters = inspect.signature(entry.make).parameters
    for key, value in options.items():
        if key not in entry.defaults:
            allowed = [*entry.defaults, *_COMMON, "batch_size", "workers"]
            raise unknown(f"option of data set {entry.name}", key, allowed)
        if parameters[key].annotation == "Any":  # several types will do; the data set checks them itself
            continue
        wanted = type(entry.defaults[key])
        if wanted in (int, float, bool):
            accepted: Any = (int, float) if wanted is float else wanted
            if not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
                raise UserError(f"data set {entry.name}: option {key!r} must be {wanted.__name__}, found {value!r}")


def _statistics(
    train: Part, mean: Sequence[float] | None, std: Sequence[float] | None, seed: int
) -> tuple[list[float], list[float]]:
    channels = train.pixels.shape[0]
    given = [(label, values) for label, values in (("mean", mean), ("std", std)) if values is not None]
    for label, values in given:
        numbers = isinstance(values, (list, tuple)) and all(isinstance(v, (int, float)) for v in values)
        if not numbers or len(values) != channels or (label == "std" and min(values) <= 0):
            raise UserError(f"data option {label!r} must be {channels} numbers (std above 0), found {values!r}")
    if mean is not None and std is not None:
        return list(mean), list(std)
    chosen = torch.randperm(len(train.rows), generator=generator(seed, "statistics"))[:_STATISTICS_SAMPLE]
    count, total, squares = 0, torch.zeros(channels).double(), torch.zeros(channels).double()
    # Sums of integers in float64: the same bits whatever the order of summation; finer images are taken at once.
    rows = train.rows[chosen.sort().values]
    fine = train.pixels.gather(rows[:1]).dtype != torch.uint8
    for some in rows.split(len(rows) if fine else _TOGETHER):
        images = train.pixels.gather(some).double()
        count += images.numel() // channels
        total += images.sum((0, 2, 3))
        squares += (images * images).sum((0, 2, 3))
    average = total / count
    spread = (squares / count - average**2).clamp(min=1.0).sqrt()
    computed = [value / 255 for value in average.tolist()], [value / 255 for value in spread.tolist()]
    return list(mean) if mean is not None else computed[0], list(std) if std is not None else computed[1]
