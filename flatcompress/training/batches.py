"""Batches in an order that (seed, epoch) alone decide, and what is said when a loading process fails."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from flatcompress.errors import RunError, UserError
from flatcompress.modules import evaluating
from flatcompress.randomness import mixed
from flatcompress.tasks import Task


def epoch_batches(
    n: int, batch_size: int, seed: int, epoch: int, rank: int = 0, world: int = 1, domain_ids: Tensor | None = None
) -> list[list[int]]:
    """Index batches of one epoch for one process: a permutation fixed by (seed, epoch), cut into equal batches.

    The remainder is left out when there is at least one full batch, so that no BatchNorm sees a tiny batch and all
    processes take the same number of steps. ``domain_ids`` [n]: domains take turns, so that a batch has as many samples
    of each, or one more; of a domain with more samples than its turns others are left out every epoch, one with fewer
    comes round again.

    >>> [len(b) for b in epoch_batches(10, 4, seed=0, epoch=0)]
    [4, 4]
    """
    generator = torch.Generator().manual_seed(mixed(seed, epoch))
    whole = torch.randperm(n, generator=generator) if domain_ids is None else _in_turns(domain_ids, generator, world)
    order = whole.tolist()[rank::world]
    size = min(batch_size, n // world)
    return [order[i * size : (i + 1) * size] for i in range((n // world) // size)]


def _in_turns(domain_ids: Tensor, generator: torch.Generator, world: int) -> Tensor:
    """Samples whose domains take turns within each of ``world`` processes, as many as there are."""
    n, domains = len(domain_ids), domain_ids.unique()
    turn = (torch.arange(n) // world) % len(domains)
    order = torch.empty(n, dtype=torch.int64)
    for position, domain in enumerate(domains):
        places, members = (turn == position).nonzero().flatten(), (domain_ids == domain).nonzero().flatten()
        rounds = -(-len(places) // len(members))
        drawn = [members[torch.randperm(len(members), generator=generator)] for _ in range(rounds)]
        order[places] = torch.cat([*drawn, members[:0]])[: len(places)]
    return order


def loader(dataset: Dataset, batches: list[list[int]], workers: int = 0) -> DataLoader:
    """A DataLoader over given index batches; a dataset with ``__getitems__`` gives whole batches at once."""
    collate = _pair if hasattr(dataset, "__getitems__") else None
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers)


def fitting(shape: Sequence[int], most: int, least: int = 1, numbers: int = 1 << 21) -> int:
    """How many samples of ``shape`` are run together: large activations cost memory, and page faults.

    >>> fitting((3, 32, 32), 512), fitting((3, 224, 224), 512)
    (512, 13)
    """
    return max(least, min(most, numbers // max(1, math.prod(shape))))


def _pair(batch: Any) -> Any:
    return batch


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: Any, task: Task, device: torch.device | str = "cpu", batch_size: int = 512
) -> dict[str, float]:
    """The task's metrics over ``dataset``, in eval mode, by name; every module's own mode is restored."""
    with evaluating(model):
        return task.measure((model(x.to(device)), y.to(device)) for x, y in in_order(dataset, batch_size))


def in_order(dataset: Any, batch_size: int) -> DataLoader:
    """Every sample once, in order."""
    n = len(dataset)
    return loader(dataset, [list(range(i, min(i + batch_size, n))) for i in range(0, n, batch_size)])


@contextmanager
def worker_errors(workers: int) -> Iterator[None]:
    """A data-loading process that dies or meets bad data, as a message instead of its traceback."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        text = str(error).strip()
        if text.startswith("Caught ") and isinstance(error, UserError | RunError):
            raise type(error)(text.splitlines()[-1].partition(": ")[2]) from None
        if text.startswith("DataLoader worker"):
            raise RunError(
                f"{text.splitlines()[0]} The system may have stopped it for lack of memory or shared memory. Set "
                f"data.workers below {workers} (0: load in the main process). The same command resumes the run."
            ) from None
        raise
