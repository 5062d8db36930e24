"""The plain optimizer under a flat method: torch's by name, or a class of the user's own."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flatcompress.errors import UserError, nearest, unknown

Groups = list[dict[str, Any]]
OWN = ("sgd", "adam", "adamw")  # those whose keys stand in the recipe one by one
_OURS = ("params", "lr", "weight_decay")


def _torchs() -> dict[str, type[torch.optim.Optimizer]]:
    """torch.optim's classes by name in small letters; those that need a closure of their own are left out."""
    found = {}
    for name, made in vars(torch.optim).items():
        if isinstance(made, type) and issubclass(made, torch.optim.Optimizer) and made is not torch.optim.Optimizer:
            closure = inspect.signature(made.step).parameters.get("closure")
            if closure is None or closure.default is not inspect.Parameter.empty:
                found[name.lower()] = made
    return found


def find(name: str) -> Any:
    """The class of ``name``: torch.optim's in any case, or ``package.module:Class``. UserError for anything else."""
    module, colon, attribute = name.partition(":")
    if not colon:
        known = _torchs()
        if name.lower() not in known:
            why = " LBFGS evaluates the loss itself, as a flat method does." if "bfgs" in name.lower() else ""
            raise UserError(f"{unknown('optimizer', name, known)}{why} Others are package.module:Class.")
        return known[name.lower()]
    try:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        made = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"optimizer {name!r}: cannot be imported ({error}).") from None
    except Exception as error:  # the user's own module may raise anything
        raise UserError(f"optimizer {name!r}: its module raises {type(error).__name__}: {error}.") from None
    if not callable(made) or (isinstance(made, type) and not issubclass(made, torch.optim.Optimizer)):
        raise UserError(f"optimizer {name!r} is no torch.optim.Optimizer, nor a function that makes one.")
    return made


def takes(made: Any) -> dict[str, Any] | None:
    """The keys that an optimizer's class takes, with their defaults; None where it takes any."""
    try:
        parameters = inspect.signature(made).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return {p.name: p.default for p in parameters if p.name != "self"}


def key_problem(name: str, keys: Mapping[str, Any], weight_decay: float) -> tuple[str, str] | None:
    """A key that the optimizer does not take, or a weight decay that would be left out silently, and why; or None."""
    accepted = takes(find(name))
    if accepted is None:
        return None
    for key in keys:
        if key not in accepted:
            own = [k for k in accepted if k not in _OURS]
            guess = nearest(key, own)
            hint = f" Did you mean {guess!r}?" if guess else ""
            return key, f"unknown key.{hint} Optimizer {name!r} takes lr, weight_decay, {', '.join(own)}."
    if weight_decay and "weight_decay" not in accepted:
        return "weight_decay", f"optimizer {name!r} has none: write weight_decay: 0."
    return None


def build(groups: Groups, name: str, lr: float, weight_decay: float, keys: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimizer ``name`` of torch parameter groups, with ``keys`` of its own. UserError when it refuses them."""
    made = find(name)
    accepted = takes(made)
    decay = {"weight_decay": weight_decay} if accepted is None or "weight_decay" in accepted else {}
    try:
        found = made(groups, lr=lr, **decay, **{k: tuple(v) if isinstance(v, list) else v for k, v in keys.items()})
    except Exception as error:  # whatever a class makes of keys that it does not like
        reason = str(error).splitlines()[0] if str(error) else "no message"
        raise UserError(f"optimizer {name!r} cannot be made ({type(error).__name__}: {reason}).") from None
    if not isinstance(found, torch.optim.Optimizer):
        raise UserError(f"optimizer {name!r} makes a {type(found).__name__}, which is no torch.optim.Optimizer.")
    return found


def try_out(name: str, lr: float, weight_decay: float, keys: Mapping[str, Any]) -> None:
    """One step on parameters like a network's. UserError when the optimizer cannot be made or cannot take it."""
    filters, bias = nn.Parameter(torch.zeros(2, 2, 3, 3)), nn.Parameter(torch.zeros(2))
    groups = [{"params": [p], "weight_decay": decay} for p, decay in ((filters, weight_decay), (bias, 0.0))]
    found = build(groups, name, lr, weight_decay, keys)
    for parameter in (filters, bias):
        parameter.grad = torch.zeros_like(parameter)
    try:
        found.step()
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else "no message"
        raise UserError(
            f"optimizer {name!r} cannot step on gradients as they are ({type(error).__name__}: {reason})."
        ) from None
