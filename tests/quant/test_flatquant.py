"""FlatQuant's transformations: exact on the float network, less error on the grid, said where there is none."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import Encoder
from torch import Tensor, nn
from torch.nn import functional

from flatcompress import models, quant
from flatcompress.graph import trace
from flatcompress.quant.ptq import SCALINGS, flatquant
from flatcompress.quant.ptq.values import find_values


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(flatquant, "STEPS", 30)


class Heads(nn.Module):
    """Attention by `scaled_dot_product_attention`, layers of their own for queries, keys and values; [B, 5, 8]."""

    input_shape = (5, 8)

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.fc = nn.Linear(8, 3)

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 5, self.heads, 8 // self.heads).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (self._split(layer(y)) for layer in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 5, 8)
        return self.fc((x + self.out(mixed)).mean(1))


class ReadTwice(Heads):
    """The values are read a second time, beside the product."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (self._split(layer(y)) for layer in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 5, 8)
        return self.fc((x + self.out(mixed)).mean(1)) + v.square().mean((1, 2, 3)).unsqueeze(1)


def vit() -> nn.Module:
    model = models.build("vit_tiny", num_classes=4, input_shape=(3, 8, 8), seed=0, dim=16, depth=2, num_heads=2)
    model.input_shape = (3, 8, 8)
    return model


def outlying(make) -> tuple[nn.Module, Tensor]:
    """A network with channels of very different size behind its norms and in its values, and inputs."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.mul_(torch.rand(module.weight.shape) * 8 + 0.05)
            if isinstance(module, nn.Linear):
                module.weight[-1] *= 6  # among the values, where the layer makes them
    return model, torch.randn(24, *model.input_shape)


@pytest.mark.parametrize("make", [Encoder, Heads, lambda: Heads(4), vit])
@pytest.mark.parametrize("bits", [(4, 4), (3, None)])
def test_the_float_function_stays_and_the_error_falls(make, bits):
    model, x = outlying(make)
    expected = model(x).detach()
    rows = SCALINGS["flatquant"].make(trace(model, x[:2]), [x[:16], x[16:]], bits)
    assert torch.allclose(model(x), expected, atol=1e-4 * float(expected.abs().max()))
    moved = [row for row in rows if "skipped" not in row]
    assert moved and all(row["after"] < row["before"] for row in moved)


@pytest.mark.parametrize("make", [Encoder, Heads, lambda: Heads(4), vit])
def test_any_invertible_matrix_folds_exactly(make):
    model, x = outlying(make)
    expected = model(x).detach()
    paths, refused = find_values(trace(model, x[:2]), x[:2])
    assert paths and not refused
    for path in paths:
        heads, size = path.features.shape
        path.move(torch.eye(size) + 0.3 * torch.randn(heads, size, size))
    assert torch.allclose(model(x), expected, atol=1e-4 * float(expected.abs().max()))


def test_values_are_found_head_by_head():
    model = vit()
    paths, _ = find_values(trace(model, torch.zeros(2, 3, 8, 8)), torch.zeros(2, 3, 8, 8))
    assert [path.reader_name for path in paths] == ["blocks.0.attn.proj", "blocks.1.attn.proj"]
    # rows of qkv are ordered (q|k|v, head, dimension)
    assert paths[0].features.tolist() == [list(range(32, 40)), list(range(40, 48))]
    assert paths[0].columns.tolist() == [list(range(8)), list(range(8, 16))]


def test_by_hand_one_head_of_two_features():
    """V = (v1, 3 v1) by rotation becomes (sqrt(10) v1, 0): every reader sees the same."""
    model, _ = outlying(lambda: Heads(4))
    path = find_values(trace(model, torch.zeros(2, 5, 8)), torch.zeros(2, 5, 8))[0][0]
    with torch.no_grad():
        path.producer.bias.zero_()
        path.producer.weight[1] = 3 * path.producer.weight[0]
    first, before = path.producer.weight[0].clone(), path.reader.weight.clone()
    turn = torch.tensor([[1.0, -3.0], [3.0, 1.0]]) / 10**0.5
    path.move(torch.stack([turn, *torch.eye(2).expand(3, 2, 2)]))
    assert torch.allclose(path.producer.weight[0], 10**0.5 * first, atol=1e-5)
    assert torch.allclose(path.producer.weight[1], torch.zeros(8), atol=1e-5)
    assert torch.allclose(path.reader.weight[:, :2], before[:, :2] @ turn, atol=1e-5)
    assert torch.equal(path.reader.weight[:, 2:], before[:, 2:])


def test_what_others_read_too_is_left_as_it_was():
    model, x = outlying(ReadTwice)
    before = copy.deepcopy(model.state_dict())
    rows = SCALINGS["flatquant"].make(trace(model, x[:2]), [x], (4, 4))
    row = next(row for row in rows if row["layer"] == "v")
    assert "other operators read" in row["skipped"]
    for name in ("v.weight", "out.weight"):
        own = model.state_dict()[name]
        assert torch.equal(own, before[name]) or name == "v.weight"  # its columns carry the norm's factors


def test_a_grid_of_many_bits_needs_nothing():
    """No transformation is kept that gains nothing: at 16 bits the error is rounding's alone."""
    model, x = outlying(Heads)
    rows = SCALINGS["flatquant"].make(trace(model, x[:2]), [x], (16, 16))
    assert rows and all(row["skipped"] == "nothing was gained" for row in rows)


def test_post_training_uses_it_and_says_so():
    model, x = outlying(vit)
    plain, wanted = copy.deepcopy(model), model(x).detach()
    done = quant.post_training(model, [x], 4, 4, scaling="flatquant", correction="none")
    quant.post_training(plain, [x], 4, 4, correction="none")
    assert done.settings["scaling"] == "flatquant" and any("after" in row for row in done.steps)
    errors = [float((net(x).detach() - wanted).square().mean()) for net in (model, plain)]
    assert errors[0] < errors[1]


def test_the_same_seed_gives_the_same_bits():
    found = []
    for _ in range(2):
        model, x = outlying(Heads)
        SCALINGS["flatquant"].make(trace(model, x[:2]), [x], (4, 4))
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_network_without_attention_is_told():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(8, 4)
    rows = SCALINGS["flatquant"].make(trace(model, x[:2]), [x], (4, 4))
    assert len(rows) == 1 and "neither a LayerNorm" in rows[0]["skipped"]
