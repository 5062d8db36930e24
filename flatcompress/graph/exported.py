"""`torch.export` with a dynamic batch, and its graph brought to the one form that `remodularize` reads."""

from __future__ import annotations

import inspect
import logging
import operator
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.fx import config as fx_config
from torch.utils import _pytree as pytree

from flatcompress.errors import UserError
from flatcompress.graph import rewrite, still
from flatcompress.graph.interface import Interface, arguments, bound
from flatcompress.graph.remembered import Program

aten = torch.ops.aten
_BLOCKS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def export(
    model: nn.Module, example: Any, without_symbols: bool = False
) -> tuple[torch.export.ExportedProgram, Interface]:
    """``model`` in its present mode as an exported program, and its interface. UserError when it cannot be.

    without_symbols: try it with the example's sizes first, see `still`.
    """
    name = type(model).__name__
    signature = inspect.signature(model.forward)
    args, kwargs = bound(signature, *arguments(example), name)
    # Before torch 2.7 the training graph had its own entry point.
    run = torch.export.export
    if tuple(int(v) for v in re.findall(r"\d+", torch.__version__)[:2]) < (2, 7):
        run = torch.export.export_for_training  # type: ignore[attr-defined]
    with _quiet(), _with_momentum(model):
        try:
            program = run(model, args, kwargs, strict=False) if without_symbols else None
            if program is None or not still.holds(program):
                program = run(model, args, kwargs, dynamic_shapes=_dynamic(signature, args, kwargs), strict=False)
            if _writes_through_views(program):
                program = program.run_decompositions({})
        except Exception as error:  # torch.export raises whatever it meets on its way
            raise UserError(f"{name} cannot be traced by torch.export: {_reason(error)}") from error
    return program, _interface(name, signature, program, (args, kwargs))


def _interface(
    name: str, signature: inspect.Signature, program: torch.export.ExportedProgram, given: tuple[Any, dict[str, Any]]
) -> Interface:
    leaves, in_spec = pytree.tree_flatten(given)
    inputs = [s for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"]
    kept = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    names = tuple(str(inputs[i].arg.name) for i in kept)
    out_spec = program.call_spec.out_spec
    simple = out_spec is not None and out_spec.num_leaves == 1 and out_spec.num_children == 0
    simple = simple and all(isinstance(v, torch.Tensor) for v in (*given[0], *given[1].values()))
    return Interface(name, signature, names, tuple(kept), in_spec, out_spec, simple)


def _dynamic(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dimension 0 of every tensor that begins with the batch; of further tensors only where the model lets it."""
    found = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    batch = found[0].shape[0] if found else None

    def dims(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.dim() or leaf.shape[0] != batch:
            return None
        return {0: torch.export.Dim.DYNAMIC if leaf is found[0] else torch.export.Dim.AUTO}

    return pytree.tree_map(dims, dict(signature.bind(*args, **kwargs).arguments))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what nobody reads: printed tracebacks of what is raised anyway, and a stack trace for every node."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level, known = log.level, hasattr(fx_config, "do_not_emit_stack_traces")  # from torch 2.9 on
    traces = known and fx_config.do_not_emit_stack_traces
    log.setLevel(logging.CRITICAL)
    try:
        if known:
            fx_config.do_not_emit_stack_traces = True
        yield
    finally:
        log.setLevel(level)
        if known:
            fx_config.do_not_emit_stack_traces = traces


@contextmanager
def _with_momentum(model: nn.Module) -> Iterator[None]:
    """Norms that average all batches alike (momentum None) count them in a tensor, which torch.export cannot follow."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.momentum is None]
    try:
        for norm in norms:
            norm.momentum = 0.1
        yield
    finally:
        for norm in norms:
            norm.momentum = None


def _reason(error: BaseException) -> str:
    """The lines of an export error that name the operator or the user's code, without the advice around them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    frames = [line for line in lines if line.startswith("File ") and "site-packages" not in line]
    head = lines[0] if lines else type(error).__name__
    return f"{type(error).__name__}: {head[:400]}" + (f" ({frames[-1]})" if frames else "")


def _writes_through_views(program: torch.export.ExportedProgram) -> bool:
    """Whether something is written in place that has another name: only functional form then has the right order."""
    for node in program.graph.nodes:
        written = rewrite.written_argument(node) if node.op == "call_function" else None
        if written is None or written.op == "placeholder":
            continue
        if _is_view(written) or any(_is_view(user) for user in written.users if user is not node):
            return True
    return False


def _is_view(node: fx.Node) -> bool:
    schema = rewrite.schema_of(node.target)
    if node.op != "call_function" or schema is None or schema.is_mutable:
        return False
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


# -- one form ---------------------------------------------------------------------------------------------------------


def normalise(graph: fx.Graph) -> None:
    """Functional batch norms and dropouts as their ordinary operators, recurrent layers and rrelu as in eval mode."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _NORMS:
            _plain(graph, node, aten.batch_norm.default, _NORMS[node.target](node.args))
        elif node.target is aten.native_dropout.default:
            _plain(graph, node, aten.dropout.default, node.args)
        elif node.target is aten.rrelu.default:
            lower, upper = [*node.args[1:3], 0.125, 1 / 3][:2] if len(node.args) < 3 else node.args[1:3]
            node.target, node.args = aten.leaky_relu.default, (node.args[0], (lower + upper) / 2)
            node.kwargs = {}
        elif node.target in _RECURRENT:
            index = _RECURRENT[node.target]
            node.update_arg(index, False)


_NORMS: dict[Any, Any] = {
    aten._native_batch_norm_legit_functional.default: lambda a: (*a, False),
    aten._native_batch_norm_legit_no_training.default: lambda a: (*a[:5], False, *a[5:], False),
    aten._native_batch_norm_legit.no_stats: lambda a: (*a[:3], None, None, *a[3:], False),
}
_RECURRENT = dict.fromkeys((aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input), 6)


def _plain(graph: fx.Graph, node: fx.Node, target: Any, args: Any) -> None:
    """An operator with several results, of which only the first matters, as one with a single result."""
    picks = [user for user in node.users if user.target is operator.getitem]
    first = [user for user in picks if user.args[1] == 0]
    with graph.inserting_before(node):
        made = graph.call_function(target, tuple(args))
    made.meta.update(first[0].meta if first else node.meta)
    made.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
    for pick in first:
        pick.replace_all_uses_with(made)
        graph.erase_node(pick)
    for pick in picks:
        if pick not in first and not any(user.op != "output" for user in pick.users):
            pick.replace_all_uses_with(made)  # a written statistic, which the layer keeps by itself
            graph.erase_node(pick)
    if not node.users:
        graph.erase_node(node)


def is_block(node: fx.Node) -> bool:
    """Whether a node runs a nested graph: a no_grad or autocast block of the forward."""
    return getattr(node.target, "__name__", "") in _BLOCKS


def block_parts(
    node: fx.Node, program: torch.export.ExportedProgram | Program
) -> tuple[fx.GraphModule, list[Any], bool]:
    """The nested graph of a block, its arguments, and whether gradients stop in it."""
    stops = node.target.__name__ == _BLOCKS[0] and node.args[0] is False  # type: ignore[union-attr]
    at = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
    nested = program.graph_module.get_submodule(str(node.args[at].target))  # type: ignore[union-attr]
    assert isinstance(nested, fx.GraphModule)
    return nested, list(node.args[at + 1 :]), stops
