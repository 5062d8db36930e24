"""What must not move between the passes of one step: buffers (running statistics, observers, counters).

The first pass of a step moves them as any training step would; later passes see the same state and leave no trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class _Slot:
    module: nn.Module
    name: str
    tensor: Tensor | None
    saved: Tensor | None


@dataclass
class Buffers:
    """Snapshots of every buffer of a model, whatever class owns it.

    Switching BatchNorm off by its flags would miss custom norms, InstanceNorm and quantization observers, and a
    momentum of 0 still counts ``num_batches_tracked``; copying every buffer is exact for all of them.
    The copies are kept from step to step, so a snapshot allocates nothing after the first.
    """

    model: nn.Module
    modules: list[nn.Module] = field(default_factory=list)
    _spare: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.walk()

    def walk(self) -> list[nn.Module]:
        """Look up the modules anew, once a step; by hand, since ``modules()`` takes as long as the copies."""
        waiting, found = [self.model], {}
        while waiting:
            module = waiting.pop()
            if id(module) not in found:
                found[id(module)] = module
                waiting.extend(child for child in module._modules.values() if child is not None)
        self.modules = list(found.values())
        return self.modules

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, forwards may move buffers; afterwards, also after an exception, they are as they were. Nests."""
        slots = self._snapshot()
        try:
            yield
        finally:
            self._restore(slots)

    @contextmanager
    def kept_on_error(self) -> Iterator[None]:
        """Inside, buffers move as they like; an exception puts them back, so a failed step has not happened."""
        slots = self._snapshot()
        try:
            yield
        except BaseException:
            self._restore(slots)
            raise
        self._keep(slots)

    def _snapshot(self) -> list[_Slot]:
        slots = []
        spare, self._spare = self._spare, {}  # an inner snapshot must not write over an outer one's copies
        for module in self.modules:
            for name, tensor in module._buffers.items():
                saved = spare.get((id(module), name))
                if tensor is not None and not _fits(saved, tensor):
                    saved = torch.empty_like(tensor)
                slots.append(_Slot(module, name, tensor, saved if tensor is not None else None))
        _copy([s.saved for s in slots], [s.tensor for s in slots])
        return slots

    def _restore(self, slots: list[_Slot]) -> None:
        known = {(id(s.module), s.name) for s in slots}
        for module in self.modules:
            for name in [n for n in module._buffers if (id(module), n) not in known]:
                del module._buffers[name]
        for slot in slots:
            slot.module._buffers[slot.name] = slot.tensor
        _copy([s.tensor for s in slots], [s.saved for s in slots])
        self._keep(slots)

    def _keep(self, slots: Sequence[_Slot]) -> None:
        self._spare = {(id(s.module), s.name): s.saved for s in slots if s.saved is not None}


def _fits(saved: Tensor | None, tensor: Tensor) -> bool:
    return (
        saved is not None
        and saved.shape == tensor.shape
        and saved.dtype == tensor.dtype
        and saved.device == tensor.device
    )


def _copy(target: Sequence[Tensor | None], source: Sequence[Tensor | None]) -> None:
    pairs = [(t, s) for t, s in zip(target, source) if t is not None and s is not None]
    with torch.no_grad():
        if pairs:
            torch._foreach_copy_([t for t, _ in pairs], [s for _, s in pairs])
