"""A block that runs several times lies in the file once (arXiv 2107.11817), and the file still holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flatcompress import quant
from flatcompress.errors import UserError
from flatcompress.onnx_export import certify, export
from flatcompress.prune import prune


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)) + x)


class Deep(nn.Module):
    """``depth`` blocks that are one object, or as many with weights of their own."""

    def __init__(self, depth: int, shared: bool) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 4)
        self.blocks = nn.ModuleList([Block()] * depth if shared else [Block() for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


def exported(depth: int, shared: bool, path, profile: str = "packed"):
    torch.manual_seed(0)
    model, x = Deep(depth, shared).eval(), torch.randn(16, 3, 8, 8)
    quant.quantize(model, 3, 4, example_input=x[:2])
    quant.calibrate(model, [x])
    optimizer = torch.optim.SGD(model.train().parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    quant.set_bias_rounding(model.eval())
    made = export(model, x[:2], path, profile=profile)
    return made, certify(made, [x], model(x).argmax(1), model=model, latency_runs=0)


@pytest.mark.parametrize("profile", ["packed", "int8"])
def test_shared_blocks_are_stored_once(tmp_path, profile):
    rows, least = {}, {}
    for depth, shared in ((1, True), (3, True), (3, False)):
        made, certificate = exported(depth, shared, tmp_path / "model.onnx", profile)
        assert certificate["holds"], certificate["failures"]
        rows[depth, shared] = [row["bytes"] for row in made.layers if row["name"].endswith(".conv")]
        least[depth, shared] = made.theoretical_bytes
    (one,) = rows[1, True]
    assert rows[3, True] == [one, 0, 0]
    assert min(rows[3, False]) > 0
    assert least[3, True] == pytest.approx(least[1, True], rel=0.05) and least[3, False] > 2 * least[1, True]


def test_a_block_that_runs_twice_is_not_cut_and_the_reason_is_said():
    with pytest.raises(UserError, match=r"blocks.0.conv (runs 2 times|shares its weights)"):
        prune(Deep(2, True), torch.randn(2, 3, 8, 8), ratio=0.5)
