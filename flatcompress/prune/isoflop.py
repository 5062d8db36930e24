"""Sparse iso-FLOP transformations (Sparse-IFT, arXiv 2303.11525): as much work while training, spent on other weights.

A layer's weight W is trained in another form that costs no more multiplications, and `fold` leaves a plain weight in
its place, of the layer's own size. *sparse_doped*: a sparse weight and a product of low rank, W = M * S + V U, the
rank being what a sparsity of s pays for, r = floor(s O K / (O + K)) of a weight [O, K]. *sparse_wide*: W = M * S in a
network that is wider by 1 / sqrt(1 - s) (`wider`), whose zeros stay. Masks are drawn once (the paper's static ones).
Written after the released code; equation numbers are not checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flatcompress.errors import UserError
from flatcompress.modules import check_patterns, matches
from flatcompress.randomness import generator
from flatcompress.registry import Registry

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Leaves:
    """What a row leaves behind. dense: a plain weight without zeros after `fold`."""

    dense: bool = True


REPARAMETRIZATIONS = Registry("reparametrization", Leaves)


def wider(width: int, sparsity: float) -> int:
    """The width at which a layer of ``sparsity`` has as many weights as a dense one of ``width``.

    >>> wider(16, 0.75)
    32
    """
    return round(width / math.sqrt(1 - _checked(sparsity)))


def low_rank(outputs: int, inputs: int, sparsity: float) -> int:
    """The rank of two factors that have as many numbers as a sparsity takes from a weight [outputs, inputs]."""
    return math.floor(_checked(sparsity) * outputs * inputs / (outputs + inputs))


class _Masked(nn.Module):
    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class _Doped(_Masked):
    """The sparse weight and the product of low rank, which begin as the released code begins them."""

    def __init__(self, mask: Tensor, rank: int, rng: torch.Generator) -> None:
        super().__init__(mask)
        outputs, inputs = mask.flatten(1).shape
        receptive = mask[0, 0].numel()  # fan_out counts the positions of a kernel
        self.u = nn.Parameter(torch.randn(rank, inputs, generator=rng) * math.sqrt(2 / (rank * receptive)))
        self.v = nn.Parameter(torch.randn(outputs, rank, generator=rng) * math.sqrt(2 / outputs))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask + (self.v @ self.u).view_as(weight)


def sparse_doped(model: nn.Module, sparsity: float = 0.5, seed: int = 0, ignore: Sequence[str] = ()) -> list[str]:
    """Train the layers of ``model`` as a sparse weight and one of low rank; changed in place, the layers' names.

    ``sparsity``: share of zeros of the sparse weight, in [0, 1); at 0 the layer is what it was, bit for bit.
    ``ignore``: layers that stay, as names or ``re:PATTERN``. Grouped convolutions stay. UserError: no layer, a wrong
    sparsity.
    """
    return _put(model, sparsity, seed, ignore, doped=True)


def sparse_wide(model: nn.Module, sparsity: float = 0.5, seed: int = 0, ignore: Sequence[str] = ()) -> list[str]:
    """Train the layers of ``model``, which is `wider` already, under masks; as `sparse_doped` in all else."""
    return _put(model, sparsity, seed, ignore, doped=False)


def fold(model: nn.Module) -> nn.Module:
    """Plain weights in the place of what `sparse_doped` and `sparse_wide` made; ``model``, changed in place."""
    for module in model.modules():
        forms: Any = module.parametrizations if parametrize.is_parametrized(module, "weight") else {}
        if "weight" in forms and isinstance(forms["weight"][0], _Masked):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return model


def _put(model: nn.Module, sparsity: float, seed: int, ignore: Sequence[str], doped: bool) -> list[str]:
    _checked(sparsity)
    found = {n: m for n, m in model.named_modules() if isinstance(m, LAYERS) and getattr(m, "groups", 1) == 1}
    check_patterns("ignore", ignore, list(found))
    chosen = {n: m for n, m in found.items() if not any(matches(p, n) for p in ignore)}
    if not chosen:
        raise UserError(f"{type(model).__name__} has no convolution or linear layer to train in another form.")
    for name, layer in chosen.items():
        rng, weight = generator(seed, "isoflop", name), layer.weight
        mask = torch.ones(weight.numel())
        mask[torch.randperm(weight.numel(), generator=rng)[: round(sparsity * weight.numel())]] = 0
        mask = mask.view_as(weight)
        rank = low_rank(len(mask), mask[0].numel(), sparsity) if doped else 0
        form = _Doped(mask, rank, rng) if rank else _Masked(mask)
        parametrize.register_parametrization(layer, "weight", form.to(weight.device, weight.dtype))
    return list(chosen)


def _checked(sparsity: float) -> float:
    if not 0 <= sparsity < 1:
        raise UserError(f"sparsity is a share from 0 to below 1, found {sparsity:g}.")
    return sparsity


REPARAMETRIZATIONS.add(
    "sparse_doped", sparse_doped, "a sparse weight and one of low rank for a dense one, folded after", "2303.11525"
)
REPARAMETRIZATIONS.add(
    "sparse_wide", sparse_wide, "a wider network under fixed masks, as many weights", "2303.11525", dense=False
)
