"""The passes of one step: move to a point, evaluate the closure, come back to exactly w."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.flat.engine import vectors
from flatcompress.flat.engine.closures import Closure, evaluate, takes_keep
from flatcompress.flat.engine.context import Probe, Program, Result, Step
from flatcompress.flat.engine.distributed import Replicas, unscale_
from flatcompress.flat.engine.settings import Settings
from flatcompress.flat.engine.snapshot import Buffers
from flatcompress.flat.engine.vectors import Vector
from flatcompress.randomness import RandomState, replayed


@dataclass
class Run:
    """What a program made of its passes.

    probes: the gradients at its points, for COMPOSE. kept: what REMEMBER and UPDATE get. absent: parameters that no
    pass gave a gradient. pair: the losses of the same samples at the weights and at the first point away from them.
    """

    combined: Vector
    probes: list[Vector]
    kept: list[Vector]
    losses: list[Tensor]
    absent: list[bool]
    backwards: int
    pair: tuple[Tensor, Tensor] | None
    finite: bool

    def plus(self, other: Run) -> Run:
        """The sum of two runs over different micro-batches."""
        return Run(
            vectors.add(self.combined, other.combined),
            [vectors.add(a, b) for a, b in zip(self.probes, other.probes)],
            [vectors.add(a, b) for a, b in zip(self.kept, other.kept)],
            [a + b for a, b in zip(self.losses, other.losses)],
            [a and b for a, b in zip(self.absent, other.absent)],
            self.backwards,
            None
            if self.pair is None or other.pair is None
            else (self.pair[0] + other.pair[0], self.pair[1] + other.pair[1]),
            self.finite and other.finite,
        )

    def over(self, count: int) -> Run:
        """Divide sums by the number of micro-batches, in place."""
        share = 1.0 / count
        for vector in (self.combined, *self.probes, *self.kept):
            torch._foreach_mul_(vector, share)
        self.losses = [loss * share for loss in self.losses]
        self.pair = None if self.pair is None else (self.pair[0] * share, self.pair[1] * share)
        return self


class Points:
    """Moves tensors to w + shift and back. The saved copies keep their storage from step to step."""

    def __init__(self) -> None:
        self._saved: dict[int, Tensor] = {}
        self._fresh: set[int] = set()
        self.sizes: list[Tensor] = []

    def begin(self) -> None:
        """A new step: the copies are of older weights."""
        self._fresh = set()
        self.sizes = []

    @contextmanager
    def at(self, params: Sequence[Tensor], probe: Probe) -> Iterator[None]:
        """Inside, the weights are at w + shift; afterwards they are w, bit for bit, whatever happened inside."""
        pairs = [(p, e) for p, e in zip(params, probe.shift or ()) if e is not None]
        pairs.extend(probe.outside)
        del probe
        if not pairs:
            yield
            return
        targets, deltas = [t for t, _ in pairs], [e for _, e in pairs]
        with torch.no_grad():
            saved = self._save(targets)
        self.sizes = vectors.norms(deltas)
        try:
            vectors.add_(targets, deltas)
            del pairs, deltas  # a copy of the weights that need not be held during the pass
            torch.clear_autocast_cache()  # autocast around step() would go on using the cast copies of w
            yield
        finally:
            with torch.no_grad():
                vectors.copy_(targets, saved)
            torch.clear_autocast_cache()

    def _save(self, targets: Sequence[Tensor]) -> Vector:
        """Copies taken once a step. Allocating them anew each time costs page faults, so their storage is kept."""
        stale = [t for t in targets if id(t) not in self._fresh]
        for t in stale:
            kept = self._saved.get(id(t))
            if kept is None or kept.shape != t.shape or kept.dtype != t.dtype or kept.device != t.device:
                self._saved[id(t)] = torch.empty_like(t, requires_grad=False)
        vectors.copy_([self._saved[id(t)] for t in stale], stale)
        self._fresh.update(id(t) for t in stale)
        return [self._saved[id(t)] for t in targets]


@dataclass
class Passes:
    """Evaluates the probes of one program over its closures. ``keep``: the method wants the gradients at its probes."""

    step: Step
    points: Points
    buffers: Buffers
    replicas: Replicas
    settings: Settings
    keep: bool
    probes: list[Vector] = field(default_factory=list)
    present: list[list[bool]] = field(default_factory=list)
    fillers: list[Tensor] = field(default_factory=list)
    asked: list[Probe] = field(default_factory=list)
    dropped: int = 0
    finite: bool = True
    _noise: dict[int | None, RandomState] = field(default_factory=dict)

    def run(self, program: Program, closures: Sequence[Closure], second: Sequence[Closure]) -> Run:
        """Send every gradient to the program until it returns the combined one."""
        self.step.losses, self.step.present, self.step.parts = [], self.present, len(closures)
        self.step.selective = lambda: all(takes_keep(closure) for closure in closures)
        self.step.agreed = partial(_agreed, self.replicas, self.settings.perturb)
        # The last gradient and the next probe are handed on without a name here: where the program drops them too,
        # their memory is free during the next pass.
        hand: list[Any] = [None]
        try:
            while self.finite or self.replicas.size > 1:  # other processes may be waiting for our share
                hand.append(self.gradient(program.send(hand.pop()), closures, second))
        except StopIteration as stop:
            return self._result(stop.value)
        finally:
            program.close()
        return self._result([])

    def _result(self, result: Vector | Result) -> Run:
        combined = result.combined if isinstance(result, Result) else result
        zeros = {id(t) for t in self.fillers}
        never = [not any(there) for there in zip(*self.present)]
        absent = [lost or id(g) in zeros for lost, g in zip(never, combined)]
        kept = list(result.kept) if isinstance(result, Result) else self.probes if len(self.probes) > 1 else []
        return Run(
            combined,
            self.probes if self.settings.compose is not None else [],
            kept if self.keep else [],
            self._losses(),
            absent,
            self._count(),
            self._pair(),
            self.finite,
        )

    def _losses(self) -> list[Tensor]:
        """The mean loss of every probe; of the first, over all parts when it asked for one of them."""
        losses = [loss.mean() for loss in self.step.losses]
        if self.asked and self.asked[0].part is not None:
            at_rest = [loss for probe, loss in zip(self.asked, losses) if not _moved(probe)]
            losses[0] = torch.stack(at_rest).mean()
        return losses

    def _count(self) -> int:
        """Passes over the batch: probes that ran backward, as many parts as there are closures making one."""
        parts = sum(probe.part is not None for probe in self.asked)
        return len(self.present) + self.dropped - parts + round(parts / max(self.step.parts, 1))

    def _pair(self) -> tuple[Tensor, Tensor] | None:
        """The losses of the same samples at the weights and at the first point away from them."""
        for probe, loss in zip(self.asked, self.step.losses):
            for other, risen in zip(self.asked, self.step.losses):
                if not _moved(probe) and _moved(other) and _same_samples(probe, other):
                    return loss.mean(), risen.mean()
        return None

    def gradient(self, probe: Probe, closures: Sequence[Closure], second: Sequence[Closure]) -> Vector:
        """The mean gradient over the closures at w + shift; an empty list when the probe asks for losses alone."""
        first, backward, part = self._first(probe), probe.backward, probe.part
        used = second if probe.auxiliary else closures
        used = used if probe.part is None else used[probe.part : probe.part + 1]
        self._note(probe, used)
        if not used:
            raise UserError("this method combines two losses: call step(closure, auxiliary_closure)")
        if probe.keep is not None and len(used) > 1:
            raise UserError("choosing samples works on one closure at a time; use chunks='independent'")
        unmoved = replace(probe, shift=None, outside=())
        with ExitStack() as stack:
            stack.enter_context(self.replicas.alone())
            stack.enter_context(self.points.at(self.step.params, probe))
            del probe
            if not first:
                stack.enter_context(self.buffers.frozen() if self.settings.freeze_buffers else nullcontext())
                stack.enter_context(_untouched(self.step.others))
                stack.enter_context(replayed(self._noise.get(part), self._devices()))
            total, present, losses = self._sum(used, unmoved)
        self.step.losses.append(losses[0] if len(losses) == 1 else torch.stack([loss.mean() for loss in losses]))
        return self._collect(total, present) if backward else []

    def _first(self, probe: Probe) -> bool:
        """Is this the pass in which buffers move, the step's first (of this part)? Its noise is drawn again later."""
        if any(asked.part == probe.part for asked in self.asked) or (probe.part is None and self.asked):
            return False
        if self.settings.replay_noise:
            self._noise[probe.part] = RandomState.now(self._devices())
        return True

    def _note(self, probe: Probe, used: Sequence[Closure]) -> None:
        """What was asked for, without its tensors but for the samples."""
        self.asked.append(replace(probe, shift=() if _moved(probe) else None, outside=()))
        if not probe.backward and not all(takes_keep(closure) for closure in used):
            self.dropped += 1  # its loss alone was wanted, but the closure runs backward

    def _sum(self, closures: Sequence[Closure], probe: Probe) -> tuple[Vector, list[bool], list[Tensor]]:
        """The mean gradient over closures, where there was one at all, and the losses; one gradient in memory."""
        total: Vector = []
        present = [False] * len(self.step.params)
        losses = []
        for closure in closures:
            reading = evaluate(closure, self.step.params, probe)
            losses.append(reading.loss)
            if not probe.backward:
                continue
            present = [there or g is not None for there, g in zip(present, reading.gradients)]
            found = [torch.zeros_like(p) if g is None else g for p, g in zip(self.step.params, reading.gradients)]
            if total:
                vectors.add_(total, found)
            else:
                total = found
        if total and len(closures) > 1:
            torch._foreach_mul_(total, 1.0 / len(closures))
        return total, present, losses

    def _collect(self, total: Vector, present: list[bool]) -> Vector:
        self.finite = unscale_(total, self.settings.scaler) and self.finite
        if self.settings.perturb == "synced":
            gone, self.finite = self.replicas.mean_(total, [not there for there in present], self.finite)
            present = [not g for g in gone]
        self.present.append(present)
        self.fillers.extend(g for g, there in zip(total, present) if not there)
        if self.keep or self.settings.compose is not None:
            self.probes.append(total)
        return total

    def _devices(self) -> set[torch.device]:
        return {p.device for p in self.step.params}


def _agreed(replicas: Replicas, perturb: str, values: Tensor) -> Tensor:
    """The mean over processes where they climb together, so that all decide alike.

    Not a method: a step that held its passes, which hold the step, would keep its gradients until garbage is collected.
    """
    if perturb == "synced":
        values = values.clone()
        replicas.mean_([values], [False])
    return values


def _moved(probe: Probe) -> bool:
    return probe.shift is not None or bool(probe.outside)


def _same_samples(a: Probe, b: Probe) -> bool:
    return a.keep is b.keep and a.part == b.part and a.auxiliary == b.auxiliary


@contextmanager
def _untouched(others: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters of the model that another optimizer owns keep the gradient of the first pass alone."""
    kept = [p.grad for p in others]
    for p in others:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in zip(others, kept):
            p.grad = grad
