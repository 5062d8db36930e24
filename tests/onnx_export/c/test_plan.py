from __future__ import annotations

import random

import numpy as np
import pytest

from flatcompress.onnx_export.c import ir, plan
from flatcompress.onnx_export.lower.integer import Grid

GRID = Grid(1.0, 0, 0, 15, 4)


def tensor(name: str, height: int, width: int, channels: int) -> ir.Codes:
    return ir.Codes(name, height, width, channels, GRID)


def conv(source: ir.Codes, name: str, outputs: int, window: ir.Window, groups: int = 1) -> ir.Conv:
    def side(size, axis):
        reach = (window.kernel[axis] - 1) * window.dilation[axis]
        return (size + 2 * window.pads[axis] - reach - 1) // window.stride[axis] + 1

    height, width = side(source.height, 0), side(source.width, 1)
    weight = np.ones((outputs, *window.kernel, source.channels // groups), np.int64)
    out = tensor(name, height, width, outputs)
    bias, scale = np.zeros(outputs, np.int64), np.ones(outputs, np.float32)
    return ir.Conv(name, [source], out, weight, bias, scale, 4, 0, window, groups, height, width)


def moments(step: ir.Conv):
    """What a convolution reads and then writes, in order: (lowest and highest byte read, written range)."""
    source, window = step.sources[0], step.window
    pixels = step.height * step.width
    for first in range(0, pixels, step.pixels):
        group, read = range(first, min(first + step.pixels, pixels)), []
        for pixel in group:
            for ky in range(window.kernel[0]):
                for kx in range(window.kernel[1]):
                    y = pixel // step.width * window.stride[0] - window.pads[0] + ky * window.dilation[0]
                    x = pixel % step.width * window.stride[1] - window.pads[1] + kx * window.dilation[1]
                    if 0 <= y < source.height and 0 <= x < source.width:
                        at = (y * source.width + x) * source.channels
                        read.append((at, at + source.channels))
        yield read, (first * step.outputs, (group[-1] + 1) * step.outputs)


@pytest.mark.parametrize("seed", range(40))
def test_a_convolution_over_its_own_source_never_reads_what_it_wrote(seed):
    draw = random.Random(seed)
    kernel = draw.choice([(1, 1), (3, 3), (1, 5), (2, 2)])
    window = ir.Window(kernel, (draw.randint(1, 2), draw.randint(1, 3)), (draw.randint(1, 2), 1), (kernel[0] // 2, 0))
    step = conv(
        tensor("x", draw.randint(5, 9), draw.randint(5, 9), draw.randint(1, 5)), "y", draw.randint(1, 9), window
    )
    gap = plan.lead(step, step.sources[0])
    written = 0
    for read, (_, end) in moments(step):
        assert not written or all(first + gap >= written for first, _ in read)
        written = end


def chain(draw: random.Random) -> ir.Program:
    program = ir.Program((3, 12, 12), (8,))
    now = tensor("in", 12, 12, 3)
    program.steps.append(ir.Quantize("in", [], now))
    for index in range(draw.randint(2, 6)):
        step = drawn(draw, f"t{index}", now, program)
        program.steps.append(step)
        now = step.out
    return program


def drawn(draw: random.Random, name: str, now: ir.Codes, program: ir.Program) -> ir.Step:
    kind = draw.choice(["conv", "depthwise", "add"])
    others = [t for t in program.tensors[:-1] if (t.bytes, t.channels) == (now.bytes, now.channels)]
    if kind == "add" and others:
        return ir.Add(name, [now, draw.choice(others)], tensor(name, now.height, now.width, now.channels))
    window = ir.Window((3, 3), (draw.randint(1, 2),) * 2, (1, 1), (1, 1))
    if kind == "depthwise":
        return conv(now, name, now.channels, window, now.channels)
    return conv(now, name, draw.randint(2, 9), window)


@pytest.mark.parametrize("seed", range(30))
def test_live_blocks_lie_apart_but_for_what_a_step_may_overwrite(seed):
    draw = random.Random(seed)
    program = chain(draw)
    scratch = [draw.choice([0, 8, 100]) for _ in program.steps]
    made = plan.lay_out(program, scratch)
    lives = plan._lives(program)
    users = {t.name: s for s in program.steps for t in s.sources}
    places = {t.name: (made.offsets[t.name], made.offsets[t.name] + t.bytes) for t in program.tensors}
    for index, size in enumerate(scratch):
        places[f"s{index}"], lives[f"s{index}"] = (made.scratch[index], made.scratch[index] + size), (index, index)
    assert max(end for _, end in places.values()) <= made.arena
    for a, (start, end) in places.items():
        for b, (other, finish) in places.items():
            alive = lives[a][0] <= lives[b][1] and lives[b][0] <= lives[a][1]
            if a == b or not alive or end <= other or finish <= start or start == end or other == finish:
                continue
            source, out = (a, b) if lives[a][0] < lives[b][0] else (b, a)
            step = users[source]
            assert step.out.name == out and lives[source][1] == lives[out][0]
            operand = next(t for t in step.sources if t.name == source)
            gap, difference = plan.lead(step, operand), places[source][0] - places[out][0]
            assert (gap is not None and difference >= gap) or (plan.in_place(step, operand) and difference == 0)


def test_pointwise_and_depthwise_layers_need_one_buffer():
    program = ir.Program((8, 16, 16), (8,))
    now = tensor("in", 16, 16, 8)
    program.steps.append(ir.Quantize("in", [], now))
    for index in range(3):
        deep = conv(now, f"d{index}", 8, ir.Window((3, 3), (1, 1), (1, 1), (1, 1)), groups=8)
        wide = conv(deep.out, f"p{index}", 8, ir.Window((1, 1)))
        program.steps += [deep, wide]
        now = wide.out
    made = plan.lay_out(program, [0] * len(program.steps))
    assert (made.arena, made.bound) == (2048, 4096)


@pytest.mark.parametrize("seed", range(10))
def test_a_product_over_its_own_first_operand_never_reads_what_it_wrote(seed):
    draw = random.Random(seed)
    heads, tokens, depth, columns = (draw.randint(1, 5) for _ in range(4))
    strides = draw.choice([(depth, heads * depth, 1), (tokens * depth, depth, 1)])  # heads inside of rows, or outside
    left, right = tensor("left", 1, heads * tokens, depth), tensor("right", 1, heads * depth, columns)
    product = ir.Product(heads, tokens, columns, depth, (0, *strides), (0, 0, 0, 0), np.float32(1))
    out = tensor("out", 1, heads * tokens, columns)
    step = ir.Rows("product", [left, right], out, heads * tokens, columns, product)
    gap = plan.lead(step, left)
    assert plan.lead(step, right) is None
    for at in range(heads * tokens):
        begin = at % heads * strides[0] + at // heads * strides[1]
        assert not at or begin + gap >= at * columns
