from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from c_nets import NETS, STRICT, block, made, samples, wrong
from test_plan import conv, tensor
from torch import nn

from flatcompress.errors import UserError
from flatcompress.onnx_export import export
from flatcompress.onnx_export.c import build, checking, choosing, ir, packing, plan
from flatcompress.onnx_export.lower.integer import Grid

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C compiler on this machine")


class Even(nn.Module):
    """Even channels throughout: a concatenation, additions of wide operands, a grouped layer, a pool of means."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.left = block(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8))
        self.right = block(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.down = block(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.deep = block(nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.ReLU(), nn.Conv2d(12, 12, 1), nn.ReLU())
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.relu(self.left(x) + x)
        x = self.relu(self.right(x) + self.left(x))
        x = self.down(x)
        x = self.deep(x)
        return self.fc(torch.flatten(self.pool(torch.cat([x, x], 1)), 1))


PACKED = {**NETS, "even": (Even, (3, 10, 7))}


@needs_compiler
@pytest.mark.parametrize(
    ("name", "weights", "activations", "sparsity"),
    [
        ("residual", 4, 4, 0.0),
        ("deep", 3, 4, 0.85),
        ("even", 4, 3, 0.0),
        *(
            pytest.param(name, w, a, zeros, marks=pytest.mark.slow)
            for name in PACKED
            for w, a, zeros in [(4, 4, 0.0), (4, 4, 0.85), (2, 2, 0.0), (8, 3, 0.85)]
        ),
    ],
)
def test_every_output_bit_is_the_same_with_packed_activations(name, weights, activations, sparsity, tmp_path):
    kind, shape = PACKED[name]
    torch.manual_seed(0)
    exported = made(kind(), shape, weights, activations, tmp_path / "m.onnx", sparsity=sparsity, pack_activations=True)
    assert exported.c.figures["packed_tensors"] > 0
    assert wrong(exported, samples(shape), STRICT) == []


def test_packed_activations_take_less_ram_and_the_bound_stays_in_bytes_a_code(tmp_path):
    found = []
    for packed in (False, True):
        torch.manual_seed(0)
        found.append(made(Even(), (3, 10, 7), 4, 4, tmp_path / "m.onnx", pack_activations=packed).c.figures)
    plain, packed = found
    assert packed["ram_bytes"] < 0.9 * plain["ram_bytes"]
    assert packed["ram_bound_bytes"] == plain["ram_bound_bytes"] and plain["packed_tensors"] == 0


def test_eight_bit_activations_have_nothing_to_pack(tmp_path):
    exported = made(Even(), (3, 10, 7), 4, 8, tmp_path / "m.onnx", pack_activations=True)
    assert exported.c.figures["packed_tensors"] == 0
    assert "#define FC_PACKED 0" in (exported.c.folder / "m.c").read_text()


def test_a_profile_without_c_has_no_activations_to_pack(tmp_path):
    with pytest.raises(UserError, match=r"pack_activations.*writes no C.*profile 'c'"):
        export(nn.Linear(3, 2), torch.randn(2, 3), tmp_path / "m.onnx", "float32", pack_activations=True)
    assert not list(tmp_path.iterdir())


# --- which tensors ------------------------------------------------------------------------------------------------


def packed_names(*steps: ir.Step, kernels: dict[int, str] | None = None) -> set[str]:
    program = ir.Program((1,), (1,), list(steps))
    for held in program.tensors:
        held.packed = False
    packing.pack(program, kernels or {i: choosing.CONV for i, s in enumerate(steps) if isinstance(s, ir.Conv)})
    return {held.name for held in program.tensors if held.packed}


def test_a_tensor_is_packed_where_all_its_steps_know_halves_of_bytes():
    first, last = tensor("a", 4, 4, 6), conv(tensor("b", 4, 4, 6), "c", 8, ir.Window((1, 1)))
    begin = [ir.Quantize("", [], first), conv(first, "b", 6, ir.Window((3, 3)))]
    last.sources = [begin[1].out]
    moved = ir.Move("", last.sources, tensor("d", 4, 4, 6), 0, [(96, 1)])
    assert packed_names(*begin, moved) == {"a"}
    assert packed_names(*begin, last, kernels={1: choosing.CONV, 2: choosing.LINEAR}) == {"a"}
    assert packed_names(*begin, last) == {"a", "b", "c"}


@pytest.mark.parametrize(("channels", "high", "fits"), [(1, 15, False), (6, 15, True), (7, 15, True), (6, 16, False)])
def test_codes_below_16_in_several_channels_are_packed(channels, high, fits):
    held = ir.Codes("a", 3, 3, channels, Grid(1.0, 0, 0, high, 4))
    assert packed_names(ir.Quantize("", [], held)) == ({"a"} if fits else set())
    assert held.bytes == (9 * -(-channels // 2) if fits else 9 * channels)


@pytest.mark.parametrize("channels", [6, 7])
def test_operands_of_an_addition_are_packed_alike_where_channels_are_odd(channels):
    wide = ir.Codes("wide", 3, 3, channels, Grid(1.0, 0, 0, 200, 8))
    source = tensor("x", 3, 3, channels)
    step = conv(source, "y", channels, ir.Window((1, 1)))
    step.add = ir.Fused("", step.out, wide, True)
    step.sources = [source, wide]
    found = packed_names(ir.Quantize("", [], source), ir.Quantize("", [], wide), step)
    assert found == ({"x", "y"} if channels == 6 else {"x"})


def test_a_view_with_odd_channels_keeps_a_tensor_in_bytes():
    held, flat = tensor("a", 3, 3, 7), tensor("a", 1, 1, 63)
    step = conv(flat, "b", 8, ir.Window((1, 1)))
    assert packed_names(ir.Quantize("", [], held), step) == {"b"}


def test_codes_are_read_back_from_halves_of_bytes():
    held = ir.Codes("a", 2, 1, 3, Grid(1.0, 0, 0, 15, 4), packed=True)
    raw = np.array([[0x21, 0x03, 0xF4, 0x05]], np.uint8)
    assert checking.codes(raw, held).tolist() == [[1, 2, 3, 4, 15, 5]]


# --- where they lie -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("groups", [1, 3])
def test_a_convolution_never_reads_what_it_wrote_over_its_source(seed, groups):
    """Two pixels at a time, a group of channels after the other; whatever of source and result is packed."""
    draw = random.Random(seed)
    window = ir.Window((3, 3), (draw.randint(1, 2), draw.randint(1, 2)), (1, 1), (1, 1))
    source = tensor("x", draw.randint(4, 7), draw.randint(4, 7), groups * draw.randint(1, 4))
    step = conv(source, "y", groups * draw.randint(1, 6), window, groups)
    source.packed, step.out.packed = draw.random() < 0.5, draw.random() < 0.5
    gap, written = plan.lead(step, source), np.zeros(source.bytes * 4 + step.out.bytes * 2, bool)
    for first in range(0, step.out.pixels, 2):
        pair = range(first, min(first + 2, step.out.pixels))
        for group in range(groups):
            for pixel in pair:
                assert not any(written[gap + at] for at in reads(step, source, pixel, group, groups))
            for pixel in pair:
                each = step.outputs // groups
                for channel in range(group * each, (group + 1) * each):
                    written[place(step.out, pixel, channel)] = True


def place(held: ir.Codes, pixel: int, channel: int) -> int:
    return pixel * held.pixel_bytes + (channel // 2 if held.packed else channel)


def reads(step: ir.Conv, source: ir.Codes, pixel: int, group: int, groups: int) -> set[int]:
    """The bytes that an output pixel's patch of a group is read from."""
    found, depth, window = set(), source.channels // groups, step.window
    for ky in range(window.kernel[0]):
        for kx in range(window.kernel[1]):
            y = pixel // step.width * window.stride[0] - window.pads[0] + ky
            x = pixel % step.width * window.stride[1] - window.pads[1] + kx
            if 0 <= y < source.height and 0 <= x < source.width:
                channels = range(group * depth, (group + 1) * depth)
                found |= {place(source, y * source.width + x, channel) for channel in channels}
    return found


def test_a_layer_is_not_written_in_place_over_a_source_of_another_width():
    source = tensor("x", 4, 4, 6)
    step = conv(source, "y", 6, ir.Window((3, 3), pads=(1, 1)), groups=6)
    assert plan.in_place(step, source)
    step.out.packed = True
    assert not plan.in_place(step, source)
