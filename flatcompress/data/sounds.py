"""Folders of WAV files: spoken words, machines; as log-mel spectrograms or MFCC [1, frames, bands]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flatcompress.data.bundle import DataBundle
from flatcompress.data.corruptions import how_many
from flatcompress.data.corruptions.audio import changed
from flatcompress.data.images.files import Finder, data_root, inside
from flatcompress.data.images.layout import one_name
from flatcompress.data.in_memory import bundle
from flatcompress.data.raw_data import held_out_name
from flatcompress.data.spectra import Spectra
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
from flatcompress.data.wav import read_wav
from flatcompress.errors import UserError
from flatcompress.randomness import generator
from flatcompress.tasks import Task, build

NAME = "sounds"
_LISTS = {"val": "validation_list.txt", "test": "testing_list.txt"}  # as Speech Commands has them


@dataclass(frozen=True)
class Listing:
    """Files with what is learned of each, its domain, and its part where somebody said it."""

    files: list[Path]
    targets: Any
    names: tuple[str, ...]
    domains: list[str] | None = None
    told: list[str] | None = None


def sounds(
    seed: int,
    *,
    path: Any = None,
    table: Any = None,
    file: Any = None,
    target: Any = None,
    split: Any = None,
    domain: Any = None,
    held_out: Any = None,
    rate: int = 16000,
    seconds: float = 1.0,
    features: str = "logmel",
    bands: int = 40,
    coefficients: int = 10,
    window: float = 40.0,
    hop: float = 20.0,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    corruptions: Any = "default",
    corrupted_count: int = 500,
    task: Any = None,
) -> DataBundle:
    """PATH/CLASS/*.wav, PATH/DOMAIN/CLASS/*.wav with a domain ``held_out``, or files of a table's rows.

    table, file, target, split, domain: as for `image-table`. Speech Commands' validation_list.txt and testing_list.txt
    are the split where they are there; folders that begin with ``_`` are no classes. rate: of every file. seconds: of a
    sample: what is longer is cut, what is shorter gets silence behind it. features: logmel or mfcc, see `Spectra`.
    Features are normalised by the training part. UserError names the file that cannot be used.
    """
    root, learned = data_root(path, NAME), build(task)
    if not 0.05 <= seconds <= 60:
        raise UserError(f"data set {NAME!r}: seconds is from 0.05 to 60, found {seconds!r}.")
    if not 1000 <= rate <= 192_000:
        raise UserError(f"data set {NAME!r}: rate is samples a second, from 1,000 to 192,000, found {rate!r}.")
    made = Spectra(rate, features, bands, coefficients, window, hop)
    if round(seconds * rate) < made.length:
        raise UserError(f"data set {NAME!r}: a window of {window:g} ms is longer than a sample of {seconds:g} s.")
    if table is None and target is not None:
        raise UserError(f"data set {NAME!r}: 'target' is a column; name the file with 'table'.")
    finder = Finder(root)
    if table is None:
        found = _folders(root, finder, held_out, learned)
    else:
        found = _tabled(root, table, file, target, split, domain, learned)
    waves, notes = _waves(found.files, rate, round(seconds * rate))
    parts = _parts(found, held_out, {"test": test_fraction, "val": val_fraction}, seed, learned, root)
    return featured(
        root.name,
        found,
        waves,
        parts,
        made,
        learned,
        (*finder.notes, *notes),
        how_many(NAME, corruptions, corrupted_count),
        seed,
    )


def _folders(root: Path, finder: Finder, held_out: Any, task: Task) -> Listing:
    """Classes by folder, below domains by folder where one of them is held out."""
    if task.name not in ("classification", "reconstruction"):
        raise UserError(
            f"data set {NAME!r}: folders say a class; for task {task.name!r} name a 'table' and its 'target'."
        )
    tops = [p for p in finder.subfolders(root) if not p.name.startswith("_")]
    names = [one_name(p.name) for p in tops]
    with_domains = held_out_name(held_out, names) is not None
    files: list[Path] = []
    told: list[str] = []
    where: list[str] = []
    for top in tops:
        inner = [p for p in finder.subfolders(top) if not p.name.startswith("_")] if with_domains else [top]
        for folder in inner:
            here = _wavs(folder, root)
            if not here:
                raise UserError(f"{folder}: no .wav file in it. Remove the folder or fill it.")
            files += here
            told += [one_name(folder.name)] * len(here)
            where += [one_name(top.name)] * len(here)
    classes = tuple(sorted(set(told)))
    if task.name == "classification" and len(classes) < 2:
        raise UserError(f"{root}: expected a folder of .wav files per class, found {', '.join(classes) or 'none'}.")
    numbers = torch.tensor([classes.index(name) for name in told])
    if task.name == "reconstruction":  # one class: whoever trains an anomaly score has sounds that are well
        return Listing(files, _normal(classes, numbers, root), (), where if with_domains else None)
    return Listing(files, numbers, classes, where if with_domains else None, _listed(root, files))


def _normal(classes: tuple[str, ...], numbers: Tensor, root: Path) -> Tensor:
    if len(classes) > 1:
        if set(classes) != {"normal", "anomaly"}:
            raise UserError(
                f"{root}: for reconstruction the folders are normal and anomaly, found {', '.join(classes)}."
            )
        return (numbers == classes.index("anomaly")).long()
    return torch.full((len(numbers),), -1)


def _wavs(folder: Path, root: Path) -> list[Path]:
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() == ".wav" and not p.name.startswith("."))
    for path in found:
        if path.is_symlink():
            inside(path, root)
    return found


def _listed(root: Path, files: Sequence[Path]) -> list[str] | None:
    """The parts that Speech Commands' lists say; None without both."""
    if not all((root / name).is_file() for name in _LISTS.values()):
        return None
    parts = dict.fromkeys((one_name(p.relative_to(root).as_posix()) for p in files), "train")
    for part, name in _LISTS.items():
        for line, text in enumerate((root / name).read_text(encoding="utf-8").splitlines(), 1):
            if text.strip() and one_name(text.strip()) in parts:
                parts[one_name(text.strip())] = part
            elif text.strip() and not (root / text.strip()).is_file():
                raise UserError(f"{root / name}:{line}: {text.strip()!r} is not there.")
    return list(parts.values())


def _tabled(root: Path, table: Any, file: Any, target: Any, split: Any, domain: Any, task: Task) -> Listing:
    rows = read_table(found_table(root, table, NAME))
    files = files_told(rows, file_column(rows, file), root)
    learned, names = targets(rows, target, task, NAME)
    domains = domains_told(rows, domain)
    return Listing(files, learned, names, domains, parts_told(rows, split))


def _waves(files: Sequence[Path], rate: int, length: int) -> tuple[NDArray[np.float32], list[str]]:
    """float32 [N, length], and what was done to them."""
    waves = np.zeros((len(files), length), np.float32)
    cut = padded = mixed = 0
    for i, path in enumerate(files):
        sound = read_wav(path)
        if sound.rate != rate:
            raise UserError(f"{path}: {sound.rate} samples a second, and the set is read at {rate}: resample, or rate.")
        here = sound.samples[:length]
        waves[i, : len(here)] = here
        cut += len(sound.samples) > length
        padded += len(here) < length
        mixed += sound.channels > 1
    said = [
        (cut, "are longer than a sample; their end is cut off"),
        (padded, "are shorter than a sample and get silence behind them"),
        (mixed, "have several channels, of which the mean is taken"),
    ]
    return waves, [f"{count} of {len(files)} sounds {text}" for count, text in said if count]


def _parts(
    found: Listing, held_out: Any, fractions: dict[str, float], seed: int, task: Task, root: Path
) -> dict[str, Tensor]:
    known = tuple(sorted(set(found.domains or ())))
    unseen = held_out_name(held_out, known)
    domains = found.domains or [""] * len(found.files)
    outside = torch.tensor([unseen is not None and d == unseen for d in domains])
    labels = found.targets if task.name == "classification" else torch.zeros(len(found.files), dtype=torch.int64)
    if task.name == "reconstruction" and found.told is None:
        return _well(found.targets, outside, fractions, seed, root)
    rows = split(labels, found.told, outside, fractions, seed, str(root))
    if unseen is not None:
        rows["held_out"] = outside.nonzero().flatten()
    if task.name == "classification":
        check_learnable(rows, labels, found.names, str(root))
    return rows


def _well(marks: Tensor, outside: Tensor, fractions: dict[str, float], seed: int, root: Path) -> dict[str, Tensor]:
    """Reconstruction: anomalies are in the test part alone, or in the held-out domain."""
    known = ((marks != 1) & ~outside).nonzero().flatten()
    order = known[torch.randperm(len(known), generator=generator(seed, NAME))]
    test, val = (max(1, round(fractions[part] * len(known))) for part in ("test", "val"))
    if len(known) <= test + val:
        raise UserError(f"{root}: {len(known)} sounds that are well are too few for three parts.")
    bad = ((marks == 1) & ~outside).nonzero().flatten()
    rows = {"train": order[test + val :], "val": order[test : test + val], "test": torch.cat([order[:test], bad])}
    return {**rows, **({"held_out": outside.nonzero().flatten()} if bool(outside.any()) else {})}


def featured(
    name: str,
    found: Listing,
    waves: NDArray[np.float32],
    rows: dict[str, Tensor],
    made: Spectra,
    task: Task,
    notes: Sequence[str],
    count: int | None,
    seed: int,
) -> DataBundle:
    """The bundle of ``waves`` [N, T]: features normalised by the training part, and corrupted ones of ``count`` tests.

    ``rows``: which of them are train, val, test and held_out. ``count`` 0: all; None: nothing is corrupted.
    """
    features = torch.from_numpy(made(waves))[:, None]
    mean, std = features[rows["train"]].mean(), features[rows["train"]].std().clamp(min=1e-6)
    scaled = (features - mean) / std
    given: dict[str, Any] = {part: (scaled[at], found.targets[at]) for part, at in rows.items()}
    if count is not None:
        at = rows["test"]
        if count and count < len(at):
            at = at[torch.randperm(len(at), generator=generator(seed, "corrupted"))[:count].sort().values]
        given["corrupted"] = {
            kind: ((torch.from_numpy(made(other))[:, None] - mean) / std, found.targets[at])
            for kind, other in changed(waves[at.numpy()], made.rate, seed).items()
        }
    named = {"classes": found.names} if found.names else {}
    made_of = bundle({"name": name, "mean": [float(mean)], "std": [float(std)], **named, **given}, task)
    return replace(made_of, notes=(*made_of.notes, *notes), features=asdict(made))
