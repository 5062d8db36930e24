"""flatcompress: prune, quantize, export from the starting network, or the whole recipe from an untrained one."""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.peer_scripts.given import Given, fresh, run

# user code
from flatcompress import Pipeline


def work(given: Given) -> None:
    stages: list[Any] = json.loads(given.options.stages)
    model = fresh(given) if "train" in stages[0] else given.model
    data = {"train": given.train_set, "val": given.val, "test": given.val}
    pipeline = Pipeline(model, data, stages, seed=given.seed, device="cpu", threads=1, batch_size=64)
    pipeline.run(given.out)


# end


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stages", required=True, help="the recipe's stages, as JSON")


if __name__ == "__main__":
    run(work, arguments)
