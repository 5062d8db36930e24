"""Recurrent layers in the dependency graph: their inputs are channels like any other, their hidden size stays.

torch-pruning follows autograd, and what a GRU or LSTM leaves there differs by device and kernel. While the graph is
read, each recurrent layer is replaced by a linear layer that reads what it reads; what it puts out is a constant, so
nothing behind it is tied to what lies before. The reader's outputs leave the model beside the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def output_width(layer: nn.Module) -> int:
    """Channels that a recurrent layer puts out: hidden (or projected) size times directions."""
    assert isinstance(layer, RECURRENT)
    if isinstance(layer, nn.RNNCellBase):
        return layer.hidden_size
    return (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)


class StandIn(nn.Module):
    """In the place of ``layer``: reads its input with ``reader`` and returns constants of the right shapes."""

    def __init__(self, layer: nn.Module, heard: list[Tensor]) -> None:
        super().__init__()
        weight = next(layer.parameters())
        self.reader = nn.Linear(int(layer.input_size), 2, bias=False, device=weight.device, dtype=weight.dtype)  # type: ignore[arg-type]
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_heard", heard)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, x: Tensor | PackedSequence, hx: Any = None) -> Any:
        """The layer's own results on zeros, detached; the reading of ``x`` goes into the list of what was heard."""
        data = x.data if isinstance(x, PackedSequence) else x
        self._heard.append(self.reader(data))
        with torch.no_grad():
            return self._layer(x, hx) if hx is not None else self._layer(x)


@contextmanager
def stood_in(model: nn.Module) -> Iterator[tuple[dict[nn.Module, str], list[Tensor]]]:
    """Inside, recurrent layers are `StandIn`s. Gives their readers with the layers' names, and what they have read."""
    heard: list[Tensor] = []
    made: dict[nn.Module, StandIn] = {}
    readers: dict[nn.Module, str] = {}
    places = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, RECURRENT) and name:
            places.append((name, module))
    for name, module in places:
        parent, _, child = name.rpartition(".")
        if module not in made:
            made[module] = StandIn(module, heard).train(module.training)
            readers[made[module].reader] = name
        model.get_submodule(parent)._modules[child] = made[module]
    try:
        yield readers, heard
    finally:
        for name, module in places:
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent)._modules[child] = module
