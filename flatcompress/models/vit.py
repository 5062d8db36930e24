"""A small vision transformer (arXiv 2010.11929): pre-norm blocks, mean pooling instead of a class token.

Attention is written out as matmul, softmax, matmul, so that quantizers find the two products; its shape comes
from `num_heads` and `head_dim` at run time, so that pruning a head is cutting `qkv` and `proj` and changing
the attributes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.models.blocks import Shape, positive


class Attention(nn.Module):
    """[B, N, dim] -> [B, N, dim]; rows of ``qkv`` are ordered (q|k|v, head, head_dim)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5  # of the unpruned head: cutting dimensions must not change the temperature
        self.qkv = nn.Linear(dim, 3 * dim)
        self.softmax = nn.Softmax(dim=-1)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        qkv = self.qkv(x).reshape(-1, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = self.softmax((q * self.scale) @ k.transpose(-2, -1))
        mixed = (weights @ v).transpose(1, 2).reshape(-1, tokens, self.num_heads * self.head_dim)
        return self.proj(mixed)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """[B, C, H, W] -> logits [B, classes]; ``pos_embed`` [1, tokens, dim] is a free parameter."""

    def __init__(
        self, num_classes: int, input_shape: Shape, patch: int, dim: int, depth: int, heads: int, mlp_ratio: float
    ) -> None:
        super().__init__()
        channels, height, breadth = input_shape
        # Sides that no patch divides are padded evenly rather than cropped.
        padding = ((-height % patch + 1) // 2, (-breadth % patch + 1) // 2)
        rows, columns = ((side + 2 * pad - patch) // patch + 1 for side, pad in zip((height, breadth), padding))
        self.patch_embed = nn.Conv2d(channels, dim, patch, patch, padding)
        self.flatten = nn.Flatten(2)
        self.pos_embed = nn.Parameter(torch.empty(1, rows * columns, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads, round(dim * mlp_ratio)) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        self._init()

    def _init(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.flatten(self.patch_embed(x)).transpose(1, 2) + self.pos_embed
        return self.head(self.norm(self.blocks(x)).mean(1))


def default_patch(input_shape: Shape) -> int:
    """Two pixels up to 16 a side, 4 up to 48, 8 up to 128, else 16: 16 to 196 tokens."""
    side = min(input_shape[1:])
    return next((patch for limit, patch in ((16, 2), (48, 4), (128, 8)) if side <= limit), 16)


def vit_tiny(
    num_classes: int,
    input_shape: Shape,
    *,
    patch_size: int = 0,
    dim: int = 64,
    depth: int = 4,
    num_heads: int = 4,
    mlp_ratio: float = 2.0,
) -> nn.Module:
    """A vision transformer small enough for 16 to 32 pixels. ``patch_size`` 0: by the image size."""
    for name, value in (("dim", dim), ("depth", depth), ("num_heads", num_heads), ("mlp_ratio", mlp_ratio)):
        positive(name, value)
    if dim % num_heads:
        raise UserError(f"vit_tiny: dim {dim} is not a multiple of num_heads {num_heads}")
    patch = patch_size or default_patch(input_shape)
    if not 0 < patch <= min(input_shape[1:]):
        raise UserError(f"vit_tiny: patch_size {patch} does not fit images of {input_shape[1]}x{input_shape[2]}")
    return VisionTransformer(num_classes, input_shape, patch, dim, depth, num_heads, mlp_ratio)
