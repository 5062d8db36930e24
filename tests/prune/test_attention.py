"""Attention heads in the spellings that models use, and what is done where they cannot be told apart."""

from __future__ import annotations

import copy

import pytest
import torch
from prune_nets import group_named, largest_difference, randomized
from torch import Tensor, nn

from flatcompress.plan import apply_plan
from flatcompress.prune import Budget, CostModel, Limits, SoftMask, choose, find_groups, prune, score, survey

TOKENS = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3))


class Fused(nn.Module):
    """One qkv layer, as in timm."""

    def __init__(self, dim: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))


class Separate(nn.Module):
    """query, key and value apart and the projection beside them, as in transformers before version 5."""

    class Inner(nn.Module):
        def __init__(self, dim: int, heads: int) -> None:
            super().__init__()
            self.num_attention_heads, self.attention_head_size, self.all_head_size = heads, dim // heads, dim
            self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            shape = (*x.shape[:2], self.num_attention_heads, self.attention_head_size)
            q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
            weights = (q @ k.transpose(-1, -2) / self.attention_head_size**0.5).softmax(-1)
            return (weights @ v).transpose(1, 2).reshape(*x.shape[:2], self.all_head_size)

    class Output(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.dense = nn.Linear(dim, dim)

        def forward(self, x: Tensor) -> Tensor:
            return self.dense(x)

    def __init__(self, dim: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.attention, self.output = self.Inner(dim, heads), self.Output(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.attention(x))


class Rigid(Fused):
    """Writes the model's width where the heads' width belongs: cutting a head cannot work."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))


class Torch(nn.Module):
    def __init__(self, dim: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x)[0]


class Block(nn.Module):
    """Pre-norm transformer block and a classifier on the mean token."""

    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(12), attention()
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(12), nn.Linear(12, 16), nn.Linear(16, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


def block(attention: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomized(Block(attention))


@pytest.mark.parametrize("attention", [Fused, Separate])
def test_cutting_heads_equals_masking_them(attention: type[nn.Module]) -> None:
    model = block(attention)
    groups = find_groups(model, TOKENS)
    assert sorted((g.kind, g.units) for g in groups) == [("channels", 16), ("heads", 3)]
    mask = SoftMask(groups, choose(groups, score(groups), Budget("ratio", 0.4), Limits(ranking="uniform")))
    assert {int(keep.sum()) for keep in mask.keep} == {2, 10}
    assert largest_difference(model, groups, mask, TOKENS) < 1e-9


def test_attributes_follow_the_heads_and_the_plan_sets_them_again() -> None:
    model = block(Separate)
    fresh = copy.deepcopy(model)
    plan = prune(model, TOKENS, 0.6, ranking="uniform")
    inner = model.attn.attention
    assert (inner.num_attention_heads, inner.all_head_size, inner.query.out_features) == (1, 4, 4)
    assert torch.equal(apply_plan(fresh, plan)(TOKENS), model(TOKENS))


def test_head_owns_its_rows_of_query_key_and_value() -> None:
    group = next(g for g in find_groups(block(Fused), TOKENS) if g.kind == "heads")
    owners = {m.name: m.owner.tolist() for m in group.members}
    one = [0] * 4 + [1] * 4 + [2] * 4
    assert owners == {"attn.qkv": one * 3, "attn.proj": one}


def test_heads_that_the_forward_does_not_let_go_are_protected_but_the_mlp_is_not() -> None:
    found = survey(block(Rigid), TOKENS)
    assert "does not give the masked model's output" in (group_named(found.protected, "attn").reason or "")
    assert [g.name for g in found.groups] == ["fc1"]


def test_torch_multihead_attention_is_left_whole() -> None:
    found = survey(block(Torch), TOKENS)
    assert [g.name for g in found.groups] == ["fc1"]


def test_ignored_attention_keeps_its_heads() -> None:
    found = survey(block(Fused), TOKENS, ignore=["attn"])
    assert [g.name for g in found.groups] == ["fc1"]


def test_cost_of_a_head_includes_the_attention_products() -> None:
    model = block(Fused)
    groups = find_groups(model, TOKENS)
    costs = CostModel(model, TOKENS)
    gone = [1 if g.kind == "heads" else 0 for g in groups]
    saved = costs.macs(costs.dense) - costs.macs(costs.by_count(groups)(gone))
    tokens, head, dim = 5, 4, 12
    assert saved == tokens * (4 * head * dim) + 2 * tokens * tokens * head
