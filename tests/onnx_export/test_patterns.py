"""Patterns that people's networks are made of: trained a little, quantized, written, proved, and equal to the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from flatcompress import quant
from flatcompress.onnx_export import certify, export

WIDTH = 8
IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SERIES = torch.randn(16, 3, 16, generator=torch.Generator().manual_seed(1))


def conv(channels: int = WIDTH, **options: int) -> nn.Conv2d:
    return nn.Conv2d(WIDTH, channels, 3, padding=1, **options)


class Body(nn.Module):
    """Named layers, and a function of them and of what the stem makes."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor], width: int = WIDTH, **layers: nn.Module) -> None:
        super().__init__()
        self.run, self.width = run, width
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Network(nn.Module):
    """Stem, body, mean over positions, classifier; series [B, 3, T] get a 1-d stem."""

    def __init__(self, body: Body, series: bool) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, WIDTH, 3, padding=1) if series else nn.Conv2d(3, WIDTH, 3, padding=1)
        self.body, self.head = body, nn.Linear(body.width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(F.relu(self.stem(x))).flatten(2).mean(2))


class Standardised(nn.Conv2d):
    """Weights of mean 0 and deviation 1 per channel."""

    def forward(self, x: Tensor) -> Tensor:
        spread, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) * torch.rsqrt(spread + 1e-4), self.bias, padding=1)


def spatial_gate(m: nn.Module, x: Tensor) -> Tensor:
    y = F.relu(m.conv(x))
    return y * torch.sigmoid(m.gate(torch.cat([y.amax(1, True), y.mean(1, True)], 1)))


def attention(m: nn.Module, x: Tensor) -> Tensor:
    query, key, value = m.project(x.transpose(1, 2)).chunk(3, -1)
    weights = torch.einsum("nqc,nkc->nqk", query, key).softmax(-1)
    return x + torch.einsum("nqk,nkc->ncq", weights, value)


def skip(m: nn.Module, x: Tensor) -> Tensor:
    return F.relu(m.mix(torch.cat([x, F.relu(m.up(F.relu(m.down(x))))], 1)))


W = WIDTH
PATTERNS: dict[str, Callable[[], Body]] = {
    "squeeze and excite": lambda: Body(
        lambda m, x: x + m.norm(m.wide(x)) * F.hardsigmoid(m.up(F.relu(m.down(x.mean((2, 3), keepdim=True))))),
        wide=conv(groups=W), norm=nn.BatchNorm2d(W), down=nn.Conv2d(W, 4, 1), up=nn.Conv2d(4, W, 1)),
    "encoder and decoder": lambda: Body(
        skip, down=nn.Conv2d(W, W, 3, 2, 1), up=nn.ConvTranspose2d(W, W, 2, 2), mix=nn.Conv2d(2 * W, W, 1)),
    "group and instance norm": lambda: Body(
        lambda m, x: F.gelu(m.second(m.b(F.silu(m.first(m.a(x)))))),
        a=conv(), first=nn.GroupNorm(2, W), b=conv(), second=nn.InstanceNorm2d(W)),
    "one convolution, norm and activation twice": lambda: Body(
        lambda m, x: m.act(m.norm(m.conv(m.act(m.norm(m.conv(x)))))),
        conv=conv(), norm=nn.BatchNorm2d(W), act=nn.LeakyReLU(0.1)),
    "gated linear unit": lambda: Body(lambda m, x: F.relu(m.b(F.glu(m.a(x), 1))), a=conv(2 * W), b=conv()),
    "prelu": lambda: Body(lambda m, x: m.act(m.norm(m.conv(x))), conv=conv(), norm=nn.BatchNorm2d(W), act=nn.PReLU(W)),
    "weight norm": lambda: Body(lambda m, x: F.relu(m.conv(x)), conv=parametrizations.weight_norm(conv())),
    "spectral norm": lambda: Body(lambda m, x: F.relu(m.conv(x)), conv=parametrizations.spectral_norm(conv())),
    "weight standardisation": lambda: Body(
        lambda m, x: F.relu(m.norm(m.conv(x))), conv=Standardised(W, W, 3), norm=nn.GroupNorm(4, W)),
    "functional dropout": lambda: Body(lambda m, x: F.dropout(F.relu(m.conv(x)), 0.2, m.training), conv=conv()),
    "spatial gate": lambda: Body(spatial_gate, conv=conv(), gate=nn.Conv2d(2, 1, 7, padding=3)),
    "gate by a maximum": lambda: Body(lambda m, x: x * torch.sigmoid(m.conv(x).max(1, keepdim=True)[0]), conv=conv()),
    "normalised features": lambda: Body(lambda m, x: F.normalize(F.relu(m.conv(x)) + 0.1, dim=1), conv=conv()),
    "norm of the batch at hand": lambda: Body(
        lambda m, x: F.relu(m.b(F.relu(m.norm(m.a(x))))),
        a=conv(), norm=nn.BatchNorm2d(W, track_running_stats=False), b=conv()),
}  # fmt: skip
OF_SERIES: dict[str, Callable[[], Body]] = {
    "depthwise": lambda: Body(
        lambda m, x: F.relu6(m.norm(m.conv(x))), conv=nn.Conv1d(W, W, 5, padding=2, groups=W), norm=nn.BatchNorm1d(W)),
    "lstm": lambda: Body(
        lambda m, x: m.layer(x.transpose(1, 2))[0].transpose(1, 2), layer=nn.LSTM(W, W, batch_first=True)),
    "multi-head attention": lambda: Body(
        lambda m, x: x + m.layer(*[x.transpose(1, 2)] * 3, need_weights=False)[0].transpose(1, 2),
        layer=nn.MultiheadAttention(W, 2, batch_first=True)),
    "transformer encoder": lambda: Body(
        lambda m, x: m.layer(x.transpose(1, 2)).transpose(1, 2),
        layer=nn.TransformerEncoderLayer(W, 2, 16, batch_first=True)),
    "einsum": lambda: Body(attention, project=nn.Linear(W, 3 * W)),
    "transposed": lambda: Body(
        lambda m, x: F.leaky_relu(m.up(F.leaky_relu(m.down(x)))),
        down=nn.Conv1d(W, W, 4, 2, 1), up=nn.ConvTranspose1d(W, W, 4, 2, 1)),
}  # fmt: skip
EVERY = [(name, bits) for name in [*PATTERNS, *OF_SERIES] for bits in (8, 4)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "bits"), EVERY)
def test_a_trained_pattern_is_written_proved_and_equal_to_the_model(name: str, bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    series = name in OF_SERIES
    model, x = Network({**PATTERNS, **OF_SERIES}[name](), series), SERIES if series else IMAGES
    quant.quantize(model, bits, bits, example_input=x)
    quant.calibrate(model, [x])
    optimizer = torch.optim.SGD(model.train().parameters(), 0.02)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(len(x)) % 4).backward()
        optimizer.step()
    quant.set_bias_rounding(model)
    for profile in ("packed", "int8"):
        exported = export(model.eval(), x, tmp_path / f"{profile}.onnx", profile)
        found = certify(exported, [x], model=model, latency_runs=0, write=False, evaluations=16)
        assert found["holds"], found["failures"]
        trained = found["trained"]
        assert trained["file"]["largest_error_steps"] < 1.0 or trained["stepwise"]["holds"], trained


class AfterAnInstanceNorm(nn.Module):
    """The mean of a map whose mean is zero: what the pool makes is far smaller than what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.norm(self.conv(self.stem(x))), 1).flatten(1))


@pytest.mark.parametrize("profile", ["packed", "int8", "qdq"])
def test_a_pool_that_onnxruntimes_integer_kernel_refuses_stays_in_floats(profile: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AfterAnInstanceNorm()
    quant.quantize(model, 8, 8, example_input=IMAGES[:2])
    quant.calibrate(model, [IMAGES])
    exported = export(model.eval(), IMAGES[:2], tmp_path / "m.onnx", profile=profile)
    certificate = certify(exported, [IMAGES], latency_runs=0, write=False)
    assert certificate["holds"], certificate["failures"]
