"""What must not move between the passes of one step: buffers (running statistics, observers, counters).

The first pass of a step moves them as any training step would; later passes see the same state and leave no trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flatcompress.modules import walked


@dataclass
class _Taken:
    """Where every buffer was, and of those that are tensors what they held."""

    slots: list[tuple[nn.Module, str, Tensor | None]]
    tensors: list[Tensor]
    saved: list[Tensor]


@dataclass
class Buffers:
    """Snapshots of every buffer of a model, whatever class owns it.

    Switching BatchNorm off by its flags would miss custom norms, InstanceNorm and quantization observers, and a
    momentum of 0 still counts ``num_batches_tracked``; copying every buffer is exact for all of them.
    The copies are kept from step to step, so a snapshot allocates nothing after the first.
    """

    model: nn.Module
    modules: list[nn.Module] = field(default_factory=list)
    _spare: dict[tuple[int, str], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.walk()

    def walk(self) -> list[nn.Module]:
        """Look up the modules anew, once a step."""
        self.modules = walked(self.model)
        return self.modules

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, forwards may move buffers; afterwards, also after an exception, they are as they were. Nests."""
        taken = self._snapshot()
        try:
            yield
        finally:
            self._restore(taken)

    @contextmanager
    def kept_on_error(self) -> Iterator[None]:
        """Inside, buffers move as they like; an exception puts them back, so a failed step has not happened."""
        taken = self._snapshot()
        try:
            yield
        except BaseException:
            self._restore(taken)
            raise
        self._keep(taken)

    def _snapshot(self) -> _Taken:
        taken = _Taken([], [], [])
        spare, self._spare = self._spare, {}  # an inner snapshot must not write over an outer one's copies
        for module in self.modules:
            for name, tensor in module._buffers.items():
                taken.slots.append((module, name, tensor))
                if tensor is None:
                    continue
                of, saved = spare.get((id(module), name), (None, None))
                if saved is None or not (saved.shape == tensor.shape if of is tensor else _fits(saved, tensor)):
                    saved = torch.empty_like(tensor)
                taken.tensors.append(tensor)
                taken.saved.append(saved)
        _copy(taken.saved, taken.tensors)
        return taken

    def _restore(self, taken: _Taken) -> None:
        for module, name, tensor in taken.slots:
            module._buffers[name] = tensor
        if sum(len(module._buffers) for module in self.modules) != len(taken.slots):
            known = {(id(module), name) for module, name, _ in taken.slots}
            for module in self.modules:
                for name in [n for n in module._buffers if (id(module), n) not in known]:
                    del module._buffers[name]
        _copy(taken.tensors, taken.saved)
        self._keep(taken)

    def _keep(self, taken: _Taken) -> None:
        there = ((id(module), name) for module, name, tensor in taken.slots if tensor is not None)
        self._spare = dict(zip(there, zip(taken.tensors, taken.saved)))


def _fits(saved: Tensor, tensor: Tensor) -> bool:
    return saved.shape == tensor.shape and saved.dtype == tensor.dtype and saved.device == tensor.device


def _copy(target: list[Tensor], source: list[Tensor]) -> None:
    with torch.no_grad():
        if target:
            torch._foreach_copy_(target, source)
