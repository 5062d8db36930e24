"""Parameters that are divided over processes (FSDP2's DTensors): what treats them as the whole that they stand for.

Elementwise arithmetic on them is each process's on its own part. Norms and inner products are sums over all parts, and
random draws are made whole by every process and then divided, so a step is the step of one process that holds all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_WHOLE = (Tensor, nn.Parameter)  # asked first: it is by far the most frequent answer


def is_sharded(tensor: Any) -> bool:
    """Whether ``tensor`` is a DTensor. Asked without importing those, which takes a while."""
    return type(tensor) not in _WHOLE and hasattr(tensor, "placements")


def any_sharded(tensors: Iterable[Any]) -> bool:
    """Whether one of ``tensors`` is a DTensor."""
    return any(map(is_sharded, tensors))


def is_divided(model: nn.Module) -> bool:
    """Whether parameters of ``model`` are divided over processes."""
    return any_sharded(model.parameters())


def any_process(said: bool | Tensor) -> bool:
    """Whether any process says so; all of them ask, and get the same answer."""
    flag = torch.as_tensor(said, dtype=torch.float32)
    flag = flag.cuda() if dist.get_backend() == "nccl" else flag
    dist.all_reduce(flag)
    return bool(flag)


def local(tensor: Tensor) -> Tensor:
    """This process's part of ``tensor``, sharing its memory; ``tensor`` itself where it is whole."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined,no-any-return]


def whole(tensor: Tensor) -> Tensor:
    """The whole of ``tensor``; every process must ask for it at the same time."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined,no-any-return]


def whole_tree(value: Any) -> Any:
    """Nested dictionaries, lists and tuples with every DTensor made `whole`, on the CPU."""
    if is_sharded(value):
        return whole(value.detach()).cpu()
    if isinstance(value, dict):
        return {key: whole_tree(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole_tree(inner) for inner in value)
    return value


def divided(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole ``tensor``, the same in every process, divided as ``like`` is; unchanged where that is whole."""
    if not is_sharded(like) or is_sharded(tensor) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(like.device), mesh, placements)


def load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """``module.load_state_dict(state)``, where the module's parameters may be divided and the state whole."""
    own = module.state_dict()
    module.load_state_dict({key: divided(value, own[key]) if key in own else value for key, value in state.items()})


def summed(parts: Callable[..., Tensor], *vectors: Sequence[Tensor]) -> Tensor:
    """``parts(*vectors)``, one number per tensor, added up over the processes where a tensor is divided.

    parts: gets lists of this process's parts and gives a 1-dim tensor. All tensors are divided over the same processes,
    or whole.
    """
    values = parts(*([local(t) for t in vector] for vector in vectors))
    is_part = [is_sharded(t) for t in vectors[0]]
    where = torch.tensor(is_part, device=values.device)
    share = torch.where(where, values, torch.zeros_like(values))
    for group in _groups(vectors[0][is_part.index(True)]):
        dist.all_reduce(share, group=group)
    return torch.where(where, share, values)


def _groups(tensor: Any) -> list[Any]:
    """The process groups that ``tensor`` is divided over."""
    return [tensor.device_mesh.get_group(i) for i, placed in enumerate(tensor.placements) if placed.is_shard()]


def apart(function: Callable[..., Iterable[Tensor]], *vectors: Sequence[Tensor]) -> list[Tensor]:
    """``function(*vectors)``, a multi-tensor kernel, called for divided and whole tensors one after the other.

    Called for both together it would give the whole ones back as DTensors.
    """
    is_part = [is_sharded(t) for t in vectors[0]]
    if all(is_part) or not any(is_part):
        return list(function(*map(list, vectors)))
    found: dict[int, Tensor] = {}
    for kind in (True, False):
        chosen = [i for i, part in enumerate(is_part) if part is kind]
        found.update(zip(chosen, function(*([vector[i] for i in chosen] for vector in vectors))))
    return [found[i] for i in range(len(is_part))]


@contextmanager
def mixing() -> Iterator[None]:
    """Inside, a whole tensor may meet a divided one: it is the same in every process."""
    from torch.distributed.tensor.experimental import implicit_replication

    with implicit_replication():
        yield


def broadcast_(tensors: Sequence[Tensor], group: Any = None) -> None:
    """Give all processes the values of the first one, in place."""
    source = 0 if group is None else dist.get_global_rank(group, 0)
    for alike in by_kind(tensors).values():
        flat = torch.cat([t.reshape(-1) for t in alike])
        dist.broadcast(flat, source, group=group)
        unflatten(flat, alike)


def by_kind(tensors: Sequence[Tensor]) -> dict[tuple[torch.dtype, torch.device], list[Tensor]]:
    """``tensors`` that fit into one message, together."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for t in tensors:
        kinds.setdefault((t.dtype, t.device), []).append(t)
    return kinds


def unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write a message's values back into ``tensors``."""
    start = 0
    for t in tensors:
        t.copy_(flat[start : start + t.numel()].view(t.shape))
        start += t.numel()
