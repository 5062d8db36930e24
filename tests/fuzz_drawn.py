"""The mutators' decisions as draws of Hypothesis, so that an input that fails shrinks to the simplest that does."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz_mutate import HOSTILE

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


class Drawn(random.Random):
    """A source of randomness for the mutators in which Hypothesis decides.

    Where a mutator asks for one of the hostile values it may also get any nested plain value. The simplest draws are
    few changes, at the first place, inside a sound structure.
    """

    def __init__(self, data: st.DataObject) -> None:
        super().__init__(0)
        self._draw = data.draw

    def random(self) -> float:
        return 0.99 - self._draw(st.integers(0, 99)) / 100

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        low, high = (0, start) if stop is None else (start, stop)
        return self._draw(st.integers(low, high - 1))

    def randint(self, a: int, b: int) -> int:
        return self._draw(st.integers(a, b))

    def randbytes(self, n: int) -> bytes:
        return self._draw(st.binary(min_size=n, max_size=n))

    def expovariate(self, lambd: float = 1.0) -> float:
        return float(self._draw(st.integers(0, 40)))

    def choice(self, seq: Sequence[Any]) -> Any:
        if seq is HOSTILE:
            return self._draw(st.sampled_from(HOSTILE) | VALUES)
        return seq[self._draw(st.integers(0, len(seq) - 1))]

    def sample(self, population: Sequence[Any], k: int, *, counts: Any = None) -> list[Any]:
        places = st.lists(st.integers(0, len(population) - 1), min_size=k, max_size=k, unique=True)
        return [population[i] for i in self._draw(places)]


def explore(check: Callable[[Drawn], str], count: int, number: int) -> None:
    """Call ``check`` with about ``count`` different sources; after an outcome that is no answer, with simpler ones.

    AssertionError with the outcome of the simplest input that fails.
    """

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        verbosity=Verbosity.quiet,
    )
    @given(st.data())
    def examples(data: st.DataObject) -> None:
        outcome = check(Drawn(data))
        assert outcome in ("answered", "refused"), outcome

    examples()
