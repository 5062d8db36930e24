"""Models of several arguments, recurrent layers and drawn networks: cut to what their mask computes, or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flatcompress import apply_plan, prune
from flatcompress.errors import RunError, UserError
from flatcompress.prune.budgets.cost import CostModel
from flatcompress.prune.dependency.survey import cut_equals_mask
from flatcompress.prune.inputs import call, tensors_of


class Two(nn.Module):
    """An image and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector, self.head = nn.Conv2d(3, 8, 3), nn.Linear(5, 8), nn.Linear(16, 4)

    def forward(self, x: Tensor, m: Tensor | None = None) -> Tensor:
        m = torch.zeros(len(x), 5) if m is None else m
        return self.head(torch.cat([self.image(x).relu().mean((2, 3)), self.vector(m).relu()], 1))


class Answers(Two):
    """As `Two`, with its answer in a dictionary."""

    def forward(self, x: Tensor, m: Tensor | None = None) -> dict[str, Any]:  # type: ignore[override]
        return {"logits": super().forward(x, m), "none": None, "parts": (x.mean(), [m])}


X, M = torch.randn(2, 3, 8, 8), torch.randn(2, 5)
EXAMPLES = {
    "tensor": X, "tuple": (X, M), "list": [X, M], "dict": {"x": X, "m": M}, "dict in another order": {"m": M, "x": X},
    "tuple of one": (X,), "None inside": (X, None),
}  # fmt: skip


@pytest.mark.parametrize("build", [Two, Answers])
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_form_of_example_input_is_pruned_and_repeated_from_the_plan(name: str, build):
    torch.manual_seed(0)
    model, example = build(), EXAMPLES[name]
    fresh = copy.deepcopy(model)
    plan = prune.prune(model, example, ratio=0.5)
    assert model.image.out_channels < 8
    apply_plan(fresh, plan, example)
    fresh.load_state_dict(model.state_dict())
    for a, b in zip(tensors_of(call(model, example)), tensors_of(call(fresh, example)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("importance", ["taylor", "hessian"])
def test_gradients_are_taken_over_batches_of_several_inputs(importance: str):
    model = Two()
    batches = [({"x": X, "m": M}, torch.tensor([0, 1])), ((X, M), torch.tensor([2, 3]))]
    prune.prune(model, (X, M), ratio=0.5, importance=importance, batches=batches)
    assert model.vector.out_features < 8


def test_a_schedule_and_budgets_take_several_inputs():
    for kind in ("macs", "params", "bytes", "ratio"):
        schedule = prune.ChannelSchedule(Two(), (X, M), prune.Budget(kind, 0.6), events=2, every=1)
        schedule.step(), schedule.step()
        schedule.shrink()
        assert schedule.model.image.out_channels < 8


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (X[0, 0], "does not run on the example input of shape"), ((X, M, M), "does not run"), ({"y": X}, "y: "),
        ("image", "an example input is a tensor"), (None, "an example input is"), ((), "does not run"),
        (X * float("nan"), "gives NaN"),
    ],
)  # fmt: skip
def test_an_example_input_that_does_not_fit_is_refused_in_one_sentence(example, reason: str):
    with pytest.raises(UserError, match=reason) as caught:
        prune.prune(Two(), example)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- recurrent layers


class Recurrent(nn.Module):
    """Convolutions, a recurrent layer over time, a head."""

    def __init__(self, kind: type[nn.Module], **keys: Any) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 12, 3, padding=1)
        self.over_time = kind(12, 10, **keys)
        self.first = bool(keys.get("batch_first"))
        width = (keys.get("proj_size") or 10) * (2 if keys.get("bidirectional") else 1)
        self.hidden, self.head = nn.Linear(width, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x).relu()).relu()
        x = x.transpose(1, 2) if self.first else x.permute(2, 0, 1)
        y, _ = self.over_time(x)
        return self.head(self.hidden(y[:, -1] if self.first else y[-1]).relu())


class Cells(Recurrent):
    """The same with a cell that is called step by step."""

    def forward(self, x: Tensor) -> Tensor:
        x, h = self.two(self.one(x).relu()).relu(), None
        for step in x.unbind(2):
            h = self.over_time(step, h)
        return self.head(self.hidden(h[0] if isinstance(h, tuple) else h).relu())


KINDS = [
    (nn.GRU, {"batch_first": True}), (nn.LSTM, {"batch_first": True, "num_layers": 2}),
    (nn.RNN, {"bidirectional": True}), (nn.LSTM, {"bidirectional": True, "proj_size": 4}), (nn.GRU, {"bias": False}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "keys"), KINDS)
def test_the_neighbours_of_a_recurrent_layer_are_cut_and_its_hidden_size_stays(kind, keys):
    torch.manual_seed(0)
    model, x = Recurrent(kind, **keys).eval(), torch.randn(2, 3, 9)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    groups = prune.find_groups(model, x)
    assert [g.name for g in groups] == ["one", "two", "hidden"]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert type(model.over_time) is kind
    keep = [torch.arange(g.units) % 2 == 0 for g in groups]
    assert cut_equals_mask(model, x, groups, keep)
    fresh = copy.deepcopy(model)
    plan = prune.shrink(model, groups, keep, x)
    assert model.over_time.input_size == 6 and model.over_time.hidden_size == 10
    apply_plan(fresh, plan, x)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(x), fresh(x))


def test_a_cell_that_runs_several_times_is_left_alone_and_said():
    survey = prune.survey(Cells(nn.GRUCell), torch.randn(2, 3, 5))
    assert {g.name for g in survey.groups} == {"one", "hidden"}


def test_the_cost_of_a_recurrent_layer_falls_with_what_it_reads():
    model, x = Recurrent(nn.GRU, batch_first=True), torch.randn(2, 3, 9)
    costs = CostModel(model, x)
    assert costs.params(costs.dense) == sum(p.numel() for p in model.parameters())
    groups = prune.find_groups(model, x)
    keep = [torch.arange(g.units) % 2 == 0 for g in groups]
    expected = costs.params(costs.widths(groups, keep))
    prune.shrink(model, groups, keep, x)
    assert expected == sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------------------------------- what channels are mixed in


class Eca(nn.Module):
    """Attention over channels (arXiv 1910.03151) in residual blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.inner = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.mix = nn.ModuleList(nn.Conv1d(1, 1, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, mix in enumerate(self.mix):
            y = self.inner[2 * i + 1](self.inner[2 * i](x).relu())
            x = x + y * mix(y.mean((2, 3)).view(len(y), 1, -1)).sigmoid().view(len(y), -1, 1, 1)
        return self.head(x.mean((2, 3)))


def test_the_walk_through_attention_over_channels_is_linear_in_the_width_and_says_what_mixes(monkeypatch):
    from flatcompress.prune.dependency import coupling

    followed = []
    fresh = coupling._fresh

    def counted(dependency, pairs, seen):
        found = fresh(dependency, pairs, seen)
        followed.append(len(pairs) + len(found))
        return found

    monkeypatch.setattr(coupling, "_fresh", counted)
    totals = []
    for width in (16, 32):
        followed.clear()
        survey = prune.survey(Eca(width), torch.randn(2, 3, 8, 8))
        totals.append(sum(followed))
        assert [g.name for g in survey.groups] == ["inner.0", "inner.2"]
        assert any("mixes all of these channels" in (g.reason or "") for g in survey.protected)
    assert totals[1] <= 2.5 * totals[0]


class Softmaxed(nn.Module):
    """Channels under a softmax: those of ``gate`` change one another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.last, self.head = nn.Conv2d(8, 12, 1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate(self.conv(x).relu()).softmax(1)
        return self.head(self.last(x).relu().mean((2, 3)))


@pytest.mark.parametrize("ignore", [(), ("gate",), ("re:ga.*",)])
def test_channels_under_a_softmax_stay_whether_they_are_ignored_or_not(ignore):
    model = Softmaxed()
    prune.prune(model, torch.randn(2, 3, 6, 6), ratio=0.5, ignore=ignore)
    assert model.gate.out_channels == 8 and model.conv.out_channels < 8 and model.last.out_channels < 12


# --------------------------------------------------------------------------------------------------- drawn networks

ACTIONS = (
    "conv", "norm", "relu", "softmax", "pool", "residual", "concat", "split", "depthwise", "grouped", "se", "shuffle",
    "transpose", "gru", "layernorm", "groupnorm", "prelu", "flip", "chunk_gate", "channel_mean", "matmul", "detach",
)  # fmt: skip


class Drawn(nn.Module):
    """A network over [B, C, T] made of a list of actions."""

    def __init__(self, actions: list[str], width: int) -> None:
        super().__init__()
        self.actions, self.stem = actions, nn.Conv1d(3, width, 3, padding=1)
        self.layers = nn.ModuleDict()
        channels = width
        for i, action in enumerate(actions):
            made, channels = self.layer(action, channels)
            self.layers[str(i)] = made
        self.head = nn.Linear(channels, 3)

    def layer(self, action: str, c: int) -> tuple[nn.Module, int]:
        made: dict[str, Any] = {
            "conv": (lambda: nn.Conv1d(c, 8, 3, padding=1), 8), "norm": (lambda: nn.BatchNorm1d(c), c),
            "residual": (lambda: nn.Conv1d(c, c, 1), c), "concat": (lambda: nn.Conv1d(c, 4, 1), c + 4),
            "depthwise": (lambda: nn.Conv1d(c, c, 3, padding=1, groups=c), c),
            "grouped": (lambda: nn.Conv1d(c, c, 1, groups=2), c), "se": (lambda: nn.Linear(c, c), c),
            "gru": (lambda: nn.GRU(c, 6, batch_first=True), 6), "layernorm": (lambda: nn.LayerNorm(c), c),
            "groupnorm": (lambda: nn.GroupNorm(2, c), c), "prelu": (lambda: nn.PReLU(c), c),
            "chunk_gate": (lambda: nn.Conv1d(c, 2 * c, 1), c),
        }  # fmt: skip
        if action in ("grouped", "groupnorm", "shuffle", "split") and c % 2:
            return nn.Identity(), c
        make, out = made.get(action, (nn.Identity, c))
        return make(), out

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, action in enumerate(self.actions):
            x = self.act(action, self.layers[str(i)], x)
        return self.head(x.mean(2))

    def act(self, action: str, layer: nn.Module, x: Tensor) -> Tensor:
        b, c, t = x.shape
        plain = isinstance(layer, nn.Identity)
        does: dict[str, Any] = {
            "relu": lambda: x.relu(), "softmax": lambda: x.softmax(1), "pool": lambda: nn.functional.avg_pool1d(x, 1),
            "residual": lambda: x + layer(x).relu(), "concat": lambda: torch.cat([x, layer(x)], 1),
            "split": lambda: torch.cat(x.split([c // 2, c - c // 2], 1)[::-1], 1),
            "se": lambda: x * layer(x.mean(2)).sigmoid().unsqueeze(2),
            "shuffle": lambda: x if c % 2 else x.view(b, 2, c // 2, t).transpose(1, 2).reshape(b, c, t),
            "transpose": lambda: x.transpose(1, 2).contiguous().transpose(1, 2), "flip": lambda: x.flip(1),
            "gru": lambda: layer(x.transpose(1, 2))[0].transpose(1, 2),
            "layernorm": lambda: layer(x.transpose(1, 2)).transpose(1, 2),
            "chunk_gate": lambda: (lambda a, g: a * g.sigmoid())(*layer(x).chunk(2, 1)),
            "channel_mean": lambda: x - x.mean(1, keepdim=True),
            "matmul": lambda: x @ (x.transpose(1, 2) @ x).softmax(-1), "detach": lambda: x + x.detach(),
        }  # fmt: skip
        return does[action]() if action in does and not (plain and action in ("grouped", "groupnorm")) else layer(x)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    actions=st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=6),
    width=st.sampled_from([4, 6, 7]),
    ratio=st.sampled_from([0.3, 0.6]),
)
def test_a_drawn_network_is_cut_to_what_its_mask_computes_or_refused(actions: list[str], width: int, ratio: float):
    torch.manual_seed(0)
    model, x = Drawn(actions, width).eval(), torch.randn(2, 3, 5)
    before = model(x).detach()
    try:
        prune.survey(model, x)
        assert torch.equal(before, model(x))
        plan = prune.prune(model, x, ratio=ratio)
    except (UserError, RunError) as error:
        assert "\n" not in str(error)
        return
    fresh = apply_plan(Drawn(actions, width).eval(), plan, x)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
