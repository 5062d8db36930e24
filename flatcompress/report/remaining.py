"""How long a run still takes, from the events it shows and a clock: training, measuring, and the stages to come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flatcompress.report.numbers import mapping, number, text


class Remaining:
    """Seconds left of the running stage and of the run; `stage` and `run` are None while nothing is known.

    The pace is measured between ticks (optimizer steps, else epochs) of this process, so it has the validation of every
    epoch in it and leaves out what came before the first step. Measuring takes as long as it took after the stage
    before; after the first stage as long as the validation took for each of its samples. A stage that has not
    begun is expected to take as long an epoch as the running one. Every figure is therefore an estimate, which its
    user should say.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._planned: list[float] = []  # epochs of every stage; 0: it does not train
        self._parts: dict[str, float] = {}  # samples that each part of the data has
        self._measured: float | None = None  # seconds of the measuring of the stage before
        self._validation: float | None = None  # seconds of one validation
        self._epoch_pace: float | None = None  # seconds of an epoch of the stage before
        self._begin({})

    def _begin(self, event: Mapping[str, Any]) -> None:
        self._index = int(number(event.get("index")) or 0)
        self._epochs = number(event.get("epochs")) or 0.0
        self._ticks: list[tuple[float, float]] = []  # (epochs done, when): the first and the last
        self._ended = 0.0 if self._epochs else self._clock()  # when the training was over
        self._entered = self._clock()
        self._exact = False  # there are ticks of steps
        self._last_epoch: float | None = None

    def event(self, event: Mapping[str, Any]) -> None:
        """Take one event."""
        take = getattr(self, f"_on_{text(event.get('event'), 20)}", None)
        if take is not None:
            take(event)

    def _on_run(self, event: Mapping[str, Any]) -> None:
        planned = event.get("epochs")
        self._planned = [number(epochs) or 0.0 for epochs in planned] if isinstance(planned, list) else []
        self._parts = {name: number(count) or 0.0 for name, count in mapping(event.get("samples")).items()}

    def _on_stage(self, event: Mapping[str, Any]) -> None:
        self._epoch_pace = self.pace or self._epoch_pace
        self._begin(event)

    def _on_step(self, event: Mapping[str, Any]) -> None:
        step, steps = number(event.get("step")), number(event.get("steps"))
        if step is not None and steps and self._epochs:
            if not self._exact:
                self._ticks, self._exact = [], True
            self._tick(min(1.0, step / steps) * self._epochs)

    def _on_epoch(self, event: Mapping[str, Any]) -> None:
        now, epoch, trained = self._clock(), number(event.get("epoch")), number(event.get("seconds"))
        if self._last_epoch is not None and trained is not None:
            self._validation = max(0.0, now - self._last_epoch - trained)
        self._last_epoch = now
        self._epochs = self._epochs or number(event.get("epochs")) or 0.0
        if epoch is not None and not self._exact:
            if not self._ticks:
                self._ticks = [(epoch - 1, self._entered)]
            self._tick(epoch)

    def _on_doing(self, event: Mapping[str, Any]) -> None:
        if event.get("measuring") is True and not self._ended:
            self._ended = self._clock()

    def _on_spent(self, event: Mapping[str, Any]) -> None:
        parts = mapping(event.get("seconds"))
        self._measured = sum(number(v) or 0.0 for name, v in parts.items() if name != "the stage")

    def _tick(self, done: float) -> None:
        self._ticks = [*self._ticks[:1], (done, self._clock())]

    @property
    def pace(self) -> float | None:
        """Seconds an epoch."""
        if len(self._ticks) < 2:
            return None
        (first, began), (done, now) = self._ticks
        return (now - began) / (done - first) if done > first else None

    @property
    def measuring(self) -> float | None:
        """Seconds that measuring a stage takes, where that is known."""
        if self._measured is not None:
            return self._measured
        wanted, val = self._parts.get("measured"), self._parts.get("val")
        return None if self._validation is None or not wanted or not val else self._validation * wanted / val

    @property
    def training(self) -> float | None:
        """Seconds of training left in this stage."""
        if self._ended:
            return 0.0
        pace = self.pace
        if pace is None:
            return None
        done, when = self._ticks[-1]
        return max(0.0, pace * (self._epochs - done) - (self._clock() - when))

    @property
    def stage(self) -> tuple[float, bool] | None:
        """Seconds left of this stage, and whether its measuring is among them; None: not known."""
        training, measuring = self.training, self.measuring
        if training is None:
            return None
        if measuring is None:
            return (training, False) if training else None
        since = self._clock() - self._ended if self._ended else 0.0
        return training + max(0.0, measuring - since), True

    @property
    def run(self) -> float | None:
        """Seconds left of the run, measuring included; None: not known."""
        stage, measuring, pace = self.stage, self.measuring, self.pace or self._epoch_pace
        if stage is None or not stage[1] or measuring is None or pace is None or not self._planned:
            return None
        return stage[0] + sum(epochs * pace + measuring for epochs in self._planned[self._index + 1 :])
