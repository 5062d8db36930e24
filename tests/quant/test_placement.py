from __future__ import annotations

import copy

import pytest
import torch
from nets import Encoder, Net, trained
from torch import nn

from flatcompress import graph, quant
from flatcompress.errors import UserError
from flatcompress.plan import Plan, apply_plan

torch.set_num_threads(1)
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(7))


def rows(plan: Plan, key: str = "activations") -> dict[str, tuple]:
    return {r["name"]: (r["bits"], r.get("signed")) for r in plan.of_kind("quantizers")[0][key]}


def calibrated(model: nn.Module, **options: object) -> tuple[nn.Module, Plan]:
    plan = quant.quantize(model, **options)
    x = X if len(model.input_shape) == 3 else torch.randn(4, *model.input_shape)
    quant.calibrate(model, [x])
    return model, plan


def test_residual_net() -> None:
    _, plan = calibrated(Net())
    assert rows(plan) == {
        "input": (8, True),
        "act": (4, False),  # before the max pool, which passes it on; block1 and its add share it
        "block1_act1": (4, False),
        "block1_bn2": (8, True),
        "block1_act2": (4, False),
        "block2_act1": (4, False),
        "block2_bn2": (8, True),
        "block2_act2": (4, False),
        "average": (8, False),
    }
    assert rows(plan, "layers") == {
        "stem": (8, None), "fc": (8, None),
        **{f"block{i}.conv{j}": (4, None) for i in (1, 2) for j in (1, 2)},
    }  # fmt: skip


def test_linear_bottleneck_quantizes_the_add() -> None:
    found = rows(calibrated(Net(relu6=True, final=False))[1])
    assert found["block1_bn2"] == (8, True)
    assert found["block1_add"] == (8, True)  # it enters the next add
    assert found["block2_add"] == (4, True)
    assert found["block1_act1"] == (4, False)  # ReLU6


def test_one_quantizer_per_tensor_and_none_before_a_relu() -> None:
    model, _ = calibrated(Net())
    nodes = list(graph.installed_graph(model).nodes)
    quantizers = [n for n in nodes if str(n.target).startswith("quantizers.")]
    assert len({n.args[0] for n in quantizers}) == len(quantizers)
    for node in quantizers:
        assert not any("relu" in str(u.target) for u in node.users)
        source = node.args[0]
        assert not any(str(u.target).split(".")[-1].startswith("bn") for u in source.users)
    layers = [n for n in nodes if str(n.target) in quant.quantized_layers(model)]
    passes = ("max_pool2d", "flatten", "dropout")
    for node in layers:
        source = node.args[0]
        while any(p in str(source.target) for p in passes):
            source = source.args[0]
        assert source in quantizers


def test_attention_quantizes_both_products_and_keeps_norms_float() -> None:
    model, plan = calibrated(Encoder())
    found = rows(plan)
    assert found["softmax"] == (4, False)
    assert found["qkv"] == (4, True)  # one grid for query, key and value: their scaling moved behind the product
    assert found["norm1"] == (4, True) and found["act"] == (4, True)
    assert found["mean"] == (8, True)
    floats = {r["name"]: r["why"] for r in quant.explain(model) if r["what"] == "float"}
    assert set(floats) == {"norm1", "norm2"} and "LayerNorm" in floats["norm1"]
    # the residual stream stays float: nothing is quantized between the two blocks' adds
    assert not any(name.startswith("add") for name in found)


def test_scaling_behind_the_product_is_the_same_function() -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    x = torch.randn(3, 4, 6)
    expected = model(x)
    gm = graph.trace(model, x)
    from flatcompress.quant.operators import hoist_scalars

    hoist_scalars(gm)
    gm.recompile()
    torch.testing.assert_close(gm(x), expected)


@pytest.mark.parametrize("make", [Net, lambda: Net(True, False), Encoder])
def test_same_object_same_names_copies_and_modes(make) -> None:
    torch.manual_seed(0)
    model = make()
    names, kind = list(model.state_dict()), type(model)
    weights = dict(model.named_parameters())
    same, _ = calibrated(model)
    assert same is model and isinstance(model, kind)
    assert all(dict(model.named_parameters())[n] is p for n, p in weights.items())
    assert [n for n in model.state_dict() if "quant" not in n and not n.startswith("bias_rounding.")] == names
    trained(model)
    x = torch.randn(5, *model.input_shape)
    model.eval()
    clone = copy.deepcopy(model)
    assert torch.equal(clone(x), model(x))
    trained(clone)
    clone.eval()
    assert not torch.equal(clone(x), model(x))
    assert torch.isfinite(model.double()(x.double())).all()


@pytest.mark.parametrize("method", [*quant.QUANTIZERS])
def test_every_method_trains_and_reloads_bit_for_bit(method: str) -> None:
    torch.manual_seed(0)
    model = Net()
    plan = quant.quantize(model, 3, 4, method=method, per_channel=method != "lsq+")
    trained(model, 3)
    model.eval()
    fresh = apply_plan(Net(), Plan.from_json(plan.to_json()))
    fresh.load_state_dict(model.state_dict())
    fresh.eval()
    assert torch.equal(fresh(X), model(X))
    for name, scale in quant.scale_parameters(model).items():
        assert torch.isfinite(scale).all(), name


@pytest.mark.parametrize("method", ["lsq", "brevitas"])
def test_specs_are_what_the_forward_computes(method: str) -> None:
    torch.manual_seed(0)
    model = trained(calibrated(Net(), method=method)[0], 35 if method == "brevitas" else 3)
    model.eval()
    seen = {}
    for name, layer in quant.quantized_layers(model).items():
        spec = layer.weight_spec()
        real = spec.values.float() * spec.scale.view(-1, *[1] * (layer.weight.dim() - 1))
        assert torch.equal(real, layer.quantized_weight())
        assert spec.values.dtype is torch.int8 and spec.scale.numel() in (1, layer.weight.shape[0])
        assert int(spec.values.int().abs().max()) <= 2 ** (spec.bits - 1), name
    for name, quantizer in quant.activation_quantizers(model).items():
        quantizer.register_forward_hook(lambda m, i, o, n=name: seen.update({n: (i[0], o)}))
    model(X)
    for name, (before, after) in seen.items():
        spec = quant.activation_quantizers(model)[name].activation_spec()
        codes = torch.clamp(torch.round(before / spec.scale) + spec.zero_point, spec.qmin, spec.qmax)
        torch.testing.assert_close(spec.scale * (codes - spec.zero_point), after)


def test_weight_mask_stays_on_its_layer() -> None:
    model = Net()
    model.block1.conv1.register_buffer("weight_mask", torch.ones_like(model.block1.conv1.weight, dtype=torch.bool))
    calibrated(model)
    assert "block1.conv1.weight_mask" in model.state_dict()


def test_scales_survive_assigned_weights_and_loaded_states() -> None:
    model, _ = calibrated(Net())
    scale = model.fc.weight_quant.tensor_quant.scale
    model.fc.weight = nn.Parameter(model.fc.weight.detach() * 2)
    model.load_state_dict(model.state_dict())
    assert model.fc.weight_quant.tensor_quant.scale is scale  # the optimizer's parameter is still the one in use


def test_every_trainable_tensor_is_a_parameter_of_the_model_once() -> None:
    model, _ = calibrated(Net())
    parameters = [id(p) for p in model.parameters()]
    assert len(parameters) == len(set(parameters))
    scales = quant.scale_parameters(model)
    assert {id(p) for p in scales.values()} <= set(parameters)
    assert len(scales) == len(quant.quantized_layers(model)) + len(quant.activation_quantizers(model))
    assert quant.scale_names(model) == {n for n, _ in model.named_parameters() if n.endswith("tensor_quant.scale")}


def test_overrides_ignore_and_weights_only() -> None:
    model = Net()
    plan = quant.quantize(
        model, 4, 4, ignore=["block2"], bits={"re:block1.*": 3, "block1.conv2": {"weight": 2, "activation": 5}}
    )
    layers = rows(plan, "layers")
    assert layers["block1.conv1"] == (3, None) and layers["block1.conv2"] == (2, None)
    assert rows(plan)["block1_act1"] == (5, False)
    assert not any(n.startswith("block2.") for n in layers)
    floats = {r["name"]: r["why"] for r in quant.explain(model) if r["what"] == "float"}
    assert floats["block2.conv1"] == "named in ignore"
    only = Net()
    plan = quant.quantize(only, 7, None)
    assert rows(plan) == {} and rows(plan, "layers")["block1.conv1"] == (7, None)
    assert torch.isfinite(only(X)).all()


def test_what_is_no_plain_layer_is_listed_with_the_reason() -> None:
    class Odd(nn.Module):
        input_shape = (4,)

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 4))
            self.fc = nn.Linear(3, 2)
            self.unused = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(nn.functional.linear(x, self.table * x.mean()))

    model = Odd()
    with pytest.raises(UserError, match=r"computed from the input.*max_float_macs"):
        quant.quantize(model)
    with pytest.warns(UserWarning, match="1 of 2 layers stay float, 66.7% of the weights and 66.7%"):
        quant.quantize(model, max_float_macs=1.0)
    floats = {r["name"]: r["why"] for r in quant.explain(model) if r["what"] == "float"}
    assert "not called" in floats["unused"]
    assert any("computed from the input" in why for why in floats.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 1}, "2..8"),
        ({"activation_bits": 9}, "activation_bits"),
        ({"first_last_bits": 16}, "first_last_bits"),
        ({"ignore": ["block3"]}, "matches no layer.*block"),
        ({"ignore": ["re:("]}, "regular expression"),
        ({"bits": {"block1.conv7": 3}}, "block1.conv1"),
        ({"bits": {"fc": 12}}, "fc"),
        ({"method": "lsk"}, "lsq"),
        ({"example_input": torch.full((2, 3, 8, 8), float("nan"))}, "NaN"),
    ],
)
def test_bad_arguments_say_what_and_leave_the_model_alone(options: dict, message: str) -> None:
    model = Net()
    with pytest.raises(UserError, match=message):
        quant.quantize(model, **options)
    assert not quant.is_quantized(model) and not quant.quantized_layers(model)


def test_weights_that_are_not_numbers_or_all_zero_are_named() -> None:
    model = Net()
    with torch.no_grad():
        model.block2.conv1.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(UserError, match=r"'block2\.conv1\.weight'.*infinity"):
        quant.quantize(model)
    assert not quant.is_quantized(model) and not quant.quantized_layers(model)
    with torch.no_grad():
        model.block2.conv1.weight.zero_()
    with pytest.warns(UserWarning, match=r"'block2\.conv1'.*zero"):
        quant.quantize(model)
    assert torch.isfinite(model(X)).all()


def test_quantizing_twice_and_using_a_float_model_are_refused() -> None:
    model, _ = calibrated(Net())
    with pytest.raises(UserError, match="already"):
        quant.quantize(model)
    with pytest.raises(UserError, match="not quantized"):
        quant.calibrate(Net(), [X])
    with pytest.raises(UserError, match="example_input"):
        quant.quantize(nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Flatten(), nn.Linear(5, 2)))  # takes no size at all


def test_plan_of_another_model_is_refused_by_name() -> None:
    plan = quant.quantize(Net())
    with pytest.raises(UserError, match="does not fit"):
        apply_plan(Net(relu6=True, final=False), plan)
    plan.steps[0].data.pop("settings")
    with pytest.raises(UserError, match="incomplete"):
        apply_plan(Net(), plan)


def test_calibration_complains_about_its_data() -> None:
    model = Net()
    quant.quantize(model)
    with pytest.raises(UserError, match="at least one"):
        quant.calibrate(model, [])
    bad = X.clone()
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=r"NaN.*quantizers\.input"):
        quant.calibrate(model, [bad])
    with pytest.raises(UserError, match="calibrate"):
        quant.activation_quantizers(model)["quantizers.input"].activation_spec()
    with torch.no_grad():
        model.block1.bn1.weight.zero_()
        model.block1.bn1.bias.fill_(-1.0)
    with pytest.warns(UserWarning, match="dead tensor") as caught:
        quant.calibrate(model, [X])
    assert {"block1_act1", "block1_bn2"} == {w.message.args[0].split("'")[1].split(".")[1] for w in caught}
    assert torch.isfinite(model(X)).all()


def test_calibration_uses_all_batches() -> None:
    model = Net()
    quant.quantize(model)
    quant.calibrate(model, [X, 3 * X])
    scale = quant.scale_parameters(model)["quantizers.input"]
    assert float(scale) == pytest.approx(2 * float(X.abs().mean()) * 2 / 127**0.5, rel=1e-5)


def test_input_size_is_found_when_nobody_says_it():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 26 * 26, 2))  # reads 28 x 28 alone
    quant.quantize(net, weight_bits=4, activation_bits=4)
    assert net(torch.randn(1, 3, 28, 28)).shape == (1, 2)


def test_layers_may_be_called_what_a_dictionary_of_modules_calls_its_own() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keys, self.values, self.data, self.training_ = (nn.Linear(6, 6) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.training_(self.data(x + (self.keys(x) @ x.transpose(1, 2)).softmax(-1) @ self.values(x)))

    model, x = Attends().eval(), torch.randn(4, 3, 6)
    plan = quant.quantize(model, 4, 4, example_input=x)
    quant.calibrate(model, [x])
    again = apply_plan(Attends().eval(), plan, x)
    again.load_state_dict(model.state_dict())
    assert set(quant.quantized_layers(again)) == {"keys", "values", "data", "training_"}
    assert torch.equal(again(x), model(x))
