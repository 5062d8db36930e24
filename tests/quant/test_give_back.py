"""Bits are given back until the drop is within its limit, the most worthwhile layers first."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import Net, trained

from flatcompress import quant
from flatcompress.errors import UserError


def setting():
    torch.manual_seed(0)
    model = trained(Net(), 10).eval()
    x = torch.randn(64, 3, 8, 8)
    reference = copy.deepcopy(model)

    def metric(found: torch.nn.Module) -> float:
        """Decibels of the outputs, at most 60."""
        with torch.no_grad():
            wanted = reference(x)
            error = (found(x) - wanted).square().sum() / wanted.square().sum()
        return min(60.0, -10 * float(error.clamp_min(1e-12).log10()))

    return model, x, metric


def test_layers_are_given_back_until_the_limit_holds():
    model, x, metric = setting()
    done, rounds = quant.within_drop(model, [x], metric, 37.0, 2, 8, first_last_bits=2)
    assert rounds[0]["given_back"] == {} and rounds[0]["drop"] > 37
    assert rounds[-1]["drop"] <= 37 and 60 - metric(model) == pytest.approx(rounds[-1]["drop"])
    bits = {row["name"]: row["bits"] for row in done.layers}
    for name, to in rounds[-1]["given_back"].items():
        assert bits.get(name, "float") == to
    assert any(b == 2 for b in bits.values()), "not everything was given back"


def test_nothing_is_given_back_where_nothing_is_lost():
    model, x, metric = setting()
    _, rounds = quant.within_drop(model, [x], metric, 40.0, 8, 8)
    assert [r["given_back"] for r in rounds] == [{}]


@pytest.mark.slow
def test_a_limit_that_cannot_be_kept_is_said_and_leaves_the_model_float():
    model, x, metric = setting()
    with pytest.raises(UserError, match="every layer is float"):
        quant.within_drop(model, [x], metric, 1.0, 8, 2, residual_bits=2)
    assert not quant.is_quantized(model) and metric(model) == 60.0
