"""How a network's four-dimensional weights and inputs lie in memory: as they are, or with channels last.

Values are the same in both; sums are taken in another order, so the choice is part of what a recipe computes. It is
made by a rule and not by a stopwatch, which would choose otherwise on a busy machine: on a processor, depthwise
convolutions take channels last 1.3 to 1.7 times as fast a training step, others 1.2 (`benchmarks.memory_format`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from flatcompress.modules import evaluating

Setting = Literal["auto", "channels_last", "contiguous"]
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def chosen(setting: str, model: nn.Module, shape: Sequence[int], device: torch.device) -> str:
    """``channels_last`` or ``contiguous`` for ``model`` on samples of ``shape``.

    ``auto``: channels last on the CPU for images of several channels where a convolution is depthwise. Inputs that are
    no images stay as they are.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8))
    >>> chosen("auto", net, (3, 32, 32), torch.device("cpu")), chosen("auto", net[:1], (3, 32, 32), torch.device("cpu"))
    ('channels_last', 'contiguous')
    """
    if len(shape) != 3:
        return "contiguous"
    if setting != "auto":
        return setting
    depthwise = any(isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels for m in model.modules())
    return "channels_last" if depthwise and device.type == "cpu" else "contiguous"


def problem(model: nn.Module, x: Tensor) -> str | None:
    """Why ``model`` does not run with channels last on the images ``x`` (its forward views what lies otherwise), or
    None.
    """
    device = next((p.device for p in model.parameters()), x.device)
    try:
        with torch.no_grad(), evaluating(model), lying(model, "channels_last"):
            model(laid(x.to(device), "channels_last"))
    except (RuntimeError, ValueError, TypeError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0][:200]
    return None


def put(model: nn.Module, name: str) -> None:
    """Let the weights of ``model`` lie as ``name`` says, in place; values, and the parameters themselves, stay."""
    model.to(memory_format=FORMATS[name])  # type: ignore[call-overload]


def laid(x: Tensor, name: str) -> Tensor:
    """``x`` as ``name`` says; inputs that are no images as they are."""
    return x.contiguous(memory_format=FORMATS[name]) if x.dim() == 4 and name != "contiguous" else x


@contextmanager
def lying(model: nn.Module, name: str) -> Iterator[None]:
    """Inside, the weights of ``model`` lie as ``name`` says, afterwards contiguous again."""
    if name == "contiguous":
        yield
        return
    put(model, name)
    try:
        yield
    finally:
        put(model, "contiguous")
