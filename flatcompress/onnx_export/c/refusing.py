"""The error for what has no C form, naming the module."""

from __future__ import annotations

from typing import Any

from torch import fx

from flatcompress.errors import UserError


def refuse(path: str, what: str) -> UserError:
    """The error for a module without a C form."""
    where = path or "the model's forward"
    return UserError(f"module {where!r}: {what} has no C form, so profile 'c' cannot write this model.")


def path_of(node: Any) -> str:
    """The module that a node comes from, or nothing."""
    return str(node.meta.get("path") or "") if isinstance(node, fx.Node) else ""


def name_of(node: fx.Node) -> str:
    """An operator or module for people."""
    if node.op == "call_module":
        return f"a {type(node.graph.owning_module.get_submodule(str(node.target))).__name__}"  # type: ignore[union-attr]
    parts = str(node.target).split(".")
    return f"the operator {parts[1] if len(parts) > 1 else parts[0]}"
