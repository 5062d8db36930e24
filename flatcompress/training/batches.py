"""Batches in an order that (seed, epoch) alone decide, and what is said when a loading process fails."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
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


def loader(dataset: Dataset, batches: list[list[int]], workers: int = 0, **options: Any) -> DataLoader:
    """A DataLoader over given index batches; a dataset with ``__getitems__`` gives whole batches at once."""
    collate = _pair if hasattr(dataset, "__getitems__") else None
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers, **options)


class Feed:
    """Batches of ``dataset``, one epoch after the other, loaded ahead by ``workers`` processes that stay in between.

    They stay where the data set says with ``persistent`` that all that changes from epoch to epoch is in shared memory;
    else they start anew. pin: batches lie where a GPU copies them from while it computes.
    """

    def __init__(self, dataset: Any, workers: int = 0, pin: bool = False) -> None:
        self.dataset, self.workers, self.pin = dataset, workers, pin
        self.stays = bool(workers) and getattr(dataset, "persistent", False)
        self._order: list[list[int]] = []
        self._kept: DataLoader | None = None

    def epoch(self, batches: list[list[int]], resumed: bool = False) -> Iterator[Any]:
        """The ``batches`` in their order. ``resumed``: the epoch began before, so nothing is drawn from torch here."""
        state = torch.get_rng_state()
        found = self._started(batches)
        if resumed:
            torch.set_rng_state(state)
        return found

    def _started(self, batches: list[list[int]]) -> Iterator[Any]:
        if not self.stays:
            return iter(loader(self.dataset, batches, self.workers, pin_memory=self.pin))
        self._order[:] = batches
        if self._kept is None:
            options = {"pin_memory": self.pin, "persistent_workers": True}
            self._kept = loader(self.dataset, self._order, self.workers, **options)
        else:
            torch.empty((), dtype=torch.int64).random_()  # as a loader that starts anew does: the same bits after it
        return iter(self._kept)

    def close(self) -> None:
        """End the processes."""
        self._kept = None


def fitting(shape: Sequence[int], most: int, least: int = 1, numbers: int = 1 << 20) -> int:
    """How many samples of ``shape`` are run together: large activations cost memory, and page faults.

    >>> fitting((3, 32, 32), 512), fitting((3, 224, 224), 512)
    (341, 6)
    """
    return max(least, min(most, numbers // max(1, math.prod(shape))))


def _pair(batch: Any) -> Any:
    return batch


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Any,
    task: Task,
    device: torch.device | str = "cpu",
    batch_size: int = 512,
    workers: int = 0,
    shared: bool = False,
) -> dict[str, float]:
    """The task's metrics over ``dataset``, in eval mode, by name; every module's own mode is restored.

    ``workers`` processes load ahead where the images lie in files; what lies in memory is there sooner without them.
    ``shared``: the processes of this training, which all call this, run a share of the samples each and get the metrics
    of all of them.
    """
    with evaluating(model), worker_errors(workers):
        if shared:
            return task.measure(_in_shares(model, dataset, device, batch_size, workers))
        batches = in_order(dataset, batch_size, workers, pin_memory=torch.device(device).type == "cuda")
        return task.measure((model(x.to(device)), y.to(device)) for x, y in batches)


def _in_shares(
    model: nn.Module, dataset: Any, device: torch.device | str, batch_size: int, workers: int
) -> Iterator[tuple[Any, Tensor]]:
    """Outputs and targets of all samples in order, each batch run by one of the processes.

    All run as many: a forward of a network that they share is a meeting of all of them.
    """
    rank, world, n = torch.distributed.get_rank(), torch.distributed.get_world_size(), len(dataset)
    size = max(1, min(batch_size, -(-n // world)))
    batches = _cut(n, size)
    rounds = -(-len(batches) // world)
    own = [batches[min(i * world + rank, len(batches) - 1)] for i in range(rounds)]
    for i, (x, y) in enumerate(_ahead(dataset, own, workers)):
        found = gather_object([send_to_device((model(x.to(device)), y), "cpu")])
        yield from (send_to_device(pair, device) for pair in found[: len(batches) - i * world])


def in_order(dataset: Any, batch_size: int, workers: int = 0, **options: Any) -> DataLoader:
    """Every sample once, in order; ``workers`` load a data set that is ``on_disk``."""
    return _ahead(dataset, _cut(len(dataset), batch_size), workers, **options)


def _cut(n: int, size: int) -> list[list[int]]:
    """0 .. n - 1 in order, ``size`` at a time."""
    return [list(range(i, min(i + size, n))) for i in range(0, n, size)]


def _ahead(dataset: Any, batches: list[list[int]], workers: int, **options: Any) -> DataLoader:
    """A `loader` whose ``workers`` are left out for a data set in memory."""
    return loader(dataset, batches, workers if getattr(dataset, "on_disk", False) else 0, **options)


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
