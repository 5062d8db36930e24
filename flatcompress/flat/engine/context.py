"""What the parts of a method may see of the step they belong to, and where they keep what must survive it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flatcompress.flat.engine.vectors import Vector
from flatcompress.randomness import spaced

Noise = Callable[[int, Sequence[Tensor]], list[Tensor]]
_DRAWS_APART = 1_000_003


@dataclass(frozen=True)
class Probe:
    """A point at which the closure is evaluated: w + ``shift``.

    shift: one tensor (or None) per parameter, or None for w itself.
    backward: False asks for the losses alone: a closure that takes ``keep`` then runs under ``torch.no_grad``; any
        other runs as always, its gradients are dropped and it counts as a pass.
    keep: indices of the samples to use; passed to the closure as its only argument.
    outside: further ``(tensor, delta)`` pairs that move with this probe, parameters of the optimizer or not.
    auxiliary: evaluate the second closure given to ``step`` instead of the first.
    part: evaluate this one of the step's closures alone (a `Method` that is ``joint`` sees them all).
    """

    shift: Sequence[Tensor | None] | None = None
    backward: bool = True
    keep: Tensor | None = None
    outside: Sequence[tuple[Tensor, Tensor]] = ()
    auxiliary: bool = False
    part: int | None = None


HERE = Probe()


@dataclass(frozen=True)
class Result:
    """What a program returns when it keeps something else for REMEMBER and UPDATE than the gradients at its probes."""

    combined: Vector
    kept: Sequence[Vector]


Program = Generator[Probe, Vector, "Vector | Result"]


@dataclass
class Memory:
    """State of a method between steps; all of it goes into ``state_dict``.

    slots: ``slots[key][i]`` is a tensor shaped like parameter i of the optimizer.
    values: plain numbers and small tensors.
    """

    slots: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def copy(self) -> Memory:
        """A copy of the dictionaries, not of the tensors: parts replace tensors, they never write into them."""
        return Memory({key: dict(slot) for key, slot in self.slots.items()}, dict(self.values))


@dataclass
class Step:
    """One step in progress. ``params`` are the trainable parameters, in order; every vector is aligned to them.

    selected: indices of the parameters that may be perturbed. losses: of the probes so far, a scalar or one per
    sample. selective(): do the closures take ``keep``? parts: how many closures the program sees. present: by probe,
    which parameters got a gradient. agreed(): values that decide something, such as losses, as they are over all
    processes where these climb together (``synced``), else as they are. others: trainable parameters that this
    optimizer does not own. scratch: what a part leaves for a later part of the same step.
    """

    t: int
    model: nn.Module
    base: Optimizer
    params: list[nn.Parameter]
    indices: list[int]
    names: list[str]
    group_of: list[dict[str, Any]]
    selected: list[int]
    memory: Memory
    seed: int = 0
    noise_source: Noise | None = None
    radius: Callable[[list[nn.Parameter]], Sequence[Tensor | float]] | None = None
    clip: Callable[[Vector], Vector] = list
    others: list[nn.Parameter] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    selective: Callable[[], bool] = lambda: False
    agreed: Callable[[Tensor], Tensor] = lambda values: values
    parts: int = 1
    present: list[list[bool]] = field(default_factory=list)
    scratch: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> list[nn.Parameter]:
        """The weights w: between two probes the parameters hold exactly w."""
        return self.params

    def option(self, i: int, key: str, default: Any) -> Any:
        """The value that parameter i's group gives to ``key``, else the default."""
        return self.group_of[i].get(key, default)

    def rate(self, i: int) -> float | Tensor:
        """The learning rate of parameter i at this step."""
        return self.group_of[i]["lr"]

    def scatter(self, moved: Sequence[Tensor]) -> list[Tensor | None]:
        """A list over ``selected`` as a list over ``params``, None elsewhere."""
        whole: list[Tensor | None] = [None] * len(self.params)
        for i, e in zip(self.selected, moved):
            whole[i] = e
        return whole

    def recall(self, key: str) -> Vector | None:
        """The vector stored under ``key``, zeros for parameters that have none yet; None before the first store."""
        slot = self.memory.slots.get(key)
        if not slot:
            return None
        return [slot[j] if j in slot else torch.zeros_like(p) for j, p in zip(self.indices, self.params)]

    def store(self, key: str, vector: Sequence[Tensor]) -> None:
        """Keep ``vector`` under ``key`` for later steps. The tensors are taken over, not copied."""
        slot = self.memory.slots.setdefault(key, {})
        slot.update((j, t.detach()) for j, t in zip(self.indices, vector))

    def noise(self) -> Vector:
        """Standard normal draws shaped like the parameters; the seed, the step and the draw alone decide the bits.

        Nothing but the step counter has to be saved for a resumed run to see the same noise.
        """
        draw = int(self.memory.values.get("draws", 0))
        self.memory.values["draws"] = draw + 1
        if self.noise_source is not None:
            given = self.noise_source(draw, self.params)
            return [n.to(p) for n, p in zip(given, self.params)]
        return normal(self.params, spaced(self.seed, draw, _DRAWS_APART))


def normal(like: Sequence[Tensor], seed: int) -> Vector:
    """Standard normal tensors shaped like ``like``, drawn on their devices from one seed."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, t in enumerate(like):
        kinds.setdefault((t.device, t.dtype), []).append(i)
    out = [torch.empty(0)] * len(like)
    for (device, dtype), members in kinds.items():
        generator = torch.Generator(device).manual_seed(seed)
        sizes = [like[i].numel() for i in members]
        flat = torch.randn(sum(sizes), dtype=dtype, device=device, generator=generator)
        for i, part in zip(members, flat.split(sizes)):
            out[i] = part.view(like[i].shape)
    return out
