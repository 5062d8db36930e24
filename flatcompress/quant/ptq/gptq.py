"""GPTQ (arXiv 2210.17323): weights rounded one input at a time, each error made up for by the inputs still to come.

    H = X X^T + damping * mean(diag H) * I,   U = upper Cholesky factor of H^-1
    for every input j:  e = (w_j - Q(w_j)) / U_jj,   w_{j:} <- w_{j:} - e U_{j, j:}                (eq. 2, algorithm 1)

X are the layer's inputs on the quantized path; a convolution's are its patches, per group. Inputs of the largest
H_jj come first. Seconds where a reconstruction by gradients takes minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatcompress.quant.quantizers.modules import QuantizedLayer

_POSITIONS = 8192  # patches that a Hessian is made of
_COLUMNS = 128  # inputs rounded before their error is carried on to the rest
_DAMPING = 0.01


@torch.no_grad()
def gptq(layer: QuantizedLayer, inputs: Sequence[Tensor], generator: torch.Generator) -> str:
    """Round ``layer``'s weights in place for these inputs. Returns what was done, or why the layer was left."""
    quantizer: Any = layer.weight_quant.tensor_quant
    patches = _patches(layer, inputs, generator)
    if patches is None:
        return "nearest (no plain convolution or linear layer)"
    groups, _, size = patches.shape
    weight = layer.weight.detach()
    scale = quantizer.step().expand(weight.shape[0], *[1] * (weight.dim() - 1)).flatten()
    rows = weight.reshape(groups, weight.shape[0] // groups, size).double()
    steps = scale.reshape(groups, -1, 1).double()
    hessian = patches.transpose(1, 2) @ patches / patches.shape[1]
    integers = _rounded(rows, steps, hessian, quantizer.qn, quantizer.qp)
    layer.weight.copy_((integers * steps).reshape(weight.shape))
    return "gptq"


def _rounded(rows: Tensor, steps: Tensor, hessian: Tensor, qn: int, qp: int) -> Tensor:
    """Integers [G, rows, K] for weights ``rows`` [G, rows, K] on the grids ``steps`` [G, rows, 1] under [G, K, K]."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    order = diagonal.argsort(1, descending=True)
    rows = rows.gather(2, order.unsqueeze(1).expand_as(rows)).clone()
    hessian = hessian.gather(1, order.unsqueeze(2).expand_as(hessian))
    hessian = hessian.gather(2, order.unsqueeze(1).expand_as(hessian)).double()
    damping = _DAMPING * diagonal.double().mean(1).clamp_min(1e-12)
    hessian.diagonal(dim1=1, dim2=2).add_(damping.unsqueeze(1))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    integers, size = torch.zeros_like(rows), rows.shape[2]
    for start in range(0, size, _COLUMNS):
        end = min(start + _COLUMNS, size)
        errors = torch.zeros_like(rows[:, :, start:end])
        for j in range(start, end):
            column = rows[:, :, j : j + 1]
            integers[:, :, j : j + 1] = (column / steps).round().clamp(-qn, qp)
            error = (column - integers[:, :, j : j + 1] * steps) / factor[:, j : j + 1, j : j + 1]
            rows[:, :, j:end] -= error * factor[:, j : j + 1, j:end]
            errors[:, :, j - start : j - start + 1] = error
        rows[:, :, end:] -= errors @ factor[:, start:end, end:]
    return torch.zeros_like(integers).scatter(2, order.unsqueeze(1).expand_as(integers), integers)


def _patches(layer: QuantizedLayer, inputs: Sequence[Tensor], generator: torch.Generator) -> Tensor | None:
    """What each group's weights are multiplied with, [groups, patches, inputs]; None for a layer of another kind."""
    per_batch = max(1, _POSITIONS // max(len(inputs), 1))
    found = []
    for x in inputs:
        rows = x.flatten(0, -2).unsqueeze(0) if isinstance(layer, nn.Linear) else _unfolded(layer, x)
        if rows is None:
            return None
        picked = torch.randperm(rows.shape[1], generator=generator)[:per_batch]
        found.append(rows[:, picked.to(rows.device)])
    patches = torch.cat(found, 1)
    return patches if _explains(layer, inputs[0]) else None


def _unfolded(layer: Any, x: Tensor) -> Tensor | None:
    if isinstance(layer, nn.Conv1d):
        x, sides = x.unsqueeze(2), [(0, *layer.padding)] if not isinstance(layer.padding, str) else []
        kernel, stride, dilation = (1, *layer.kernel_size), (1, *layer.stride), (1, *layer.dilation)
    elif isinstance(layer, nn.Conv2d):
        sides = [layer.padding] if not isinstance(layer.padding, str) else []
        kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    else:
        return None
    if not sides or layer.padding_mode != "zeros":
        return None
    columns = F.unfold(x, kernel, dilation, sides[0], stride)
    per_group = columns.reshape(columns.shape[0], layer.groups, -1, columns.shape[2])
    return per_group.permute(1, 0, 3, 2).flatten(1, 2)


def _explains(layer: Any, x: Tensor) -> bool:
    """Whether weights times patches is what the layer computes: a subclass may pad or scale in its own forward."""
    x = x[:1]
    rows = x.flatten(0, -2).unsqueeze(0) if isinstance(layer, nn.Linear) else _unfolded(layer, x)
    assert rows is not None
    weight = layer.quantized_weight().detach()
    made = rows @ weight.reshape(rows.shape[0], -1, rows.shape[2]).transpose(1, 2)
    made = made.permute(1, 0, 2).flatten(1)
    wanted = layer(x) if layer.bias is None else layer(x) - _shaped(layer)
    wanted = wanted.flatten(0, -2) if isinstance(layer, nn.Linear) else wanted.transpose(0, 1).flatten(1).T
    limit = 1e-3 * float(wanted.abs().max().clamp_min(1e-12))
    return made.shape == wanted.shape and bool((made - wanted).abs().max() <= limit)


def _shaped(layer: Any) -> Tensor:
    return layer.bias if isinstance(layer, nn.Linear) else layer.bias.view(-1, *[1] * (layer.weight.dim() - 2))
