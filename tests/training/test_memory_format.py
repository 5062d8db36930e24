"""Channels last: chosen by a rule, the same values, nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flatcompress import Pipeline, models
from flatcompress.errors import UserError
from flatcompress.training import layout

CPU = torch.device("cpu")


def net(name: str) -> nn.Module:
    return models.build(name, num_classes=4, input_shape=(3, 32, 32), seed=0)


@pytest.mark.parametrize(("name", "wanted"), [("mobilenet_v2", "channels_last"), ("resnet8", "contiguous")])
def test_auto_is_channels_last_for_depthwise_networks_on_a_processor_alone(name: str, wanted: str) -> None:
    assert layout.chosen("auto", net(name), (3, 32, 32), CPU) == wanted
    assert layout.chosen("auto", net(name), (3, 32, 32), torch.device("cuda")) == "contiguous"


@pytest.mark.parametrize("setting", ["channels_last", "contiguous"])
def test_what_is_asked_for_is_done_where_inputs_are_images(setting: str) -> None:
    assert layout.chosen(setting, net("resnet8"), (3, 32, 32), CPU) == setting
    assert layout.chosen(setting, nn.Linear(4, 2), (4,), CPU) == "contiguous"


def test_inside_the_weights_lie_otherwise_and_are_the_same_parameters() -> None:
    model = net("mobilenet_v2").eval()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    x = torch.randn(2, 3, 32, 32)
    plain = model(x)
    with layout.lying(model, "channels_last"):
        first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        assert first.weight.is_contiguous(memory_format=torch.channels_last) and not first.weight.is_contiguous()
        torch.testing.assert_close(model(layout.laid(x, "channels_last")), plain, rtol=1e-4, atol=1e-4)
    for name, p in model.named_parameters():
        assert id(p) == before[name][0] and torch.equal(p, before[name][1]) and p.is_contiguous()


class Viewing(nn.Module):
    """Depthwise, and its forward flattens by view, which tensors with channels last do not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8)
        self.fc = nn.Linear(8 * 30 * 30, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.two(self.one(x))
        return self.fc(x.view(x.shape[0], -1))


def test_a_forward_that_does_not_take_it_stays_contiguous_and_is_refused_where_it_is_asked_for() -> None:
    images, labels = torch.rand(32, 3, 32, 32), torch.arange(32) % 4
    given = {"train": (images, labels), "val": (images, labels), "test": (images, labels)}
    stages = [{"train": {"method": "none", "epochs": 1}}]
    assert Pipeline(model=Viewing(), data=given, stages=stages).prepare().layout == "contiguous"
    assert Pipeline(model=net("mobilenet_v2"), data=given, stages=stages).prepare().layout == "channels_last"
    asked = Pipeline(model=Viewing(), data=given, stages=stages, memory_format="channels_last")
    with pytest.raises(UserError, match="memory_format: channels_last: the model does not run so"):
        asked.prepare()


def test_series_and_rows_stay_as_they_are() -> None:
    for shape in ((2, 3), (2, 3, 5)):
        x = torch.randn(shape)
        assert layout.laid(x, "channels_last") is x
