"""What `compress` calibrates and measures on: the user's images or arrays, with labels or without, or drawn inputs.

What is not said is decided here, and every decision is a sentence in ``notes``.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flatcompress import onnx_export
from flatcompress.compressing import network
from flatcompress.compressing.network import Known, Shape
from flatcompress.data import arrays
from flatcompress.data.images.decoding import output_shape
from flatcompress.data.images.files import Finder, data_root, drawn
from flatcompress.data.images.layout import class_folders, parts_of
from flatcompress.data.images.reading import Reader
from flatcompress.errors import UserError
from flatcompress.modules import evaluating
from flatcompress.onnx_export.runtime import sessions
from flatcompress.storage import write_bytes_atomic

DRAWN = 256
MOST = 1024  # images without labels that are read: calibration takes 512 of them, the rest measures


@dataclass
class Inputs:
    """Reads what the user gave into a recipe's ``data`` section. ``section``: the recipe's ``model``."""

    section: dict[str, Any]
    target: Path
    classes: int | None = None
    shape: Shape | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    seed: int = 0
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.known: Known = network.known(self.section["name"])
        self._built: tuple[nn.Module, int] | None = None
        self.agreement = False  # the labels are the float network's own classes

    def read(self, path: Path | None) -> dict[str, Any]:
        """The ``data`` section for ``path``; what it lacks is written into the ``.npz`` file ``target``."""
        if path is None:
            return self._unlabelled(self._drawn())
        return self._folder(path) if path.is_dir() else self._file(path)

    def _network(self, shape: Shape, fallback: int | None = None) -> tuple[nn.Module, int]:
        """The float network; ``fallback``: classes of a built-in network, which has as many as the data."""
        if self._built is None:
            count = self.classes or self.known.classes or (None if ":" in self.section["name"] else fallback)
            self._built = network.build(self.section, count, shape, self.seed)
        return self._built

    def _size(self) -> Shape:
        found = self.shape or self.known.shape
        if found is None:
            self.notes.append(f"no input shape is known: {network.DEFAULT_SHAPE}; --input-shape says another.")
        return found or network.DEFAULT_SHAPE

    def _drawn(self) -> Tensor:
        """Sums of normal noise at several scales: like photographs, more power in what is coarse."""
        shape, generator = self._size(), torch.Generator().manual_seed(self.seed)
        self.notes.append(
            f"no data: {DRAWN} inputs of shape {shape} are drawn at random. Ranges taken from them are a guess; give "
            "real inputs with --data."
        )
        x = torch.randn(DRAWN, *shape, generator=generator)
        side = min(shape[1:]) // 2
        while side >= 2:
            coarse = torch.randn(DRAWN, shape[0], side, side, generator=generator)
            x += nn.functional.interpolate(coarse, shape[1:], mode="bilinear", align_corners=False)
            side //= 2
        return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True).clamp_min(1e-6)

    # --- arrays ---------------------------------------------------------------------------------------------------

    def _file(self, path: Path) -> dict[str, Any]:
        found = arrays.read(path)
        parts = [key for key in found if key in ("x_train", "x_val", "x_test")]
        names = [f"y{key[1:]}" for key in parts] or [name for name in arrays.LABELS if name in found][:1]
        if not names:
            return self._unlabelled(arrays.as_inputs(arrays.first(found, arrays.INPUTS, "inputs", path), path))
        labels = [arrays.as_labels(found, name, path) for name in names]
        inputs = found[parts[0]] if parts else arrays.first(found, arrays.INPUTS, "inputs", path)
        shape = tuple(arrays.as_inputs(inputs[:1], path).shape[1:])
        named = len(found["classes"]) if "classes" in found else 1 + max(int(y.max()) for y in labels)
        own = self._network(shape, named)[1]  # type: ignore[arg-type]
        if own == named:
            return {"name": "arrays", "path": str(path), "missing_classes": True}
        if own < named:
            raise UserError(f"{path}: labels go up to {named - 1}, and the network has {own} classes.")
        self.notes.append(f"{path.name} names no classes: the network's {own} are taken.")
        self._write({**found, "classes": np.array([str(c) for c in range(own)])})
        return {"name": "arrays", "path": str(self.target), "missing_classes": True}

    def _unlabelled(self, x: Tensor) -> dict[str, Any]:
        """The float network's own classes stand for the labels."""
        if len(x) < 3:
            raise UserError(f"{len(x)} inputs; at least 3 are needed, for calibration, selection and measuring.")
        model, count = self._network(tuple(x.shape[1:]))  # type: ignore[arg-type]
        labels = torch.from_numpy(_outputs(model, x).argmax(1))
        self.agreement = True
        self.notes.append("no labels: the float network's own classes stand for them; accuracy is agreement with it.")
        self._write({"x": x.numpy(), "y": labels.numpy(), "classes": np.array([str(c) for c in range(count)])})
        return {"name": "arrays", "path": str(self.target), "missing_classes": True}

    def _write(self, found: dict[str, Any]) -> None:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        made = io.BytesIO()
        np.savez(made, **found)
        write_bytes_atomic(self.target, made.getvalue())

    # --- images ---------------------------------------------------------------------------------------------------

    def _folder(self, path: Path) -> dict[str, Any]:
        """Class folders with as many classes as the network has are labels; other images are inputs alone."""
        shape = self._size()
        mean, std = self._normalised(shape[0])
        finder = Finder(data_root(path, "folder"))
        parts = parts_of(path, finder)
        found = len(class_folders(parts["train"] if parts else path, finder))
        own = self._network(shape, found if found >= 2 else None)[1]
        if found == own:
            return {"name": "folder", "path": str(path), "size": list(shape[1:]), "channels": shape[0],
                    "mean": list(mean), "std": list(std), "corruptions": "none"}  # fmt: skip
        if found:
            self.notes.append(f"{path} has {found} folders, the network {own} classes: they are no labels.")
        return self._unlabelled(self._images(finder, shape, mean, std))

    def _normalised(self, channels: int) -> tuple[Sequence[float], Sequence[float]]:
        mean, std = self.mean or self.known.mean, self.std or self.known.std
        if mean is None or std is None:
            mean, std = mean or _for(channels, network.IMAGENET[0]), std or _for(channels, network.IMAGENET[1])
            self.notes.append(
                "how the network's images are normalised is not known: by ImageNet's mean and standard deviation. "
                "--mean and --std say another."
            )
        for what, values in (("mean", mean), ("std", std)):
            if len(values) != channels:
                raise UserError(f"{what}: {len(values)} numbers for images of {channels} channels.")
        return [float(v) for v in mean], [float(v) for v in std]

    def _images(self, finder: Finder, shape: Shape, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        every = finder.images(finder.root)
        if not every:
            raise UserError(f"{finder.root}: no image that Pillow reads lies in it.")
        paths = drawn(every, MOST, self.seed, "compress")
        if len(paths) < len(every):
            self.notes.append(f"{len(paths)} of {len(every)} images are read, drawn by the seed.")
        reader = Reader(output_shape(list(shape[1:]), shape[0]), skip_bad=True)
        reader.look(paths)
        pixels, good, bad = reader.read(paths)
        self.notes += [*reader.notes, *finder.left_out()]
        if bad:
            self.notes.append(f"{len(bad)} images cannot be read and are left out; the first: {bad[0]}")
        x = pixels.gather(torch.arange(len(good))).float() / 255
        return (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def with_targets(path: Path | None, task: str) -> dict[str, Any]:
    """The ``data`` section of a task that is no classification: an ``.npz`` with inputs and targets."""
    if path is None or path.suffix.lower() != ".npz":
        raise UserError(
            f"task {task}: give inputs and their targets as --data FILE.npz with the arrays x and y; found "
            f"{path or 'no data'}. A recipe takes its other data sets: `flatcompress list data`."
        )
    arrays.read(path)
    return {"name": "arrays", "path": str(path)}


def _for(channels: int, values: Sequence[float]) -> Sequence[float]:
    """Three channels' values; for one channel their mean."""
    return values if channels == len(values) else [sum(values) / len(values)] * channels


def _outputs(model: nn.Module, x: Tensor) -> np.ndarray:
    """Logits [N, classes], through onnxruntime, which takes a third of torch's time; torch where it has no form."""
    with evaluating(model), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        try:
            onnx_export.export(model, x[:2], path, "float32")
        except UserError:  # an operator without an ONNX form here is refused later, with its name
            return torch.cat([model(batch) for batch in x.split(64)]).numpy()
        return sessions.run(sessions.session(path), [batch.numpy() for batch in x.split(64)])
