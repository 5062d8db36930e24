"""The user's own images: a folder of classes, or a folder of domains with the same classes in each."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatcompress.data.bundle import Part
from flatcompress.data.images.decoding import output_shape
from flatcompress.data.images.files import Finder, data_root, drawn
from flatcompress.data.images.grouping import HELD_OUT, identities, split_grouped
from flatcompress.data.images.layout import class_folders, parts_of, same_classes
from flatcompress.data.images.pixels import Pixels
from flatcompress.data.images.published_tests import classes_below, corrupted_folders
from flatcompress.data.images.reading import Reader, skips
from flatcompress.data.raw_data import RawData, held_out_name
from flatcompress.data.split import split_identities
from flatcompress.errors import UserError, unknown

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
    """Pixels with int64 labels, domains and identities [N]; which files they are, and what was skipped."""

    pixels: Pixels
    labels: Tensor
    domain_ids: Tensor
    identity: Tensor
    kept: list[int]
    skipped: tuple[str, ...]

    def part(self, rows: Tensor) -> Part:
        """The samples at ``rows``."""
        return Part(self.pixels, rows, self.labels[rows], self.domain_ids[rows], self.identity[rows])


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
    intensity: Any = None,
    held_out_path: Any = None,
    corrupted_path: Any = None,
    corrupted_limit: int = 0,
) -> RawData:
    """PATH/CLASS/image, split by the seed; or PATH/train, PATH/val and PATH/test with CLASS/image in each.

    The parts are known by their usual names (`layout.PARTS`) in any case. Where only one of val and test is there it is
    the test part, and ``val_fraction`` of train is for selection. ``limit``: images per class at most (0: all).
    ``on_bad_sample``: error, or skip and count. ``intensity``: [low, high] of images with more than eight bits, see
    `Reader`. ``held_out_path``: a folder of the same classes that is only measured on (ImageNet-V2).
    ``corrupted_path``: KIND/SEVERITY/CLASS/image in place of computed corruptions (ImageNet-C), ``corrupted_limit``
    images of a class in each.
    """
    root = data_root(path, "folder")
    reader = Reader(output_shape(size, channels), skips(on_bad_sample), intensity)
    finder = Finder(root)
    raw = _folder(seed, finder, reader, val_fraction, test_fraction, limit)
    if held_out_path is not None:
        elsewhere = data_root(held_out_path, "held_out_path")
        unseen, bad = classes_below(Finder(elsewhere), elsewhere, raw.classes, reader, limit, seed)
        raw = replace(
            raw,
            held_out=replace(unseen, domain_ids=torch.ones_like(unseen.labels)),
            domains=(root.name, elsewhere.name),
            held_out_domain=elsewhere.name,
            skipped=raw.skipped + bad,
        )
    if corrupted_path is not None:
        changed, bad = corrupted_folders(corrupted_path, raw.classes, reader, corrupted_limit, seed)
        raw = replace(raw, corrupted=changed, skipped=raw.skipped + bad)
    return _with_notes(raw, finder, reader)


def _with_notes(raw: RawData, finder: Finder, reader: Reader) -> RawData:
    return replace(raw, notes=(*finder.left_out(), *reader.notes), intensity=reader.intensity)


def _folder(
    seed: int, finder: Finder, reader: Reader, val_fraction: float, test_fraction: float, limit: int
) -> RawData:
    root = finder.root
    parts = parts_of(root, finder)
    if parts:
        return _fixed_split(finder, parts, reader, val_fraction, limit, seed)
    listing = _class_listing(root, finder, limit, seed)
    reader.look(listing.paths)
    found = _decoded(listing, reader)
    _check_counts(found.labels, listing.classes, root)
    split = split_identities(found.labels, {"test": test_fraction, "val": val_fraction}, seed)
    return RawData(
        classes=listing.classes,
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
    intensity: Any = None,
    group: Any = None,
    held_out_identities: str = "unseen",
) -> RawData:
    """PATH/DOMAIN/CLASS/image (PACS, OfficeHome, DomainNet); ``held_out`` is the domain that is never trained on.

    Selection and in-domain test images are split off each source domain, class by class, by the seed. Where domains
    show the same things, ``group`` says by what key (`grouping.identities`): no identity is then in two parts, and of
    the held-out domain those that were neither trained nor selected on are measured (``held_out_identities``:
    unseen, or all), and the others by themselves.
    """
    root = data_root(path, "domains")
    reader, finder = Reader(output_shape(size, channels), skips(on_bad_sample), intensity), Finder(root)
    names = _domain_names(root, finder)
    unseen = held_out_name(held_out, names)
    if held_out_identities not in HELD_OUT:
        raise unknown("held_out_identities", held_out_identities, HELD_OUT)
    if unseen is None:
        raise UserError(f"data set 'domains': say which domain is held_out: {', '.join(names)}.")
    listings = [_class_listing(root / name, finder, limit, seed) for name in names]
    same_classes({name: one.classes for name, one in zip(names, listings, strict=True)}, root)
    classes = listings[0].classes
    joined = _joined(listings)
    reader.look(joined.paths)
    found = _decoded(joined, reader)
    strata = found.domain_ids * len(classes) + found.labels
    _check_counts(strata, tuple(f"{d}/{c}" for d in names for c in classes), root)
    fractions = {"test": test_fraction, "val": val_fraction}
    source = found.domain_ids != names.index(unseen)
    if group is None:
        split = {name: rows[source[rows]] for name, rows in split_identities(strata, fractions, seed).items()}
    else:
        found = replace(found, identity=identities([joined.paths[i] for i in found.kept], root, group))
        split = split_grouped(found.identity, found.labels, source, fractions, seed)
    held_out_rows, seen = _measured_rows(~source, split.get("unseen"), held_out_identities, unseen, finder)
    raw = RawData(
        classes=classes,
        train=found.part(split["train"]),
        val=found.part(split["val"]),
        test=found.part(split["test"]),
        held_out=found.part(held_out_rows),
        held_out_seen=found.part(seen) if len(seen) else None,
        domains=tuple(names),
        held_out_domain=unseen,
        skipped=found.skipped,
    )
    return _with_notes(raw, finder, reader)


def _joined(listings: Sequence[Listing]) -> Listing:
    """The domains' listings as one, with the domain's number beside each image."""
    return Listing(
        listings[0].classes,
        [p for one in listings for p in one.paths],
        [label for one in listings for label in one.labels],
        [d for d, one in enumerate(listings) for _ in one.paths],
    )


def _domain_names(root: Path, finder: Finder) -> list[str]:
    names = [p.name for p in finder.subfolders(root)]
    if len(names) < 2:
        raise UserError(
            f"{root}: expected two domains or more (DOMAIN/CLASS/image), found {', '.join(names) or 'none'}."
        )
    return names


def _measured_rows(
    outside: Tensor, unseen: Tensor | None, identities: str, domain: str, finder: Finder
) -> tuple[Tensor, Tensor]:
    """The rows of the held-out domain that count (all, or those of identities not trained on), and the others."""
    rows = outside.nonzero().flatten()
    if unseen is None or identities == "all":
        return rows, rows[:0]
    finder.note(
        f"held-out domain {domain!r}: {len(unseen)} of {len(rows)} images show what was neither trained nor selected "
        "on, and are measured; the others have a figure of their own, held_out_seen"
    )
    return unseen, rows[~torch.isin(rows, unseen)]


def _class_listing(folder: Path, finder: Finder, limit: int, seed: int) -> Listing:
    if isinstance(limit, bool) or limit < 0:
        raise UserError(f"data option 'limit' must be 0 or more, found {limit!r}")
    classes = class_folders(folder, finder)
    if len(classes) < 2:
        found = ", ".join(c.name for c in classes) or "none"
        raise UserError(f"{folder}: expected a folder of images per class, two classes or more; found {found}.")
    finder.beside(folder)
    paths: list[Path] = []
    labels: list[int] = []
    for label, each in enumerate(classes):
        files = [file for one in each.folders for file in finder.images(one)]
        if not files:
            raise UserError(f"{each.folders[0]}: the class is empty: no image in it. Remove the folder or fill it.")
        files = drawn(files, limit, seed, each.name)
        paths += files
        labels += [label] * len(files)
    return Listing(tuple(c.name for c in classes), paths, labels, [0] * len(paths))


def _decoded(listing: Listing, reader: Reader) -> Decoded:
    pixels, good, reasons = reader.read(listing.paths)
    if reasons:
        warnings.warn(f"{len(reasons)} bad images are left out, the first: {reasons[0]}", stacklevel=3)
    labels = torch.tensor([listing.labels[i] for i in good], dtype=torch.int64)
    domain_ids = torch.tensor([listing.domain_ids[i] for i in good], dtype=torch.int64)
    return Decoded(pixels, labels, domain_ids, torch.arange(len(good)), good, tuple(reasons))


def _check_counts(strata: Tensor, names: tuple[str, ...], root: Path) -> None:
    counts = torch.bincount(strata, minlength=len(names)).tolist()
    for name, count in zip(names, counts, strict=True):
        if count < _LEAST:
            raise UserError(f"{root / name}: {count} usable images; a class needs {_LEAST} to be split.")


def _fixed_split(
    finder: Finder, parts: dict[str, Path], reader: Reader, val_fraction: float, limit: int, seed: int
) -> RawData:
    listings = {part: _class_listing(folder, finder, limit, seed) for part, folder in parts.items()}
    same_classes({parts[part].name: one.classes for part, one in listings.items()}, finder.root)
    classes = listings["train"].classes
    reader.look(path for one in listings.values() for path in one.paths)
    decoded = {part: _decoded(one, reader) for part, one in listings.items()}
    skipped = tuple(reason for one in decoded.values() for reason in one.skipped)
    whole = {part: one.part(torch.arange(len(one.labels))) for part, one in decoded.items()}
    if len(parts) == 3:
        return RawData(classes, whole["train"], whole["val"], whole["test"], skipped=skipped)
    train = decoded["train"]
    _check_counts(train.labels, classes, parts["train"])
    split = split_identities(train.labels, {"val": val_fraction}, seed)
    test = whole["test"] if "test" in whole else whole["val"]
    return RawData(classes, train.part(split["train"]), train.part(split["val"]), test, skipped=skipped)
