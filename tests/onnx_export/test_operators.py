"""Every operator that the writer knows, against torch, through onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatcompress.onnx_export import export
from flatcompress.onnx_export.runtime.sessions import run, session

CASES = {
    "relu": lambda x: F.relu(x),
    "relu6": lambda x: F.relu6(x * 4),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.25),
    "clamp": lambda x: x.clamp(-0.3, 0.4),
    "clamp_min": lambda x: x.clamp_min(0.1),
    "clamp_max": lambda x: x.clamp(max=0.1),
    "silu": lambda x: F.silu(x),
    "hardswish": lambda x: F.hardswish(x * 3),
    "hardsigmoid": lambda x: F.hardsigmoid(x * 3),
    "sigmoid": lambda x: torch.sigmoid(x),
    "tanh": lambda x: torch.tanh(x),
    "gelu": lambda x: F.gelu(x),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "elu": lambda x: F.elu(x, 0.7),
    "selu": lambda x: F.selu(x),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "softplus": lambda x: F.softplus(x),
    "mish": lambda x: F.mish(x),
    "softmax": lambda x: F.softmax(x, 1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "exp": lambda x: torch.exp(x),
    "log": lambda x: torch.log(x.abs() + 1),
    "sqrt": lambda x: torch.sqrt(x.abs()),
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 1),
    "arithmetic": lambda x: (2 - x) * 3 / (x.abs() + 1) - x.pow(2) + torch.add(x, x, alpha=2) - torch.sub(x, 1.0),
    "floor_division": lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    "rounding": lambda x: torch.floor(x) + torch.ceil(x * 2) + torch.round(x * 3) + torch.sign(x) + torch.abs(-x),
    "trigonometry": lambda x: torch.sin(x) + torch.cos(x) + torch.erf(x) + torch.reciprocal(x.abs() + 1),
    "maximum": lambda x: torch.maximum(x, -x) + torch.minimum(x, x * 2),
    "where": lambda x: torch.where(x > 0, x, x * 0.1) + torch.where(x <= 0.2, 1.0, x),
    "comparisons": lambda x: ((x >= 0) & ~(x < -1) | (x == 3)).to(x.dtype) + (x != 0).float(),
    "masked_fill": lambda x: x.masked_fill(x < 0, -1.0),
    "mean": lambda x: x.mean((2, 3)),
    "mean_keepdim": lambda x: x.mean((2, 3), keepdim=True) + x.mean(1, keepdim=True),
    "sum": lambda x: x.sum(1) + x.amax(1) + x.amin(1),
    "argmax": lambda x: x.argmax(1).float(),
    "adaptive_one": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive_even": lambda x: F.adaptive_avg_pool2d(x, (4, 2)),
    "adaptive_same": lambda x: F.adaptive_avg_pool2d(x, (8, 8)),
    "adaptive_max": lambda x: F.adaptive_max_pool2d(x, 1),
    "avg_pool": lambda x: F.avg_pool2d(x, 3, 2, 1) + F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "max_pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool_dilated": lambda x: F.max_pool2d(x, 2, 1, dilation=2),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, size=(12, 10), mode="bilinear", align_corners=False),
    "bilinear_corners": lambda x: F.interpolate(x, size=(12, 10), mode="bilinear", align_corners=True),
    "reshape": lambda x: x.reshape(x.shape[0], 2, -1).transpose(1, 2),
    "view_batch": lambda x: x.view(-1, 8).view(x.shape[0], 4, 8, 8),
    "permute": lambda x: x.permute(0, 2, 3, 1).flatten(1, 2),
    "flatten_middle": lambda x: x.flatten(1, 2),
    "squeeze": lambda x: x[:, :1].squeeze(1).unsqueeze(-1),
    "slices": lambda x: x[:, 1:3, ::2, -3:],
    "select": lambda x: x[:, 0] + x[:, -1],
    "unbind": lambda x: sum(x.unbind(1)),
    "split": lambda x: torch.cat(x.split(3, 1)[::-1], 1) + torch.cat(x.split([1, 3], 1), 1),
    "chunk": lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1],
    "cat": lambda x: torch.cat([x, -x, x * 2], 1),
    "stack": lambda x: torch.stack([x, -x], 1).flatten(1, 2),
    "expand": lambda x: x[:, :1].expand(-1, 4, -1, -1) * x,
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "roll": lambda x: torch.roll(x, (1, -2), (2, 3)),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)) + F.pad(x, (1, 2, 0, 1), value=0.5),
    "pad_modes": lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect") + F.pad(x, (1, 2, 0, 1), mode="replicate"),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "attention": lambda x: F.scaled_dot_product_attention(x, x * 2, x + 1),
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "norms": lambda x: F.layer_norm(x, (8,)),
}


class Wrapped(nn.Module):
    """A convolution, so that there is a layer, and the operator."""

    def __init__(self, function) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.function = function

    def forward(self, x):
        return self.function(self.conv(x))


def check(model: nn.Module, path, x: torch.Tensor | None = None, profile: str = "float32") -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 8, 8) if x is None else x
    model = model.eval()
    exported = export(model, x, path, profile)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(exported.reference(x), expected, rtol=1e-4, atol=1e-5)
    found = run(session(exported.path), [x.numpy()])
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-4)
    assert run(session(exported.path), [x.numpy()[:1]]).shape[0] == found.shape[0] // 3


@pytest.mark.parametrize("name", CASES)
def test_an_operator_means_in_onnx_what_it_means_in_torch(name, tmp_path):
    torch.manual_seed(0)
    check(Wrapped(CASES[name]), tmp_path / "m.onnx")


MODULES = {
    "batch_norm_after_relu": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)),
    "batch_norm_first": lambda: nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3)),
    "group_norm": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)),
    "group_norm_plain": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4, affine=False)),
    "layer_norm": lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.LayerNorm([4, 8, 8])),
    "layer_norm_plain": lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(128, elementwise_affine=False)),
    "same_padding": lambda: nn.Conv2d(2, 4, 4, padding="same"),
    "valid_padding": lambda: nn.Conv2d(2, 4, 4, padding="valid"),
    "reflect_padding": lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
    "circular_padding": lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
    "dilated_grouped": lambda: nn.Conv2d(2, 4, 3, dilation=2, groups=2, stride=2, bias=False),
    "linear_on_tokens": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(64, 5), nn.Linear(5, 6, bias=False)),
    "conv1d": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(2, 4, 3, stride=2, padding=1), nn.AdaptiveAvgPool1d(1)),
    "prelu": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.PReLU(4)),
    "dropout": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Dropout(0.5), nn.Identity()),
    "identity": lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.Flatten()),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_layer_means_in_onnx_what_it_means_in_torch(name, tmp_path):
    torch.manual_seed(0)
    model = MODULES[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    check(model, tmp_path / "m.onnx")


class Shared(nn.Module):
    """One layer called twice, with a BatchNorm behind one of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)

    def forward(self, x):
        return self.conv(self.norm(self.conv(x)))


class PositionMask(nn.Module):
    """A mask made of positions and the batch size, as transformers models make theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        tokens = self.linear(x.flatten(1, 2))
        position = torch.arange(tokens.shape[1])
        seen = (position[None, None, :] <= position[None, :, None]).expand(x.shape[0], -1, -1)
        scores = tokens @ tokens.transpose(1, 2)
        return torch.softmax(scores + torch.where(seen, 0.0, -1e9), -1) @ tokens


@pytest.mark.parametrize("model", [Shared, PositionMask])
def test_shared_layers_and_position_masks(model, tmp_path):
    torch.manual_seed(0)
    check(model(), tmp_path / "m.onnx")
