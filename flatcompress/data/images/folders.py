"""The user's own images: a folder of classes, or a folder of domains with the same classes in each."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatcompress.data.bundle import Part
from flatcompress.data.images.decoding import output_shape, read_all
from flatcompress.data.images.files import data_root, drawn, images, subfolders
from flatcompress.data.images.pixels import Pixels
from flatcompress.data.images.published_tests import class_folders, corrupted_folders
from flatcompress.data.raw_data import RawData, held_out_name
from flatcompress.data.split import split_identities
from flatcompress.errors import UserError

_LEAST = 3  # images of a class: one each for training, selection and test


@dataclass(frozen=True)
class Listing:
    """Files with their class and domain, before anything is decoded."""

    classes: tuple[str, ...]
    paths: list[Path]
    labels: list[int]
    domain_ids: list[int]


@dataclass(frozen=True)
class Decoded:
    """Pixels with int64 labels and domains [N], and what was skipped."""

    pixels: Pixels
    labels: Tensor
    domain_ids: Tensor
    skipped: tuple[str, ...]

    def part(self, rows: Tensor) -> Part:
        """The samples at ``rows``; every file is an image of its own."""
        return Part(self.pixels, rows, self.labels[rows], self.domain_ids[rows], rows)


def folder(
    seed: int,
    *,
    path: Any = None,
    size: Any = 64,
    channels: int = 3,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    limit: int = 0,
    on_bad_sample: str = "error",
    held_out_path: Any = None,
    corrupted_path: Any = None,
    corrupted_limit: int = 0,
) -> RawData:
    """PATH/CLASS/image, split by the seed; or PATH/train, PATH/val and PATH/test with CLASS/image in each.

    Where only one of val and test is there it is the test part, and ``val_fraction`` of train is for selection.
    ``limit``: images per class at most (0: all). ``on_bad_sample``: error, or skip and count. ``held_out_path``: a
    folder of the same classes that is only measured on (ImageNet-V2). ``corrupted_path``: KIND/SEVERITY/CLASS/image in
    place of computed corruptions (ImageNet-C), ``corrupted_limit`` images of a class in each.
    """
    root = data_root(path, "folder")
    shape, skip = output_shape(size, channels), _skips(on_bad_sample)
    raw = _folder(seed, root, shape, skip, val_fraction, test_fraction, limit)
    if held_out_path is not None:
        elsewhere = data_root(held_out_path, "held_out_path")
        unseen, bad = class_folders(elsewhere, raw.classes, shape, limit, skip, seed)
        raw = replace(
            raw,
            held_out=replace(unseen, domain_ids=torch.ones_like(unseen.labels)),
            domains=(root.name, elsewhere.name),
            held_out_domain=elsewhere.name,
            skipped=raw.skipped + bad,
        )
    if corrupted_path is not None:
        changed, bad = corrupted_folders(corrupted_path, raw.classes, shape, corrupted_limit, skip, seed)
        raw = replace(raw, corrupted=changed, skipped=raw.skipped + bad)
    return raw


def _folder(
    seed: int,
    root: Path,
    shape: tuple[int, int, int],
    skip: bool,
    val_fraction: float,
    test_fraction: float,
    limit: int,
) -> RawData:
    fixed = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    if "train" in fixed and len(fixed) > 1:
        return _fixed_split(root, fixed, shape, val_fraction, limit, skip, seed)
    found = _decoded(_class_listing(root, root, limit, seed), shape, skip)
    classes = tuple(p.name for p in subfolders(root, root))
    _check_counts(found.labels, classes, root)
    split = split_identities(found.labels, {"test": test_fraction, "val": val_fraction}, seed)
    return RawData(
        classes=classes,
        train=found.part(split["train"]),
        val=found.part(split["val"]),
        test=found.part(split["test"]),
        skipped=found.skipped,
    )


def domains(
    seed: int,
    *,
    path: Any = None,
    held_out: Any = None,
    size: Any = 224,
    channels: int = 3,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    limit: int = 0,
    on_bad_sample: str = "error",
) -> RawData:
    """PATH/DOMAIN/CLASS/image (PACS, OfficeHome, DomainNet); ``held_out`` is the domain that is never trained on.

    Selection and in-domain test images are split off each source domain, class by class, by the seed.
    """
    root = data_root(path, "domains")
    shape, skip = output_shape(size, channels), _skips(on_bad_sample)
    names = [p.name for p in subfolders(root, root)]
    if len(names) < 2:
        raise UserError(
            f"{root}: expected two domains or more (DOMAIN/CLASS/image), found {', '.join(names) or 'none'}."
        )
    unseen = held_out_name(held_out, names)
    if unseen is None:
        raise UserError(f"data set 'domains': say which domain is held_out: {', '.join(names)}.")
    listings = [_class_listing(root / name, root, limit, seed) for name in names]
    classes = _same_classes(names, listings, root)
    joined = Listing(
        classes,
        [p for one in listings for p in one.paths],
        [label for one in listings for label in one.labels],
        [d for d, one in enumerate(listings) for _ in one.paths],
    )
    found = _decoded(joined, shape, skip)
    strata = found.domain_ids * len(classes) + found.labels
    _check_counts(strata, tuple(f"{d}/{c}" for d in names for c in classes), root)
    split = split_identities(strata, {"test": test_fraction, "val": val_fraction}, seed)
    source = found.domain_ids != names.index(unseen)

    def of_sources(rows: Tensor) -> Part:
        return found.part(rows[source[rows]])

    return RawData(
        classes=classes,
        train=of_sources(split["train"]),
        val=of_sources(split["val"]),
        test=of_sources(split["test"]),
        held_out=found.part((~source).nonzero().flatten()),
        domains=tuple(names),
        held_out_domain=unseen,
        skipped=found.skipped,
    )


def _skips(on_bad_sample: str) -> bool:
    if on_bad_sample not in ("error", "skip"):
        raise UserError(f"data option 'on_bad_sample' must be error or skip, found {on_bad_sample!r}")
    return on_bad_sample == "skip"


def _class_listing(folder: Path, root: Path, limit: int, seed: int) -> Listing:
    if isinstance(limit, bool) or limit < 0:
        raise UserError(f"data option 'limit' must be 0 or more, found {limit!r}")
    classes = subfolders(folder, root)
    if len(classes) < 2:
        found = ", ".join(p.name for p in classes) or "none"
        raise UserError(f"{folder}: expected a folder of images per class, two classes or more; found {found}.")
    paths: list[Path] = []
    labels: list[int] = []
    for label, each in enumerate(classes):
        files = images(each, root)
        if not files:
            raise UserError(f"{each}: the class is empty: no image in it. Remove the folder or fill it.")
        files = drawn(files, limit, seed, each.name)
        paths += files
        labels += [label] * len(files)
    return Listing(tuple(p.name for p in classes), paths, labels, [0] * len(paths))


def _same_classes(names: list[str], listings: list[Listing], root: Path) -> tuple[str, ...]:
    first = set(listings[0].classes)
    for name, listing in zip(names, listings, strict=True):
        different = sorted(first ^ set(listing.classes))
        if different:
            raise UserError(
                f"{root}: every part needs the same classes; {names[0]!r} and {name!r} differ in "
                f"{', '.join(different)}."
            )
    return listings[0].classes


def _decoded(listing: Listing, shape: tuple[int, int, int], skip: bool) -> Decoded:
    pixels, good, reasons = read_all(listing.paths, shape, skip)
    if reasons:
        warnings.warn(f"{len(reasons)} bad images are left out, the first: {reasons[0]}", stacklevel=3)
    labels = torch.tensor([listing.labels[i] for i in good], dtype=torch.int64)
    return Decoded(
        pixels, labels, torch.tensor([listing.domain_ids[i] for i in good], dtype=torch.int64), tuple(reasons)
    )


def _check_counts(strata: Tensor, names: tuple[str, ...], root: Path) -> None:
    counts = torch.bincount(strata, minlength=len(names)).tolist()
    for name, count in zip(names, counts, strict=True):
        if count < _LEAST:
            raise UserError(f"{root / name}: {count} usable images; a class needs {_LEAST} to be split.")


def _fixed_split(
    root: Path,
    fixed: dict[str, Path],
    shape: tuple[int, int, int],
    val_fraction: float,
    limit: int,
    skip: bool,
    seed: int,
) -> RawData:
    names = list(fixed)
    listings = [_class_listing(fixed[name], root, limit, seed) for name in names]
    classes = _same_classes(names, listings, root)
    decoded = {name: _decoded(one, shape, skip) for name, one in zip(names, listings, strict=True)}
    skipped = tuple(reason for one in decoded.values() for reason in one.skipped)
    whole = {name: one.part(torch.arange(len(one.labels))) for name, one in decoded.items()}
    if len(fixed) == 3:
        return RawData(classes, whole["train"], whole["val"], whole["test"], skipped=skipped)
    train = decoded["train"]
    _check_counts(train.labels, classes, fixed["train"])
    split = split_identities(train.labels, {"val": val_fraction}, seed)
    test = whole["test"] if "test" in whole else whole["val"]
    return RawData(classes, train.part(split["train"]), train.part(split["val"]), test, skipped=skipped)
