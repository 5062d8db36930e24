"""What goes into a model and what comes out of it: any arguments in, flat tensors through the graph, the same out.

An *example* is a tensor (the one argument), a tuple or list (positional arguments) or a mapping (keyword arguments);
a model that takes one dictionary gets it inside a tuple. A graph has one placeholder per tensor in it and returns one
tensor or a tuple of tensors; the `Interface` in its output node's meta knows what to make of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from flatcompress.errors import UserError

KEY = "interface"


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, keyword) arguments of an example. UserError when it is none.

    >>> arguments({"x": 1}), arguments((1, 2))
    (((), {'x': 1}), ((1, 2), {}))
    """
    if isinstance(example, torch.Tensor):
        return (example,), {}
    if isinstance(example, tuple | list):
        return tuple(example), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    raise UserError(
        f"an example input is a tensor, a tuple of arguments or a dictionary of them; found {type(example).__name__}."
    )


def tensors(example: Any) -> list[torch.Tensor]:
    """Every tensor of an example, in order."""
    return [leaf for leaf in pytree.tree_leaves(arguments(example)) if isinstance(leaf, torch.Tensor)]


def first_tensor(example: Any) -> torch.Tensor:
    """The first tensor of an example: its dimension 0 is the batch. UserError when there is none."""
    found = tensors(example)
    if not found:
        raise UserError("the example input holds no tensor.")
    return found[0]


def mapped(example: Any, function: Any) -> Any:
    """``example`` with every tensor replaced by ``function`` of it."""
    plain = dict(example) if isinstance(example, Mapping) else example
    return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, plain)


def call(model: nn.Module, example: Any) -> Any:
    """``model`` on an example."""
    args, kwargs = arguments(example)
    return model(*args, **kwargs)


def bound(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments in one canonical form: by name, in the order of the forward's signature.

    A forward with ``*args`` keeps them by position. UserError when they do not fit the signature.
    """
    try:
        given = signature.bind(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}.forward cannot be called with this input: {error}.") from None
    kinds = {p.name: p.kind for p in signature.parameters.values()}
    if inspect.Parameter.VAR_POSITIONAL in kinds.values() or inspect.Parameter.POSITIONAL_ONLY in kinds.values():
        return given.args, given.kwargs
    named: dict[str, Any] = {}
    for key, value in given.arguments.items():
        named.update(value if kinds[key] is inspect.Parameter.VAR_KEYWORD else {key: value})
    return (), named


@dataclass(frozen=True)
class Interface:
    """How a model's arguments become a graph's inputs and the graph's outputs the model's result.

    ``names``: of the tensors, as placeholders are called. ``leaves``: where each lies among the flattened arguments.
    ``simple``: every argument is one tensor and one tensor comes out, so the graph's own forward will do.
    """

    name: str
    signature: inspect.Signature
    names: tuple[str, ...]
    leaves: tuple[int, ...]
    in_spec: Any
    out_spec: Any
    simple: bool

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The graph's inputs. UserError when the arguments are not of the kind that was traced."""
        leaves, spec = pytree.tree_flatten(bound(self.signature, args, kwargs, self.name))
        if spec != self.in_spec:
            raise UserError(
                f"{self.name} was traced with other arguments than it is called with; its tensors are "
                f"{', '.join(self.names)}."
            )
        return [leaves[index] for index in self.leaves]

    def result(self, outputs: Any) -> Any:
        """What the model returns, from what the graph does."""
        flat = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
        return pytree.tree_unflatten(flat, self.out_spec)


def interface_of(graph: fx.Graph) -> Interface:
    """The interface of a graph: the one that `trace` noted, or of a graph made by hand its own inputs and outputs."""
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    return output.meta[KEY] if KEY in output.meta else _as_it_is(graph, output)


def _as_it_is(graph: fx.Graph, output: fx.Node) -> Interface:
    """One argument per placeholder, and what the graph returns."""
    names = tuple(str(n.target) for n in graph.nodes if n.op == "placeholder")
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    returned = output.args[0]
    return Interface(
        name="the graph",
        signature=inspect.Signature(parameters),
        names=names,
        leaves=tuple(range(len(names))),
        in_spec=pytree.tree_flatten(((), dict.fromkeys(names, 0)))[1],
        out_spec=pytree.tree_flatten(returned)[1],
        simple=not isinstance(returned, tuple | list),
    )


def run_graph(gm: fx.GraphModule, example: Any) -> Any:
    """A traced graph module on an example, with the model's kind of result."""
    interface = interface_of(gm.graph)
    args, kwargs = arguments(example)
    return interface.result(gm(*interface.inputs(args, kwargs)))


def inputs_of_batch(batch: Any, names: tuple[str, ...] | None = None) -> Any:
    """The example in a batch of a data loader: without its labels.

    A tensor is the input; a pair (or longer) starts with it; a mapping is the arguments, of which those in ``names``
    are kept. A tuple of tensors is the arguments themselves when the model takes that many (``names``).
    """
    if isinstance(batch, Mapping):
        kept = {k: v for k, v in batch.items() if names is None or k in names}
        return kept or dict(batch)
    if not isinstance(batch, tuple | list):
        return batch
    if names is not None and len(names) > 1 and isinstance(batch[0], torch.Tensor) and len(batch) >= len(names):
        return tuple(batch[: len(names)])
    return inputs_of_batch(batch[0], names) if isinstance(batch[0], Mapping) else batch[0]
