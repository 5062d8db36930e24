"""One door to every model: `build`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flatcompress.errors import UserError, unknown
from flatcompress.models import ds_cnn, external, mobilenet, resnet, vit
from flatcompress.models.blocks import Shape
from flatcompress.models.weights import load_weights
from flatcompress.registry import Entry, Registry


@dataclass(frozen=True)
class Takes:
    """What a row takes. dims: of one input, 3 for images [C, H, W], 2 for series [C, T], 1 for features [F]."""

    dims: int = 3


MODELS = Registry("model", Takes)
MODELS.add("resnet8", resnet.resnet8, "ResNet-8, MLPerf Tiny image classification, 78 k parameters", "2106.07597")
MODELS.add("resnet20", resnet.resnet20, "ResNet-20 for small images, 0.27 M parameters", "1512.03385")
MODELS.add("resnet18", resnet.resnet18, "ResNet-18, 11.2 M parameters", "1512.03385")
MODELS.add("resnet50", resnet.resnet50, "ResNet-50, 23.5 M parameters", "1512.03385")
MODELS.add("mobilenet_v1_025", mobilenet.mobilenet_v1_025, "MobileNetV1 x0.25, MLPerf Tiny wake words", "1704.04861")
MODELS.add("mobilenet_v2", mobilenet.mobilenet_v2, "MobileNetV2, width option, 2.2 M parameters", "1801.04381")
MODELS.add("ds_cnn", ds_cnn.ds_cnn, "DS-CNN, MLPerf Tiny keyword spotting, 22 k parameters", "1711.07128")
MODELS.add("vit_tiny", vit.vit_tiny, "a vision transformer for small images, 0.14 M parameters", "2010.11929")

_OF_TEXT = "flatcompress.models.text_nets:text_cnn"
_PREFIXES = [f"{source}:..." for source in external.SOURCES] + ["package.module:factory"]


def build(
    name: str,
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    seed: int | None = None,
    weights: str | None = None,
    config: dict[str, Any] | None = None,
    new_head: bool = False,
    checked: bool = True,
    vocabulary: int | None = None,
    **options: Any,
) -> nn.Module:
    """Build a model that maps images [B, C, H, W] to logits [B, num_classes].

    ``name``: a built-in name, ``timm:NAME``, ``torchvision:NAME``, ``transformers:TYPE`` (or a local folder) or
    ``package.module:factory``. ``seed`` fixes the initial weights and leaves torch's global generator as it was.
    ``weights``: a safetensors or state-dict file; ``new_head`` skips its classifier. ``config`` overrides keys of a
    transformers config; without ``checked`` a model from outside may give something else than [B, num_classes], for
    tasks that want it. ``vocabulary``: how many token numbers there are, where inputs are text, for a factory whose
    signature has it. ``options`` are the architecture's own. UserError on anything that does not fit.

    >>> model = build("resnet8", num_classes=10, input_shape=(1, 16, 16), seed=0)
    >>> model(torch.zeros(2, 1, 16, 16)).shape
    torch.Size([2, 10])
    """
    shape = _checked_shape(num_classes, input_shape)
    if config is not None and not name.startswith("transformers:"):
        raise UserError(f"model {name!r} takes no 'config'; it belongs to transformers:TYPE")
    with _seeded(seed):
        if ":" in name:
            made = _external(name, num_classes, shape, config, options, vocabulary)
            model = external.checked(name, made, num_classes if checked else None, shape, vocabulary is not None)
        else:
            if vocabulary is not None:
                raise UserError(
                    f"model {name!r} takes images; text wants a model of token numbers, such as {_OF_TEXT}."
                )
            model = _builtin(name, num_classes, shape, options)
    if weights is not None:
        load_weights(model, weights, new_head)
    model.input_shape = shape  # type: ignore[assignment]
    return model


def _checked_shape(num_classes: int, input_shape: tuple[int, ...]) -> Shape:
    if not isinstance(num_classes, int) or num_classes < 1:
        raise UserError(f"num_classes must be a positive whole number, found {num_classes!r}")
    shape = tuple(input_shape)
    if not 1 <= len(shape) <= 4 or not all(isinstance(side, int) and side > 0 for side in shape):
        raise UserError(f"input_shape must be (channels, height, width), all positive, found {input_shape!r}")
    return shape  # type: ignore[return-value]


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _builtin(name: str, num_classes: int, shape: Shape, options: dict[str, Any]) -> nn.Module:
    if name not in MODELS:
        raise unknown("model", name, [*MODELS, *_PREFIXES])
    entry = MODELS[name]
    _check_options(entry, options)
    if len(shape) != entry.facts.dims:
        kinds = {1: "features [F]", 2: "series [C, T]", 3: "images [C, H, W]"}
        raise UserError(f"model {name!r} takes {kinds[entry.facts.dims]}; the data's input_shape is {shape}.")
    return entry(num_classes, shape, **options)


def _check_options(entry: Entry, options: dict[str, Any]) -> None:
    """Names and types against the defaults in the architecture's signature."""
    for key, value in options.items():
        if key == "pretrained":
            raise UserError(
                f"model {entry.name}: the built-in networks come without weights. Give yours with weights: FILE, or "
                "take timm:NAME or torchvision:NAME, which fetch theirs with pretrained: true."
            )
        if key not in entry.defaults:
            raise unknown(f"option of model {entry.name}", key, [*entry.defaults, "weights", "new_head"])
        wanted = type(entry.defaults[key])
        fits = isinstance(value, (int, float) if wanted is float else wanted) and not isinstance(value, bool)
        if not fits:
            raise UserError(f"model {entry.name}: option {key!r} must be {wanted.__name__}, found {value!r}")


def _external(
    name: str,
    num_classes: int,
    shape: Shape,
    config: dict[str, Any] | None,
    options: dict[str, Any],
    vocabulary: int | None,
) -> nn.Module:
    source, _, rest = name.partition(":")
    if not source or not rest:
        raise UserError(f"model {name!r}: something must stand on both sides of the colon: {', '.join(_PREFIXES)}")
    if source not in external.SOURCES:
        given = {} if vocabulary is None else {"vocabulary": vocabulary}
        return external.factory(name, num_classes, shape, given, **options)
    if config is not None:
        options = {**options, "config": config}
    return external.SOURCES[source](rest, num_classes, shape, **options)
