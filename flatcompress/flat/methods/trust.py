"""Trust-region methods and what they need: seeing what the closure feeds to the model, and replaying it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError, unknown
from flatcompress.flat.engine import vectors
from flatcompress.flat.engine.ball import Ball
from flatcompress.flat.engine.context import HERE, Probe, Program, Result, Step
from flatcompress.flat.engine.hyper import non_negative, share
from flatcompress.flat.engine.snapshot import Buffers
from flatcompress.flat.engine.vectors import Vector
from flatcompress.flat.methods.method import Method
from flatcompress.modules import logits_of
from flatcompress.numerics import kl
from flatcompress.randomness import RandomState
from flatcompress.sharded import any_sharded

TARGETS = ("ema", "previous")


class Tap:
    """Records the inputs and logits of a model's last call, and evaluates it again with other weights."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.logits: Tensor | None = None

    @contextmanager
    def listening(self) -> Iterator[Tap]:
        """Inside, every call of the model is recorded."""
        handle = self.model.register_forward_hook(self._hear, with_kwargs=True)
        try:
            yield self
        finally:
            handle.remove()

    def _hear(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.args, self.kwargs = args, kwargs
        self.logits = logits_of(out).detach()

    def replay(self, model: nn.Module | None = None, weights: dict[str, Tensor] | None = None) -> Tensor:
        """Logits on the recorded input of another model, or of this one with other weights."""
        return elsewhere(self.model if model is None else model, weights or {}, self.args, self.kwargs)


@torch.no_grad()
def elsewhere(
    model: nn.Module, weights: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> Tensor:
    """Logits of ``model`` with other ``weights`` by name; its own weights, buffers and random state do not move."""
    devices = {p.device for p in model.parameters()}
    before = RandomState.now(devices)
    try:
        with Buffers(model).frozen():
            out = torch.func.functional_call(model, weights, args, kwargs or {})
    finally:
        before.set()
    return logits_of(out)


def divergence(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(target / T) || softmax(logits / T)), summed over classes and averaged over all other dimensions."""
    return kl(logits, target, temperature).sum(-1).mean()


def tram(
    scale: float = 1.0,
    target: Any = "ema",
    decay: float = 0.999,
    distance: Callable[[], Tensor | float] | None = None,
    **ball: Any,
) -> Method:
    """TRAM: e = d g0 / ||g0||, the radius d being a trust-region distance of the present model (arXiv 2310.03646).

    d = scale * KL(target || model) on the batch of the first pass. target: ``ema`` (of the weights, with ``decay``),
    ``previous`` (the weights of the last step) or a module such as the pretrained model; or give ``distance()``
    yourself. The logits are seen through a forward hook on the model; the radius is 0 at the first step.
    """
    shape = Ball(0.0, **ball)
    non_negative(scale=scale)
    share("decay", decay)
    if isinstance(target, str) and target not in TARGETS:
        raise unknown("target", target, TARGETS)

    def program(step: Step) -> Program:
        tap = Tap(step.model)
        with tap.listening():
            g0 = yield HERE
        d = distance() if distance is not None else _radius(step, tap, target, scale)
        g1 = yield Probe(replace(shape, rho=lambda _: d)(step, g0))
        return Result(g1, [])

    def remember(step: Step, kept: Sequence[Vector], combined: Vector) -> None:
        if target == "ema":
            held = step.recall("target") or vectors.clone(step.weights)
            step.store("target", vectors.add(vectors.scale(held, decay), step.weights, 1 - decay))
        elif target == "previous":
            step.store("target", vectors.clone(step.weights))

    def check(step: Step) -> None:
        if distance is None and isinstance(target, str) and any_sharded(step.params):
            raise UserError(
                f"tram with target={target!r} runs the model with other weights, and its parameters are divided over "
                "processes. Give a module as the target, or distance(), or train with whole parameters."
            )

    return Method(program, shape, remember=remember, check=check)


def _radius(step: Step, tap: Tap, target: Any, scale: float) -> Tensor | float:
    """scale * KL(target || model) on what the tap heard; 0 while there is no target yet."""
    if tap.logits is None:
        raise UserError("tram did not see the model being called: create it with the module that the closure calls")
    if isinstance(target, nn.Module):
        return scale * divergence(tap.logits, tap.replay(model=target))
    held = step.recall("target")
    if held is None:
        return 0.0
    return scale * divergence(tap.logits, tap.replay(weights=dict(zip(step.names, held))))
