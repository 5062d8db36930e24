"""Helpers on modules: modes come back one by one, patterns name layers, BatchNorm's statistics are estimated anew."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flatcompress import flat, graph, models, onnx_export, prune, quant, tasks
from flatcompress.errors import UserError
from flatcompress.modules import check_patterns, estimate_batchnorm, evaluating, matches, modes_kept
from flatcompress.training.batches import evaluate

X = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 4
DATA = torch.utils.data.TensorDataset(X, Y)
BATCHES = [(X, Y)]


def network() -> nn.Sequential:
    """In train mode but for one BatchNorm, frozen on purpose."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 4),
    )  # fmt: skip
    net[1].eval()
    return net


def loss(model: nn.Module) -> torch.Tensor:
    return nn.functional.cross_entropy(model(X), Y)


EVALUATING = {
    "accuracy": lambda m: evaluate(m, DATA, tasks.build()),
    "trace": lambda m: graph.trace(m, X),
    "macs": lambda m: graph.macs(m, X),
    "groups": lambda m: prune.find_groups(m, X),
    "costs": lambda m: prune.CostModel(m, X),
    "sensitivities": lambda m: quant.sensitivities(m, lambda: loss(m)),
    "auto_bits": lambda m: quant.auto_bits(m, lambda: loss(m), example_input=X),
    "sharpness": lambda m: flat.sharpness.sharpness(m, BATCHES, nn.functional.cross_entropy, rho=0.05),
    "curvature": lambda m: flat.curvature.trace(m, BATCHES, nn.functional.cross_entropy, draws=1),
    "re-estimation": lambda m: quant.reestimate_batchnorm(m, [X]),
    "update_bn": lambda m: flat.averaging.update_bn(m, [X]),
    "build": lambda m: models.external.checked("given", m, 4, (1, 8, 8)),
}


@pytest.mark.parametrize("what", EVALUATING)
def test_a_frozen_batchnorm_stays_frozen_after(what):
    model = network()
    before = [m.training for m in model.modules()]
    EVALUATING[what](model)
    assert [m.training for m in model.modules()] == before


def test_a_frozen_batchnorm_stays_frozen_through_quantization_and_export(tmp_path):
    model = network()
    quant.quantize(model, 8, 8, example_input=X)
    model[1].eval()
    before = [m.training for m in model.modules()]
    quant.calibrate(model, [X])
    exported = onnx_export.export(model, X, tmp_path / "model.onnx")
    onnx_export.certify(exported, [X], model=model, latency_runs=0)
    assert [m.training for m in model.modules()] == before


def test_modes_come_back_after_an_exception():
    model = network()
    before = [m.training for m in model.modules()]
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(m.training for m in model.modules())
        raise ZeroDivisionError
    with modes_kept(model):
        model.train()
    assert [m.training for m in model.modules()] == before


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layer1", "layer1", True), ("layer1", "layer1.0.conv", True), ("layer1", "layer10", False),
        (r"re:layer\d+", "layer10", True), (r"re:layer\d", "layer10", False), (r"re:.*\.conv", "a.b.conv", True),
    ],
)  # fmt: skip
def test_a_pattern_names_a_layer_with_all_below_it_or_is_an_expression_over_the_whole_name(pattern, name, expected):
    assert matches(pattern, name) is expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("conv9", r"^ignore: 'conv9' matches no layer. Did you mean 'conv1'\? Layers: conv1, fc"),
     ("re:conv[", "^ignore: 're:conv\\[' is no regular expression")],
)  # fmt: skip
def test_a_pattern_that_names_nothing_is_refused(pattern, message):
    check_patterns("ignore", ["fc", "re:conv."], ["conv1", "fc"])
    with pytest.raises(UserError, match=message):
        check_patterns("ignore", [pattern], ["conv1", "fc"])


def test_statistics_become_the_mean_over_batches_in_the_mode_the_rest_is_in():
    norm = nn.BatchNorm1d(3, momentum=0.0)
    model = nn.Sequential(norm, nn.Dropout(0.5))
    batches = [torch.randn(16, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    assert estimate_batchnorm(model, batches) == 3
    assert torch.allclose(norm.running_mean, torch.stack([b.mean(0) for b in batches]).mean(0), atol=1e-6)
    assert torch.allclose(norm.running_var, torch.stack([b.var(0) for b in batches]).mean(0), atol=1e-6)
    assert norm.momentum == 0.0 and model[1].training


@pytest.mark.parametrize("batches", [[], [X * float("nan")]], ids=["no batch", "NaN"])
def test_statistics_are_kept_when_the_data_cannot_give_new_ones(batches):
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="BatchNorm re-estimation"):
        estimate_batchnorm(model, batches)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
