"""A reference's sums are exact however they are computed, and so it is run the way that is cheapest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flatcompress import models, quant
from flatcompress.onnx_export import export
from flatcompress.onnx_export.lower.integer import Grid, IntegerLayer, scale32
from flatcompress.onnx_export.proof import parity, roundoff
from flatcompress.onnx_export.proof.samples import Samples


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    inputs=st.sampled_from([1, 7, 300, 4000]),
    headroom=st.integers(0, 6),
    bias=st.sampled_from([None, 10, 2**20, 2**30]),
    zero=st.sampled_from([0, 128]),
    linear=st.booleans(),
    rounded=st.booleans(),
)
def test_integer_layers_give_the_float32_of_the_exact_sum(seed, inputs, headroom, bias, zero, linear, rounded):
    generator = torch.Generator().manual_seed(seed)
    most = 127 >> headroom
    weight = torch.randint(-most - 1, most + 1, (5, inputs, *(() if linear else (1, 1))), generator=generator)
    scale = torch.rand(5, generator=generator) * 1e-3 + 1e-6
    added = None if bias is None else torch.randint(-bias, bias + 1, (5,), generator=generator, dtype=torch.int32)
    grids = Grid(0.02, zero, 0, 255, 8), Grid(0.1, zero, 0, 255, 8) if rounded else None
    layer = IntegerLayer(weight, scale, added, *grids, 8, headroom)
    codes = torch.randint(0, 256, (3, inputs, *(() if linear else (2, 2))), generator=generator).float()
    before = codes.clone()
    total = torch.einsum("ni...,oi->no...", (codes - zero).double(), weight.reshape(5, inputs).double()) * 2**headroom
    shape = [-1] + [1] * (codes.dim() - 2)
    total = total if added is None else total + added.double().reshape(shape)
    step = scale32(0.02) * layer.scale.reshape(shape)
    expected = total.float() * (step / scale32(0.1) if rounded else step)
    assert torch.equal(layer.value(codes), expected)
    wanted = (torch.round(expected) + zero).clamp(0, 255) if rounded else expected
    assert torch.equal(layer(codes), wanted) and torch.equal(codes, before)


@pytest.fixture(scope="module")
def depthwise(tmp_path_factory):
    model = models.build("mobilenet_v1_025", num_classes=4, input_shape=(3, 32, 32), seed=0)
    x = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    quant.quantize(model, 4, 8, example_input=x[:2])
    quant.calibrate(model, [x])
    return export(model.eval(), x[:2], tmp_path_factory.mktemp("depthwise") / "m.onnx").reference, x


def test_an_exact_reference_gives_the_same_bits_with_channels_last_and_in_other_batches(depthwise):
    reference, x = depthwise
    assert parity.is_exact(reference)
    (laid,) = parity.laid(reference, [x])
    assert laid.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(reference(laid), reference(x))
    assert torch.equal(reference(laid), torch.cat([reference(part) for part in x.split(5)]))


def test_a_reference_with_real_operators_lies_as_it_was_given(tmp_path):
    model = models.build("mobilenet_v1_025", num_classes=4, input_shape=(3, 32, 32), seed=0).eval()
    x = torch.randn(2, 3, 32, 32)
    reference = export(model, x, tmp_path / "m.onnx", profile="float32").reference
    assert not parity.is_exact(reference)
    assert parity.laid(reference, [x])[0] is x


@pytest.mark.parametrize("floats", [False, True])
def test_roundoff_is_the_same_from_what_is_known_and_kept_as_from_the_start(depthwise, floats, monkeypatch):
    reference, x = depthwise
    inputs = Samples(reference, [x])
    known = parity.reference_outputs(reference, inputs.batches)
    found = roundoff.roundoff(reference, inputs, floats=floats, known=known)
    monkeypatch.setattr(roundoff, "KEPT", 0)
    assert found == roundoff.roundoff(reference, inputs, floats=floats) > 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
def test_every_value_is_moved_up_or_down_by_its_error_and_otherwise_each_time(layout: str) -> None:
    moved = roundoff._Moved(torch.fx.symbolic_trace(torch.nn.ReLU()), True, roundoff.SINGLE, 0)
    moved.env, value = {}, torch.randn(4, 6, 50, 40, generator=torch.Generator().manual_seed(1))
    if layout == "channels_last":
        value = value.contiguous(memory_format=torch.channels_last)
    value = value.permute(0, 2, 3, 1) if layout == "permuted" else value
    node = next(iter(moved.module.graph.nodes))
    turns = [moved._move(node, value, 1) - value for _ in range(8)]
    error = (roundoff._SAFETY + 1) * roundoff.SINGLE * value.abs().amax((1, 2, 3), keepdim=True)
    signs = torch.stack([(turn / error).double() for turn in turns])
    assert torch.allclose(signs.abs(), torch.ones(()).double(), atol=0.2)  # the sum is rounded to a float32
    signs = signs.sign()
    assert signs.mean((1, 2, 3, 4)).abs().max() < 0.03
    together = (signs.flatten(1) @ signs.flatten(1).T) / signs[0].numel()
    assert (together - torch.eye(8)).abs().max() < 0.03  # no two turns agree more than by chance
    assert moved._move(node, value, 1).stride() == value.stride()
