"""The code on the page about quantization runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "quantization.md"


def test_code_on_the_page_runs() -> None:
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 2
    scope: dict = {}
    for block in blocks:
        exec(block, scope)
    x = scope["batches"][0]
    assert scope["conflict"].windows == 2
    assert torch.isfinite(scope["model"](x)).all() and scope["fresh"](x).shape == (32, 10)
