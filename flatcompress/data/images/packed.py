"""Images packed into few files: WebDataset shards (tar), and folders that Hugging Face's `datasets` saved (Arrow)."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatcompress.data.bundle import Part
from flatcompress.data.images.decoding import decode_bytes, output_shape, suffixes
from flatcompress.data.images.files import data_root
from flatcompress.data.images.layout import PART_OF, one_name
from flatcompress.data.images.pixels import MemoryPixels, Pixels, Shape
from flatcompress.data.images.reading import MOST_BYTES
from flatcompress.data.raw_data import RawData
from flatcompress.data.tables import PARQUET, classes_in
from flatcompress.data.targeted import check_learnable, split
from flatcompress.errors import UserError, unknown
from flatcompress.tasks import build, built_in

_CLASS = ("cls", "txt", "label")  # what a shard calls a sample's class
_MOST_MEMBER = 256 << 20


@dataclass(frozen=True)
class Place:
    """Bytes of a file that are read when they are needed."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes. UserError where they are no longer there."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                found = file.read(self.size)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or error}).") from None
        if len(found) < self.size:
            raise UserError(f"{self.path}: has become shorter since its samples were listed.")
        return found


@dataclass
class Sample:
    """An encoded image, its class as text, its part ("" where nobody said), and where it stands."""

    image: bytes | Place
    label: str
    part: str
    where: str


def webdataset(
    seed: int,
    *,
    path: Any = None,
    target: Any = None,
    size: Any = 64,
    channels: int = 3,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    task: Any = None,
) -> RawData:
    """The tar files in PATH: of every sample an image and NAME.cls (or .txt), or a key ``target`` of its NAME.json.

    A file whose name has a part in it (train-000.tar) is of that part; where none has, the seed splits. Classes only.
    Of a set whose decoded images take more than 2 GiB only the places of the images are kept: they are read and decoded
    as they are asked for, in any order. UserError names the shard and the sample.
    """
    root = data_root(path, "webdataset")
    shards = sorted(p for p in root.rglob("*.tar") if p.is_file())
    if not shards:
        raise UserError(f"data set 'webdataset': no .tar file in {root}.")
    found = [sample for shard in shards for sample in _of_shard(shard, target)]
    return _raw(seed, "webdataset", found, None, root, size, channels, val_fraction, test_fraction, task)


def _of_shard(shard: Path, target: Any) -> list[Sample]:
    said = [PART_OF[word] for word in re.findall("[a-z]+", shard.stem.lower()) if word in PART_OF]
    samples: dict[str, dict[str, bytes | Place]] = {}
    try:
        for key, ending, content in _members(shard):
            rows = samples.setdefault(key, {})
            if ending in rows:
                raise UserError(f"{shard}: {key.rpartition('/')[2]}.{ending} is there twice.")
            rows[ending] = content
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{shard}: cannot be read as a tar file ({str(error)[:120]}).") from None
    return [_sample(rows, target, said[0] if said else "", f"{shard}: sample {key}") for key, rows in samples.items()]


def _members(shard: Path) -> Iterator[tuple[str, str, bytes | Place]]:
    """Key, ending in small letters and content of a shard's files; of images the place, where nothing is packed."""
    plain = tarfile.is_tarfile(shard) and not _compressed(shard)
    with tarfile.open(shard, "r:" if plain else "r:*") as archive:
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            key, dot, ending = name.partition(".")
            if not member.isfile() or not dot or not key:
                continue
            if member.size > _MOST_MEMBER:
                raise UserError(f"{shard}: {member.name} has more than 256 MiB.")
            ending = ending.lower()
            if plain and f".{ending}" in suffixes() and not member.issparse():
                yield f"{folder}/{key}", ending, Place(shard, member.offset_data, member.size)
                continue
            file = archive.extractfile(member)
            yield f"{folder}/{key}", ending, file.read() if file is not None else b""


def _compressed(shard: Path) -> bool:
    with shard.open("rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))


class EncodedPixels:
    """Images that lie encoded in shards or in memory, decoded as they are asked for."""

    on_disk = True

    def __init__(self, samples: Sequence[Sample], shape: Shape) -> None:
        self.samples, self._shape = samples, shape

    @property
    def shape(self) -> Shape:
        return self._shape

    def __len__(self) -> int:
        return len(self.samples)

    def gather(self, rows: Tensor) -> Tensor:
        return torch.stack([self.image(row) for row in rows.tolist()])

    def image(self, row: int) -> Tensor:
        """uint8 [C, H, W] of one sample. UserError says which one cannot be decoded."""
        sample = self.samples[row]
        data = sample.image if isinstance(sample.image, bytes) else sample.image.read()
        return decode_bytes(data, sample.where, self._shape)


def _sample(rows: dict[str, bytes | Place], target: Any, part: str, where: str) -> Sample:
    images = [ending for ending in rows if f".{ending}" in suffixes()]
    if len(images) != 1:
        raise UserError(f"{where} has {len(images)} images, among {', '.join(sorted(rows))}; one is wanted.")
    if target is None:
        named = next((ending for ending in _CLASS if ending in rows), None)
        if named is None:
            raise UserError(f"{where} has no {' or '.join(_CLASS)}; name a key of its JSON with 'target'.")
        label = _text(rows[named]).strip()
    else:
        try:
            label = str(json.loads(_text(rows["json"]))[str(target)])
        except (KeyError, ValueError, TypeError):
            raise UserError(f"{where} has no JSON with a key {str(target)!r}.") from None
    if not label:
        raise UserError(f"{where}: its class is empty.")
    return Sample(rows[images[0]], one_name(label), part, where)


def _text(content: bytes | Place) -> str:
    return (content if isinstance(content, bytes) else content.read()).decode("utf-8", "replace")


def hf_dataset(
    seed: int,
    *,
    path: Any = None,
    image: str = "image",
    target: str = "label",
    size: Any = 64,
    channels: int = 3,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    task: Any = None,
) -> RawData:
    """A folder that ``datasets.save_to_disk`` wrote: one split, or a DatasetDict with train, validation and test.

    image, target: its columns; a ClassLabel's names are the classes. Read with pyarrow (extra ``parquet``); nothing is
    downloaded and no code of the folder is run. Classes only. UserError names the split and the row.
    """
    root = data_root(path, "hf-dataset")
    folders = {"": root} if (root / "state.json").is_file() else _splits(root)
    samples: list[Sample] = []
    names: list[str] | None = None
    for name, folder in folders.items():
        part = PART_OF.get(name.lower(), "")
        if name and not part:
            raise UserError(f"{folder}: the split {name!r} is none of train, validation and test.")
        names = _class_names(folder, target) or names
        samples += _of_split(folder, part, image, target, names)
    return _raw(seed, "hf-dataset", samples, names, root, size, channels, val_fraction, test_fraction, task)


def _splits(root: Path) -> dict[str, Path]:
    try:
        told = json.loads((root / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return {str(name): root / str(name) for name in told}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"data set 'hf-dataset': {root} has neither state.json nor dataset_dict.json; give a folder that "
            "datasets.save_to_disk wrote."
        ) from None


def _class_names(folder: Path, target: str) -> list[str] | None:
    """The names of a ClassLabel, where the column is one."""
    try:
        features = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))["features"]
        names = features[target].get("names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return [one_name(str(name)) for name in names] if isinstance(names, list) and names else None


def _of_split(folder: Path, part: str, image: str, target: str, names: list[str] | None) -> list[Sample]:
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{folder}: {PARQUET.split(',')[0]}.") from None
    found: list[Sample] = []
    for file in sorted(folder.glob("*.arrow")):
        try:
            with pyarrow.memory_map(str(file)) as source:
                table = pyarrow.ipc.open_stream(source).read_all()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file}: cannot be read as Arrow ({str(error).splitlines()[0][:120]}).") from None
        for column in (image, target):
            if column not in table.column_names:
                raise UserError(f"{file}: {unknown('column', column, table.column_names)}")
        for i, (picture, label) in enumerate(zip(table[image].to_pylist(), table[target].to_pylist())):
            where = f"{file}, row {i + 1}"
            data = picture.get("bytes") if isinstance(picture, dict) else picture
            if not isinstance(data, bytes):
                raise UserError(f"{where}: {image!r} holds no image; save the data set with its pictures embedded.")
            found.append(Sample(data, _label(label, names, where, target), part, where))
    if not found:
        raise UserError(f"{folder}: no row in its .arrow files.")
    return found


def _label(value: Any, names: list[str] | None, where: str, target: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise UserError(f"{where}: {target!r} holds {value!r}, which is no class.")
    if names is None or isinstance(value, str):
        return one_name(str(value))
    if not 0 <= value < len(names):
        raise UserError(f"{where}: class {value}; there are {len(names)} names.")
    return names[value]


def _raw(
    seed: int,
    name: str,
    samples: Sequence[Sample],
    names: list[str] | None,
    root: Path,
    size: Any,
    channels: int,
    val_fraction: float,
    test_fraction: float,
    task: Any,
) -> RawData:
    learned = build(task)
    if learned.name != "classification" and built_in(learned.name):
        raise UserError(f"data set {name!r} has targets for task 'classification', not {learned.name!r}.")
    shape = output_shape(size, channels)
    told = [sample.label for sample in samples]
    classes = tuple(names) if names else classes_in(told, lambda i: samples[i].where)
    numbers = {label: i for i, label in enumerate(classes)}
    labels = torch.tensor([numbers[label] for label in told])
    encoded = EncodedPixels(samples, shape)
    kept: Pixels = encoded
    if len(samples) * torch.Size(shape).numel() <= MOST_BYTES:
        kept = MemoryPixels(torch.stack([encoded.image(row) for row in range(len(samples))]))
    parts = [sample.part for sample in samples]
    if any(parts) and not all(parts):
        raise UserError(f"{root}: {samples[parts.index('')].where} says no part, and others do.")
    rows = split(labels, parts if any(parts) else None, torch.zeros(len(labels), dtype=torch.bool),
                 {"test": test_fraction, "val": val_fraction}, seed, str(root))  # fmt: skip
    check_learnable(rows, labels, classes, str(root))
    zeros = torch.zeros_like(labels)

    def part(chosen: Tensor) -> Part:
        return Part(kept, chosen, labels[chosen], zeros[chosen], chosen)

    return RawData(classes, part(rows["train"]), part(rows["val"]), part(rows["test"]), task=learned.name)
