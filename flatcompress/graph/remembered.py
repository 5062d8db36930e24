"""Exported programs of models that were traced before: torch.export takes seconds, and a run traces one model often.

Two models have one program where nothing that their forward can read differs but the values of tensors: the modules'
types, modes and plain attributes, the names, shapes, types and identities of parameters and buffers, the example's
shapes. A model with anything else on it (an attribute that holds an object, a hook) is traced each time. What is
remembered is compared with the model's own forward like a fresh trace, and forgotten where it differs.
"""

from __future__ import annotations

import copy
import enum
import functools
import types
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from flatcompress.graph.interface import Interface, arguments

MOST = 8  # programs, of which none holds a parameter
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, enum.Enum, type)
_CODE = (types.FunctionType, types.BuiltinFunctionType)
_COMMON = frozenset(vars(nn.Module()))  # what every module has
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Program:
    """What `remodularize` reads of an exported program; ``graph`` may be changed, the rest is shared."""

    graph: fx.Graph
    graph_signature: Any
    graph_module: fx.GraphModule
    constants: Mapping[str, Any]


@dataclass(frozen=True)
class Traced:
    """A program, of the forward in ``training`` mode or not, and why not where that was tried in vain."""

    program: Program
    interface: Interface
    training: bool
    problem: str = ""


_known: OrderedDict[Hashable, Traced] = OrderedDict()


def kept(program: torch.export.ExportedProgram) -> Program:
    """What is remembered of a program; call it before its graph is changed."""
    signature = program.graph_signature
    lifted = set(signature.inputs_to_lifted_tensor_constants.values())
    constants = {name: value for name, value in program.constants.items() if name in lifted}
    return Program(copy.deepcopy(program.graph), signature, program.graph_module, constants)


def find(key: Hashable | None) -> Traced | None:
    """What is known under ``key``, with a graph of its own."""
    found = None if key is None else _known.get(key)
    if found is None:
        return None
    _known.move_to_end(key)
    p = found.program
    constants = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in p.constants.items()}
    own = Program(copy.deepcopy(p.graph), p.graph_signature, p.graph_module, constants)
    return Traced(own, found.interface, found.training, found.problem)


def remember(key: Hashable | None, traced: Traced) -> None:
    """Keep ``traced`` under ``key``; the one that was not asked for longest goes."""
    if key is None:
        return
    _known[key] = traced
    while len(_known) > MOST:
        _known.popitem(last=False)


def forget(key: Hashable | None) -> None:
    """What was kept under ``key`` is wrong."""
    if key is not None:
        _known.pop(key, None)


def key_of(model: nn.Module, example: Any) -> Hashable | None:
    """What decides the program of ``model`` on ``example``; None where it cannot be told."""
    numbers: dict[int, int] = {}

    def number(value: object) -> int:
        return numbers.setdefault(id(value), len(numbers))

    rows: list[Hashable] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if any(getattr(module, hooks) for hooks in _HOOKS):
            return None
        attributes = {k: v for k, v in vars(module).items() if k not in _COMMON}
        try:
            rows.append((name, type(module), number(module), _frozen(attributes)))
        except TypeError:
            return None
        for store in (module._parameters, module._buffers):
            rows += [(k, None) if t is None else (k, number(t), _tensor(t)) for k, t in store.items()]
    leaves, spec = pytree.tree_flatten(arguments(example))
    try:
        given = tuple(_tensor(leaf) if isinstance(leaf, torch.Tensor) else _frozen(leaf) for leaf in leaves)
    except TypeError:
        return None
    modes = torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu")
    return tuple(rows), given, str(spec), modes


def _tensor(value: torch.Tensor) -> Hashable:
    return type(value), tuple(value.shape), value.dtype, value.device, value.requires_grad


def _frozen(value: Any) -> Hashable:
    """``value`` as something to compare by. TypeError when it may hold what cannot be seen."""
    if isinstance(value, float):  # 0.0 and -0.0, and no NaN that differs from itself
        return "float", value.hex()
    if isinstance(value, (_PLAIN, _CODE)):
        return type(value), value
    if isinstance(value, functools.partial):
        return functools.partial, _frozen(value.func), _frozen(value.args), _frozen(value.keywords)
    if isinstance(value, Mapping) and type(value) in (dict, OrderedDict):
        return tuple((_frozen(k), _frozen(v)) for k, v in value.items())
    if type(value) in (tuple, list, torch.Size):
        return type(value), tuple(_frozen(v) for v in value)
    if type(value) in (set, frozenset):
        return type(value), frozenset(_frozen(v) for v in value)
    raise TypeError(f"{type(value).__name__} may hold anything")
