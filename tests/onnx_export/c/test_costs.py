"""The cost model against the emulator, and its counts against the kernels' own sizes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from c_nets import NETS, made

from flatcompress import models
from flatcompress.onnx_export.c import board, costs, work

needs_board = pytest.mark.skipif(board.missing() is not None, reason=f"{board.missing()}")
REAL = {"resnet8": (3, 32, 32), "ds_cnn": (1, 49, 10), "mobilenet_v1_025": (3, 48, 48), "vit_tiny": (3, 16, 16)}


def network(name: str) -> tuple[torch.nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    if name in NETS:
        return NETS[name][0](), NETS[name][1]
    depth = {"depth": 2} if name == "vit_tiny" else {}
    return models.build(name, num_classes=10, input_shape=REAL[name], seed=0, **depth), REAL[name]


@pytest.mark.slow
@needs_board
@pytest.mark.parametrize("sparsity", [0.0, 0.8])
@pytest.mark.parametrize("name", REAL)
def test_estimates_are_near_what_the_linker_and_the_emulator_say(name, sparsity, tmp_path):
    """Stated in docs/microcontroller.md: flash within 3 % and 400 bytes, instructions within 12 %, RAM exactly."""
    model, shape = network(name)
    exported = made(model, shape, 4, 4, tmp_path / "m.onnx", sparsity=sparsity)
    x = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    found = board.measure(exported.c.folder, "m", x, exported.c.outputs, costs.BOARD, costs.FLAGS)
    guess = costs.estimate(exported.c.decided)
    assert abs(guess.flash - found.flash) <= 0.03 * found.flash + 400
    assert guess.instructions == pytest.approx(found.instructions[0], rel=0.12)
    assert guess.ram == exported.c.figures["ram_bytes"]


@pytest.mark.parametrize("sparsity", [0.0, 0.85])
@pytest.mark.parametrize("name", [*NETS, *REAL])
def test_every_kind_of_work_and_every_part_of_the_code_is_in_the_table(name, sparsity, tmp_path):
    model, shape = network(name)
    decided = made(model, shape, 4, 4, tmp_path / "m.onnx", sparsity=sparsity).c.decided
    found = costs.estimate(decided)
    assert all(step.instructions > 0 for step in found.steps) and found.unknown == ()
    assert sum(step.macs for step in found.steps) == decided.program.macs
    assert found.flash > costs.constants(decided)


def test_what_the_table_does_not_have_is_named_in_the_figures_and_the_readme(tmp_path, monkeypatch):
    known = costs.table()
    short = {name: {k: v for k, v in known[name].items() if k != gone} for name, gone in
             (("instructions", "pair of rows"), ("flash", "part CONV"))}  # fmt: skip
    monkeypatch.setattr(costs, "table", lambda: {**known, **short})
    model, shape = network("residual")
    written = made(model, shape, 4, 4, tmp_path / "m.onnx").c
    assert written.figures["estimate"]["unknown"] == ["pair of rows", "part CONV"]
    assert "nothing of the kind: pair of rows, part CONV." in (written.folder / "README.md").read_text()


def test_work_grows_with_pixels_and_channels_as_the_loops_do(tmp_path):
    model, shape = network("deep")
    decided = made(model, shape, 4, 4, tmp_path / "m.onnx").c.decided
    counts = work.of_step(decided, 1)
    conv = decided.program.steps[1]
    assert (
        sum(n for name, n in counts.items() if name.startswith(("code value", "even value")))
        == conv.outputs * conv.height * conv.width
    )
    assert counts["copied bytes"] + 4 * counts["copied words"] == conv.taps * conv.height * conv.width


def test_the_readme_and_the_figures_have_every_step(tmp_path):
    model, shape = network("line")
    written = made(model, shape, 4, 4, tmp_path / "m.onnx").c
    text = (written.folder / "README.md").read_text()
    estimate = json.loads(json.dumps(written.figures["estimate"]))
    assert len(estimate["steps"]) == len(written.decided.program.steps)
    for step in estimate["steps"]:
        assert f"| {step['module'] or '-'} | {step['kind']} | {step['macs']} | {step['instructions']} |" in text


def test_a_sparse_layer_that_goes_down_the_columns_is_counted_down_them(tmp_path):
    """Three pairs of columns, each 25 inputs long and three taps wide; four of eleven results at once, for which
    the 30 taps are gathered together."""
    torch.manual_seed(0)
    first = torch.nn.Conv2d(2, 6, (5, 3), stride=(2, 1), padding=(2, 1))
    model = torch.nn.Sequential(first, torch.nn.ReLU(), torch.nn.Conv2d(6, 4, 3))
    decided = made(model, (2, 21, 5), 4, 4, tmp_path / "m.onnx", sparsity=0.85).c.decided
    index, layer = next(iter(decided.layers.items()))
    counts = work.of_step(decided, index)
    assert layer.turned and counts["gathered columns"] == 3 * 3 * 25
    assert counts["walks"] == 3 * 3 * 6 and counts["parts"] == counts["walks"]
    assert layer.whole and counts["taps together"] == 3 * 3 * 5 * 3 * 2
