"""Arithmetic on "all weights at once": a vector is a list of tensors, one per parameter.

Everything goes through PyTorch's multi-tensor kernels (``torch._foreach_*``), so a step costs a handful of
launches whatever the number of parameters. Norms and inner products are taken in float32, or in float64 for
float64 weights, because 1e6 half-precision entries of 100 already overflow a half-precision norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flatcompress.sharded import any_sharded, apart, local, summed

Vector = list[Tensor]
Scalar = float | Tensor


def accumulate_dtype(vector: Sequence[Tensor]) -> torch.dtype:
    """float64 when any entry is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in vector) else torch.float32


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    device = parts[0].device
    return torch.stack([part if part.device == device else part.to(device) for part in parts])


def total_norm(sizes: Sequence[Tensor]) -> Tensor:
    """The norm of the whole from the norms of its tensors."""
    return torch.linalg.vector_norm(_stacked(sizes))


def norms(vector: Sequence[Tensor]) -> list[Tensor]:
    """The l2 norm of every tensor, 0-dim each."""
    if not vector:
        return []
    if any_sharded(vector):
        return list(summed(lambda parts: _stacked(norms(parts)).square(), vector).sqrt().unbind())
    dtype = accumulate_dtype(vector)
    if any(t.dtype != dtype for t in vector):
        return [torch.linalg.vector_norm(t, dtype=dtype) for t in vector]
    return list(torch._foreach_norm(list(vector), 2))


def norm(vector: Sequence[Tensor]) -> Tensor:
    """The l2 norm over everything, 0-dim; 0 for an empty vector."""
    if not vector:
        return torch.zeros(())
    return total_norm(norms(vector))


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The inner product over everything, 0-dim."""
    if not a:
        return torch.zeros(())
    if any_sharded(a):
        return summed(lambda x, y: _stacked([dot([one], [other]) for one, other in zip(x, y)]), a, b).sum()
    dtype = accumulate_dtype(a)
    parts = [torch.dot(x.reshape(-1).to(dtype), y.reshape(-1).to(dtype)) for x, y in zip(a, b)]
    return _stacked(parts).sum()


def dots(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """The inner product of every pair of tensors."""
    return [dot([x], [y]) for x, y in zip(a, b)]


def scale(vector: Sequence[Tensor], factor: Scalar) -> Vector:
    """``factor * vector``; the factor may be a 0-dim tensor, which costs no device synchronisation."""
    if isinstance(factor, Tensor):
        if len({t.device for t in vector}) > 1:
            return [t * factor.to(device=t.device, dtype=t.dtype) for t in vector]
        if len({t.dtype for t in vector}) == 1:
            factor = factor.to(vector[0].dtype)
    return apart(lambda v: torch._foreach_mul(v, factor), vector) if vector else []


def add(a: Sequence[Tensor], b: Sequence[Tensor], alpha: float = 1.0) -> Vector:
    """``a + alpha * b``."""
    return apart(lambda x, y: torch._foreach_add(x, y, alpha=alpha), a, b) if a else []


def add_(a: Sequence[Tensor], b: Sequence[Tensor], alpha: float = 1.0) -> None:
    """``a += alpha * b`` in place."""
    if a:
        torch._foreach_add_(list(a), list(b), alpha=alpha)


def sub(a: Sequence[Tensor], b: Sequence[Tensor], alpha: float = 1.0) -> Vector:
    """``a - alpha * b``."""
    return add(a, b, alpha=-alpha)


def mul(a: Sequence[Tensor], b: Sequence[Tensor]) -> Vector:
    """The elementwise product."""
    return apart(torch._foreach_mul, a, b) if a else []


def lerp_(a: Sequence[Tensor], b: Sequence[Tensor], share: float) -> None:
    """``a += share * (b - a)`` in place, for vectors that are divided alike."""
    if a:
        torch._foreach_lerp_([local(t) for t in a], [local(t) for t in b], share)


def copy_(target: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """Copy values into the same storage: nothing that holds the target notices but for its values."""
    if not target:
        return
    if any_sharded(target):  # the copy of all at once does not know divided tensors
        target, source = [local(t) for t in target], [local(t) for t in source]
    torch._foreach_copy_(list(target), list(source))


def clone(vector: Sequence[Tensor]) -> Vector:
    """An independent copy."""
    return [t.detach().clone() for t in vector]


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``numerator / denominator``, and 0 where the denominator is 0."""
    safe = torch.where(denominator == 0, torch.ones_like(denominator), denominator)
    return torch.where(denominator == 0, torch.zeros_like(numerator), numerator / safe)


def project(a: Sequence[Tensor], onto: Sequence[Tensor]) -> Vector:
    """``proj_b(a) = (a.b / b.b) b`` over the whole vector; 0 when b is 0, and exactly a when a and b are equal."""
    return scale(onto, ratio(dot(a, onto), dot(onto, onto)))
