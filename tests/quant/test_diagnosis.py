"""A planted fault is named before anything else, in networks of every kind; a sound network names none."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from nets import Encoder, Net, trained
from torch import nn

from flatcompress import quant
from flatcompress.errors import UserError

KINDS = [Net, lambda: Net(width=12), lambda: Net(relu6=True, final=False), Encoder]
FAULTS = ("coarse weight", "fine weight", "dead channel", "coarse activation", "saturated activation")


def sound(kind: int, seed: int, bits: int) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    twin = trained(KINDS[kind](), 10, seed=seed).eval()
    x = torch.randn(64, *twin.input_shape)
    model = copy.deepcopy(twin)
    quant.post_training(model, [x], bits, bits)
    return model, twin, x


def plant(model: nn.Module, fault: str, draw: random.Random) -> str:
    """One fault in one place; returns its name."""
    if "activation" in fault:
        name, module = draw.choice(sorted(quant.activation_quantizers(model).items()))
        factor = 8.0 if fault.startswith("coarse") else 1 / 8
        module.tensor_quant.scale.data.mul_(factor)
        return name
    name, layer = draw.choice(sorted(quant.quantized_layers(model).items()))
    if fault == "dead channel":
        layer.weight.data[draw.randrange(layer.weight.shape[0])] = 0
    else:
        layer.weight_quant.tensor_quant.scale.data.mul_(8.0 if fault.startswith("coarse") else 1 / 8)
    return name


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_a_planted_fault_is_named_first_and_a_sound_network_names_none(kind, bits):
    draw = random.Random(100 * kind + bits)
    model, twin, x = sound(kind, kind, bits)
    assert quant.diagnose(model, twin, [x])["first_bad"] is None
    for fault in FAULTS:
        broken = copy.deepcopy(model)
        planted = plant(broken, fault, draw)
        found = quant.diagnose(broken, twin, [x])
        assert found["first_bad"] == planted, (fault, planted, [r for r in found["rows"] if r["bad"]])
        assert planted in found["proposal"]


@pytest.mark.slow
def test_in_20_of_20_networks_the_planted_place_is_named_first():
    """The faults of a table: a scale that is eight times too large, a dead channel, a saturated activation."""
    table, draw = [], random.Random(0)
    for number in range(20):
        model, twin, x = sound(number % len(KINDS), 100 + number, (8, 4)[number % 2])
        for fault in ("coarse weight", "dead channel", "saturated activation"):
            broken = copy.deepcopy(model)
            planted = plant(broken, fault, draw)
            found = quant.diagnose(broken, twin, [x])["first_bad"]
            table.append((number, type(twin).__name__, fault, planted, found))
    for fault in ("coarse weight", "dead channel", "saturated activation"):
        rows = [row for row in table if row[2] == fault]
        print(fault, sum(row[3] == row[4] for row in rows), "of", len(rows))
    assert [row for row in table if row[3] != row[4]] == []


def test_rows_say_local_and_cumulative_error():
    model, twin, x = sound(0, 0, 8)
    rows = quant.diagnose(model, twin, [x])["rows"]
    assert {r["name"] for r in rows} == {*quant.quantized_layers(model), *quant.activation_quantizers(model)}
    assert all(r["local_db"] > 25 for r in rows)
    weights = [r for r in rows if r["what"] == "weight"]
    assert all(r["cumulative_db"] <= r["local_db"] + 3 for r in weights)


def test_local_error_by_hand():
    twin = nn.Sequential(nn.Linear(1, 1, bias=False)).eval()
    twin[0].weight.data.fill_(0.9)
    model = copy.deepcopy(twin)
    quant.quantize(model, 4, None, example_input=torch.zeros(2, 1), first_last_bits=4)
    quant.quantized_layers(model)["0"].weight_quant.tensor_quant.set_scale(torch.ones(1, 1))
    (row,) = quant.diagnose(model, twin, [torch.ones(3, 1)])["rows"]
    # 0.9 became 1.0: 20 log10(0.9 / 0.1)
    assert row["local_db"] == pytest.approx(19.08, abs=0.01) and row["cumulative_db"] == row["local_db"]


def test_without_inputs_it_is_refused():
    model, twin, _ = sound(0, 0, 8)
    with pytest.raises(UserError, match="at least one batch"):
        quant.diagnose(model, twin, [])
