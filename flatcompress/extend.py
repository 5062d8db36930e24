"""Adding to flatcompress from outside: a decorator for every kind of thing that is chosen by name.

In a script the decorator is all there is to it. A package that is installed names the module that uses these decorators
under the entry-point group ``flatcompress``, and what it adds is there wherever flatcompress runs:

    [project.entry-points.flatcompress]
    mine = "my_package.for_flatcompress"

``flatcompress list`` says where each row comes from. docs/extending.md has a worked example of every kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from flatcompress import data, flat, models, onnx_export, prune, quant
from flatcompress.data.corruptions import CORRUPTIONS
from flatcompress.registry import Registry
from flatcompress.stages import STAGES, Stage
from flatcompress.tasks import TASKS

Made = TypeVar("Made", bound=Callable[..., Any])

__all__ = [
    "corruption", "data_set", "export_profile", "flat_method", "importance", "model", "quantizer", "stage", "task",
]  # fmt: skip


def flat_method(name: str, summary: str, paper: str = "", **facts: Any) -> Callable[[Made], Made]:
    """A flat-minima method: ``function(**hyper) -> flat.Method``; its keyword arguments are the stage's keys.

    ``facts``, here and below: what others must know of the row, such as the bounds of its hyper-parameters.
    """
    return _added(flat.METHODS, name, summary, paper, facts)


def importance(name: str, summary: str, paper: str = "", **facts: Any) -> Callable[[Made], Made]:
    """A channel importance: ``function(group) -> scores [units]``, low means expendable."""
    return _added(prune.IMPORTANCES, name, summary, paper, facts)


def quantizer(name: str, summary: str, paper: str = "", **facts: Any) -> Callable[[Made], Made]:
    """A quantizer: ``function() -> Quantizer`` (see `quant.quantizers.table`)."""
    return _added(quant.QUANTIZERS, name, summary, paper, facts)


def corruption(name: str, summary: str, paper: str = "", **facts: Any) -> Callable[[Made], Made]:
    """A corruption: ``function(images, severity, generator) -> images``, float images [B, C, H, W] in 0..1."""
    return _added(CORRUPTIONS, name, summary, paper, facts)


def data_set(name: str, summary: str, paper: str = "", **facts: Any) -> Callable[[Made], Made]:
    """A data set: ``function(seed, **options) -> data.raw_data.RawData``; its options are keys of ``data``."""
    return _added(data.DATASETS, name, summary, paper, facts)


def model(name: str, summary: str, paper: str = "", **facts: Any) -> Callable[[Made], Made]:
    """A model: ``function(num_classes, input_shape, **options) -> nn.Module``, images [B, C, H, W] to logits."""
    return _added(models.MODELS, name, summary, paper, facts)


def export_profile(name: str, summary: str, paper: str = "", **facts: Any) -> Callable[[Made], Made]:
    """A way of writing the ONNX file: ``function() -> Profile`` (see `onnx_export.emit.profiles`)."""
    return _added(onnx_export.PROFILES, name, summary, paper, facts)


def task(name: str, summary: str, paper: str = "", **facts: Any) -> Callable[[Made], Made]:
    """A learning problem: ``function(**keys) -> tasks.Task``; its keyword arguments are keys of ``task``."""
    return _added(TASKS, name, summary, paper, facts)


def stage(name: str, summary: str, paper: str = "", **record: Any) -> Callable[[Made], Made]:
    """A kind of stage: ``phases(run, config) -> [Phase, ...]``; the other fields of `stages.Stage` are ``record``."""

    def add(phases: Made) -> Made:
        made = Stage(phases=phases, **record)
        STAGES.add(name, lambda: made, summary, paper, origin=phases.__module__)
        return phases

    return add


def _added(registry: Registry, name: str, summary: str, paper: str, facts: dict[str, Any]) -> Callable[[Made], Made]:
    def add(function: Made) -> Made:
        registry.add(name, function, summary, paper, **facts)
        return function

    return add
