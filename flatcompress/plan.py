"""The Plan: plain data that says what has been done to an architecture, and the one door that does it again.

A plan is a list of steps in the order they were applied. Each step has a ``kind`` and JSON data that only the
package that wrote it understands. A checkpoint is ``plan.json`` + ``model.safetensors``: `apply_plan` on a freshly
built model gives a module whose state dict has exactly the checkpoint's names and shapes. No pickle anywhere.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flatcompress.errors import UserError, unknown

SCHEMA = 1

# kind -> "module:function" with signature (model, data, example_input) -> model. Strings, so that this page
# stays below every package: they import Plan, and one is loaded only when a plan needs it.
APPLIERS: dict[str, str] = {
    "channels": "flatcompress.prune.channels:apply",
    "blocks": "flatcompress.prune.depth:apply",
    "masks": "flatcompress.prune.masks:apply",
    "quantizers": "flatcompress.quant.layers:apply",
    "elastic": "flatcompress.prune.elastic:apply",
}


# What a step's data can provoke when it is not what the package that applies it once wrote.
_DAMAGED = (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Step:
    """One change of the architecture: which kind, and the data that repeats it."""

    kind: str
    data: dict[str, Any]


@dataclass
class Plan:
    """The ordered steps that turn a fresh model into the compressed architecture."""

    steps: list[Step] = field(default_factory=list)

    def __add__(self, other: Plan) -> Plan:
        return Plan([*self.steps, *other.steps])

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The data of every step of ``kind``, in order."""
        return [step.data for step in self.steps if step.kind == kind]

    def to_json(self) -> str:
        """Canonical JSON: the same plan gives the same text."""
        return json.dumps({"schema": SCHEMA, "steps": [asdict(s) for s in self.steps]}, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> Plan:
        """Parse `to_json`'s text. UserError when it is no plan, or one of another schema."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error}).") from None
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
            raise UserError(f"{where}: not a plan of schema {SCHEMA} (found {found!r}).")
        steps = raw.get("steps")
        if not isinstance(steps, list):
            raise UserError(f"{where}: 'steps' must be a list.")
        return cls([_step(s, f"{where}: steps[{i}]") for i, s in enumerate(steps)])

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan.json. UserError when it is missing or damaged."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error}).") from None
        return cls.from_json(text, str(path))


def _step(raw: Any, where: str) -> Step:
    if not isinstance(raw, dict) or not isinstance(raw.get("data"), dict):
        raise UserError(f"{where}: a step needs 'kind' and 'data'.")
    if not isinstance(raw.get("kind"), str) or raw["kind"] not in APPLIERS:
        raise UserError(f"{where}: {unknown('plan step', raw.get('kind'), APPLIERS)}")
    return Step(raw["kind"], raw["data"])


def _load(path: str) -> Callable[..., nn.Module]:
    module, function = path.split(":")
    return getattr(importlib.import_module(module), function)


def apply_plan(model: nn.Module, plan: Plan, example_input: torch.Tensor | None = None) -> nn.Module:
    """Repeat every step of ``plan`` on a freshly built ``model`` (changed in place and returned).

    The weights are not part of the plan: load the checkpoint's state dict afterwards. ``example_input`` is one
    batch of inputs, needed by steps that trace the graph. UserError names the first layer that does not fit.
    """
    for index, step in enumerate(plan.steps):
        try:
            model = _load(APPLIERS[step.kind])(model, step.data, example_input)
        except UserError:
            raise
        except _DAMAGED as error:
            raise UserError(
                f"plan: steps[{index}] ({step.kind}) is damaged or does not fit this model "
                f"({type(error).__name__}: {str(error)[:200]})."
            ) from error
    return model


def load_weights(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Fill a model that `apply_plan` has built. UserError names the first tensor that does not fit, in model order."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        check_state(model, state)
        raise UserError(str(error).splitlines()[-1].strip()) from None


def check_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """UserError naming the first tensor of ``state`` that does not fit ``model``, in the model's order."""
    own = model.state_dict()
    for name, value in own.items():
        if name not in state:
            raise UserError(f"{name}: missing from the checkpoint.")
        if state[name].shape != value.shape:
            raise UserError(
                f"{name}: the checkpoint has shape {tuple(state[name].shape)}, the model {tuple(value.shape)}; "
                "is the plan the one that was saved with it?"
            )
    extra = next((name for name in state if name not in own), None)
    if extra is not None:
        raise UserError(f"{extra}: in the checkpoint, but the model has no such tensor.")
