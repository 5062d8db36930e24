"""What every package does to a ``torch.nn.Module`` in passing: modes put back, layers named by patterns, BatchNorm."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from flatcompress.errors import UserError, nearest

EXPRESSION = "re:"


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[nn.Module]:
    """Afterwards, also after an exception, every module is in the mode it was in (one flag each, not the root's)."""
    modes = [(module, module.training) for module in _every(model)]
    try:
        yield model
    finally:
        for module, training in modes:
            if module.training != training:
                module.training = training


def _every(model: nn.Module) -> list[nn.Module]:
    """``model.modules()`` in any order: of the thousands in a quantized network that takes a fifth of the time."""
    found, waiting = {id(model): model}, [model]
    while waiting:
        new = [m for m in waiting.pop()._modules.values() if m is not None and id(m) not in found]
        found.update((id(m), m) for m in new)
        waiting += new
    return list(found.values())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode inside; afterwards every module's own mode, so a BatchNorm that was frozen by ``eval()`` stays frozen.

    >>> net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
    >>> with evaluating(net):
    ...     [m.training for m in net]
    [False, False]
    >>> [m.training for m in net]
    [True, False]
    """
    with modes_kept(model):
        if any(module.training for module in _every(model)):
            model.eval()
        yield model


def logits_of(output: Any) -> Any:
    """The tensor that a loss is computed on: the output itself, or the ``logits`` of a transformers output."""
    return output.logits if hasattr(output, "logits") else output


def pads_with_zeros(layer: nn.Module) -> bool:
    """Whether a convolution pads with zeros; a layer that does not pad is like one that does."""
    return not isinstance(layer, _ConvNd) or layer.padding_mode == "zeros"


def weight_of(layer: nn.Module | None) -> Tensor | None:
    """The weight tensor of a layer, or None for a module that has none."""
    weight = layer.weight if layer is not None and hasattr(layer, "weight") else None
    return weight if isinstance(weight, Tensor) else None


def matches(pattern: str, name: str) -> bool:
    """``layer1`` is itself and everything below it; ``re:PATTERN`` is a regular expression over the whole name."""
    if pattern.startswith(EXPRESSION):
        return re.fullmatch(pattern.removeprefix(EXPRESSION), name) is not None
    return name == pattern or name.startswith(f"{pattern}.")


def check_patterns(
    key: str, patterns: Iterable[str], names: Sequence[str], listed: Sequence[str] | None = None
) -> None:
    """UserError, beginning with ``key``, for a pattern that is no regular expression or matches none of ``names``.

    ``listed``: the names that the message offers (default: ``names``).
    """
    for pattern in patterns:
        try:
            hit = any(matches(pattern, name) for name in names)
        except re.error as error:
            raise UserError(f"{key}: {pattern!r} is no regular expression ({error}).") from None
        if not hit:
            offered = names if listed is None else listed
            guess = nearest(pattern.removeprefix(EXPRESSION), offered)
            hint = f" Did you mean {guess!r}?" if guess else ""
            raise UserError(f"{key}: {pattern!r} matches no layer.{hint} Layers: {', '.join(offered)}.")


def batchnorms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers with running statistics, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats}


@torch.no_grad()
def estimate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Replace every BatchNorm's running statistics by their mean over ``batches``; returns the number of batches.

    ``batches``: inputs [B, ...], or tuples that begin with one. Every batch counts the same (a momentum of None).
    All other modules keep the mode they are in; momenta and modes are restored. UserError for no batch and for
    statistics that are not finite, naming the layer; the old statistics are then kept. Nothing without BatchNorm.
    """
    norms = batchnorms(model)
    if not norms:
        return 0
    before = {name: {key: value.clone() for key, value in norm.state_dict().items()} for name, norm in norms.items()}
    momenta = {name: norm.momentum for name, norm in norms.items()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    count = 0
    try:
        with modes_kept(model):
            for norm in norms.values():
                norm.reset_running_stats()
                norm.train()
                norm.momentum = None  # the cumulative average; 0 would leave the statistics as they are
            for batch in batches:
                model((batch[0] if isinstance(batch, tuple | list) else batch).to(device))
                count += 1
        _check_statistics(norms, count)
    except BaseException:
        for name, norm in norms.items():
            norm.load_state_dict(before[name])
        raise
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
    return count


def _check_statistics(norms: Mapping[str, _BatchNorm], count: int) -> None:
    if not count:
        raise UserError("BatchNorm re-estimation needs at least one batch.")
    for name, norm in norms.items():
        found: list[Tensor | None] = [norm.running_mean, norm.running_var]
        if not all(bool(torch.isfinite(b).all()) for b in found if b is not None):
            raise UserError(f"BatchNorm re-estimation: the data gives NaN or infinity at {name!r}.")


def walked(model: nn.Module) -> list[nn.Module]:
    """Every module once, as ``modules()`` gives them but in another order and in a third of the time.

    >>> len(walked(nn.Sequential(nn.ReLU(), nn.ReLU())))
    3
    """
    waiting, found = [model], {}
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting.extend(child for child in module._modules.values() if child is not None)
    return list(found.values())
