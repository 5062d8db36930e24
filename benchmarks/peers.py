"""flatcompress beside other libraries: same data, same start, same epochs, same machine, one run.

    python -m benchmarks.peers [--quick] [--check] [--seeds 0 1 2] [--only PATTERN ...] [--epochs 12] [--collect]

Styled shapes with *sketch* held out. One float network (ERM) is trained per seed; every peer starts from it in its own
environment (made on the first call by `benchmarks._peer_envs`, a gigabyte each), gets the same number of epochs, sees
training and validation images only, and writes an ONNX file. Accuracy, bytes and latency of every file are measured
here, through onnxruntime. Prints the table, writes benchmarks/results/peers.json, docs/results/peers.md and the two
plots beside it. Rows that are finished are not run again; ``--collect`` runs nothing at all; ``--train-only`` leaves
latency and page for a quieter hour.

Target (``--check`` exits 1 where it is missed): for every peer's file there is the pipeline's file (AdaSAP, GAQAT,
W4A4) with higher robust accuracy at no more bytes and no more milliseconds (3 % is equal).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from benchmarks import _peer_page
from benchmarks._peer_rows import Peer, own, peers
from benchmarks._peer_runs import Arena, start_epochs

NAME = "peers"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs, fewer rows: a smoke run")
    parser.add_argument("--check", action="store_true", help="exit 1 where the target is missed, naming it")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="seeds (default 0 1 2)")
    parser.add_argument("--only", nargs="+", default=["*"], help="rows whose name fits one of these patterns")
    parser.add_argument("--epochs", type=int, default=None, help="epochs after the start, for everybody (default 12)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="where the runs go")
    parser.add_argument("--collect", action="store_true", help="run nothing: the page from what is finished")
    parser.add_argument("--train-only", action="store_true", help="train and grade; no latency, no page")
    options = parser.parse_args(argv)
    options.seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    options.epochs = options.epochs or (3 if options.quick else 12)
    return options


def chosen(options: argparse.Namespace) -> list[Peer]:
    """The rows that are asked for, with those whose files they take."""
    rows = [*peers(options.quick), *own(options.epochs, options.quick)]
    wanted = {r.name for r in rows if any(fnmatch(r.name, pattern) for pattern in options.only)}
    for r in reversed(rows):  # what a row needs stands before it
        wanted |= {r.after, r.tuned_as} if r.name in wanted else set()
    return [r for r in rows if r.name in wanted]


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write; the exit code."""
    options = arguments(argv)
    torch.set_num_threads(1)
    rows = chosen(options)
    folder = options.output / f"{NAME}{'-quick' if options.quick else ''}-{options.epochs}"
    kept = folder / "choices.json"
    choices = {k: tuple(v) for k, v in json.loads(kept.read_text()).items()} if kept.exists() else {}
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for seed in options.seeds:
        arena = Arena(folder / f"seed-{seed}", seed, options.epochs, start_epochs(options.quick), choices)
        done = finished(arena, rows) if options.collect else run(arena, rows)
        found[seed] = {p.name: arena.with_start(p, done[p.name]) for p in rows if p.name in done}
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(choices, indent=1) + "\n")
        if not options.train_only:
            measured = [name for name, figures in found[seed].items() if "problem" not in figures]
            for name, ms in arena.latencies(measured, 15 if options.quick else 40).items():
                found[seed][name]["ms"] = ms
    if options.train_only:
        return 0
    return _peer_page.publish(NAME, rows, found, choices, options, start_epochs(options.quick))


def run(arena: Arena, rows: Sequence[Peer]) -> dict[str, dict[str, Any]]:
    """Every row of one seed: figures, or the problem."""
    arena.prepare()
    return {peer.name: arena.row(peer) for peer in rows}


def finished(arena: Arena, rows: Sequence[Peer]) -> dict[str, dict[str, Any]]:
    """The rows of one seed that are there."""
    files = {peer.name: arena.of(peer.name) / "graded.json" for peer in rows}
    return {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}


if __name__ == "__main__":
    sys.exit(main())
