"""The code on the page runs as it stands, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from prune_nets import images
from torch import nn

PAGE = Path(__file__).parents[2] / "docs" / "pruning.md"


class Table(dict):
    """A latency table that knows every layer."""

    def __missing__(self, key: tuple[str, int, int]) -> float:
        return 0.01 * key[1] * key[2]


def test_code_on_the_page_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    x, y = images(32, 4), torch.tensor([0, 1, 2, 3])
    names: dict[str, object] = {"batches": [(x, y)], "loss": nn.functional.cross_entropy, "table": Table()}
    names["timed"] = ("layer1.0.conv1", "layer2.0.conv1")
    assert len(blocks) == 6
    for block in blocks:
        source = block
        if "batches" in block:
            names["optimizer"] = torch.optim.SGD(names["model"].parameters(), 0.01)
        exec(compile(source, str(PAGE), "exec"), names)
    assert names["plan"].of_kind("masks")
