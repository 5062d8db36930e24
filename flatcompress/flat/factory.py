"""`create`: from a name and options to an optimizer, with every wrong option refused by name."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flatcompress.errors import UserError, unknown
from flatcompress.flat.engine.ball import BALL_OPTIONS
from flatcompress.flat.engine.context import Step
from flatcompress.flat.engine.engine import FlatOptimizer
from flatcompress.flat.engine.settings import CHUNKS, PERTURB, Compose, Radius, Settings
from flatcompress.flat.engine.when import WHEN
from flatcompress.flat.methods.family import COMBINATIONS, METHODS
from flatcompress.flat.methods.method import Method, When, plain

LOW_PRECISION = (torch.float16, torch.bfloat16)


def create(
    name: str,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    perturb: str = "per_replica",
    max_grad_norm: float | None = None,
    scaler: Any = None,
    compose: Compose | None = None,
    radius: Radius | None = None,
    perturbed: Callable[[str, nn.Parameter], bool] | None = None,
    chunks: str = "independent",
    when: When | None = None,
    filters: Sequence[Callable[[Step, list[Tensor]], list[Tensor]]] = (),
    safety: Any = None,
    process_group: Any = None,
    replay_noise: bool = True,
    freeze_buffers: bool = True,
    noise: Any = None,
    seed: int = 0,
    low_precision: str = "refuse",
    **hyper: Any,
) -> FlatOptimizer:
    """Wrap ``optimizer`` so that its steps seek flat minima by the method ``name``.

    >>> model = nn.Linear(2, 1)
    >>> optimizer = create("sam", model, torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)
    >>> def closure():
    ...     loss = model(torch.ones(1, 2)).square().mean()
    ...     loss.backward()
    ...     return loss
    >>> loss = optimizer.step(closure)
    >>> optimizer.passes
    2

    model: what the closure calls (with DDP, the wrapped one). perturb, max_grad_norm, scaler, compose, radius,
    perturbed, chunks, filters, safety, process_group, replay_noise, freeze_buffers, noise, seed: see `engine.settings`.
    when: a policy such as ``flat.when.interval(2)``; ``interval=2`` and ``bernoulli=0.5`` are short for two of them.
    low_precision: ``refuse`` or ``warn`` when weights to be perturbed are float16 or bfloat16.
    hyper: the method's own hyper-parameters, and those of its ball (`flatcompress.flat.engine.ball.Ball`).
    Raises UserError (a ValueError) for an unknown method or option and for values that cannot work.
    """
    method = _timed(build(name, **hyper_only(hyper)), when, hyper)
    if low_precision not in ("refuse", "warn"):
        raise unknown("low_precision", low_precision, ("refuse", "warn"))
    optimizer, scaler = _inside_accelerate(optimizer, scaler)
    _check_optimizer(optimizer)
    settings = Settings(
        perturb=perturb, chunks=chunks, max_grad_norm=max_grad_norm, scaler=scaler, compose=compose, radius=radius,
        perturbed=perturbed, filters=tuple(filters), safety=safety, process_group=process_group,
        replay_noise=replay_noise, freeze_buffers=freeze_buffers, noise=noise, seed=seed,
    )  # fmt: skip
    flat = FlatOptimizer(name, model, optimizer, method, settings)
    if name != "none":
        _check_precision(flat, low_precision)
    if radius is not None and (method.ball is None or method.ball.key != "rho"):
        raise UserError(f"{name!r} has no single ball whose radius `radius` could replace; use 'sam', 'asam' or 'sagm'")
    if method.check is not None:
        method.check(flat.context())
    return flat


def build(name: str, **hyper: Any) -> Method:
    """The `Method` of a registered name; refuses options that neither the method nor its ball has."""
    entry = COMBINATIONS[name] if name in COMBINATIONS else METHODS[name]
    parameters = inspect.signature(entry.make).parameters
    takes_ball = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    named = [p.name for p in parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    allowed = [*named, *(option for option in BALL_OPTIONS if takes_ball and option not in named)]
    for key in hyper:
        if key not in allowed:
            raise unknown(f"option of flat method {name!r}:", key, allowed)
    method = cast(Method, entry(**hyper))
    for key, bounds in entry.facts.bounds.items():
        problem = bounds.problem(hyper[key]) if isinstance(hyper.get(key), int | float) else None
        if problem is not None:  # what the method itself did not refuse in its own words
            raise UserError(f"{key} is {hyper[key]!r}; it {problem}")
    return method


def hyper_only(hyper: dict[str, Any]) -> dict[str, Any]:
    """``hyper`` without the short forms of policies."""
    return {key: value for key, value in hyper.items() if not _is_policy(key)}


def _is_policy(key: str) -> bool:
    return key in WHEN and WHEN[key].facts.short


def _timed(method: Method, when: When | None, hyper: dict[str, Any]) -> Method:
    """Put the policies around the method: a step that one of them leaves out is a plain step."""
    policies = [when] if when is not None else []
    policies += [WHEN[key](value) for key, value in hyper.items() if _is_policy(key)]
    if not policies:
        return method

    def chosen(step: Step) -> bool:
        return all(policy(step) for policy in policies)

    def program(step: Step) -> Any:
        return (method.program if method.when(step) else method.otherwise)(step)

    return replace(method, when=chosen, program=program, otherwise=plain)


def _inside_accelerate(optimizer: Any, scaler: Any) -> tuple[Any, Any]:
    """The optimizer and scaler inside Accelerate's wrapper, whose own step would skip and scale a second time."""
    if type(optimizer).__name__ != "AcceleratedOptimizer":
        return optimizer, scaler
    return optimizer.optimizer, optimizer.scaler if scaler is None else scaler


def _check_optimizer(optimizer: Any) -> None:
    if isinstance(optimizer, FlatOptimizer):
        raise UserError("the optimizer is a flat optimizer already; wrap the one inside it (`.base`)")
    if not isinstance(optimizer, Optimizer):
        raise UserError(
            f"optimizer is {optimizer!r}; give an optimizer instance, for example "
            "torch.optim.SGD(model.parameters(), lr=0.1)"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UserError("LBFGS evaluates its closure at points of its own; wrap a first-order optimizer instead")
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise UserError("SparseAdam needs sparse gradients, which are combined as dense ones here; use Adam or AdamW")
    if not any(group["params"] for group in optimizer.param_groups):
        raise UserError("the optimizer has no parameters; build it from model.parameters()")


def _check_precision(flat: FlatOptimizer, low_precision: str) -> None:
    chosen = flat.settings.perturbed
    params = [p for group in flat.param_groups for p in group["params"]]
    names = flat.names()
    low = [p for p in params if p.dtype in LOW_PRECISION and (chosen is None or chosen(names[id(p)], p))]
    if not low:
        return
    text = (
        f"{len(low)} parameters are {str(low[0].dtype).removeprefix('torch.')} (first: {names[id(low[0])]}): most of a "
        "perturbation of usual size is rounded away there (78 % of it in bfloat16 at rho 0.05). Keep the weights in "
        "float32 and compute under torch.autocast"
    )
    if low_precision == "refuse":
        raise UserError(text + ", or pass low_precision='warn' to go on")
    warnings.warn(text + ".", stacklevel=3)


__all__ = ["CHUNKS", "METHODS", "PERTURB", "WHEN", "build", "create"]
