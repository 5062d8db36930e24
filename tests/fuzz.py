"""Mutated files of every kind that a verb reads: each must end in a result or in one readable message.

`python -m tests.fuzz --count 20000` prints a table by kind of file and exits 1 on any traceback, crash or hang (more
than 5 seconds of one input). Inputs are made from sound files by damage to their bytes and, where a file has a
structure, by hostile values in it; checksums and hashes are made to fit again half of the time, so that what lies
behind them is reached. For one half of the inputs a seeded generator decides what is changed, for the other half
Hypothesis does, so that an input that fails is shrunk to the simplest one. Inputs run in forked processes that a parent
watches; the same seed gives the same inputs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import select
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis.errors import StopTest, UnsatisfiedAssumption

from tests.fuzz_drawn import Drawn, explore
from tests.fuzz_targets import KINDS, TARGETS, Bench

os.environ.setdefault("OMP_NUM_THREADS", "1")

HANG = 5.0  # seconds of processor time for one input
PATIENCE = 12  # on a busy machine the clock may run this many times faster
MEMORY = 8 << 30
CHUNK = 500
DRAWN = 0.5  # share of the inputs in which Hypothesis decides what is changed


def one(bench: Bench, target: str, rng: random.Random) -> str:
    """The outcome of one input: answered, refused, or the traceback."""
    from flatcompress.errors import RunError, UserError

    try:
        getattr(bench, target)(rng)
    except (UserError, RunError) as error:
        return "refused" if str(error).strip() else "an error without a message"
    except (StopTest, UnsatisfiedAssumption):  # Hypothesis ends an input that it will not use
        raise
    except BaseException:
        return traceback.format_exc()[-3000:]
    return "answered"


def seeded(seed: int, target: str, index: int) -> random.Random:
    """The source of input ``index`` of a kind."""
    return random.Random(f"{seed} {target} {index}")


# ---------------------------------------------------------------------------------------------- watching


@dataclass
class Tally:
    """What became of the inputs of one kind of file."""

    target: str
    seeded: int = 0
    drawn: int = 0
    answered: int = 0
    refused: int = 0
    hung: int = 0
    failures: list[str] = field(default_factory=list)
    longest: float = 0.0
    seconds: float = 0.0

    @property
    def inputs(self) -> int:
        """How many there were."""
        return self.seeded + self.drawn

    def count(self, row: dict[str, Any], name: str) -> None:
        """One input more; ``name`` says which."""
        self.longest = max(self.longest, row["seconds"])
        if row["seconds"] > HANG:
            self.hang(f"{name}: took {row['seconds']:.1f} s")
        elif row["outcome"] in ("answered", "refused"):
            setattr(self, row["outcome"], getattr(self, row["outcome"]) + 1)
        else:
            self.failures.append(f"{name}: {row['outcome']}")

    def hang(self, text: str) -> None:
        """One input more that took too long."""
        self.hung += 1
        self.failures.append(text)

    def row(self) -> str:
        """A line of the table."""
        failed = len(self.failures) - self.hung
        return (
            f"{self.target:<20}{self.seeded:>8}{self.drawn:>8}{self.answered:>10}{self.refused:>9}{failed:>8}"
            f"{self.hung:>6}{self.longest:>9.2f}s{self.seconds:>8.0f}s"
        )


HEADER = (
    f"{'file':<20}{'seeded':>8}{'drawn':>8}{'answered':>10}{'refused':>9}{'failed':>8}{'hung':>6}"
    f"{'slowest':>10}{'seconds':>9}"
)
Check = Callable[[random.Random], str]
Source = Callable[[Check], None]


def work(sound: Path, target: str, source: Source, pipe: int) -> None:
    """In a process of its own: the inputs of ``source``, one line of JSON each into ``pipe``."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        bench = Bench(Path(folder), sound)

        def check(rng: random.Random) -> str:
            started = time.process_time()
            outcome = one(bench, target, rng)
            bad = outcome not in ("answered", "refused")
            simpler = bool(failed) and isinstance(rng, Drawn)  # a search for the simplest input that fails is on
            row = {"outcome": outcome, "seconds": time.process_time() - started, "simpler": simpler}
            failed.extend([f"{bench.last}\n{outcome}"] * bad)
            os.write(pipe, json.dumps(row).encode() + b"\n")
            return outcome

        try:
            source(check)
        except AssertionError:
            os.write(pipe, json.dumps({"simplest": failed[-1]}).encode() + b"\n")


def by_seed(seed: int, target: str, first: int, last: int) -> Source:
    """Inputs ``first`` to ``last`` of the seed."""

    def source(check: Check) -> None:
        for index in range(first, last):
            check(seeded(seed, target, index))

    return source


def by_hypothesis(seed: int, target: str, first: int, last: int) -> Source:
    """As many inputs that Hypothesis decides on; those after a failing one are simpler ones that fail."""
    return lambda check: explore(check, last - first, zlib.crc32(f"{seed} {target} {first}".encode()))


def watched(sound: Path, target: str, count: int, seed: int) -> Tally:
    """``count`` inputs of a kind in processes that this one watches."""
    tally, started = Tally(target), time.monotonic()
    drawn = round(DRAWN * count)
    for name, make, wanted in (("seeded", by_seed, count - drawn), ("drawn", by_hypothesis, drawn)):
        index = 0
        while index < wanted:
            last = min(wanted, index + CHUNK)
            index += _chunk(sound, make(seed, target, index, last), tally, f"{name} {index}", last - index)
        setattr(tally, name, index)
    tally.seconds = time.monotonic() - started
    return tally


def _chunk(sound: Path, source: Source, tally: Tally, name: str, most: int) -> int:
    """The inputs of one source; returns how many there were, those that ended their process counted in."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code = 1
        try:
            work(sound, tally.target, source, writer)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    done = 0
    with os.fdopen(reader, "rb", buffering=0) as lines:
        while True:
            ready, _, _ = select.select([lines], [], [], HANG * PATIENCE)
            line = lines.readline() if ready else b""
            if not line:
                break
            row = json.loads(line)
            if "simplest" in row:
                tally.failures[-1] += f"\nthe simplest such input: {row['simplest']}"
            elif not row["simpler"] and done < most:
                tally.count(row, f"{tally.target} {name}+{done}")
                done += 1
        if not ready:
            os.kill(child, 9)
        _, status = os.waitpid(child, 0)
    if not ready:
        tally.hang(f"{tally.target} {name}+{done}: hung")
    elif status:
        tally.failures.append(f"{tally.target} {name}+{done}: the process died (status {status})")
    return done + (1 if status else 0)


def sound_run(folder: Path) -> Path:
    """A finished run folder with a checkpoint in the middle of a stage beside the finished ones."""
    import torch

    from flatcompress.cli.app import _guarded
    from flatcompress.randomness import capture
    from flatcompress.store import checkpoint
    from tests.faults import RECIPE
    from tests.tiny_net import build

    (folder / "recipe.yaml").write_text(RECIPE)
    with contextlib.redirect_stdout(io.StringIO()):
        if _guarded(["run", str(folder / "recipe.yaml"), "-o", str(folder / "run"), "--quiet"]) != 0:
            raise SystemExit("the sound run failed")
    found = checkpoint.load(folder / "run/checkpoints/0-train")
    model = build(10)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "rng": capture(), "best": (0.5, model.state_dict()), "epoch": 1}
    checkpoint.save_progress(folder / "run/checkpoints", "4-train", 7, found.plan, found.state_dict, state=state)
    return folder / "run"


def main(arguments: list[str] | None = None) -> int:
    """Command line: 0 when every input was answered or refused."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(TARGETS))
    parser.add_argument("--index", type=int, help="run this one seeded input of --only here, for a debugger")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        sound = _made(Path(folder))
        if options.index is not None:
            rng = seeded(options.seed, options.only, options.index)
            print(one(Bench(Path(folder) / "one", sound), options.only, rng))
            return 0
        return _table(sound, options)


def _made(folder: Path) -> Path:
    """`sound_run` in a process of its own: this one must not have trained when it forks."""
    from tests.faults import preload

    preload()
    child = os.fork()
    if child == 0:
        try:
            sound_run(folder)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        raise SystemExit("the sound run could not be made")
    (folder / "one").mkdir()
    return folder / "run"


def _table(sound: Path, options: argparse.Namespace) -> int:
    chosen = {options.only: 1.0} if options.only else TARGETS
    tallies = []
    print(HEADER)
    for target, share in chosen.items():
        tallies.append(watched(sound, target, max(2, round(share * options.count)), options.seed))
        print(tallies[-1].row(), flush=True)
    print(", ".join(f"{kind} {sum(t.inputs for t in tallies if t.target in names)}" for kind, names in KINDS.items()))
    failures = [text for tally in tallies for text in tally.failures]
    total = sum(tally.inputs for tally in tallies)
    print(f"{total} mutated inputs, {len(failures)} tracebacks, crashes or hangs over {HANG:g} s")
    for text in failures[:20]:
        print(f"\n--- {text}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
