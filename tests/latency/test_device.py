"""Flash, RAM and instructions before training: the figures are the written C's, and budgets of them are met."""

from __future__ import annotations

import copy

import pytest
import torch
from stage_pieces import SoftmaxOverChannels, config, context
from torch import nn

from flatcompress import models, onnx_export, prune, quant
from flatcompress.errors import UserError
from flatcompress.latency import device
from flatcompress.onnx_export.c import costs, sizing
from flatcompress.stages import run_stage
from flatcompress.stages.dry_run import dry_run

NETS = {"resnet8": (3, 16, 16), "ds_cnn": (1, 25, 10)}


class Gated(nn.Module):
    """Squeeze and excite after a max pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(24, 4)
        self.relu = nn.ModuleList(nn.ReLU() for _ in range(3))
        self.mean, self.around = nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.relu[0](self.stem(x)))
        x = x * torch.sigmoid(self.excite(self.relu[1](self.squeeze(self.around(x)))))
        return self.fc(self.mean(self.relu[2](self.left(x))).flatten(1))


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    if name == "gated":
        torch.manual_seed(0)
        return Gated(), torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    model = models.build(name, num_classes=4, input_shape=NETS[name], seed=0)
    return model, torch.randn(4, *NETS[name], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [*NETS, "gated"])
def test_ram_at_other_widths_is_the_cut_network_s_and_flash_is_near_it(name):
    model, x = network(name)
    sketch = sizing.Sketch.of(device.decided(model, x))
    for ratio in (0.3, 0.6):
        cut = copy.deepcopy(model)
        prune.prune(cut, x, ratio=ratio)
        widths = prune.CostModel(cut, x).dense
        guess = sketch.at({name: width.outputs for name, width in widths.items()})
        real = costs.estimate(device.decided(cut, x))
        assert guess.ram == real.ram
        assert guess.flash == pytest.approx(real.flash, rel=0.03)
        assert guess.instructions == pytest.approx(real.instructions, rel=0.1)


def test_at_its_own_widths_a_sketch_is_the_program_itself():
    model, x = network("resnet8")
    found = device.decided(model, x)
    same = sizing.Sketch.of(found).at({})
    own = costs.estimate(found)
    assert (same.ram, same.flash) == (own.ram, own.flash)


@pytest.mark.parametrize("sparsity", [0.0, 0.8])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_constants_and_ram_are_those_that_are_written(bits, sparsity, tmp_path):
    model, x = network("ds_cnn")
    if sparsity:
        prune.masks.sparsify(model, sparsity, scope="layer")
    quant.quantize(model, weight_bits=bits, activation_bits=4, example_input=x)
    quant.calibrate(model, [x])
    written = onnx_export.export(model.eval(), x, tmp_path / "model.onnx", "c").c
    coded = costs.DECODER * any(layer.block for layer in written.decided.layers.values())
    stored = written.figures["weight_bytes"] + written.figures["parameter_bytes"] + coded
    assert costs.constants(written.decided) == stored
    assert costs.estimate(written.decided).ram == written.figures["ram_bytes"]


def test_pruning_meets_flash_and_ram_together_in_the_c_that_is_written():
    work = context()
    before = device.measured(device.decided(work.model, work.example()))
    limits = {"flash": round(0.8 * before["flash"]), "ram": round(0.6 * before["ram"])}
    run_stage("prune", work, config("prune", method="magnitude", epochs=2, budget_bits=4, **limits))
    after = device.measured(device.decided(work.model, work.example()))
    assert after["ram"] <= limits["ram"] and after["flash"] <= 1.03 * limits["flash"]


def test_a_peak_of_memory_costs_only_the_layers_that_make_it():
    model, x = network("resnet8")
    cost = device.DeviceCost(model, x, {"ram": 0.75 * device.measured(device.decided(model, x))["ram"]})
    groups = prune.find_groups(model, x)
    scores, costs_of = prune.score(groups), prune.CostModel(model, x)
    kept = {}
    for weighs in (False, None):  # None for the ranking alone
        budget = prune.Budget("cost", 1.0, cost, absolute=True, knapsack=weighs)
        limits = prune.Limits("global" if weighs is False else "isomorphic")
        kept[weighs] = costs_of.widths(groups, prune.choose(groups, scores, budget, limits, costs=costs_of))
        assert cost(kept[weighs]) <= 1
    assert costs_of.params(kept[False]) > costs_of.params(kept[None])
    assert costs_of.params(kept[False]) > 0.9 * costs_of.params(costs_of.dense)  # the deep layers keep theirs


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"flash": "2k"}, r"stages\.0\.prune: flash 2,000 cannot be met: .* the C takes flash [\d,]+ B"),
        ({"flash": "40k", "ram": 100}, r"ram 100 cannot be met: .* ram [\d,]+ B"),
        ({"instructions": "1k"}, r"instructions 1,000 cannot be met: .* instructions [\d,]+\."),
        ({"ram": "1M"}, "nothing was pruned: the dense model is within ram 1,000,000 already"),
    ],
)
def test_what_pruning_cannot_meet_is_refused_before_anything_is_trained(keys, message):
    with pytest.raises(UserError, match=message):
        dry_run(context(), [("prune", config("prune", method="magnitude", **keys))])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"bits": "auto", "flash": "3k"}, r"flash 3,000 cannot be met: with 2 bits .*prune: \{flash: 3000\}"),
        ({"ram": 200}, r"ram 200 cannot be met: with 4 bits .* ram [\d,]+ B"),
    ],
)
def test_what_bits_cannot_meet_is_refused_before_anything_is_trained(keys, message):
    with pytest.raises(UserError, match=message):
        dry_run(context(), [("quantize", config("quantize", **keys))])


def test_a_module_without_a_c_form_is_named():
    with pytest.raises(UserError, match=r"stages\.0\.prune: module 'after': .*no C form"):
        dry_run(context(SoftmaxOverChannels), [("prune", config("prune", method="magnitude", flash="10k"))])


def test_auto_bits_fill_a_flash_budget_and_not_more():
    work = context()
    settings = {"activation_bits": 4, "first_last_bits": 8}
    least, most = (
        device.measured(device.decided(work.model, work.example(), weight_bits=b, **settings))["flash"] for b in (2, 8)
    )
    budget = round(least + 0.5 * (most - least))
    run_stage("quantize", work, config("quantize", epochs=1, bits="auto", flash=budget, sensitivity="gradient"))
    found = device.measured(device.of_quantized(work.model, work.example()))
    chosen = {layer.weight_spec().bits for layer in quant.quantized_layers(work.model).values()}
    assert len(chosen) > 1
    assert 0.85 * budget < found["flash"] <= 1.05 * budget  # training moves what the last digits are
