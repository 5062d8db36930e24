"""What calibration collects of a tensor does not depend on how that lies in memory, nor on how it is worked through."""

from __future__ import annotations

import math

import pytest
import torch

from flatcompress.errors import UserError
from flatcompress.quant.quantizers import lsq
from flatcompress.quant.quantizers.lsq import Observer
from flatcompress.quant.sensitivity import rounding_error

LAYOUTS = {
    "contiguous": lambda v: v,
    "channels last": lambda v: v.contiguous(memory_format=torch.channels_last),
    "transposed": lambda v: v.transpose(0, 1).contiguous().transpose(0, 1),
    "a slice": lambda v: torch.cat([v, v], 1)[:, : v.shape[1]],
}


def tensors():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator) for shape in ((2, 3, 5, 7), (4, 16, 9, 9), (1, 1, 1, 1), (3, 8, 64, 64))
    ]


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_an_observer_sees_the_same_in_every_layout(layout, monkeypatch):
    monkeypatch.setattr(lsq, "_PART", 1000)
    for plain in tensors():
        seen = Observer("q")
        v = LAYOUTS[layout](plain)
        assert seen.see(v) is v
        exact = math.fsum(plain.double().abs().flatten().tolist())
        assert seen.total == pytest.approx(exact, rel=1e-14) and seen.count == plain.numel()
        assert (seen.low, seen.high) == (float(plain.min()), float(plain.max()))
        step = max(1, plain.numel() // 2048)
        assert torch.equal(seen.sample(), plain.flatten()[::step][:2048])


def test_an_observer_takes_other_types_and_few_dimensions():
    for v in (
        torch.tensor(-2.5),
        torch.tensor([1.0, -3.0]),
        torch.tensor([[1.0, -2.0]], dtype=torch.float64),
        torch.zeros(0, 3) + 1,
    ):
        if v.numel():
            seen = Observer("q")
            seen.see(v)
            assert seen.total == float(v.abs().sum()) and torch.equal(seen.sample(), v.flatten())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_observer_refuses_what_is_not_finite(bad):
    v = torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    v[1, 2, 3, 0] = bad
    with pytest.raises(UserError, match="NaN or infinity at quantizer 'q'"):
        Observer("q").see(v)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_rounding_error_is_of_the_best_of_the_grids_tried(bits):
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(bits))
    rows, found = weight.flatten(1), rounding_error(weight, bits).flatten(1)
    qn, qp = lsq.grid(bits, signed=True)
    least = torch.full((6,), math.inf)
    for share in torch.linspace(1 / 60, 1, 60):
        step = rows.abs().amax(1, keepdim=True) / qp * share
        error = ((rows / step).round().clamp(-qn, qp) * step - rows).square().sum(1)
        least = torch.minimum(least, error)
    assert torch.allclose(found.square().sum(1), least, rtol=1e-5)
