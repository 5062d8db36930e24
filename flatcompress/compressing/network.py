"""What a network says of itself: how many classes, what size of image, how its images are normalised."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatcompress import models
from flatcompress.errors import UserError

Shape = tuple[int, int, int]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DEFAULT_SHAPE: Shape = (3, 224, 224)
_GAVE = re.compile(r"gave \(1, (\d+)\)")


@dataclass(frozen=True)
class Known:
    """``classes``, ``shape`` (C, H, W), ``mean`` and ``std`` (on pixels in 0..1) as far as they are known."""

    classes: int | None = None
    shape: Shape | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def known(name: str) -> Known:
    """What ``name`` says before it is built; nothing is downloaded."""
    source, _, rest = name.partition(":")
    reader = {"onnx": _onnx, "timm": _timm, "transformers": _transformers}.get(source)
    if reader is not None:
        return reader(rest)
    if source == "torchvision":
        return Known(1000, DEFAULT_SHAPE, *IMAGENET)
    return _factory(source, rest) if rest else Known()


def _onnx(path: str) -> Known:
    from flatcompress.onnx_export.proof import inspect_file

    graph = inspect_file.load(Path(path).expanduser()).graph
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    sizes = [dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim][1:] if len(inputs) == 1 else []
    ends = [dim.dim_value for dim in graph.output[0].type.tensor_type.shape.dim] if len(graph.output) == 1 else []
    shape = (sizes[0], sizes[1], sizes[2]) if len(sizes) == 3 and all(sizes) else None
    return Known(ends[1] or None if len(ends) == 2 else None, shape)


def _timm(name: str) -> Known:
    from flatcompress.models.external import library

    config = library("timm").models.get_pretrained_cfg(name)
    if config is None:
        return Known()
    return Known(config.num_classes, tuple(config.input_size), tuple(config.mean), tuple(config.std))


def _transformers(name: str) -> Known:
    """Of a local folder: its config and its preprocessor; a model type knows nothing."""
    folder = Path(name).expanduser()
    config, images = (_json(folder / file) for file in ("config.json", "preprocessor_config.json"))
    labels = config.get("id2label")
    mean, std = (tuple(v) if isinstance(v := images.get(key), list) else None for key in ("image_mean", "image_std"))
    side = config.get("image_size")
    shape = (int(config.get("num_channels", 3)), side, side) if isinstance(side, int) else None
    return Known(len(labels) if labels else None, shape, mean, std)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _factory(module: str, attribute: str) -> Known:
    """The defaults in a factory's signature; an import that fails is reported when the model is built."""
    try:
        parameters = inspect.signature(getattr(importlib.import_module(module), attribute)).parameters
    except Exception:  # the user's own module may raise anything; building it says what
        return Known()
    classes, shape = (parameters[k].default if k in parameters else None for k in ("num_classes", "input_shape"))
    three = isinstance(shape, tuple | list) and len(shape) == 3 and all(isinstance(side, int) for side in shape)
    return Known(classes if type(classes) is int else None, tuple(shape) if three else None)  # type: ignore[arg-type]


def build(section: dict[str, Any], classes: int | None, shape: Shape, seed: int) -> tuple[Any, int]:
    """The float network of a recipe's model ``section`` and how many classes it has: as asked, or as its output says.

    UserError for what cannot be built, and for an output of another size than ``classes`` asks for.
    """
    options = {k: v for k, v in section.items() if k != "name"} | {"input_shape": shape, "seed": seed}
    try:
        return models.build(section["name"], num_classes=classes or 1000, **options), classes or 1000
    except UserError as error:
        own = _GAVE.search(str(error))
        if classes is not None or own is None:
            raise
    return models.build(section["name"], num_classes=int(own[1]), **options), int(own[1])
