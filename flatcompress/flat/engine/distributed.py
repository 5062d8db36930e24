"""More than one process, and loss scaling: one reduction and one verdict for the whole step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flatcompress.errors import UserError
from flatcompress.flat.engine.vectors import Vector
from flatcompress.sharded import broadcast_, by_kind, is_divided, is_sharded, unflatten


class Replicas:
    """The processes that share a model, or one process alone.

    Distributed means: the model is a DistributedDataParallel, its parameters are divided (`fully_shard`), or a process
    group was given. That torch.distributed happens to be initialised decides nothing. Gradients of divided parameters
    are averaged within every backward pass, so all processes climb together: ``synced`` is all there is.
    """

    def __init__(self, model: nn.Module, group: Any = None) -> None:
        self.ddp = model if isinstance(model, DistributedDataParallel) else None
        self.sharded = is_divided(model)
        if self.sharded and group is None:
            group = dist.group.WORLD
        self.group = group if group is not None else (self.ddp.process_group if self.ddp is not None else None)
        self.size = dist.get_world_size(self.group) if self.group is not None else 1

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, DDP reduces nothing: the engine reduces the combined gradient itself."""
        if self.ddp is None:
            yield
            return
        with self.ddp.no_sync():
            yield

    def share_buffers(self) -> None:
        """What DDP does at the first forward of a step and `alone` keeps it from doing: rank 0's buffers to all."""
        if self.ddp is None or self.group is None or self.size == 1 or not self.ddp.broadcast_buffers:
            return
        broadcast_(list(self.ddp.module.buffers()), self.group)

    def mean_(self, vector: Sequence[Tensor], absent: Sequence[bool], finite: bool = True) -> tuple[list[bool], bool]:
        """Average ``vector`` in place over the processes; a parameter is absent only if it is so everywhere.

        Presence and the overflow verdict travel in the same message, so every process takes the same decision.
        """
        if self.size == 1:
            return list(absent), finite
        kinds = by_kind([t for t in vector if not is_sharded(t)])  # the others were averaged by their backward pass
        if not kinds:
            return list(absent), finite
        flags = [float(not a) for a in absent] + [float(not finite)]
        for i, tensors in enumerate(kinds.values()):
            parts = [t.reshape(-1) for t in tensors]
            notes = [tensors[0].new_tensor(flags)] if i == 0 else []
            flat = torch.cat(parts + notes)
            dist.all_reduce(flat, group=self.group)
            if i == 0:
                told = flat[flat.numel() - len(flags) :].tolist()
                flags = told
            unflatten(flat.div_(self.size), tensors)
        return [f == 0 for f in flags[:-1]], flags[-1] == 0


def unscale_(vector: Vector, scaler: Any) -> bool:
    """Divide by the loss scale in place; False when anything is infinite or NaN."""
    if scaler is None or not scaler.is_enabled():
        return True
    torch._foreach_mul_(vector, 1.0 / scaler.get_scale())
    return all(bool(torch.isfinite(n)) for n in torch._foreach_norm(vector, 1))


def update_scaler(scaler: Any, finite: bool, device: torch.device) -> None:
    """One update of the loss scale for the whole step.

    A GradScaler accepts one unscale per optimizer and step, and refuses closures; the step has several passes. So
    the engine unscales by itself and reports its verdict through a stand-in with a single gradient, 1 or infinity.
    """
    if scaler is None or not scaler.is_enabled():
        return
    verdict = nn.Parameter(torch.zeros(1, device=device))
    verdict.grad = torch.full((1,), 1.0 if finite else float("inf"), device=device)
    stand_in = SimpleNamespace(param_groups=[{"params": [verdict]}])
    try:
        scaler.unscale_(stand_in)
    except AssertionError:
        raise UserError(
            "a scaler was given but the closure does not use it: call scaler.scale(loss).backward()"
        ) from None
    scaler.update()
