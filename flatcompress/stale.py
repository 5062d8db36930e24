"""Optimizers that were made before their model changed: told at their next step, instead of training nothing.

A cut replaces parameters, and quantizing adds learned scales. Whoever does that says so here (`retire`, `accompany`);
from then on a hook that torch calls before the step of any optimizer looks whether it still holds what is trained.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from flatcompress.errors import UserError

_PATIENCE = 2  # steps: two optimizers, one for weights and one for scales, have both stepped by then

_replaced: Any = WeakIdKeyDictionary()  # parameter -> what replaced it
_scales: Any = WeakIdKeyDictionary()  # quantized weight -> weak references to its learned scales
_held: Any = WeakIdKeyDictionary()  # scales that some optimizer has stepped
_steps: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
_watching: list[Any] = []


def retire(parameters: Iterable[nn.Parameter], by: str) -> None:
    """``parameters`` are the model's no longer; an optimizer that still holds one raises UserError at its next step."""
    for parameter in parameters:
        _replaced[parameter] = by
    _watch()


def accompany(weight: nn.Parameter, scales: Sequence[nn.Parameter]) -> None:
    """``weight`` is quantized with ``scales``; an optimizer of weights whose scales nobody trains warns, once."""
    _scales[weight] = [weakref.ref(scale) for scale in scales]
    _watch()


def _watch() -> None:
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_check))


def _check(optimizer: Optimizer, *_: Any) -> None:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    gone = [p for p in held if p in _replaced]
    if gone:
        raise UserError(
            f"this {type(optimizer).__name__} was made before {_replaced[gone[0]]}: {len(gone)} of its {len(held)} "
            "parameters are no longer the model's, and a step would not train what replaced them. Make the optimizer "
            "afterwards, from model.parameters()."
        )
    _check_scales(optimizer, held)


def _check_scales(optimizer: Optimizer, held: list[nn.Parameter]) -> None:
    weights = [p for p in held if p in _scales]
    if not weights or _steps.get(optimizer, 0) > _PATIENCE:
        return
    _steps[optimizer] = _steps.get(optimizer, 0) + 1
    mine = {id(p) for p in held}
    found = [scale for w in weights for ref in _scales[w] if (scale := ref()) is not None and scale.requires_grad]
    for scale in found:
        if id(scale) in mine:
            _held[scale] = True
    untrained = [scale for scale in found if scale not in _held]
    if untrained and _steps[optimizer] == _PATIENCE:
        warnings.warn(
            f"this {type(optimizer).__name__} trains quantized weights, but no optimizer holds {len(untrained)} of "
            "their learned scales, which stay as they are. Make the optimizer after quantize(), from "
            "model.parameters(); scales that are meant to stay are frozen with requires_grad_(False).",
            stacklevel=4,
        )
