"""A limit on the loss of accuracy: layers get bits back, by measured benefit per byte, until it holds.

What a layer costs is measured on the quantized network with this layer's float weights put back: by how much the
divergence from the float network's outputs falls. Layers are given back in that order, per byte it takes, first to 8
bits, then to float, one, two, four ... at a time, and the network is quantized anew after every round.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.modules import evaluating
from flatcompress.quant.layers import quantized_layers
from flatcompress.quant.ptq.paths import float_twin, weight_replaced
from flatcompress.quant.ptq.post_training import PostTraining, post_training

Metric = Callable[[nn.Module], float]


def within_drop(
    model: nn.Module,
    batches: Iterable[Any],
    metric: Metric,
    max_drop: float,
    weight_bits: int = 8,
    activation_bits: int | None = 8,
    **settings: Any,
) -> tuple[PostTraining, list[dict[str, Any]]]:
    """`post_training` in place, with ``metric(model)`` at most ``max_drop`` below the float network's.

    ``weight_bits``, ``activation_bits``: what is tried first. ``metric``: higher is better, in the units of
    ``max_drop``; it is asked in eval mode. Returns what `post_training` does for the final network, and a row per
    round: ``given_back`` (layers and what they got), ``metric`` and ``drop``. UserError when the limit holds only with
    every layer float; the model is then as it came.
    """
    if max_drop < 0:
        raise UserError(f"the largest drop is a number of at least 0; found {max_drop!r}.")
    inputs = [b[0] if isinstance(b, tuple | list) else b for b in batches]
    original = copy.deepcopy(model)
    bits, ignored = dict(settings.pop("bits", None) or {}), list(settings.pop("ignore", ()))
    with evaluating(original):
        whole = metric(original)
    rounds: list[dict[str, Any]] = []
    given: dict[str, int | str] = {}
    order: list[tuple[str, int | str]] | None = None
    size = 1
    while True:
        attempt = copy.deepcopy(original)
        pinned = {**bits, **{n: to for n, to in given.items() if isinstance(to, int)}}
        floats = [*ignored, *[n for n, to in given.items() if to == "float"]]
        done = post_training(attempt, inputs, weight_bits, activation_bits, bits=pinned, ignore=floats, **settings)
        with evaluating(attempt):
            found = metric(attempt)
        if not quantized_layers(attempt):
            raise UserError(
                f"a drop of at most {max_drop:g} cannot be kept: the last step before every layer is float still loses "
                f"{rounds[-1]['drop']:.4g}. Allow a larger drop, give the activations more bits, or train (epochs)."
            )
        rounds.append({"given_back": dict(given), "metric": found, "drop": whole - found})
        if whole - found <= max_drop:
            _become(model, attempt)
            return done, rounds
        order = _order(attempt, original, inputs) if order is None else order
        for name, to in order[:size]:
            given[name] = to
        order, size = order[size:], 2 * size


def _order(model: nn.Module, original: nn.Module, inputs: Sequence[Tensor]) -> list[tuple[str, int | str]]:
    """(layer, what it gets), the most worthwhile first: 8 bits for all that have fewer, then float."""
    layers = quantized_layers(model)
    twin = float_twin(original)
    with evaluating(model), torch.no_grad():
        wanted = [twin(x) for x in inputs[:4]]
        start = _distance(model, inputs, wanted)
        saved = {}
        for name, layer in layers.items():
            if name not in dict(twin.named_modules()):  # a layer that quantizing itself has made
                saved[name] = 0.0
                continue
            exact: Tensor = twin.get_submodule(name).weight.detach()  # type: ignore[union-attr, operator]
            with weight_replaced(layer, exact):
                saved[name] = start - _distance(model, inputs, wanted)
    found: list[tuple[str, int | str]] = []
    for to, width in ((8, 8), ("float", 32)):
        prices = {
            n: layer.weight.numel() * (width - layer.weight_quant.tensor_quant.bits) for n, layer in layers.items()
        }
        worth = sorted((n for n in layers if prices[n] > 0), key=lambda n: -saved[n] / prices[n])
        found += [(name, to) for name in worth]
    return found


def _distance(model: nn.Module, inputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Squared distance of the outputs from the float network's, relative to their size."""
    error = sum(float((model(x) - y).square().sum()) for x, y in zip(inputs, wanted))
    return error / (sum(float(y.square().sum()) for y in wanted) or 1.0)


def _become(model: nn.Module, other: nn.Module) -> None:
    """Let ``model`` be what ``other`` is: same class, same modules and parameters."""
    model.__class__ = other.__class__
    model.__dict__.clear()
    model.__dict__.update(other.__dict__)
