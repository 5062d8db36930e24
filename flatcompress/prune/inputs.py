"""An example input of any form: one tensor, a tuple of positional arguments, or a dictionary of keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from flatcompress.graph.interface import call, first_tensor

__all__ = ["Example", "batch_size", "call", "described", "mapped", "tensors_of"]

Example = Any  # Tensor | tuple | list | Mapping[str, Any]


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor of floats in an input or output, whatever tuples, dictionaries and dataclasses it lies in."""
    found = pytree.tree_leaves(value)
    if len(found) == 1 and found[0] is value and hasattr(value, "__dict__") and not isinstance(value, Tensor):
        found = pytree.tree_leaves(dict(value.__dict__))
    return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def batch_size(example: Example) -> int:
    """Samples in an example input: dimension 0 of its first tensor. UserError without a tensor."""
    return len(first_tensor(example))


def described(example: Example) -> str:
    """The shapes of an example input, for a message."""
    if isinstance(example, Tensor):
        return str(tuple(example.shape))
    if isinstance(example, Mapping):
        return "{" + ", ".join(f"{key}: {described(value)}" for key, value in example.items()) + "}"
    if isinstance(example, tuple | list):
        return "(" + ", ".join(described(value) for value in example) + ")"
    return type(example).__name__


def mapped(example: Example, function: Callable[[Tensor], Tensor]) -> Example:
    """``example`` with every tensor of at least one dimension replaced by ``function`` of it."""
    plain = dict(example) if isinstance(example, Mapping) else example
    return pytree.tree_map(lambda v: function(v) if isinstance(v, Tensor) and v.ndim else v, plain)
