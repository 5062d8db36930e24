"""Patterns of real networks' forwards: a trace repeats both modes of each."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatcompress import graph
from flatcompress.errors import UserError
from flatcompress.graph.interface import run_graph

torch.set_num_threads(1)
X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class NormAct(nn.BatchNorm2d):
    """A BatchNorm with its activation inside, which branches on training by hand."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.Hardswish(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
            own = True
        else:
            own = self.running_mean is None
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, own, self.momentum, self.eps)
        return self.act(x)


class HandNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.rand(channels)), nn.Parameter(torch.rand(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, self.training, 0.2, 1e-3)


class SameConv(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.drop(self.bn(self.conv(x))).clone()
        y[:, 0] = 1.0
        y[:, 1:3].mul_(2)
        whole = y.flatten(1)
        y.add_(1)
        return whole + y.flatten(1)


class Statement(nn.Module):
    """In-place operators whose result is not taken: the old name means the new value."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        z = y.add_(1)
        z.mul_(2)
        return y - 1


class NoGradInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        with torch.no_grad():
            scale = y.abs().amax(-1, keepdim=True)
        return y / scale


class Plain(nn.Module):
    """Layers in a plain list: no children of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x).relu()
        return x


class Auxiliary(nn.Module):
    """Another result in training than in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.aux = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> object:
        y = self.bn(self.conv(x))
        return (y, self.aux(y)) if self.training else y


def sequence(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: copy.deepcopy(nn.Sequential(*layers))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "norm with activation": sequence(nn.Conv2d(3, 4, 3), NormAct(4), nn.Conv2d(4, 4, 3)),
    "batch norm by hand": sequence(nn.Conv2d(3, 4, 3), HandNorm(4)),
    "same padding": sequence(SameConv(3, 4, 2), nn.ReLU(), SameConv(4, 4, 2, stride=2, groups=2)),
    "synchronised norm": sequence(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4)),
    "norm without statistics": sequence(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
    "norm without affine": sequence(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)),
    "views": Views,
    "plain list": Plain,
    "alpha dropout": sequence(nn.Flatten(), nn.Linear(192, 8), nn.AlphaDropout(0.4)),
    "lazy": lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3)),
    "transposed": sequence(nn.ConvTranspose2d(3, 4, 2, stride=2, output_padding=1, groups=1), nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_both_modes_are_repeated_before_and_after_install(name: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]()
    gm = graph.trace(model, X)
    start = copy.deepcopy(model.state_dict())
    results: list[list[torch.Tensor]] = []
    for install in (False, True):
        if install:
            graph.install(model, gm)
        for training in (True, False):
            model.load_state_dict(start, strict=False)  # constants of the forward join it
            torch.manual_seed(1)
            found = model.train(training)(X)
            results.append([found, *(model.state_dict()[name].clone() for name in start)])
    for before, after in zip(results[:2], results[2:]):
        assert len(before) == len(after)
        for a, b in zip(before, after):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("make", [Statement, NoGradInside])
def test_values_and_gradients_of_odd_statements(make: Callable[[], nn.Module]) -> None:
    model, x = make(), torch.randn(3, 8)
    gm = graph.trace(model, x)
    found = []
    for run in (model, gm):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        found.append((y.detach(), model.fc.weight.grad.clone()))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def test_a_norm_inside_a_bigger_layer_trains_under_its_own_name() -> None:
    model = NETWORKS["norm with activation"]()
    names = list(model.state_dict())
    gm = graph.trace(model, X)
    assert type(model[1]) is NormAct and [n.target for n in graph.weighted(gm)] == ["0", "2"]
    graph.install(model, gm)
    assert type(model[1]) is nn.BatchNorm2d and list(model.state_dict()) == names
    clone = copy.deepcopy(model)
    clone.train()(X)
    assert not torch.equal(clone[1].running_mean, model[1].running_mean)


def test_a_forward_with_another_result_in_training_is_traced_in_eval_mode_with_a_warning() -> None:
    model = Auxiliary()
    with pytest.warns(UserWarning, match="only training does"):
        gm = graph.trace(model, X)
    graph.install(model, gm)
    before = model.bn.running_mean.clone()
    assert isinstance(model.train()(X), torch.Tensor) and not torch.equal(model.bn.running_mean, before)


@pytest.mark.parametrize(
    ("wrapped", "advice"),
    [
        (lambda m: nn.DataParallel(m), "model.module"),
        (lambda m: torch.compile(m, backend="eager"), "_orig_mod"),
        (lambda m: torch.jit.trace(m.eval(), X), "TorchScript"),
    ],
)
def test_a_wrapped_model_is_refused_with_what_to_pass_instead(wrapped: Callable, advice: str) -> None:
    with pytest.raises(UserError, match=advice):
        graph.trace(wrapped(nn.Sequential(nn.Conv2d(3, 4, 3))), X)


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.table = nn.Conv2d(3, 8, 3), nn.Linear(5, 8), nn.Embedding(7, 8)

    def forward(self, image: torch.Tensor, extra: torch.Tensor | None = None, *, ids: torch.Tensor, scale: float = 2.0):
        y = self.conv(image).relu().mean((2, 3)) * scale
        if extra is not None:
            y = y + self.fc(extra)
        tokens = self.table(ids).mean(1)
        return {"sum": y + tokens, "parts": [y, tokens]}


@pytest.mark.parametrize("with_extra", [True, False])
def test_several_inputs_and_outputs_keep_their_structure(with_extra: bool) -> None:
    model = Several()
    example = {"image": X, "ids": torch.randint(0, 7, (3, 4))}
    if with_extra:
        example["extra"] = torch.randn(3, 5)
    gm = graph.trace(model, example)
    expected = model(**example)
    found = run_graph(gm, example)
    graph.install(model, gm)
    for result in (found, model(**example)):
        assert list(result) == ["sum", "parts"] and isinstance(result["parts"], list)
        torch.testing.assert_close(result["sum"], expected["sum"])
        torch.testing.assert_close(result["parts"][1], expected["parts"][1])
    other = {k: v[:1] for k, v in example.items()}
    assert model(**other)["sum"].shape == (1, 8)
    with pytest.raises(UserError, match="traced with other arguments"):
        model(X, ids=example["ids"], scale=3.0, extra=None if with_extra else torch.randn(3, 5))


def test_what_is_no_example_is_said() -> None:
    with pytest.raises(UserError, match="cannot be run on the example"):
        graph.trace(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 5, 8, 8))
    with pytest.raises(UserError, match="missing 1 required"):
        graph.trace(Several(), X)
    with pytest.raises(UserError, match="found str"):
        graph.trace(Several(), "image")
