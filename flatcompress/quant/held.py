"""What a quantized network computes of its weights alone, computed once for many forward passes instead of in each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flatcompress.modules import evaluating
from flatcompress.quant.layers import quantized_layers
from flatcompress.quant.qat.rounding import BiasRounding
from flatcompress.sharded import is_divided


@contextmanager
def held(model: nn.Module, biases: bool = True) -> Iterator[None]:
    """Inside, quantized weights and rounded biases are what they were at the beginning, without being computed again.

    Nothing that they come from may change inside: weights, scales, BatchNorm's statistics (``biases=False`` where these
    do). Results are the same bits. Where gradients are wanted everything is computed as ever. A network that is not
    quantized is left alone, and one whose weights are divided over processes. It takes as much memory as the weights.

    >>> net = nn.Linear(2, 1)
    >>> with held(net), torch.no_grad():
    ...     net(torch.ones(3, 2)).shape
    torch.Size([3, 1])
    """
    if is_divided(model):  # these weights are whole within a forward alone
        yield
        return
    computed: list[tuple[nn.Module, str]] = [(layer, "quantized_weight") for layer in quantized_layers(model).values()]
    if biases:
        computed += [(m, "shift") for m in model.modules() if isinstance(m, BiasRounding) and m.enabled]
    with evaluating(model), torch.no_grad():
        once = [_once(getattr(module, name)) for module, name in computed]
    around = [vars(module).get(name) for module, name in computed]  # of a block around this one
    try:
        for (module, name), value in zip(computed, once):
            vars(module)[name] = value
        yield
    finally:
        for (module, name), other in zip(computed, around):
            if other is None:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = other


def _once(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    value = compute()
    return lambda: compute() if torch.is_grad_enabled() else value
