"""Attention blocks: which Linear layers form one, and what must be set again when heads go.

A head is the unit that can be cut: its rows of query, key and value, and its columns of the output projection.
Two spellings are known: one fused ``qkv`` Linear (rows ordered q | k | v, head, head_dim: timm and the built-in
ViT) and separate query / key / value Linears (transformers). The channels that leave the block belong to the
residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

_FUSED = ("qkv", "in_proj")
_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("to_q", "to_k", "to_v"))
_OUTPUTS = ("proj", "out_proj", "o_proj", "to_out", "dense")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")
_WIDTHS = ("all_head_size", "attn_dim", "inner_dim")


@dataclass(frozen=True)
class Attention:
    """One block: names of its layers, its heads, and the attributes to set again.

    ``counts``: (module name, attribute, value per kept head).
    """

    name: str
    inputs: tuple[str, ...]
    output: str
    heads: int
    head_dim: int
    counts: tuple[tuple[str, str, int], ...]

    @property
    def fused(self) -> bool:
        """One Linear makes query, key and value."""
        return len(self.inputs) == 1


def _linear(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Linear)


def _inputs(module: nn.Module) -> tuple[str, ...] | None:
    for name in _FUSED:
        if _linear(module, name):
            return (name,)
    return next((names for names in _SEPARATE if all(_linear(module, n) for n in names)), None)


def _output(model: nn.Module, name: str, module: nn.Module) -> str | None:
    prefix = f"{name}." if name else ""
    for child in _OUTPUTS:
        if _linear(module, child):
            return prefix + child
    # transformers < 5 keeps the projection beside the attention: attention.attention.query, attention.output.dense
    parent = name.rpartition(".")[0]
    beside = f"{parent}.output.dense" if parent else "output.dense"
    return beside if beside in dict(model.named_modules()) else None


def _read(model: nn.Module, name: str, module: nn.Module) -> Attention | None:
    inputs = _inputs(module)
    heads_name = next((n for n in _HEADS if isinstance(getattr(module, n, None), int)), None)
    if inputs is None or heads_name is None:
        return None
    output = _output(model, name, module)
    heads = getattr(module, heads_name)
    rows = {getattr(module, n).out_features for n in inputs}
    if output is None or len(rows) != 1:  # grouped-query attention has fewer key than query rows
        return None
    width = rows.pop() // (3 if len(inputs) == 1 else 1)
    if width % heads or model.get_submodule(output).in_features != width:
        return None
    counts = [(name, heads_name, 1)]
    counts += [(name, w, width // heads) for w in _WIDTHS if getattr(module, w, None) == width]
    prefix = f"{name}." if name else ""
    return Attention(name, tuple(prefix + n for n in inputs), output, heads, width // heads, tuple(counts))


def find_attention(model: nn.Module) -> list[Attention]:
    """Every attention block of ``model`` whose heads can be told apart, in module order."""
    found = (_read(model, name, module) for name, module in model.named_modules())
    return [block for block in found if block is not None]
