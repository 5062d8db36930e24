"""Connectivity, similarity, regimes and PSP-entropy: cases by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flatcompress.errors import UserError
from flatcompress.flat import connectivity, entropy


def line(weights, bias=(0.0, 0.0)):
    model = nn.Linear(2, 2)
    model.load_state_dict({"weight": torch.tensor(weights), "bias": torch.tensor(bias)})
    return model


X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
Y = torch.tensor([0, 1, 0, 1])
RIGHT = [[1.0, 0.0], [0.0, 1.0]]
WRONG = [[-1.0, 0.0], [0.0, -1.0]]


def test_the_way_between_two_solutions_by_hand():
    same = connectivity.linear_connectivity(line(RIGHT), line([[3.0, 0.0], [0.0, 3.0]]), [(X, Y)])
    assert same == 0.0
    # Ends: 0 and 4 wrong of 4, mean 1/2. At a quarter of the way none is wrong, at three quarters all are: 50 percent.
    assert abs(connectivity.linear_connectivity(line(RIGHT), line(WRONG), [(X, Y)], points=3)) == 50.0


def parted_by_zero(sign):
    """Both signs compute (x, -x); halfway between them all weights are zero."""
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    net[0].weight.data = torch.tensor([[sign], [-sign]])
    net[2].weight.data = torch.tensor([[sign, -sign], [-sign, sign]])
    return net


SIGNED, SIDES = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1])


def test_a_barrier_between_two_right_networks_is_negative():
    found = connectivity.linear_connectivity(parted_by_zero(1.0), parted_by_zero(-1.0), [(SIGNED, SIDES)], points=1)
    assert found == -50.0  # one of the two samples is wrong there


def test_alignment_of_outputs_by_hand():
    a = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    b = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    assert connectivity.cka(a, b) == 0.0 and connectivity.cka(a, -2 * a + 5) == pytest.approx(1.0)
    # a^T c = 2, a^T a = 4, c^T c = 2: 4 / (4 * 2)
    c = torch.tensor([[1.0], [-1.0], [0.0], [0.0]])
    assert connectivity.cka(a, c) == pytest.approx(0.5)
    assert connectivity.cka(a, torch.ones(4, 3)) == 0.0


def test_three_regimes_and_what_helps_in_each():
    assert connectivity.regime(line(RIGHT), line(RIGHT), [(X, Y)]).name == "II-B"
    unlike = line([[1.0, 0.9], [0.9, 1.0]], (0.0, 0.0))
    found = connectivity.regime(line(RIGHT), unlike, [(X, Y)], alike=0.999)
    assert found.name == "II-A" and "lower temperature" in found.advice and found.lmc == 0.0
    parted = connectivity.regime(parted_by_zero(1.0), parted_by_zero(-1.0), [(SIGNED, SIDES)], points=1)
    assert (parted.name, parted.lmc) == ("I", -50.0) and "higher temperature" in parted.advice
    with pytest.raises(UserError, match="no line"):
        connectivity.linear_connectivity(line(RIGHT), nn.Linear(2, 3), [(X, Y)])


def test_entropy_of_neurons_by_hand():
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU())
    model[0].weight.data = torch.tensor([[1.0], [-1.0]])
    x = torch.tensor([[1.0], [1.0], [1.0], [-1.0], [-1.0], [-1.0]])
    y = torch.tensor([0, 0, 0, 0, 1, 1])
    # Class 0 fires the first neuron in three of four samples and the second in one; class 1 never and always.
    one = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert entropy.psp_entropy(model, [(x[:3], y[:3]), (x[3:], y[3:])], 2) == {"1": pytest.approx((2 * one + 0) / 4)}


def test_entropy_counts_places_and_repeated_modules_and_refuses_what_it_cannot_see():
    act, conv = nn.ReLU(), nn.Conv2d(1, 1, 1, bias=False)
    conv.weight.data.fill_(1.0)
    x, y = torch.tensor([[[[1.0, -1.0]]], [[[1.0, 1.0]]]]), torch.tensor([0, 0])
    # The first place always fires; the second in one of two samples.
    assert entropy.psp_entropy(nn.Sequential(conv, act), [(x, y)], 1) == {"1": pytest.approx(0.5)}
    turned = nn.Sequential(conv, act, nn.Flatten(), nn.Linear(2, 2, bias=False), act)
    turned[3].weight.data = torch.tensor([[1.0, 1.0], [0.0, -1.0]])
    assert entropy.psp_entropy(turned, [(x, y)], 1) == {"1": pytest.approx(0.5), "1#2": 0.0}
    with pytest.raises(UserError, match="class 1 has no samples"):
        entropy.psp_entropy(nn.Sequential(conv, act), [(x, y)], 2)
    with pytest.raises(UserError, match="no such module"):
        entropy.psp_entropy(nn.Linear(1, 1), [(x, y)], 1)
