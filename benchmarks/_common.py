"""What every benchmark shares: arguments, interleaved timing, peak memory, a table, the results file, the verdict.

A benchmark is ``main(argv) -> int``: it measures, builds rows (dictionaries) and failures (sentences), and returns
``finish(NAME, rows, failures, options)``. Its docstring states the targets; ``--check`` exits 1 where one is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flatcompress.environment import processor

RESULTS = Path(__file__).parent / "results"


def arguments(
    doc: str | None, argv: Sequence[str] | None = None, own: Callable[[argparse.ArgumentParser], Any] | None = None
) -> argparse.Namespace:
    """``--quick`` (fewer rounds, for a smoke run), ``--check`` (exit 1 where a target is missed), ``--threads``.

    ``own`` adds a benchmark's own options, such as `resumable`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds; results are written beside the full ones")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed, naming it")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    if own is not None:
        own(parser)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    return options


def resumable(parser: argparse.ArgumentParser) -> None:
    """The options of a benchmark that keeps what it has measured, see `kept`."""
    parser.add_argument("--restart", action="store_true", help="measure anew what an earlier run has measured")
    parser.add_argument("--kept", action="store_true", help="measure nothing: tables and page from what is there")


def interleaved(tasks: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every task in every round. Tasks alternate, so a machine that slows down slows all of them.

    The order is reversed in every other round: what runs second finds warmer caches. On one CPU thread it is CPU time,
    which other users of the machine do not lengthen; otherwise wall time.
    """
    clock = time.process_time if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter
    for _ in range(warmup):
        for task in tasks.values():
            task()
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for r in range(rounds):
        order = list(tasks.items())
        for name, task in order if r % 2 == 0 else reversed(order):
            synchronize()
            start = clock()
            task()
            synchronize()
            times[name].append(clock() - start)
    return times


def synchronize() -> None:
    """Wait for the device, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """The median over rounds of time over reference time of the same round: unmoved by drift and by single spikes."""
    return statistics.median(a / b for a, b in zip(times, reference))


class PeakMemory(TorchDispatchMode):
    """Bytes of live tensors made inside the context: ``peak`` and ``now``. Counts storages once, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self._count(t)
        return out

    def _count(self, t: torch.Tensor) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def calibration_reader(name: str, batches: Sequence[torch.Tensor]) -> Any:
    """``batches`` of the one input ``name`` as onnxruntime's quantization tool reads them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter([{name: batch.numpy()} for batch in batches])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    return Reader()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as an aligned text table; a missing figure is a dash."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *[[_text(row.get(c)) for c in columns] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table; a missing figure is a dash."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [["-" if (v := row.get(c)) is None else f"{v:.4g}" if isinstance(v, float) else str(v) for c in columns]
              for row in rows]  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return "nan" if math.isnan(value) else f"{value:.4g}"
    return str(value)


class Kept:
    """Measured values by name in a file, so that a run that was stopped goes on where it was."""

    def __init__(self, path: Path, measuring: bool = True) -> None:
        self.path, self.measuring = path, measuring
        lines = path.read_text().splitlines() if path.exists() else []
        self.values: dict[str, Any] = dict(json.loads(line) for line in lines)

    def cleared(self) -> Kept:
        """Nothing measured yet."""
        self.path.unlink(missing_ok=True)
        return Kept(self.path, self.measuring)

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The value called ``name``, measured if it is not there yet; None where nothing is to be measured."""
        if name not in self.values:
            if not self.measuring:
                return None
            self.values[name] = make()
            with self.path.open("a") as file:
                file.write(json.dumps([name, self.values[name]]) + "\n")
            print(name, self.values[name], file=sys.stderr, flush=True)
        return self.values[name]


def kept(name: str, options: argparse.Namespace) -> Kept:
    """What earlier runs of the benchmark ``name`` have measured; nothing yet where it is to be measured anew."""
    found = Kept(RESULTS / f"{name}{'-quick' if options.quick else ''}.partial", not options.kept)
    return found.cleared() if options.restart else found


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def finish(
    name: str, rows: Sequence[Mapping[str, Any]], failures: Sequence[str], options: argparse.Namespace, **more: Any
) -> int:
    """Print the table, write ``results/NAME.json`` (``NAME-quick.json``), name missed targets; the exit code."""
    print(table(rows))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}{'-quick' if options.quick else ''}.json"
    content = {"machine": machine(), "rows": list(rows), "missed": list(failures), **more}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nwritten to {path.relative_to(RESULTS.parent.parent)}")
    for failure in failures:
        print(f"MISSED: {failure}")
    return 1 if options.check and failures else 0
