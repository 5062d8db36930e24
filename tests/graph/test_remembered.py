"""Traces that are remembered are those that would be made."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from flatcompress.graph import exported, remembered, trace


class Net(nn.Module):
    """A convolution, a dropout by function, a branch on a plain attribute, a constant."""

    def __init__(self, power: int = 2, p: float = 0.5) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.power, self.p = power, p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x)) ** self.power + torch.tensor([0.5])
        return nn.functional.dropout(y, self.p, self.training).mean((2, 3))


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the models that torch.export has seen."""
    remembered._known.clear()
    seen, real = [], exported.export

    def counted(model: nn.Module, *given: object) -> object:
        seen.append(type(model).__name__)
        return real(model, *given)

    monkeypatch.setattr(exported, "export", counted)
    yield seen
    remembered._known.clear()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_second_model_of_the_same_kind_is_not_exported_again(exports: list[str]) -> None:
    first, second = Net(), Net()
    trace(first, X)
    gm = trace(second, X).eval()
    assert exports == ["Net"]
    assert gm.get_submodule("conv") is second.conv
    torch.testing.assert_close(gm(X), second.eval()(X))


def test_a_graph_that_was_rewritten_is_not_what_is_remembered(exports: list[str]) -> None:
    net = Net()
    once = str(trace(net, X).graph)
    gm = trace(net, X)
    for node in reversed(list(gm.graph.nodes)[:-1]):
        node.meta.clear()
    next(n for n in gm.graph.nodes if n.op == "call_module").target = "norm"
    assert str(trace(net, X).graph) == once
    assert len(exports) == 1


@pytest.mark.parametrize("other", [Net(power=3), Net(p=0.25), nn.Sequential(Net()), Net().double()])
def test_whatever_may_change_the_graph_is_traced_anew(other: nn.Module, exports: list[str]) -> None:
    trace(Net(), X)
    trace(other, X.to(next(other.parameters()).dtype))
    assert len(exports) == 2


def test_a_tied_weight_is_another_model(exports: list[str]) -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied = copy.deepcopy(plain)
    tied[1].weight = tied[0].weight
    x = torch.randn(2, 4)
    trace(plain, x)
    gm = trace(tied, x)
    assert len(exports) == 2
    torch.testing.assert_close(gm(x), tied(x))


def test_what_cannot_be_seen_is_traced_each_time(exports: list[str]) -> None:
    net = Net()
    net.settings = object()
    trace(net, X)
    trace(net, X)
    hooked = Net()
    hooked.conv.register_forward_hook(lambda module, inputs, output: output * 2)
    assert len(exports) == 2
    assert remembered.key_of(hooked, X) is None


HIDDEN = {"sign": 1.0}


class Hiding(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * HIDDEN["sign"]


def test_a_memory_that_does_not_repeat_the_forward_is_forgotten(
    exports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = Hiding(4, 2), torch.randn(2, 4)
    trace(net, x)
    monkeypatch.setitem(HIDDEN, "sign", -1.0)
    gm = trace(net, x)
    assert len(exports) == 2
    torch.testing.assert_close(gm(x), net(x))


class Branching(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y + 1 if self.training else y


def test_what_training_alone_does_is_said_each_time(exports: list[str]) -> None:
    x = torch.randn(2, 4)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"branches on self\.training"):
            trace(Branching(4, 2), x)
    assert len(exports) == 2  # in training mode and in eval mode, once


def test_no_parameter_is_kept_alive(exports: list[str]) -> None:
    net = Net()
    trace(net, X)
    weight = weakref.ref(net.conv.weight)
    del net
    gc.collect()
    assert weight() is None


def test_what_was_not_asked_for_longest_goes(exports: list[str]) -> None:
    for width in range(remembered.MOST + 1):
        trace(nn.Linear(4, width + 1), torch.randn(2, 4))
    trace(nn.Linear(4, 1), torch.randn(2, 4))
    assert len(exports) == remembered.MOST + 2
