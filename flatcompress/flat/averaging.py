"""Weight averaging: SWA, EMA and SWAD, which live beside any optimizer, and the re-estimation of BatchNorm.

Averages hold the parameters; buffers are copied from the model when an average is applied, and running statistics
must then be estimated anew for the averaged weights: `update_bn`.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.flat.engine import vectors
from flatcompress.flat.engine.hyper import share
from flatcompress.flat.engine.vectors import Vector
from flatcompress.modules import estimate_batchnorm
from flatcompress.sharded import divided, local


class Average:
    """An average of a model's parameters over its updates. ``share(n)`` is the weight of the update after n others."""

    def __init__(self, model: nn.Module, share: Callable[[int], float]) -> None:
        self.model = model
        self.count = 0
        self._share = share
        self.mean: Vector = [torch.zeros_like(p) for p in self._params()]

    def update(self) -> None:
        """Take in the present weights. The first call copies them."""
        now = [p.detach() for p in self._params()]
        if self.count == 0:
            vectors.copy_(self.mean, now)
        else:
            vectors.lerp_(self.mean, now, self._share(self.count))
        self.count += 1

    def weights(self) -> dict[str, Tensor]:
        """The averaged parameters by name, as copies."""
        return dict(zip([name for name, _ in self.model.named_parameters()], vectors.clone(self.mean)))

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Inside, the model has the averaged weights; afterwards its own again, bit for bit."""
        own = vectors.clone(list(self._params()))
        self.copy_to(self.model)
        try:
            yield self.model
        finally:
            with torch.no_grad():
                vectors.copy_([p.detach() for p in self._params()], own)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the averaged weights into ``model``. Run `update_bn` afterwards if it has BatchNorm."""
        if self.count == 0:
            raise UserError("the average is empty: call update() after optimizer steps first")
        vectors.copy_([p.detach() for p in model.parameters()], self.mean)

    def _params(self) -> Iterator[nn.Parameter]:
        return self.model.parameters()

    def state_dict(self) -> dict[str, Any]:
        """The mean by parameter name, and the number of updates."""
        return {"count": self.count, "mean": self.weights()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        names = [name for name, _ in self.model.named_parameters()]
        if set(names) != set(state["mean"]):
            raise UserError("this average belongs to a model with other parameters")
        self.count = int(state["count"])
        vectors.copy_(self.mean, [divided(state["mean"][name].to(local(m)), m) for name, m in zip(names, self.mean)])


def SWA(model: nn.Module) -> Average:
    """Stochastic weight averaging: the running mean of all updates (arXiv 1803.05407)."""
    return Average(model, lambda count: 1.0 / (count + 1))


def EMA(model: nn.Module, decay: float = 0.999, warm_up: bool = False) -> Average:
    """Exponential moving average, a := decay a + (1 - decay) w from the first update on, without bias correction.

    warm_up: the decay rises with the number n of earlier updates, min(decay, (1 + n) / (10 + n)), so that an average
    over few steps is not nearly its start.
    """
    share("decay", decay)
    if warm_up:
        return Average(model, lambda count: 1.0 - min(decay, (1 + count) / (10 + count)))
    return Average(model, lambda count: 1.0 - decay)


@dataclass
class _Segment:
    """The mean of the iterates between two evaluations."""

    mean: Vector
    start_step: int
    end_step: int
    count: int = 0
    loss: float = 0.0

    @classmethod
    def empty(cls, like: Iterable[Tensor], step: int) -> _Segment:
        return cls([torch.zeros_like(p) for p in like], step, step)

    def add(self, weights: Vector, step: int) -> None:
        if self.count == 0:
            vectors.copy_(self.mean, weights)
        else:
            vectors.lerp_(self.mean, weights, 1.0 / (self.count + 1))
        self.count += 1
        self.end_step = step


class SWAD:
    """SWAD: the mean of every iterate between convergence and overfitting (arXiv 2102.08604, algorithm 1).

    Call ``update()`` after every optimizer step and ``evaluate(loss)`` with each validation loss. The iterates between
    two evaluations form a segment; segments are averaged with equal weight. When the oldest of the last ``n_converge``
    losses is their minimum the valley begins, and its threshold is their mean times ``1 + tolerance_ratio``. A segment
    then joins ``n_tolerance - 1`` evaluations late, while the lowest of the last ``n_tolerance`` losses is within the
    threshold; after that the valley is ``dead``. ``finish()`` flushes the queue by the same test; ``weights()`` is the
    result, the last segment where the losses never converged. Queue order is that of the authors' code.
    """

    def __init__(
        self, model: nn.Module, n_converge: int = 3, n_tolerance: int = 6, tolerance_ratio: float = 0.3
    ) -> None:
        if n_converge < 1 or n_tolerance < 1 or tolerance_ratio < 0:
            raise UserError("SWAD needs n_converge >= 1, n_tolerance >= 1 and tolerance_ratio >= 0")
        self.model = model
        self.n_converge, self.n_tolerance, self.tolerance_ratio = n_converge, n_tolerance, tolerance_ratio
        self.threshold: float | None = None
        self.dead = False
        self.step = 0
        self._joined = 0
        self._open = _Segment.empty(model.parameters(), 0)
        self._converging: deque[_Segment] = deque(maxlen=n_converge)
        self._smoothing: deque[_Segment] = deque(maxlen=n_tolerance)
        self._converged_at = 0
        self._average: _Segment | None = None

    @property
    def converged(self) -> bool:
        """Has the valley begun?"""
        return self.threshold is not None

    @property
    def n_averaged(self) -> int:
        """The number of segments in the result."""
        return max(1, self._joined) if self._result() is not None else 0

    @property
    def start_step(self) -> int | None:
        """The first step of the average, counting updates from 0."""
        return None if self._result() is None else self._result().start_step  # type: ignore[union-attr]

    @property
    def end_step(self) -> int | None:
        """The last step of the average."""
        return None if self._result() is None else self._result().end_step  # type: ignore[union-attr]

    def update(self) -> None:
        """Take in the present weights as the next iterate."""
        if not self.dead:
            self._open.add([p.detach() for p in self.model.parameters()], self.step)
        self.step += 1

    def evaluate(self, loss: float) -> None:
        """Close the segment of the iterates since the last evaluation, with its validation loss."""
        if self.dead:
            return
        if self._open.count == 0:
            raise UserError("evaluate() came before any update(): call update() after every optimizer step")
        closed, self._open = self._open, _Segment.empty(self.model.parameters(), self.step)
        closed.loss = float(loss)
        self._converging.append(closed)
        self._smoothing.append(closed)
        if not self.converged:
            self._look_for_convergence()
        elif self._smoothing[0].end_step >= self._converged_at:
            self._take_oldest()

    def finish(self) -> None:
        """Training is over: the segments still waiting join while the lowest remaining loss is within the threshold."""
        if self.converged and not self.dead and self._smoothing:
            self._smoothing.popleft()
            while self._smoothing and self._within():
                self._join(self._smoothing.popleft())
        self.dead = True

    def weights(self) -> dict[str, Tensor]:
        """The averaged parameters by name; the last segment's when the losses never converged."""
        result = self._result()
        if result is None:
            raise UserError("SWAD has seen no evaluation yet: call evaluate(loss) after validation")
        return dict(zip([name for name, _ in self.model.named_parameters()], vectors.clone(result.mean)))

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the result into ``model``. Run `update_bn` afterwards if it has BatchNorm."""
        own = dict(model.named_parameters())
        for name, value in self.weights().items():
            own[name].copy_(value)

    def _result(self) -> _Segment | None:
        if self.converged:
            return self._average
        return self._converging[-1] if self._converging else None

    def _within(self) -> bool:
        assert self.threshold is not None
        return min(segment.loss for segment in self._smoothing) <= self.threshold

    def _look_for_convergence(self) -> None:
        losses = [segment.loss for segment in self._converging]
        if len(losses) < self.n_converge or losses[0] > min(losses):
            return
        self.threshold = sum(losses) / len(losses) * (1 + self.tolerance_ratio)
        first = self._converging[0]
        self._converged_at = first.end_step
        # A start value only: the first segment that joins replaces it.
        self._average = replace(first, mean=vectors.clone(first.mean))
        for segment in self._already_due():
            self._join(segment)

    def _already_due(self) -> list[_Segment]:
        """Segments that the two queues' lengths put on one side: old ones still within the threshold, or early ones."""
        if self.n_tolerance < self.n_converge:
            return list(self._converging)[1 : 1 + self.n_converge - self.n_tolerance]
        if self.n_tolerance == self.n_converge:
            return []
        old = list(self._smoothing)[: self.n_tolerance - self.n_converge + 1]
        assert self.threshold is not None
        above = [i for i, segment in enumerate(old) if segment.loss > self.threshold]
        return old[(above[-1] + 1 if above else 0) + 1 :]

    def _take_oldest(self) -> None:
        if self._within():
            self._join(self._smoothing[0])
        else:
            self.dead = True

    def _join(self, segment: _Segment) -> None:
        assert self._average is not None
        if self._joined == 0:
            vectors.copy_(self._average.mean, segment.mean)
            self._average.start_step = segment.start_step
        else:
            vectors.lerp_(self._average.mean, segment.mean, 1.0 / (self._joined + 1))
        self._average.end_step = segment.end_step
        self._joined += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, as plain data and tensors."""
        own = {key: getattr(self, key) for key in ("threshold", "dead", "step", "_joined", "_converged_at")}
        queues = {key: [asdict(s) for s in getattr(self, key)] for key in ("_converging", "_smoothing")}
        average = None if self._average is None else asdict(self._average)
        return {**own, **queues, "_open": asdict(self._open), "_average": average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        for key in ("threshold", "dead", "step", "_joined", "_converged_at"):
            setattr(self, key, state[key])
        self._open = _Segment(**copy.deepcopy(state["_open"]))
        self._average = None if state["_average"] is None else _Segment(**copy.deepcopy(state["_average"]))
        segments = {s["start_step"]: _Segment(**copy.deepcopy(s)) for s in state["_converging"] + state["_smoothing"]}
        self._converging = deque((segments[s["start_step"]] for s in state["_converging"]), maxlen=self.n_converge)
        self._smoothing = deque((segments[s["start_step"]] for s in state["_smoothing"]), maxlen=self.n_tolerance)


update_bn = estimate_batchnorm
