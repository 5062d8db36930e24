"""Layers are what the graph computes, whatever their class: nothing stays float without a word."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatcompress import graph, quant
from flatcompress.errors import UserError
from flatcompress.plan import Plan, apply_plan

torch.set_num_threads(1)
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1))
norms, old_norms = nn.utils.parametrizations, nn.utils


class SamePadding(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardised(nn.Conv2d):
    def __init__(self, *args: int, **options: int) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = self.gain * w / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


def images(make: Callable[..., nn.Module]) -> nn.Module:
    return nn.Sequential(
        make(3, 8, 2), nn.BatchNorm2d(8), nn.ReLU(), make(8, 8, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)
    )


def normed(norm: Callable[[nn.Module], nn.Module]) -> Callable[..., nn.Module]:
    return lambda *args, **options: norm(nn.Conv2d(*args, **options))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x).mean(1))


class PlainList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)]
        self.head = nn.LazyLinear(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x.flatten(1))


CASES: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, int]] = {
    "same padding": (lambda: images(SamePadding), IMAGES, 3),
    "standardised": (lambda: images(Standardised), IMAGES, 3),
    "weight norm": (lambda: images(normed(norms.weight_norm)), IMAGES, 3),
    "spectral norm": (lambda: images(normed(norms.spectral_norm)), IMAGES, 3),
    "older weight norm": (lambda: images(normed(old_norms.weight_norm)), IMAGES, 3),
    "older spectral norm": (lambda: images(normed(old_norms.spectral_norm)), IMAGES, 3),
    "attention": (Attention, TOKENS, 3),
    "encoder": (Encoder, TOKENS, 9),
    "plain list": (PlainList, IMAGES, 3),
}


def built(name: str) -> tuple[nn.Module, torch.Tensor, int]:
    torch.manual_seed(0)
    make, x, count = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older weight norm says that it is old
        model = make()
    model.eval()(x)
    return model, x, count


@pytest.mark.parametrize("name", CASES)
def test_every_product_is_quantized_and_reloads(name: str) -> None:
    model, x, count = built(name)
    expected, fresh = model(x).detach(), built(name)[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stay float.*")
        warnings.filterwarnings("ignore", message=".*traced in eval mode.*")  # spectral norm writes in training
        plan = quant.quantize(model, 8, None, example_input=x)
        assert len(quant.quantized_layers(model)) == count
        other = apply_plan(fresh, Plan.from_json(plan.to_json()), x)
    for layer in quant.quantized_layers(model).values():  # a grid that reaches the largest weight
        quantizer = layer.weight_quant.tensor_quant
        quantizer.set_scale(torch.full_like(quantizer.scale, float(layer.weight.abs().max()) / 127))
    found = model(x)
    assert float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), found)
    model.train()(x).sum().backward()
    assert all(layer.weight.grad is not None for layer in quant.quantized_layers(model).values())


def test_a_materialised_weight_is_named_and_its_makers_are_gone() -> None:
    model, x, _ = built("weight norm")
    data = quant.quantize(model, example_input=x).of_kind("quantizers")[0]
    assert data["materialised"] == ["0", "3"] and data["float_layers"]["count"] == 0
    assert {n for n, _ in model.named_parameters() if "quant" not in n} >= {"0.weight", "3.weight"}
    assert not any("parametrizations" in n for n in model.state_dict())


def test_a_copy_of_a_quantized_parametrized_model_is_left_alone() -> None:
    model, x, _ = built("weight norm")
    other = copy.deepcopy(model)
    expected = other(x)
    quant.quantize(model, example_input=x)
    assert torch.equal(other(x), expected)


class _Shared(nn.Module):
    """One convolution with its norm, known to two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, layer, norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.a, self.b = nn.ModuleDict({"conv": layer, "norm": norm}), nn.ModuleDict({"conv": layer, "norm": norm})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in (self.a, self.b):
            x = x + block["norm"](block["conv"](x)).relu()
        return x.mean((2, 3))


@pytest.mark.parametrize("weight_norm", [False, True])
def test_a_layer_that_two_blocks_share_is_quantized_once(weight_norm: bool) -> None:
    torch.manual_seed(0)
    model, x = _Shared(), torch.randn(4, 3, 6, 6)
    if weight_norm:
        norms.weight_norm(model.a["conv"])
    expected = model.eval()(x)
    data = quant.quantize(model, 8, 8, example_input=x).of_kind("quantizers")[0]
    assert [row["name"] for row in data["layers"]] == ["stem", "a.conv"] and data["float_layers"]["count"] == 0
    quant.calibrate(model, [x])
    assert float((model.eval()(x) - expected).detach().abs().max()) < 0.05 * float(expected.abs().max())
    assert model.b["conv"] is model.a["conv"]


def test_a_refused_model_still_computes_what_it_did() -> None:
    model, x, _ = built("same padding")
    expected = model(x)
    with pytest.raises(UserError, match="matches no layer"):
        quant.quantize(model, example_input=x, ignore=["nothing"])
    assert torch.equal(model(x), expected)
    model, x, _ = built("standardised")
    expected = model(x)
    with pytest.raises(UserError, match="matches no layer"):
        quant.quantize(model, example_input=x, ignore=["nothing"])
    torch.testing.assert_close(model(x), expected)


def test_ignored_layers_may_be_all_the_work() -> None:
    model, x, _ = built("same padding")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = quant.quantize(model, example_input=x, ignore=["0", "3"])
    found = plan.of_kind("quantizers")[0]["float_layers"]
    assert found["count"] == 2 and found["total"] == 3 and found["unasked_macs"] == 0 < found["macs"]


class Gated(nn.Module):
    """A block of MobileNetV3: Hardswish and a squeeze-and-excite gate."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.act, self.pool = act, nn.AdaptiveAvgPool2d(1)
        self.s1, self.s2, self.gate = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Hardsigmoid()
        self.b, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.bn(self.a(x)))
        y = y * self.gate(self.s2(F.relu(self.s1(self.pool(y)))))
        return self.fc(self.b(y).relu().mean((2, 3)))


ACTIVATIONS = [nn.Hardswish, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.Mish, nn.Tanh, nn.Softplus]


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_convolutions_before_activations_and_gates_end_on_a_grid(act: Callable[[], nn.Module]) -> None:
    model = Gated(act())
    quant.quantize(model, 4, 4, example_input=IMAGES)
    quantizers = quant.activation_quantizers(model)
    nodes = graph.installed_graph(model).nodes
    grids = {n.args[0]: n for n in nodes if str(n.target) in quantizers}
    for node in nodes:
        if node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), nn.Conv2d):
            end = node
            while end not in grids:
                (end,) = end.users
                assert end.op == "call_module" or "relu" in str(end.target), (node, end)
    gate = next(n for n in nodes if "mul" in str(n.target))
    assert all(str(a.target) in quantizers for a in gate.args) and gate in grids


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.e, self.f, self.t = nn.Conv2d(3, 8, 3), nn.Linear(5, 8), nn.Linear(16, 4), nn.Embedding(9, 8)

    def forward(self, x: torch.Tensor, m: torch.Tensor, ids: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        y = torch.cat([self.c(x).relu().mean((2, 3)), self.e(m).relu()], 1)
        if ids is not None:
            y = y * self.t(ids).mean(1).repeat(1, 2)
        return {"logits": self.f(y)}


@pytest.mark.parametrize("with_ids", [True, False])
def test_several_inputs_are_quantized_calibrated_and_reloaded(with_ids: bool) -> None:
    torch.manual_seed(0)
    x = {"x": torch.randn(4, 3, 8, 8), "m": torch.randn(4, 5)}
    if with_ids:
        x["ids"] = torch.randint(0, 9, (4, 3))
    model = Two()
    plan = quant.quantize(model, 8, 8, example_input=x)
    names = [r["name"] for r in plan.of_kind("quantizers")[0]["activations"]]
    assert len([n for n in names if n.startswith("input")]) == 2  # token ids have no grid
    if with_ids:
        quant.calibrate(model, [x, {**x, "labels": torch.zeros(4)}])
    else:
        quant.calibrate(model, [(x["x"], x["m"]), ((x["x"], x["m"]), torch.zeros(4))])
    other = apply_plan(Two(), plan, x)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(**x)["logits"], model.eval()(**x)["logits"])


def test_recurrent_layers_stay_float_and_are_said_with_their_share() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.r, self.f = nn.Conv1d(8, 8, 3, padding=1), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.f(self.r(self.c(x.transpose(1, 2)).relu().transpose(1, 2))[0][:, -1])

    model = Net()
    with pytest.warns(UserWarning, match="'r' .a recurrent layer is kept float"):
        quant.quantize(model, 8, 8, example_input=TOKENS)
    quant.calibrate(model, [TOKENS])
    assert torch.isfinite(model(TOKENS)).all()


def test_what_is_no_model_and_no_example_is_said() -> None:
    with pytest.raises(UserError, match="Module"):
        quant.quantize("net", example_input=IMAGES)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cannot be run on the example"):
        quant.quantize(nn.Sequential(nn.Conv2d(3, 8, 3)), example_input=TOKENS)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))
    quant.quantize(model, example_input=IMAGES)
    with pytest.raises(UserError, match="batch 1: Sequential cannot be run"):
        quant.calibrate(model, [IMAGES, TOKENS])
