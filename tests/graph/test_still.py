"""Forwards that read no size are traced with the example's, and the graph is the one that symbols give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatcompress import models
from flatcompress.errors import UserError
from flatcompress.graph import exported, remembered, still, trace
from flatcompress.graph.interface import run_graph

GENERATOR = torch.Generator().manual_seed(0)


class Forward(nn.Module):
    """A convolution and a norm, then what is given."""

    def __init__(self, after: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.register_buffer("own", torch.ones(2, 4, 6, 6))
        self.after = after

    def forward(self, x: Tensor) -> Any:
        return self.after(self, self.norm(self.conv(x)))


def pooled(self: Any, y: Tensor) -> Tensor:
    return self.fc(F.adaptive_avg_pool2d(F.relu(y), 1).flatten(1))


PLAIN: dict[str, nn.Module] = {
    "pool": Forward(pooled),
    "sum": Forward(lambda self, y: pooled(self, y + F.relu6(y))),
    "gates": Forward(lambda self, y: pooled(self, y * torch.sigmoid(y.mean((2, 3), keepdim=True)))),
    "rows": Forward(lambda self, y: torch.cat([y, F.leaky_relu(y)], 1).mean((-1, -2))),
    "in place": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.MaxPool2d(2), nn.Flatten()),
    "padding": nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Hardswish()),
    **{
        name: models.build(name, num_classes=4, input_shape=(3, 32, 32), seed=0) for name in ("resnet8", "mobilenet_v2")
    },
}
READING: dict[str, nn.Module] = {
    "view": Forward(lambda self, y: y.view(y.shape[0], -1)),
    "reshape": Forward(lambda self, y: y.reshape(y.size(0), 4, -1)),
    "size of the batch": Forward(lambda self, y: y + y.size(0)),
    "quarters": Forward(lambda self, y: torch.stack([y, y], 1)),
    "half": Forward(lambda self, y: y[:, :2]),
    "constant": Forward(lambda self, y: y + torch.zeros(1)),
    "zeros": Forward(lambda self, y: y + torch.zeros_like(y)),
    "transpose": Forward(lambda self, y: y.transpose(0, 1)),
    "mean": Forward(lambda self, y: y - y.mean(0, keepdim=True)),
    "attention": models.build("vit_tiny", num_classes=4, input_shape=(3, 32, 32), seed=0),
}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every call of torch.export, whether it was with symbols."""
    remembered._known.clear()
    calls, real = [], torch.export.export

    def counted(*args: Any, dynamic_shapes: Any = None, **options: Any) -> Any:
        calls.append(dynamic_shapes is not None)
        return real(*args, dynamic_shapes=dynamic_shapes, **options)

    monkeypatch.setattr(torch.export, "export", counted)
    return calls


def images(model: nn.Module, count: int) -> Tensor:
    side = 6 if isinstance(model, Forward) else 32
    return torch.randn(count, 3, side, side, generator=GENERATOR)


@pytest.mark.parametrize("name", PLAIN)
def test_the_graph_without_symbols_is_the_one_with_them_and_right_for_every_batch(
    name: str, made: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = PLAIN[name]
    gm = trace(model, images(model, 2))
    assert made == [False]
    remembered._known.clear()
    monkeypatch.setattr(still, "holds", lambda program: False)
    assert str(trace(model, images(model, 2)).graph) == str(gm.graph) and made[-1]
    for batch in (1, 2, 5):
        x = images(model, batch)
        with torch.no_grad():
            assert torch.equal(run_graph(gm.eval(), x), model.eval()(x))


@pytest.mark.parametrize("name", READING)
def test_what_may_read_a_size_is_traced_with_symbols_at_once(name: str, made: list[bool]) -> None:
    model = READING[name]
    gm = trace(model, images(model, 2))
    assert made == [True]
    x = images(model, 5)
    with torch.no_grad():
        torch.testing.assert_close(run_graph(gm.eval(), x), model.eval()(x))


TRAINING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "scaled by the batch": lambda self, y: y * len(y) if self.training else y,
    "moved by the batch": lambda self, y: y + len(y) if self.training else y,
    "a batch of its own": lambda self, y: y + self.own if self.training else y,
    "another order": lambda self, y: y.flip(0) if self.training else y,
}


@pytest.mark.parametrize("name", TRAINING)
def test_what_only_the_training_forward_does_with_the_batch_is_seen_in_its_graph(name: str, made: list[bool]) -> None:
    model = Forward(TRAINING[name])
    with pytest.warns(UserWarning, match="training"):
        gm = trace(model, images(model, 2))
    assert made[0] is False and made[1:] and all(made[1:])
    x = images(model, 3)
    with torch.no_grad():
        assert torch.equal(run_graph(gm.eval(), x), model.eval()(x))


def test_a_buffer_that_has_the_examples_batch_is_refused_as_ever() -> None:
    remembered._known.clear()
    with pytest.raises(UserError, match=r"torch\.export"):
        trace(Forward(lambda self, y: y + self.own), images(Forward(pooled), 2))


@pytest.mark.parametrize(
    "forward",
    [
        *(torch.flatten, lambda y: y.flatten(0, 1), lambda y: F.pad(y, (0, 0) * 3 + (0, 1)), lambda y: y + 3),
        *(lambda y: torch.cat([y, y]), lambda y: torch.cat([y, y], -4), lambda y: y - y.mean((0, 2, 3), keepdim=True)),
        *(lambda y: y * 2, lambda y: y * y[0], lambda y: y * y.mean((-4, 1), keepdim=True), torch.mean),
    ],
)
def test_a_graph_that_does_something_to_the_batch_does_not_hold(forward: Callable[[Tensor], Tensor]) -> None:
    model = Forward(lambda self, y: forward(y))
    program = torch.export.export(model, (images(model, 2),), strict=False)
    assert not still.holds(program)
    assert still.holds(torch.export.export(Forward(pooled), (images(model, 2),), strict=False))


def test_a_call_by_keyword_is_traced_the_same() -> None:
    remembered._known.clear()
    model = Forward(pooled)
    program, interface = exported.export(model.eval(), {"x": images(model, 2)}, True)
    assert still.holds(program) and interface.names == ("x",)
