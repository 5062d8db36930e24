"""Everything random: seeds derived from seeds, and the generators' states taken and put back.

The factors decide bits of every run: they may not change.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatcompress.errors import UserError

_NEAR, _FAR = 7919, 1_000_003


def derive(*path: object) -> int:
    """A 63-bit seed from any values; the same values give the same seed on every machine.

    >>> derive(0, "split") == derive(0, "split") != derive(1, "split")
    True
    """
    text = "/".join(map(str, path))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*path: object) -> torch.Generator:
    """A fresh CPU generator seeded by `derive`."""
    return torch.Generator().manual_seed(derive(*path))


def mixed(seed: int, index: int) -> int:
    """The seed of draw ``index`` (an epoch, a step): other seeds' draws stay apart for a million of them.

    >>> mixed(2, 5)
    2000011
    """
    return seed * _FAR + index


def spaced(seed: int, index: int, apart: int = _NEAR) -> int:
    """The seed of part ``index`` (a stage, a batch), a prime away from the last one's.

    >>> spaced(2, 3)
    23759
    """
    return seed + apart * index


@dataclass(frozen=True)
class RandomState:
    """The state of torch's random generators: the CPU's and those of the devices in use."""

    cpu: Tensor
    devices: dict[torch.device, Tensor]

    @classmethod
    def now(cls, devices: Iterable[torch.device]) -> RandomState:
        """The states as they are."""
        return cls(torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"})

    def set(self) -> None:
        """Put them back."""
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.cuda.set_rng_state(state, device)


@contextmanager
def replayed(start: RandomState | None, devices: Iterable[torch.device]) -> Iterator[None]:
    """Inside, random draws repeat from ``start``; afterwards they go on from where they were. None changes nothing."""
    if start is None:
        yield
        return
    after = RandomState.now(devices)
    start.set()
    try:
        yield
    finally:
        after.set()


def capture() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's global generators (CPU and every CUDA device)."""
    state = RandomState.now(_devices())
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": state.cpu,
        "cuda": list(state.devices.values()),
    }


def restore(state: dict[str, Any]) -> None:
    """Put `capture`'s states back; CUDA states are used as far as there are devices. UserError when damaged."""
    try:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        RandomState(state["torch"], dict(zip(_devices(), state["cuda"]))).set()
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, OverflowError) as error:
        raise UserError(f"the checkpoint's random state is damaged ({str(error)[:200]}).") from None


def _devices() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
