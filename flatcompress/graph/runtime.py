"""Make a module run an fx graph instead of its own forward, staying the same object.

The graph's code is generated with ``self`` = the module itself, because every submodule and parameter in a traced
graph carries its original qualified name. It becomes the ``forward`` of a subclass made for this one model, and the
model's class is changed to it. Compared with assigning ``model.forward`` this survives what people do to models:
``copy.deepcopy`` (an instance attribute would stay bound to the original), ``train()/eval()/to()``, `isinstance`,
unchanged state-dict names, wrappers such as DDP that call ``model(x)``, and accelerate's mixed-precision wrapper,
which replaces ``model.forward`` on the instance and puts it back.

What it does not do: hooks on container modules no longer fire (containers are not called), and a Python branch in
the original forward is frozen as it was traced.
"""

from __future__ import annotations

import linecache
from typing import Any

from torch import fx, nn

from flatcompress.errors import UserError
from flatcompress.graph import standins
from flatcompress.graph.interface import interface_of

HOLDER = "traced"  # submodule for what the trace needs and the model did not own: constants, functional dropouts
_counter = 0


def install(model: nn.Module, gm: fx.GraphModule, shown: fx.Graph | None = None) -> nn.Module:
    """Let ``model`` run ``gm``'s graph from now on; the same object is returned.

    Every module and attribute the graph names must exist on ``model`` (the holder of traced constants is moved over).
    ``shown``: the graph that `trace` and `installed_graph` give back, when it is not the one that runs (a forward that
    imitates what the exported file does by itself). Raises UserError when ``forward`` has been replaced on the
    instance, since that would hide the graph.
    """
    if "forward" in vars(model):
        raise UserError(
            f"{type(model).__name__}.forward has been replaced on the instance (an accelerate wrapper?): change the "
            "model first and prepare or wrap it afterwards."
        )
    attach(model, gm)
    for node in gm.graph.nodes:
        if node.op == "call_module" and getattr(gm.get_submodule(str(node.target)), "inplace", False):
            # in-place dropout: whoever edited the graph may have put something that keeps its input before it
            gm.get_submodule(str(node.target)).inplace = False  # type: ignore[assignment]
    base = original_class(model)
    namespace = {"forward": _forward(gm.graph), "_installed_graph": shown or gm.graph, "_original_class": base}
    model.__class__ = type(
        base.__name__, (base,), {**namespace, "__module__": base.__module__, "__doc__": base.__doc__}
    )
    return model


def attach(model: nn.Module, gm: fx.GraphModule) -> None:
    """Give ``model`` what the trace added, and the modules for which ``gm`` has a stand-in its class.

    From then on the model must run the graph: its own forward may do the same thing twice.
    """
    holder = getattr(gm, HOLDER, None)
    if isinstance(holder, nn.Module) and not hasattr(model, HOLDER):
        model.add_module(HOLDER, holder)
    own = dict(model.named_modules(remove_duplicate=False))
    for name, module in list(gm.named_modules(remove_duplicate=False)):
        if name in own and standins.shares_state(own[name], module):
            standins.adopt(own[name], module)


def uninstall(model: nn.Module) -> nn.Module:
    """Give ``model`` its own forward back. A model that runs no graph is returned as it is.

    Layers that a stand-in took the place of keep its class; a model with such layers is better built anew.
    """
    model.__class__ = original_class(model)
    return model


def original_class(model: nn.Module) -> type[nn.Module]:
    """The class ``model`` had before any `install`."""
    return getattr(type(model), "_original_class", type(model))


def installed_graph(model: nn.Module) -> fx.Graph | None:
    """The graph ``model`` runs, or None when it runs its own forward."""
    return getattr(type(model), "_installed_graph", None)


def _forward(graph: fx.Graph) -> Any:
    """The graph as a method; behind the model's own arguments and result where they are not plain tensors."""
    run = _compile(graph)
    interface = interface_of(graph)
    if interface.simple:
        return run

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return interface.result(run(self, *interface.inputs(args, kwargs)))

    return forward


def _compile(graph: fx.Graph) -> Any:
    global _counter
    _counter += 1
    code = graph.python_code("self")
    filename = f"<flatcompress graph {_counter}>"
    # Without this a traceback from inside the graph would show no source lines.
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
    scope = dict(code.globals)
    exec(compile(code.src, filename, "exec"), scope)
    return scope["forward"]
