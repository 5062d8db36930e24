"""Folded branches and chains compute what their layers did, and what cannot be folded exactly stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flatcompress import graph


def lively(model):
    """Running statistics and affine parameters away from where they start."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


class Branches(nn.Module):
    """RepVGG's block: 3x3 and 1x1, each with its BatchNorm, and the input through one."""

    def __init__(self, channels=4, stride=1, groups=1, identity=True):
        super().__init__()
        options = {"stride": stride, "groups": groups, "bias": False}
        self.dense = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, **options), nn.BatchNorm2d(channels))
        self.point = nn.Sequential(nn.Conv2d(channels, channels, 1, **options), nn.BatchNorm2d(channels))
        self.identity = nn.BatchNorm2d(channels) if identity else None

    def forward(self, x):
        y = self.dense(x) + self.point(x)
        return torch.relu(y if self.identity is None else y + self.identity(x))


class Skip(nn.Module):
    """x + conv(x): a residual whose block is linear."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.conv(x))


FOLDS = {
    "branches with an identity": (lambda: Branches(), 1),
    "branches with stride": (lambda: Branches(stride=2, identity=False), 1),
    "grouped branches": (lambda: Branches(groups=2), 1),
    "a linear residual": (Skip, 1),
    "pointwise after 3x3": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1)), 1),
    "3x3 without padding after pointwise": (lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 3)), 1),
    "three in a row": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1)), 1
    ),
    "two blocks": (lambda: nn.Sequential(Branches(), Branches()), 2),
}  # fmt: skip
STAY = {
    "padded 3x3 after pointwise": lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 3, padding=1)),
    "an activation between": lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)),
    "a layer and its BatchNorm": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)),
    "depthwise then pointwise": lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1)),
    "padding by reflection": lambda: nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(4, 4, 1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDS)
def test_a_fold_computes_what_its_layers_did(case):
    make, count = FOLDS[case]
    model = lively(make())
    x = torch.randn(2, 4, 7, 7)
    folded, folds = graph.fold(model, x)
    assert len(folds) == count
    layers = [m for m in folded.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    assert len(layers) == count
    y = torch.randn(3, 4, 7, 7)
    with torch.no_grad():
        torch.testing.assert_close(folded(y), model(y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", STAY)
def test_what_is_not_exact_stays(case):
    model = lively(STAY[case]())
    folded, folds = graph.fold(model, torch.randn(2, 4, 7, 7))
    assert folds == [] and sum(isinstance(m, nn.Conv2d) for m in folded.modules()) >= 1


def test_two_linear_layers_by_hand():
    """W = (1 2) (1 0; 0 3) = (1 6), b = (1 2) (1, -1) + 0.5 = -0.5."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model.load_state_dict(
        {
            "0.weight": torch.tensor([[1.0, 0.0], [0.0, 3.0]]),
            "0.bias": torch.tensor([1.0, -1.0]),
            "1.weight": torch.tensor([[1.0, 2.0]]),
            "1.bias": torch.tensor([0.5]),
        }
    )
    folded, folds = graph.fold(model, torch.ones(2, 2))
    layer = folded.get_submodule(folds[0].name)
    assert torch.equal(layer.weight, torch.tensor([[1.0, 6.0]])) and torch.equal(layer.bias, torch.tensor([-0.5]))
    assert folds[0].layers == ("0", "1")


def test_an_intermediate_result_that_is_read_twice_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            y = self.a(x)
            return torch.relu(self.b(y)) + y

    model = Twice().eval()
    assert graph.fold(model, torch.randn(2, 3))[1] == []


def test_the_model_itself_is_left_alone():
    model = lively(Branches()).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graph.fold(model, torch.randn(2, 4, 5, 5))
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
