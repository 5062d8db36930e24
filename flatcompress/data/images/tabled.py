"""Images with a table that says what each shows: a class, labels, or numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatcompress.data.bundle import Part
from flatcompress.data.images.decoding import output_shape
from flatcompress.data.images.files import Finder, data_root
from flatcompress.data.images.reading import Reader, skips
from flatcompress.data.raw_data import RawData, held_out_name
from flatcompress.data.tables import found_table, read_table
from flatcompress.data.targeted import (
    check_learnable,
    domains_told,
    file_column,
    files_told,
    parts_told,
    split,
    targets,
)
from flatcompress.errors import UserError
from flatcompress.tasks import build

NAME = "image-table"


def image_table(
    seed: int,
    *,
    path: Any = None,
    table: Any = None,
    file: Any = None,
    target: Any = None,
    split: Any = None,
    domain: Any = None,
    held_out: Any = None,
    size: Any = 64,
    channels: int = 3,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    on_bad_sample: str = "error",
    intensity: Any = None,
    task: Any = None,
) -> RawData:
    """Images below PATH and a CSV, JSON, JSON Lines or Parquet table with a row each.

    table: the table (default: the only one in PATH). file: its column of file names below PATH. target: the column that
    is learned, or a list of them: a class (classification); zeros and ones, or one column of label names
    (multilabel); numbers (regression); 1 for an anomaly, or none (reconstruction). split: a column with train, val,
    test; without it rows are drawn by the seed. domain, held_out: a column of domains, and the one that is never
    trained on. The rest as for `folder`. UserError names the table's line.
    """
    root, learned = data_root(path, NAME), build(task)
    rows = read_table(found_table(root, table, NAME))
    files = files_told(rows, file_column(rows, file), root)
    given, names = targets(rows, target, learned, NAME)
    told = parts_told(rows, split)
    domains = domains_told(rows, domain)
    reader, finder = Reader(output_shape(size, channels), skips(on_bad_sample), intensity), Finder(root)
    reader.look(files)
    pixels, good, reasons = reader.read(files)
    kept = torch.tensor(good, dtype=torch.int64)
    learn = learned.targets(given, rows.path.name)[kept]
    return _parts(
        seed,
        pixels=pixels,
        learn=learn,
        names=names or tuple(learned.names(learn)),
        told=None if told is None else [told[i] for i in good],
        domains=None if domains is None else [domains[i] for i in good],
        held_out=held_out,
        fractions={"test": test_fraction, "val": val_fraction},
        of_classes=learned.name == "classification",
        task=learned.name,
        skipped=tuple(reasons),
        notes=(*_unlisted(finder, files), *reader.notes),
        intensity=reader.intensity,
        where=str(rows.path),
    )


def _parts(
    seed: int,
    *,
    pixels: Any,
    learn: Tensor,
    names: tuple[str, ...],
    told: list[str] | None,
    domains: list[str] | None,
    held_out: Any,
    fractions: dict[str, float],
    of_classes: bool,
    where: str,
    **said: Any,
) -> RawData:
    """The parts of the table's rows."""
    count = len(learn)
    labels = learn if of_classes else torch.zeros(count, dtype=torch.int64)
    known = tuple(sorted(set(domains))) if domains else ()
    if held_out is not None and not known:
        raise UserError(f"data set {NAME!r}: held_out is a domain; name their column with 'domain'.")
    unseen = held_out_name(held_out, known)
    numbers = torch.tensor([known.index(d) for d in domains] if domains else [0] * count, dtype=torch.int64)
    outside = torch.zeros(count, dtype=torch.bool) if unseen is None else numbers == known.index(unseen)
    rows = split(labels, told, outside, fractions, seed, where)
    if of_classes:
        away = {"held-out": outside.nonzero().flatten()}
        check_learnable({**rows, **away}, labels, names, where)

    def part(chosen: Tensor) -> Part:
        wanted = None if of_classes else learn[chosen]
        return Part(pixels, chosen, labels[chosen], numbers[chosen], chosen, wanted)

    return RawData(
        names,
        part(rows["train"]),
        part(rows["val"]),
        part(rows["test"]),
        None if unseen is None else part(outside.nonzero().flatten()),
        known,
        unseen,
        **said,
    )


def _unlisted(finder: Finder, files: list[Path]) -> list[str]:
    listed = {path.resolve() for path in files}
    others = [path for path in finder.images(finder.root) if path.resolve() not in listed]
    if others:
        finder.note(f"{finder.root}: {len(others)} images are not in the table and not read: {others[0].name} ...")
    return finder.notes
