"""Models that are not ready to be traced: wrapped by something that hides their forward, or not initialised yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from flatcompress.errors import UserError
from flatcompress.graph.interface import call
from flatcompress.modules import evaluating

_ADVICE = {
    "DataParallel": "pass model.module, and wrap it again afterwards",
    "DistributedDataParallel": "pass model.module, and wrap it again afterwards",
    "FullyShardedDataParallel": "pass the model before it is sharded",
    "OptimizedModule": "torch.compile made it: pass model._orig_mod, and compile it again afterwards",
    "ScriptModule": "TorchScript keeps no Python forward: pass the module it was made from",
    "RecursiveScriptModule": "TorchScript keeps no Python forward: pass the module it was made from",
    "TopLevelTracedModule": "TorchScript keeps no Python forward: pass the module it was made from",
    "TracedModule": "TorchScript keeps no Python forward: pass the module it was made from",
}


def check_plain(model: nn.Module) -> None:
    """UserError, with what to pass instead, for a wrapper around a model and for what is no module."""
    if not isinstance(model, nn.Module):
        raise UserError(f"a model is a torch.nn.Module; found {type(model).__name__}.")
    for name, module in model.named_modules():
        kinds = [kind.__name__ for kind in type(module).__mro__]
        found = next((kind for kind in kinds if kind in _ADVICE), None)
        if found is not None:
            where = f"module {name!r}" if name else "the model"
            raise UserError(f"{where} is a {found}: {_ADVICE[found]}.")


def initialise(model: nn.Module, example: Any) -> None:
    """Give the parameters of ``nn.Lazy*`` layers their shapes, by one forward in eval mode."""
    if not any(is_lazy(t) for t in [*model.parameters(), *model.buffers()]):
        return
    try:
        with evaluating(model), torch.no_grad():
            call(model, example)
    except Exception as error:  # whatever the model's own forward raises
        raise UserError(f"{type(model).__name__} cannot be run to initialise its lazy layers: {error}") from error
