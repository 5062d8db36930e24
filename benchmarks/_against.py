"""Another commit beside this one: the same lines run in a process of each checkout, in turns."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent.parent


def option(parser: argparse.ArgumentParser) -> None:
    """``--against CHECKOUT``."""
    parser.add_argument("--against", type=Path, help="a folder with another commit's source")


def seconds(
    lines: str,
    against: Path,
    rounds: int,
    threads: int,
    here: Sequence[str] = (),
    there: Sequence[str] = (),
    warmup: int = 1,
) -> tuple[list[float], list[float]]:
    """What ``lines`` say they took with this checkout's source and with that of ``against``, ``rounds`` times each.

    lines: Python that prints a number of seconds for every line it reads, by what both commits have. here, there: its
    arguments. The first ``warmup`` rounds of both are left out. RuntimeError where a side ends.
    """
    against = against.resolve()
    sides = [_started(lines, HERE, threads, here), _started(lines, against, threads, there)]
    try:
        times = [[_asked(process) for process in sides] for _ in range(rounds + warmup)][warmup:]
    finally:
        for process in sides:
            process.kill()
            process.wait()
    return [ours for ours, _ in times], [theirs for _, theirs in times]


def _started(lines: str, source: Path, threads: int, given: Sequence[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-W", "ignore", "-c", lines, *given]
    return subprocess.Popen(
        command, env=environment, cwd=source, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _asked(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write("again\n")
        process.stdin.flush()
        return float(process.stdout.readline())
    except (BrokenPipeError, ValueError):
        raise RuntimeError(f"the side of {process.args!r} ended without a time; its error is above") from None
