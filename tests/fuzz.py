"""Mutated files of every kind that a verb reads: each must end in a result or in one readable message.

`python -m tests.fuzz --count 20000` prints a table by kind of file and exits 1 on any traceback, crash or hang (more
than 5 seconds of one input). Inputs are made from sound files by damage to their bytes and, where a file has a
structure, by hostile values in it; checksums and hashes are made to fit again half of the time, so that what lies
behind them is reached. Inputs run in forked processes that a parent watches; the same seed gives the same inputs.
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
from pathlib import Path
from typing import Any

from tests.fuzz_targets import TARGETS, Bench

os.environ.setdefault("OMP_NUM_THREADS", "1")

HANG = 5.0  # seconds of processor time for one input
PATIENCE = 12  # on a busy machine the clock may run this many times faster
MEMORY = 8 << 30
CHUNK = 500
Most = tuple[float, int]  # seconds of the slowest input, and its index


def one(bench: Bench, target: str, index: int, seed: int) -> str:
    """The outcome of one input: answered, refused, or the traceback."""
    from flatcompress.errors import RunError, UserError

    try:
        getattr(bench, target)(random.Random(f"{seed} {target} {index}"))
    except (UserError, RunError) as error:
        return "refused" if str(error).strip() else "an error without a message"
    except BaseException:
        return traceback.format_exc()[-3000:]
    return "answered"


# ---------------------------------------------------------------------------------------------- watching


def work(sound: Path, target: str, first: int, last: int, seed: int, pipe: int) -> None:
    """In a process of its own: inputs ``first`` to ``last``, one line of JSON each into ``pipe``."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        bench = Bench(Path(folder), sound)
        for index in range(first, last):
            started = time.process_time()
            outcome = one(bench, target, index, seed)
            line = json.dumps({"outcome": outcome, "seconds": time.process_time() - started})
            os.write(pipe, line.encode() + b"\n")


def watched(sound: Path, target: str, count: int, seed: int) -> tuple[dict[str, int], list[str], Most]:
    """Run ``count`` inputs of a kind; returns outcomes, what failed, and the longest processor time of one."""
    counts: dict[str, int] = {"answered": 0, "refused": 0, "failed": 0, "hung": 0}
    failures: list[str] = []
    longest, index = (0.0, 0), 0
    while index < count:
        last = min(count, index + CHUNK)
        index, longest = _chunk(sound, target, (index, last), seed, counts, failures, longest)
    return counts, failures, longest


def _chunk(
    sound: Path, target: str, span: tuple[int, int], seed: int, counts: dict[str, int], failures: list[str], most: Most
) -> tuple[int, Most]:
    index, last = span
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            work(sound, target, index, last, seed, writer)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb", buffering=0) as lines:
        while index < last:
            ready, _, _ = select.select([lines], [], [], HANG * PATIENCE)
            line = lines.readline() if ready else b""
            if not line:
                break
            row = json.loads(line)
            most = max(most, (row["seconds"], index))
            _count(row, f"{target} {index}", counts, failures)
            index += 1
        hung = not ready
        if hung:
            os.kill(child, 9)
        _, status = os.waitpid(child, 0)
    if index < last:
        counts["hung" if hung else "failed"] += 1
        failures.append(f"{target} {index}: {'hung' if hung else f'the process died (status {status})'}")
        index += 1
    return index, most


def _count(row: dict[str, Any], name: str, counts: dict[str, int], failures: list[str]) -> None:
    if row["seconds"] > HANG:
        counts["hung"] += 1
        failures.append(f"{name}: took {row['seconds']:.1f} s")
    elif row["outcome"] in ("answered", "refused"):
        counts[row["outcome"]] += 1
    else:
        counts["failed"] += 1
        failures.append(f"{name}: {row['outcome']}")


def sound_run(folder: Path) -> Path:
    """A finished run folder with a checkpoint in the middle of a stage beside the finished ones."""
    import torch

    from flatcompress.cli import _guarded
    from flatcompress.training import checkpoint
    from flatcompress.training.rng import capture_rng
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
    state = {"optimizer": optimizer.state_dict(), "rng": capture_rng(), "best": (0.5, model.state_dict()), "epoch": 1}
    checkpoint.save_progress(folder / "run/checkpoints", "4-train", 7, found.plan, found.state_dict, state=state)
    return folder / "run"


def main(arguments: list[str] | None = None) -> int:
    """Command line: 0 when every input was answered or refused."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(TARGETS))
    parser.add_argument("--index", type=int, help="run this one input of --only in this process, for a debugger")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        sound = _made(Path(folder))
        if options.index is not None:
            print(one(Bench(Path(folder) / "one", sound), options.only, options.index, options.seed))
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
    total, failed = 0, []
    print(
        f"{'file':<20}{'inputs':>8}{'answered':>10}{'refused':>9}{'failed':>8}{'hung':>6}{'slowest':>10}{'input':>7}{'seconds':>9}"
    )
    for target, share in chosen.items():
        count, started = max(1, round(share * options.count)), time.monotonic()
        counts, failures, longest = watched(sound, target, count, options.seed)
        total, failed = total + count, failed + failures
        row = "".join(f"{counts[k]:>{w}}" for k, w in (("answered", 10), ("refused", 9), ("failed", 8), ("hung", 6)))
        print(
            f"{target:<20}{count:>8}{row}{longest[0]:>9.2f}s{longest[1]:>7}{time.monotonic() - started:>8.0f}s",
            flush=True,
        )
    print(f"{total} mutated inputs, {len(failed)} tracebacks, crashes or hangs over {HANG:g} s")
    for text in failed[:20]:
        print(f"\n--- {text}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
