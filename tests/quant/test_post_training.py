"""A float network onto integers without training: every step is a switch, and each keeps what it promises."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import Encoder, Net, trained
from torch import nn

from flatcompress import quant
from flatcompress.errors import UserError
from flatcompress.plan import apply_plan, load_weights
from flatcompress.quant.ptq import CALIBRATORS, CORRECTIONS, ROUNDINGS, SCALINGS, WEIGHT_SCALES
from flatcompress.quant.ptq.blocks import blocks
from flatcompress.quant.ptq.gptq import gptq
from flatcompress.quant.ptq.paths import Paths, float_twin
from flatcompress.quant.ptq.rounding import adaround, brecq


def network(make=Net, steps: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return trained(make(), steps).eval()


def images(model: nn.Module, count: int = 64, seed: int = 3) -> torch.Tensor:
    return torch.randn(count, *model.input_shape, generator=torch.Generator().manual_seed(seed))


def error(model: nn.Module, reference: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        wanted = reference(x)
        return float((model(x) - wanted).square().mean() / wanted.square().mean())


def quantized(reference: nn.Module, x: torch.Tensor, *args, **kwargs) -> tuple[nn.Module, quant.ptq.PostTraining]:
    model = copy.deepcopy(reference)
    return model, quant.post_training(model, [x], *args, **kwargs)


SWITCHES = [("scaling", n) for n in SCALINGS] + [("weight_scale", n) for n in WEIGHT_SCALES]
SWITCHES += [("calibrator", n) for n in CALIBRATORS] + [("correction", n) for n in CORRECTIONS]
SWITCHES += [("rounding", n) for n in ("nearest", "gptq")]


@pytest.mark.slow
@pytest.mark.parametrize(("key", "name"), SWITCHES)
def test_every_switch_leaves_a_network_close_to_float_at_eight_bits(key, name):
    reference = network()
    x = images(reference)
    model, done = quantized(reference, x, 8, 8, **{key: name})
    assert done.settings[key] == name
    # The start that LSQ trains from is known to be coarse at 8 bits.
    assert error(model, reference, x) < (2e-2 if name == "lsq" else 1e-3)


def test_the_plan_and_the_state_dict_give_the_same_model_again():
    reference = network()
    x = images(reference)
    model, done = quantized(reference, x, 4, 8, scaling="equalize", rounding="gptq", correction="batchnorm")
    again = apply_plan(network(), done.plan, x[:2])
    load_weights(again, model.state_dict())
    assert torch.equal(again.eval()(x), model(x))


def test_the_same_seed_gives_the_same_bits():
    reference = network()
    x = images(reference)
    runs = [quantized(reference, x, 4, 4, rounding=brecq(steps=3), seed=1)[0](x) for _ in range(2)]
    assert torch.equal(*runs)


def test_modes_gradients_and_batches_are_as_before():
    model = network().train()
    model.zero_grad()
    x = images(model)
    quant.post_training(model, [(x[:40], torch.zeros(40)), (x[40:], torch.zeros(24))], 8, 8)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters()) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("make", [adaround, brecq])
def test_reconstruction_without_steps_is_rounding_to_nearest_bit_for_bit(make):
    reference = network()
    x = images(reference)
    plain, _ = quantized(reference, x, 3, 8, correction="none")
    settled, _ = quantized(reference, x, 3, 8, correction="none", rounding=make(steps=0))
    for name, layer in quant.quantized_layers(plain).items():
        other = quant.quantized_layers(settled)[name]
        assert torch.equal(layer.weight_spec().values, other.weight_spec().values), name
    assert torch.equal(plain(x), settled(x))


@pytest.mark.parametrize(("make", "net"), [(brecq, Net), pytest.param(adaround, Encoder, marks=pytest.mark.slow)])
def test_reconstruction_moves_every_weight_to_a_neighbour_and_lowers_the_loss(make, net):
    reference = network(net)
    x = images(reference)
    plain, _ = quantized(reference, x, 3, 8, correction="none", first_last_bits=3)
    learned, done = quantized(reference, x, 3, 8, correction="none", first_last_bits=3, rounding=make(steps=40))
    moved = 0
    for name, layer in quant.quantized_layers(plain).items():
        step = layer.weight_quant.tensor_quant.step()
        difference = quant.quantized_layers(learned)[name].quantized_weight() - reference.get_submodule(name).weight
        inside = (reference.get_submodule(name).weight / step).abs() < 3
        assert bool((difference[inside].abs() <= step.expand_as(difference)[inside] * 1.0001).all())
        moved += int((difference - (layer.quantized_weight() - reference.get_submodule(name).weight)).ne(0).sum())
    rows = [r["block"] for r in done.layers]
    assert moved > 0 and all(r["loss_after"] <= r["loss_before"] for r in rows)
    assert sum(r["loss_after"] for r in rows) < 0.9 * sum(r["loss_before"] for r in rows)


def test_gptq_is_exact_on_a_case_by_hand():
    layer = nn.Sequential(nn.Linear(2, 1, bias=False)).eval()
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([[0.4, 0.4]]))
    quant.quantize(layer, 4, None, example_input=torch.zeros(2, 2), first_last_bits=4)
    made = quant.quantized_layers(layer)["0"]
    made.weight_quant.tensor_quant.set_scale(torch.ones(1, 1))
    # Two inputs that are always equal: 0.4 + 0.4 is nearer to one than to zero.
    x = torch.randn(64, 1).expand(64, 2).contiguous()
    assert gptq(made, [x], torch.Generator().manual_seed(0)) == "gptq"
    assert made.weight.sum().item() == 1.0


@pytest.mark.parametrize("net", [Net, lambda: Net(relu6=True, final=False), Encoder])
def test_gptq_lowers_the_error_of_rounding_to_nearest(net):
    reference = network(net)
    x = images(reference, 128)
    plain, _ = quantized(reference, x, 3, None, correction="none", first_last_bits=3)
    model, done = quantized(reference, x, 3, None, correction="none", first_last_bits=3, rounding="gptq")
    assert {row["rounding"] for row in done.layers} == {"gptq"}
    assert error(model, reference, x) < error(plain, reference, x)


def test_a_layer_that_gptq_cannot_unfold_is_rounded_to_nearest_and_says_so():
    reference = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    done = quant.post_training(reference, [torch.randn(8, 3, 6, 6)], 4, 8, rounding="gptq")
    assert done.layers[0]["rounding"].startswith("nearest (") and done.layers[1]["rounding"] == "gptq"


@pytest.mark.parametrize("correction", ["bias", "batchnorm"])
def test_corrected_outputs_have_the_float_networks_mean(correction):
    reference = network()
    x = images(reference, 256)
    shifts = {}
    for name in ("none", correction):
        model, _ = quantized(reference, x, 2, 8, correction=name, first_last_bits=2)
        with torch.no_grad():
            shifts[name] = float((model(x) - reference(x)).mean(0).abs().max())
    assert shifts[correction] < 0.1 * shifts["none"]


def test_bias_correction_by_hand():
    layer = nn.Sequential(nn.Linear(1, 1)).eval()
    with torch.no_grad():
        layer[0].weight.fill_(1.0)
        layer[0].bias.fill_(0.5)
    found = CORRECTIONS["bias"].make(layer[0], None, (torch.tensor([2.0]), None), (torch.tensor([2.75]), None))
    assert found == "bias" and layer[0].bias.item() == -0.25


def test_a_layer_without_bias_or_batchnorm_says_that_it_is_not_corrected():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)).eval()
    done = quant.post_training(model, [torch.randn(16, 4)], 4, 8)
    assert done.layers[0]["correction"].startswith("skipped") and done.layers[1]["correction"] == "bias"


def test_blocks_hold_every_node_once_and_end_where_one_tensor_crosses():
    model = network()
    twin = float_twin(model)
    quant.quantize(model, 8, 8)
    paths = Paths(model, twin)
    found = blocks(paths)
    assert [n for block in found for n in block] == paths.nodes
    layers = [[str(n.target) for n in block if paths.layer(n) is not None] for block in found]
    assert layers == [["stem"], ["block1.conv1", "block1.conv2"], ["block2.conv1", "block2.conv2"], ["fc"]]


def test_both_paths_compute_what_their_networks_do():
    model = network()
    twin = float_twin(model)
    x = images(model)
    quant.quantize(model, 4, 4)
    quant.calibrate(model, [x])
    paths = Paths(model, twin)
    for exact, network_ in ((False, twin), (True, model.eval())):
        seen = {}
        paths.advance(paths.nodes, {}, [x], exact, after=lambda node, out, seen=seen: seen.update({node: out[0]}))
        assert torch.equal(seen[paths.nodes[-1]], network_(x))


def test_asking_for_what_there_is_not_is_refused():
    model = network()
    with pytest.raises(UserError, match="at least one batch"):
        quant.post_training(model, [], 8, 8)
    with pytest.raises(UserError, match="entropy"):
        quant.post_training(model, [images(model)], 8, 8, calibrator="entropi")
    with pytest.raises(UserError, match="lsq"):
        quant.post_training(model, [images(model)], 8, 8, method="brevitas")


def test_attention_and_layer_norm_networks_are_quantized_and_smoothed():
    reference = network(Encoder)
    x = images(reference)
    model, done = quantized(reference, x, 8, 8, scaling="smooth")
    assert [r["layer"] for r in done.steps if "skipped" not in r] == ["norm1", "norm2"]
    assert error(model, reference, x) < 1e-3


def test_every_rounding_row_can_be_made():
    assert {ROUNDINGS[name].make().by for name in ROUNDINGS} == {"nothing", "hessian", "layer", "block"}
