"""Operators beyond the first table: every family that networks use, against torch, through onnxruntime."""

from __future__ import annotations

import pytest
import torch
from test_operators import Wrapped, check
from torch import nn
from torch.nn import functional as F

from flatcompress.errors import UserError
from flatcompress.onnx_export import export

W = torch.linspace(-1, 1, 6 * 4 * 9).reshape(6, 4, 3, 3)
TABLE = torch.linspace(-1, 1, 16).reshape(4, 4)


# x: [B, 4, 8, 8]
CASES = {
    "inverse_functions": lambda x: torch.asinh(x) + torch.atan(x) + torch.acosh(x.abs() + 1) + torch.sinh(x)
     + x.tan(),
    "logarithms": lambda x: (x.abs() + 1).log2() + (x.abs() + 1).log10() + x.abs().log1p() + x.expm1() + x.square(),
    "remainders": lambda x: torch.fmod(x, 0.7) + torch.remainder(x, 0.7) + torch.trunc(x * 3) + 2**x,
    "whole_numbers": lambda x: ((x * 9).long() // 4 + (x * 9).long() % 4 + torch.div((x * 9).long(), 3)).float(),
    "tests": lambda x: torch.isnan(x).float() + torch.isfinite(x).float() + (x > 0).logical_xor(x > 1).float(),
    "limits": lambda x: torch.clamp(x, x * 0.5, x * 0 + 1) + torch.clamp_max(x, 0.2) + torch.max(x, -x),
    "fused_arithmetic": lambda x: torch.addcmul(x, x, x, value=0.5) + torch.addcdiv(x, x, x + 9)
     + torch.lerp(x, -x, 0.3),
    "gates": lambda x: F.glu(x, 1) + F.logsigmoid(x[:, :2]) + F.celu(x[:, 2:], 0.5) + F.softplus(x[:, :2], beta=2.0),
    "shrinking": lambda x: F.hardshrink(x) + F.softshrink(x) + F.tanhshrink(x) + F.threshold(x, 0.1, 20)
     + F.softsign(x),
    "extremes": lambda x: x.max(1, keepdim=True)[0] + x.min(1, keepdim=True)[0] + x.max(2)[1].float().unsqueeze(2),
    "spreads": lambda x: x.std(1, keepdim=True) + x.var((2, 3), keepdim=True, correction=0)
     + x.std((1, 2), keepdim=True),
    "norms": lambda x: F.normalize(x, dim=1) + x.norm(dim=1, keepdim=True) + x.norm(p=1, dim=(2, 3), keepdim=True),
    "other_norms": lambda x: torch.linalg.vector_norm(x, 3, 1) + torch.linalg.vector_norm(x, float("inf"), 1),
    "sums": lambda x: torch.cumsum(x, 1) + x.logsumexp(1, keepdim=True) + x.prod(1, keepdim=True),
    "truths": lambda x: (x > 1).any(1).float() + (x > -2).all(1).float(),
    "top_k": lambda x: torch.topk(x, 3, -1)[0] + torch.topk(x, 3, -1, largest=False)[1].float(),
    "sorting": lambda x: x.sort(-1)[0] + x.argsort(2, descending=True).float(),
    "argmin": lambda x: x.argmin(1).float(),
    "gathering": lambda x: x.gather(1, x.argsort(1)) + x[:, [1, 0, 3, 2]],
    "scattering": lambda x: torch.zeros_like(x).scatter(1, x.argmax(1, True), 1.0)
     + x.scatter_add(1, x.argsort(1), x),
    "flips": lambda x: x.flip(-1, 2) + x.tril() + x.triu(1),
    "one_hot": lambda x: F.one_hot(x.argmax(1), 4).float() + F.embedding(x.argmax(1), TABLE),
    "filled": lambda x: torch.full((x.shape[0], 4, 1, 1), 2.0) + torch.ones_like(x) + x.new_zeros(4, 1, 1) * x,
    "einsum": lambda x: torch.einsum("bchw,bdhw->bcd", x, x) + torch.einsum("b c h w -> b c", x).unsqueeze(-1),
    "added_products": lambda x: torch.baddbmm(x[:, 0], x[:, 1], x[:, 2], beta=0.5, alpha=2.0),
    "functional_conv": lambda x: F.conv2d(x, W, padding="same") + F.conv2d(x, W[:, :, :1, :1]),
    "functional_transposed": lambda x: F.conv_transpose2d(x, W[:4, :2], stride=2, padding=1, output_padding=1),
    "functional_norms": lambda x: F.instance_norm(x) + F.group_norm(x, 2) + F.rms_norm(x, (8,))
     + F.layer_norm(x, (8, 8)),
    "batch_statistics": lambda x: F.batch_norm(x, None, None, training=True).sum((1, 2, 3)) * 0 + x.mean((1, 2, 3)),
    "uneven_pools": lambda x: F.adaptive_avg_pool2d(x, (3, 5)) + F.adaptive_max_pool2d(x, (3, 5)),
    "hanging_windows": lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True) + F.max_pool2d(x, 3, 2, ceil_mode=True),
    "hanging_padded": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True)
    + F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "own_divisor": lambda x: F.avg_pool2d(x, 2, divisor_override=3) + F.lp_pool2d(x.abs(), 2, 2),
    "volumes": lambda x: F.max_pool3d(x.unsqueeze(1), 2) + F.avg_pool3d(x.unsqueeze(1), 2)
     + F.adaptive_avg_pool3d(x, (2, 4, 4)).unsqueeze(1),
    "sequences": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 5) + F.adaptive_max_pool1d(x.flatten(2), 5),
    "resizing": lambda x: F.interpolate(x, (12, 10), mode="nearest-exact")
     + F.interpolate(x, (12, 10), mode="bicubic"),
    "resizing_1d": lambda x: F.interpolate(x.flatten(2), scale_factor=2, mode="linear")
     + F.interpolate(x.flatten(2), 128),
    "resizing_3d": lambda x: F.interpolate(x.unsqueeze(1), scale_factor=2, mode="trilinear", align_corners=True),
    "shuffles": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    "paddings": lambda x: F.pad(x, (1, 2, 0, 1), mode="circular") + F.pad(x, (2, 1, 1, 0), mode="reflect"),
    "windows": lambda x: x.unfold(2, 3, 2) + x.unfold(2, 3, 2).flip(-1),
    "columns": lambda x: F.unfold(x, 3, padding=1, stride=2),
    "moves": lambda x: x.movedim(1, -1).swapaxes(1, 2).unflatten(3, (2, 2)).flatten(-2) + x.mT.permute(0, 2, 3, 1),
    "views": lambda x: x.repeat_interleave(2, 1)[:, ::2] + x.tile(1, 1, 1, 1) + x[:, :1].expand_as(x)
     + x.narrow(1, 0, 4),
    "rolled_flat": lambda x: torch.roll(x, 3, 1) + torch.roll(x, -5),
    "positions": lambda x: x + torch.arange(x.shape[-1], dtype=x.dtype) / 8,
    "grid_sample": lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_operator_means_in_onnx_what_it_means_in_torch(name, tmp_path):
    torch.manual_seed(0)
    check(Wrapped(CASES[name]), tmp_path / "m.onnx")


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, kind: str, **options) -> None:
        super().__init__()
        self.inner = getattr(nn, kind)(4, 6, **options)
        self.outer = nn.Linear(6 * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)[:, :9].repeat(1, 1, 2)
        out = self.inner(x if self.inner.batch_first else x.transpose(0, 1))[0]
        return self.outer(out[:, -1] if self.inner.batch_first else out[-1])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.5}),
        ("GRU", {"num_layers": 2, "batch_first": True}),
        ("RNN", {"bidirectional": True}),
        ("RNN", {"nonlinearity": "relu", "bias": False, "batch_first": True}),
    ],
)
def test_recurrent_layers_are_nodes_of_onnx(kind, options, tmp_path):
    torch.manual_seed(0)
    check(Recurrent(kind, **options), tmp_path / "m.onnx")


LAYERS = {
    "transposed": lambda: nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2),
    "transposed_1d": lambda: nn.Sequential(nn.Flatten(2), nn.ConvTranspose1d(2, 4, 4, stride=2, padding=1)),
    "transposed_3d": lambda: nn.Sequential(nn.Unflatten(1, (1, 2)), nn.ConvTranspose3d(1, 3, 2, stride=2, bias=False)),
    "volume": lambda: nn.Sequential(nn.Unflatten(1, (1, 2)), nn.Conv3d(1, 3, (1, 3, 3)), nn.BatchNorm3d(3)),
    "instance": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4), nn.InstanceNorm2d(4, affine=True)),
    "rms": lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.RMSNorm(8)),
    "local_response": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.LocalResponseNorm(3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_means_in_onnx_what_it_means_in_torch(name, tmp_path):
    torch.manual_seed(0)
    check(LAYERS[name](), tmp_path / "m.onnx")


def test_what_depends_on_the_data_is_refused_by_module_and_operator(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), Inverse())
    with pytest.raises(UserError, match=r"module '1', operator aten\.linalg_inv"):
        export(model, torch.randn(2, 2, 8, 8), tmp_path / "m.onnx", "float32")
    assert not (tmp_path / "m.onnx").exists()


class Inverse(nn.Module):
    """ONNX has no inverse of a matrix."""

    def forward(self, x):
        return torch.linalg.inv(x @ x.transpose(2, 3) + torch.eye(x.shape[2]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [lambda x: torch.atan2(x, x + 1), lambda x: torch.diagonal(x, 0, 2, 3)],
)
def test_an_operator_without_a_row_goes_through_torchs_own_exporter(function, tmp_path):
    torch.manual_seed(0)
    check(Wrapped(function), tmp_path / "m.onnx")
