"""Coupling: what goes together, what is protected and why."""

from __future__ import annotations

import pytest
import torch
from prune_nets import NETS, Plain, Residual, group_named, images, net
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.prune import find_groups, survey


def members(group) -> set[tuple[str, str]]:
    return {(m.name, m.axis) for m in group.members}


def test_conv_norm_and_consumer_are_one_group() -> None:
    groups = find_groups(net("plain"), images())
    assert [(g.name, g.units) for g in groups] == [("conv1", 8), ("conv2", 16)]
    assert members(groups[0]) == {("conv1", "out"), ("bn1", "out"), ("conv2", "in")}
    assert members(groups[1]) == {("conv2", "out"), ("bn2", "out"), ("fc", "in")}


def test_residual_sum_couples_both_branches() -> None:
    groups = find_groups(net("residual"), images())
    stream = group_named(groups, "conv1")
    assert {("conv1", "out"), ("back", "out"), ("bnb", "out"), ("short", "in")} <= members(stream)
    assert {("conv2", "out"), ("short", "out")} <= members(group_named(groups, "conv2"))


def test_halves_of_a_concatenation_are_groups_of_their_own_also_behind_a_sum() -> None:
    groups = find_groups(net("concat"), images())
    left, right = group_named(groups, "left"), group_named(groups, "right")
    assert (left.units, right.units) == (8, 12)
    wide = {g.name: next(m.owner for m in g.members if m.name == "wide") for g in (left, right)}
    assert wide["left"].tolist() == [*range(8), *[-1] * 12]
    assert wide["right"].tolist() == [*[-1] * 8, *range(12)]


def test_grouped_convolution_ties_one_channel_of_every_block() -> None:
    group = group_named(find_groups(net("grouped"), images()), "conv")
    owner = next(m.owner for m in group.members if m.name == "grouped")
    assert group.units == 4 and owner.tolist() == [0, 1, 2, 3] * 4


def test_depthwise_convolution_ties_its_outputs_to_its_inputs() -> None:
    group = group_named(find_groups(net("grouped"), images()), "up")
    owner = next(m.owner for m in group.members if m.name == "depthwise")
    assert group.units == 8 and owner.tolist() == [c // 2 for c in range(16)]


@pytest.mark.parametrize("name", NETS)
def test_every_channel_of_a_group_belongs_to_one_unit(name: str) -> None:
    for group in find_groups(net(name), images()):
        for member in group.members:
            mine = member.owner[member.owner >= 0]
            assert sorted(set(mine.tolist())) == list(range(group.units))


def test_output_layer_is_protected_with_the_reason() -> None:
    found = survey(net("plain"), images())
    assert [(g.name, "output" in (g.reason or "")) for g in found.protected] == [("fc", True)]
    assert "fc: not cut: " in found.explain()


@pytest.mark.parametrize("pattern", ["conv1", "re:conv[1]", "re:.*v1"])
def test_ignored_layers_keep_their_channels(pattern: str) -> None:
    found = survey(net("plain"), images(), ignore=[pattern])
    assert [g.name for g in found.groups] == ["conv2"]
    assert "ignored" in (group_named(found.protected, "conv1").reason or "")


@pytest.mark.parametrize(("pattern", "hint"), [("conv3", "conv"), ("re:layer.*", "no layer"), ("re:(", "regular")])
def test_pattern_without_a_match_is_an_error(pattern: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        find_groups(net("plain"), images(), ignore=[pattern])


class Rolled(Plain):
    """Channels are moved by an operation that the dependency graph takes for elementwise."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x))).roll(1, 1)
        return self.fc(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


class Twice(Plain):
    """A layer that runs twice, and one with a LayerNorm over its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(torch.relu(self.again(self.conv1(x))))
        return self.fc(self.norm(self.conv2(x).mean((2, 3))))


class Tied(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv4 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv4.weight = self.conv3.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.fc(self.conv4(self.conv3(self.conv1(x))).mean((2, 3)).repeat(1, 2))


@pytest.mark.parametrize(
    ("model", "layer", "reason"),
    [
        (Rolled, "conv1", "RollBackward"),
        (Twice, "conv1", "runs 2 times"),
        (Twice, "conv2", "LayerNorm norm normalises"),
    ],
)
def test_what_cannot_be_cut_is_protected_and_named(model: type[nn.Module], layer: str, reason: str) -> None:
    torch.manual_seed(0)
    found = survey(model().eval(), images())
    assert reason in (group_named(found.protected, layer).reason or "")


def test_shared_weights_are_protected() -> None:
    torch.manual_seed(0)
    found = survey(Tied().eval(), images())
    assert all("conv3" not in {m.name for m in g.members} for g in found.groups)
    assert any("shares its weights" in (g.reason or "") for g in found.protected)


def test_model_that_does_not_run_is_a_clear_error() -> None:
    with pytest.raises(UserError, match=r"shape \(1, 5, 8, 8\)"):
        find_groups(Plain(), torch.zeros(1, 5, 8, 8))


def test_broken_weights_are_a_clear_error() -> None:
    model = net("plain")
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN or infinity"):
        find_groups(model, images())


class Blind(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach().argmax(1)


def test_graph_that_cannot_be_read_is_a_clear_error() -> None:
    with pytest.raises(UserError, match=r"Blind.*int64"):
        find_groups(Blind(), images())


def test_an_index_map_that_cannot_be_made_protects_its_own_channels_alone(monkeypatch) -> None:
    from torch_pruning.dependency import index_mapping

    def fails(graph: object, node: object) -> None:
        raise ZeroDivisionError("integer division or modulo by zero")

    def flattened() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5),
            nn.ReLU(), nn.Linear(5, 4),
        )  # fmt: skip

    assert {g.name for g in survey(flattened(), images()).groups} == {"0", "2", "5"}
    monkeypatch.setattr(index_mapping, "update_reshape_index_mapping", fails)
    found = survey(flattened(), images())
    assert {g.name for g in found.groups} == {"0", "5"}
    assert next(g.reason for g in found.protected if g.name == "2").startswith("the dependency graph cannot follow")


def test_survey_leaves_the_model_as_it_was() -> None:
    model = Residual().train()
    model.conv1.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [module.training for module in model.modules()]
    identities = [id(p) for p in model.parameters()]
    survey(model, images())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modules
    assert [id(p) for p in model.parameters()] == identities
    assert not model.conv1.weight.requires_grad and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_quantized_model_is_refused() -> None:
    brevitas = pytest.importorskip("brevitas.nn")
    model = nn.Sequential(brevitas.QuantConv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
    with pytest.raises(UserError, match="Prune first, then quantize"):
        find_groups(model, images())
