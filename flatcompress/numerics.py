"""Estimates and distances that several packages take, each written once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Draw = Callable[[int], Sequence[Tensor]]
Product = Callable[[Sequence[Tensor]], Sequence[Tensor | None]]


def kl(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(target / T) || softmax(logits / T)) by class, [..., classes]; a sample's is the sum over the last.

    >>> float(kl(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), 4.0).sum())
    0.0
    """
    log_p, log_q = F.log_softmax(logits / temperature, -1), F.log_softmax(target / temperature, -1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True)


def hutchinson(draw: Draw, product: Product, draws: int) -> list[float]:
    """The traces of a matrix's diagonal blocks: the mean of v'(Mv) over ``draws`` random signs v, block by block.

    ``draw(j)``: one tensor of signs per block. ``product(v)``: M v; None where a block has no part in it.
    """
    totals: list[float] = []
    for j in range(draws):
        v = draw(j)
        totals = totals or [0.0] * len(v)
        for i, (sign, row) in enumerate(zip(v, product(v))):
            totals[i] += 0.0 if row is None else float((row * sign).sum(dtype=_wide(row))) / draws
    return totals


def _wide(tensor: Tensor) -> torch.dtype:
    """At least float32: a sum of halves would not reach it."""
    return torch.promote_types(tensor.dtype, torch.float32)
