"""How long a file takes: interleaved medians, because two runs one after the other measure the machine's mood.

Every round times each candidate once, in an order that moves on by one each round, so that frequency changes and
neighbours' load fall on all of them alike. One timing is the mean of as many calls as make two milliseconds. The
figure is the median of the rounds; the spread given is the distance between the 10th and the 90th percentile.
Between its calls a session's threads sleep: those of one that spins take the cores from the one being timed (up to
four times its time, seven sessions of two threads on two cores).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from flatcompress.environment import machine
from flatcompress.errors import UserError
from flatcompress.onnx_export.proof import inspect_file
from flatcompress.onnx_export.runtime.sessions import WHOLE, drawn, session

METHOD = (
    "interleaved rounds, each the mean of calls lasting 2 ms; median of rounds; onnxruntime CPU, default "
    "optimizations, threads asleep between calls, one sample unless batch says otherwise, input and output in "
    "ordinary memory"
)
TIMING_SECONDS = 2e-3
MOST_CALLS = 200
FEWEST_ROUNDS = 10
MOST_VALUES = 1 << 28  # of an input; a file that asks for more is not a model to time


def measure(
    models: Mapping[str, str | Path | bytes],
    *,
    threads: int = 1,
    runs: int = 30,
    batch: int = 1,
    size: Sequence[int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    seconds: float | None = None,
) -> dict[str, dict[str, float]]:
    """{name: {"median_ms", "p10_ms", "p90_ms", "load_ms"}} for every model, measured against one another.

    runs: rounds. size: [C, H, W] where the models leave them open. clock: wall time; `time.process_time` does for
    one thread on a machine with other users. seconds: what loading and the rounds may take each; there are fewer then,
    `FEWEST_ROUNDS` and one loading at least, and a row says how many with "runs". UserError for files that do not load.
    """
    if runs < 1 or threads < 1 or batch < 1:
        raise UserError(f"runs, threads and batch must be at least 1, found {runs}, {threads}, {batch}.")
    each = None if seconds is None else seconds / len(models)
    loads, timers, names = dict[str, float](), dict[str, _Timer](), list(models)
    for name, model in models.items():
        loads[name], handle = _load(model, threads, 3, clock, each)
        timers[name] = _Timer(handle, batch, size, clock)
    rounds = runs
    if seconds is not None:
        rounds = min(runs, max(FEWEST_ROUNDS, int(seconds / sum(timer.each for timer in timers.values()))))
    for round_number in range(rounds):
        turn = round_number % len(names)
        for name in names[turn:] + names[:turn]:
            timers[name].time()
    told = {} if seconds is None else {"runs": rounds}
    return {name: {**timers[name].summary(), "load_ms": round(loads[name], 3), **told} for name in names}


def load_ms(
    model: str | Path | bytes, threads: int = 1, repeats: int = 3, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Milliseconds from file to ready session, median."""
    return _load(model, threads, repeats, clock)[0]


def _load(
    model: str | Path | bytes, threads: int, repeats: int, clock: Callable[[], float], seconds: float | None = None
) -> tuple[float, ort.InferenceSession]:
    """`load_ms`, of fewer loadings where they take more than ``seconds``, and the last session."""
    times: list[float] = []
    while len(times) < repeats and (not times or seconds is None or sum(times) < seconds):
        start = clock()
        handle = session(model, threads=threads, idle=True)
        times.append(clock() - start)
    return 1e3 * statistics.median(times), handle


def bench(
    path: str | Path | Sequence[str | Path], threads: Sequence[int] = (1,), runs: int = 30, batch: int = 1
) -> dict[str, Any]:
    """Size and latency of one file or several, here. Several are timed against one another.

    ``runs``: timed runs, of ``batch`` samples each, for each number of ``threads``.

    Returns {"method", "machine", "onnxruntime", "files": [{"path", "bytes", "latency": {threads: {...}}}]}.
    """
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(p) for p in path]
    for file in paths:
        if not file.is_file():
            raise UserError(f"{file}: no such file.")
        inspect_file.load(file)  # refuses what a file from a stranger must not make onnxruntime do
    try:
        results = {n: measure({str(p): p for p in paths}, threads=n, runs=runs, batch=batch) for n in threads}
    except UserError:
        raise
    except Exception as error:  # onnxruntime's exceptions share no base class
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise UserError(f"{', '.join(map(str, paths))}: onnxruntime cannot run it ({reason}).") from None
    return {
        "method": METHOD,
        "machine": machine(),
        "onnxruntime": ort.__version__,
        "batch": batch,
        "runs": runs,
        "files": [
            {
                "path": str(p),
                "bytes": p.stat().st_size,
                "latency": {str(n): results[n][str(p)] for n in threads},
            }
            for p in paths
        ],
    }


class _Timer:
    """One session, its input, and the timings so far."""

    def __init__(
        self, handle: ort.InferenceSession, batch: int, size: Sequence[int] | None, clock: Callable[[], float]
    ) -> None:
        self.handle, self.clock = handle, clock
        self.feed = _feed(handle, batch, size)
        self.seconds: list[float] = []
        once = max(min(self._call(3), self._call(3)), 1e-6)
        self.calls = max(1, min(MOST_CALLS, round(TIMING_SECONDS / once)))
        self.each = once * self.calls

    def _call(self, times: int) -> float:
        start = self.clock()
        for _ in range(times):
            self.handle.run(None, self.feed)
        return (self.clock() - start) / times

    def time(self) -> None:
        self.seconds.append(self._call(self.calls))

    def summary(self) -> dict[str, float]:
        low, median, high = np.percentile(np.array(self.seconds) * 1e3, [10, 50, 90])
        return {"median_ms": round(float(median), 5), "p10_ms": round(float(low), 5), "p90_ms": round(float(high), 5)}


def _feed(handle: ort.InferenceSession, batch: int, size: Sequence[int] | None) -> dict[str, np.ndarray]:
    """A value for every input: normal reals, ones for whole numbers (token ids, masks)."""
    inputs = handle.get_inputs()
    return {entry.name: _value(entry, batch, size if index == 0 else None) for index, entry in enumerate(inputs)}


def _value(entry: Any, batch: int, size: Sequence[int] | None) -> np.ndarray:
    given = list(entry.shape[1:] if size is None else size)
    first = (
        [batch if not isinstance(d, int) else d for d in entry.shape[:1]] if entry.type != "tensor(float)" else [batch]
    )
    shape = [*first, *given] if entry.shape else []
    if not all(isinstance(d, int) and d > 0 for d in shape):
        raise UserError(f"input shape {entry.shape}: sizes other than the batch must be fixed, or given.")
    if np.prod(shape, dtype=np.float64) > MOST_VALUES:
        raise UserError(f"input shape {shape}: too large to time.")
    random = np.random.default_rng(0)
    if entry.type == "tensor(float)":
        return random.standard_normal(shape).astype(np.float32)
    if entry.type not in WHOLE:
        raise UserError(f"input {entry.name!r} is a {entry.type}; reals and whole numbers are timed.")
    return drawn(random, shape, entry.type)
