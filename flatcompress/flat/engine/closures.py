"""Calling the user's closure: what it must do, what it leaves behind, and errors that say how to fix it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.flat.engine.context import Probe
from flatcompress.sharded import local

Closure = Callable[..., Any]

NEEDS_CLOSURE = (
    "step() needs a closure: a function that runs forward and backward and returns the loss, because the gradient "
    "is taken at more than one point. Write\n"
    "    def closure():\n"
    "        loss = criterion(model(x), y)\n"
    "        loss.backward()\n"
    "        return loss\n"
    "    optimizer.step(closure)"
)
RETURNED_NONE = "the closure returned None; it must return the loss (add `return loss` as its last line)"
ZEROED = (
    "the closure zeroed the gradients; the optimizer does that itself before every pass. "
    "Remove the zero_grad() call from the closure"
)
NO_GRADIENT = (
    "the closure left no gradient on any trainable parameter of this optimizer; it must call loss.backward() "
    "(or scaler.scale(loss).backward()) and must not zero gradients afterwards"
)


@dataclass(frozen=True)
class Reading:
    """What one evaluation left: a gradient (or None) per parameter and the loss, scalar or one per sample."""

    gradients: list[Tensor | None]
    loss: Tensor


def as_closures(closure: Any) -> tuple[Closure, ...]:
    """A closure, or a non-empty list of them (micro-batches), as a tuple."""
    found = tuple(closure) if isinstance(closure, Iterable) and not callable(closure) else (closure,)
    if not found or not all(callable(c) for c in found):
        raise UserError(NEEDS_CLOSURE)
    return found


def evaluate(closure: Closure, params: Sequence[nn.Parameter], probe: Probe) -> Reading:
    """Run the closure once at the present weights and take the gradients it leaves, without copying them."""
    for p in params:
        p.grad = None
    if not probe.backward and takes_keep(closure):
        with torch.no_grad():
            return Reading([], _loss(_call(closure, probe)))
    sentinel = min(params, key=lambda p: p.numel())
    mark = sentinel.grad = torch.zeros_like(sentinel)
    version = local(mark)._version
    with torch.enable_grad():
        loss = _loss(_call(closure, probe))
    _check_mark(sentinel, mark)
    if sentinel.grad is mark and local(mark)._version == version:
        sentinel.grad = None
    gradients = [None if p.grad is None else _dense(p.grad) for p in params]
    for p in params:
        p.grad = None
    if all(g is None for g in gradients):
        raise UserError(NO_GRADIENT)
    return Reading(gradients, loss)


def _call(closure: Closure, probe: Probe) -> Any:
    return closure(keep=probe.keep) if takes_keep(closure) else closure()


def takes_keep(closure: Closure) -> bool:
    """Does the closure have a parameter ``keep``, the samples to use? Parameters of other names are its own affair."""
    try:
        return "keep" in inspect.signature(closure).parameters
    except (TypeError, ValueError):
        return False


def _check_mark(sentinel: nn.Parameter, mark: Tensor) -> None:
    """Backward adds to a gradient in place, so a mark that is gone was zeroed (unless backward built a graph)."""
    left = sentinel.grad
    if left is not mark and (left is None or not left.requires_grad):
        raise UserError(ZEROED)


def _dense(gradient: Tensor) -> Tensor:
    if gradient.is_sparse:
        gradient = gradient.to_dense()
    return gradient.detach() if gradient.requires_grad else gradient


def _loss(returned: Any) -> Tensor:
    if returned is None:
        raise UserError(RETURNED_NONE)
    if isinstance(returned, Tensor):
        return returned.detach()
    if isinstance(returned, int | float):
        return torch.tensor(float(returned))
    raise UserError(f"the closure returned a {type(returned).__name__}; it must return the loss, a tensor or a number")
