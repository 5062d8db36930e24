from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatcompress import graph
from flatcompress.errors import UserError

torch.set_num_threads(1)


class Residual(nn.Module):
    """Everything awkward at once: padding modes, an in-place add, a layer called twice, a free parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding="same", bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(8, 5)
        self.norm = nn.LayerNorm(5)
        self.twice = nn.Linear(5, 5)
        self.token = nn.Parameter(torch.randn(1, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        z = self.bn2(self.conv2(y))
        z += y
        z = self.dropout(self.pool(self.relu(z)).flatten(1))
        z = self.norm(self.fc(z)).view(x.shape[0], 5)
        return self.twice(self.twice(z).to(z.dtype)) + self.token.expand(x.shape[0], -1)[:]


class Attention(nn.Module):
    def __init__(self, mask: str = "none") -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.out = nn.Linear(6, 6)
        self.mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.view(x.shape[0], -1, 2, 3).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mask = None
        if self.mask == "open":
            mask = torch.ones(4, 4, dtype=torch.bool)
        elif self.mask == "causal":
            mask = torch.ones(4, 4, dtype=torch.bool).tril()
        p = 0.4 if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        return self.out(y.transpose(1, 2).reshape(x.shape[0], 4, 6)).mean(1)


def targets(gm: torch.fx.GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op.startswith("call")]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch", [2, 5])
def test_graph_repeats_the_forward_bit_for_bit(training: bool, batch: int) -> None:
    torch.manual_seed(0)
    model = Residual()
    gm = graph.trace(model, torch.randn(1, 3, 8, 8))
    x = torch.randn(batch, 3, 8, 8)
    model.train(training), gm.train(training)
    outputs, states = [], []
    start = copy.deepcopy(model.state_dict())
    for run in (model, gm):
        model.load_state_dict(start)
        torch.manual_seed(1)
        outputs.append(run(x))
        states.append(copy.deepcopy(model.state_dict()))
    assert torch.equal(outputs[0], outputs[1])
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))


def test_layers_are_the_models_own_under_their_own_names() -> None:
    model = Residual()
    gm = graph.trace(model, torch.randn(2, 3, 8, 8))
    assert [n.target for n in graph.weighted(gm)] == ["conv1", "conv2", "fc", "twice", "twice"]
    assert gm.get_submodule("conv1") is model.conv1
    assert {"bn1", "bn2", "dropout", "norm"} <= set(targets(gm))
    assert not any("aten.pad" in t or t.endswith("_.Tensor") or "slice" in t or "aten.to" in t for t in targets(gm))
    assert all("val" in n.meta and "path" in n.meta for n in gm.graph.nodes if n.op != "output")


def test_training_modes_survive_the_trace() -> None:
    model = Residual()
    model.bn1.eval()
    before = {name: m.training for name, m in model.named_modules()}
    graph.trace(model, torch.randn(2, 3, 8, 8))
    assert {name: m.training for name, m in model.named_modules()} == before


@pytest.mark.parametrize("mask", ["none", "open", "causal"])
def test_attention_is_written_out(mask: str) -> None:
    torch.manual_seed(0)
    model = Attention(mask)
    gm = graph.trace(model, torch.randn(2, 4, 6))
    names = targets(gm)
    assert names.count("aten.matmul.default") == 2 and "aten.softmax.int" in names
    assert ("aten.masked_fill.Scalar" in names) == (mask == "causal")  # a mask that hides nothing is dropped
    x = torch.randn(3, 4, 6)
    model.eval(), gm.eval()
    torch.testing.assert_close(gm(x), model(x))
    gm.train()
    assert not torch.equal(gm(x), gm(x))  # attention dropout is alive in training mode


def test_functional_dropout_obeys_eval() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(self.fc(x), 0.5, self.training)

    model = Net()
    gm = graph.trace(model, torch.randn(2, 4))
    x = torch.randn(3, 4)
    gm.eval(), model.eval()
    assert torch.equal(gm(x), model(x))
    graph.install(model, gm)
    model.train()
    assert (model(x) == 0).any()
    model.eval()
    assert not (model(x) == 0).any()


def test_tied_weights_keep_both_layers() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    model = Tied()
    gm = graph.trace(model, torch.randn(2, 4))
    assert [n.target for n in graph.weighted(gm)] == ["a", "b"]


def test_layer_with_its_own_forward_is_the_layer_it_computes() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(4, 4), nn.Linear(4, 2))
    gm = graph.trace(model, torch.randn(2, 4))
    assert [n.target for n in graph.weighted(gm)] == ["0", "1"]
    x = torch.randn(3, 4)
    expected = model(x)
    assert torch.equal(gm(x), expected)
    graph.install(model, gm)
    assert torch.equal(model(x), expected)


def test_random_training_ops_are_left_out_with_a_warning() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x)
            return y + torch.rand_like(y) if self.training else y

    model = Noisy()
    gm = graph.trace(model, torch.randn(2, 4))
    x = torch.randn(3, 4)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert torch.equal(gm(x), expected) and not torch.equal(gm(x), expected)
    assert torch.equal(gm.eval()(x), model.eval()(x))


def test_stochastic_depth_is_alive_in_training_and_gone_in_eval() -> None:
    class Depth(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.conv, self.how = nn.Conv2d(3, 3, 3, padding=1), how

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            if not self.training:
                return x + y
            if self.how == "bernoulli":
                return x + y * y.new_empty((y.shape[0], 1, 1, 1)).bernoulli_(0.7).div_(0.7)
            return x + y.div(0.7) * (0.7 + torch.rand((y.shape[0], 1, 1, 1), dtype=y.dtype)).floor_()

    for how in ("bernoulli", "floor"):
        model = Depth(how)
        gm = graph.trace(model, torch.randn(2, 3, 4, 4))
        x = torch.randn(5, 3, 4, 4)
        for training in (True, False):
            model.train(training), gm.train(training)
            torch.manual_seed(1)
            expected = model(x)
            torch.manual_seed(1)
            torch.testing.assert_close(gm(x), expected)


def test_randomness_of_another_kind_is_left_out_with_a_warning() -> None:
    class Flips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x)
            return torch.where(torch.rand_like(y) < 0.5, y, -y) if self.training else y

    with pytest.warns(UserWarning, match="rand_like"):
        gm = graph.trace(Flips(), torch.randn(2, 4))
    assert targets(gm) == ["fc"]


class _Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class _Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x * 2


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (_Branch(), "_Branch"),
        (_Counts(), "calls"),
    ],
)
def test_what_cannot_be_traced_says_why(model: nn.Module, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        graph.trace(model, torch.randn(2, 4))


def test_install_keeps_the_object_and_survives_copies() -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    x = torch.randn(3, 3, 8, 8)
    expected, names = model(x), list(model.state_dict())
    same = graph.install(model, graph.trace(model, x))
    assert same is model and isinstance(model, Residual) and list(model.state_dict()) == names
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.fc.weight.zero_()
    assert torch.equal(model(x), expected) and not torch.equal(clone(x), expected)
    assert graph.installed_graph(model) is not None
    graph.uninstall(model)
    assert type(model) is Residual and graph.installed_graph(clone) is not None


def test_inplace_layers_do_not_write_into_what_a_graph_keeps() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5, inplace=True))
    gm = graph.trace(model, torch.randn(2, 4))
    first = next(n for n in gm.graph.nodes if n.target == "0")
    with gm.graph.inserting_after(first):
        node = gm.graph.call_function(torch.ops.aten.sigmoid.default, (first,))  # its backward needs its output
    first.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    gm.recompile()
    graph.install(model, gm)
    model.train()(torch.randn(8, 4)).sum().backward()
    assert model[0].weight.grad is not None


def test_install_after_a_replaced_forward_is_refused() -> None:
    model = Residual()
    gm = graph.trace(model, torch.randn(2, 3, 8, 8))
    model.forward = model.forward  # what accelerate's mixed precision does to an instance
    with pytest.raises(UserError, match="replaced on the instance"):
        graph.install(model, gm)


def test_accelerate_style_wrapping_reaches_the_graph() -> None:
    model = Residual().eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    graph.install(model, graph.trace(model, x))
    inner = model.forward.__func__
    model.forward = lambda *a: inner(model, *a) + 1
    assert torch.equal(model(x), expected + 1)
    del model.forward
    assert torch.equal(model(x), expected)


def test_macs_by_hand() -> None:
    model = Residual()
    counts = graph.macs(model, torch.randn(1, 3, 8, 8))
    assert counts == {"conv1": 8 * 27 * 64, "conv2": 8 * 72 * 64, "fc": 40, "twice": 50}
    assert graph.total_macs(model, torch.randn(7, 3, 8, 8)) == sum(counts.values())
    attention = graph.macs(Attention(), torch.randn(1, 4, 6))
    assert attention["qkv"] == 4 * 6 * 18
    assert sorted(v for k, v in attention.items() if ":" in k) == [2 * 4 * 4 * 3] * 2


def test_specs_give_the_integer_range() -> None:
    assert (graph.ActivationSpec(0.1, 3, True).qmin, graph.ActivationSpec(0.1, 3, True).qmax) == (-4, 3)
    assert graph.ActivationSpec(0.1, 8, False).qmax == 255


def test_a_norm_that_averages_all_batches_alike_is_traced_and_keeps_its_momentum() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None))
    x = torch.randn(2, 3, 8, 8)
    model(x)
    traced = graph.trace(model, x)
    assert model[1].momentum is None and model[1].num_batches_tracked == 1
    torch.testing.assert_close(traced.eval()(x), model.eval()(x), rtol=0, atol=0)
