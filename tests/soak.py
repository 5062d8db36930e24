"""A long run of a small model in one process: it neither grows nor collects open files.

`python -m tests.soak` trains (SAM with an average), prunes, quantizes (GAQAT) and exports, again and again, with a
checkpoint every 250 steps: 18,000 optimizer steps, as many as a run of two hours takes at 0.4 s a step. It prints the
memory of the process and its open files through every stage, and exits 1 when a stage ends with over 2 % more memory
than it had after its first tenth, when the last round has over 2 % more than the second (the first one imports and
compiles), or when the number of open files changes inside a stage.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

MOST = 0.02  # growth that counts as flat
LOOKS = 20  # in a stage
STEPS = 5  # of an epoch
SHARES = (0.6, 0.1, 0.3)  # of the epochs: training, pruning, quantization


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    """How many files this process has open."""
    return len(os.listdir("/proc/self/fd"))


def growth(values: Sequence[int]) -> float:
    """Median of the last tenth over the median of the second tenth (the first warms up), minus 1."""
    tenth = max(1, len(values) // 10)
    return statistics.median(values[-tenth:]) / statistics.median(values[tenth : 2 * tenth]) - 1


@dataclass
class Stage:
    """What was seen in one stage of one round."""

    round: int
    name: str
    epochs: int = 0
    memory: list[int] = field(default_factory=list)
    files: set[int] = field(default_factory=set)

    def line(self) -> str:
        """The stage as a row of the table."""
        files = "..".join(map(str, sorted({min(self.files), max(self.files)})))
        sizes = f"{self.memory[0] / 2**20:>10.1f}{self.memory[-1] / 2**20:>10.1f}{growth(self.memory):>+9.2%}"
        return f"{self.round:>5}  {self.name:<12}{self.epochs:>7}{sizes}  {files}"


class Watch:
    """Looks at the process through the epochs of a run; a ``display``. ``show`` gets a line per stage that is done."""

    def __init__(self, show: Callable[[str], None] = lambda line: None) -> None:
        self.round, self.show = 0, show
        self.stages: list[Stage] = []

    def __call__(self, row: dict[str, Any]) -> None:
        if row["event"] == "stage" and row["epochs"]:
            self.stages.append(Stage(self.round, row["stage"]))
        if row["event"] == "row" and self.stages and self.stages[-1].name == row["stage"]:
            self.show(self.stages[-1].line())
        if row["event"] != "epoch":
            return
        stage = self.stages[-1]
        stage.epochs += 1
        if stage.epochs % max(1, row["epochs"] // LOOKS) == 0:
            gc.collect()
            stage.memory.append(resident())
            stage.files.add(open_files())

    def problems(self) -> list[str]:
        """What is not flat."""
        found = []
        for stage in self.stages:
            name = f"round {stage.round} {stage.name}"
            if growth(stage.memory) > MOST:
                found.append(f"{name}: memory grew by {growth(stage.memory):.2%}")
            if len(stage.files) != 1:
                found.append(f"{name}: open files between {min(stage.files)} and {max(stage.files)}")
        grown = self.between_rounds()
        return found + ([f"from round 2 to the last memory grew by {grown:.2%}"] if grown > MOST else [])

    def between_rounds(self) -> float:
        """Growth from the end of the second round to the end of the last one; 0 with less than three."""
        ends = {stage.round: statistics.median(stage.memory[-4:]) for stage in self.stages}
        return ends[max(ends)] / ends[2] - 1 if len(ends) > 2 else 0.0

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return sum(stage.epochs * STEPS for stage in self.stages)


def soak(make: Callable[..., Any], watch: Watch, folder: Path, rounds: int, epochs: int) -> None:
    """``rounds`` runs of ``epochs`` epochs each; ``make(*stages, **options)`` makes a pipeline."""
    train, prune, quantize = (max(3, round(share * epochs)) for share in SHARES)
    stages = (
        {"train": {"method": "sam", "rho": 0.05, "epochs": train, "averaging": "ema"}},
        {"prune": {"method": "magnitude", "ratio": 0.4, "epochs": prune, "schedule_steps": 2}},
        {"quantize": {"method": "gaqat", "weight_bits": 4, "activation_bits": 4, "epochs": quantize, "K": 50}},
        {"export": {"profile": "packed", "latency": False}},
    )
    for watch.round in range(1, rounds + 1):
        make(*stages, checkpoint_every=250).run(folder / f"round{watch.round}", display=watch)


def main(arguments: list[str] | None = None) -> int:
    """Command line: 0 when memory and open files stayed flat."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=900, help="epochs of a round, of five steps each")
    options = parser.parse_args(arguments)
    sys.path[:0] = [str(Path(__file__).parent)]  # as the test suite has it
    import small_runs

    from flatcompress.errors import Interrupted

    print(f"{'round':>5}  {'stage':<12}{'epochs':>7}{'MiB':>10}{'MiB':>10}{'growth':>9}  files")
    watch = Watch(lambda line: print(line, flush=True))
    with tempfile.TemporaryDirectory() as folder:
        try:
            soak(small_runs.pipeline, watch, Path(folder), options.rounds, options.epochs)
        except Interrupted as stopped:
            print(stopped)
    print(f"{watch.steps} optimizer steps; from round 2 to the last {watch.between_rounds():+.2%}")
    print("\n".join(watch.problems()) or "memory flat within 2 %, open files constant")
    return 1 if watch.problems() else 0


if __name__ == "__main__":
    sys.exit(main())
