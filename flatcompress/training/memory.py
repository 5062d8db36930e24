"""Running out of memory: told from other errors, the batch size that fits, and batches worked through in parts."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

import torch
from torch import Tensor

_SIGNS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Did an allocation fail, on whatever device?"""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def release() -> None:
    """Give back what the failed attempt held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_bytes(device: torch.device) -> int | None:
    """The most memory there has been so far: of this process on a CPU, of its tensors on a GPU; None where unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def largest_fitting(size: int, attempt: Callable[[int], None]) -> int | None:
    """The largest of size/2, size/4 ... for which ``attempt(n)`` has the memory it needs; None when not even 1 has.

    >>> def attempt(n):
    ...     if n > 20:
    ...         raise MemoryError
    >>> largest_fitting(64, attempt)
    16
    """
    while size > 1:
        size //= 2
        release()
        try:
            attempt(size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            continue
        return size
    return None


def split(x: Tensor, y: Tensor, parts: int) -> list[tuple[Tensor, Tensor, float]]:
    """The batch in ``parts`` of nearly equal size, each with the factor that makes the mean of their losses exact.

    >>> [(len(x), round(f, 2)) for x, _, f in split(torch.zeros(5, 1), torch.zeros(5), 2)]
    [(3, 1.2), (2, 0.8)]
    """
    if parts == 1:
        return [(x, y, 1.0)]
    pieces = zip(x.tensor_split(parts), y.tensor_split(parts))
    return [(a, b, len(a) * parts / len(x)) for a, b in pieces]
