"""How much each layer minds being rounded, before anything is quantized.

`rounded_loss` measures it: the loss with weights on their grids. `hessian_traces` is what HAWQ-V2 uses
instead (arXiv 1911.03852): tr(H) of the loss in one layer's weights, by Hutchinson's estimate. `sensitivities` turns
one of them, or one backward pass, into a cost per layer and bit width. `flatness_map` puts
side by side how far a layer may move and how far its grid moves it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError, unknown
from flatcompress.modules import evaluating
from flatcompress.numerics import hutchinson
from flatcompress.quant.placement import LAYERS
from flatcompress.quant.quantizers.lsq import grid

Loss = Callable[[], Tensor]
KINDS = ("measured", "hessian", "gradient")
CHOICES = (2, 3, 4, 6, 8)
_SHARES = 60  # grid steps tried per row when the least squared error is looked for


@contextmanager
def _differentiable(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Frozen weights require gradients inside: how much they mind being rounded does not depend on who trains them."""
    frozen = [w for w in weights if not w.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def float_layers(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, nn.Module]:
    """Conv and linear layers by name (or those named). UserError for a name that is none."""
    found: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, LAYERS)}
    if names is None:
        return found
    for name in names:
        if name not in found:
            raise unknown("layer", name, found)
    return {n: found[n] for n in names}


def hessian_traces(
    model: nn.Module, loss: Loss, names: Iterable[str] | None = None, samples: int = 16, seed: int = 0
) -> dict[str, float]:
    """tr(H_l) of ``loss()`` in each layer's weight: the mean of z^T H z over Rademacher z (one z for all layers).

    ``loss``: forward on ``model``, returns a scalar; it is called in eval mode. Layers are probed together, each with
    its own block of z, so the blocks across layers enter as noise of mean zero. Frozen layers are measured like the
    others. ``names``: which layers (default: all that can be quantized); ``samples``: how many z. UserError when the
    loss does not depend on a layer or is not finite.
    """
    layers = float_layers(model, names)
    weights: list[Any] = [m.weight for m in layers.values()]
    generator = torch.Generator().manual_seed(seed)

    def signs(sample: int) -> list[Tensor]:
        return [(torch.randint(0, 2, w.shape, generator=generator) * 2.0 - 1.0).to(w) for w in weights]

    # BatchNorm by its statistics, no dropout
    with evaluating(model), _differentiable(weights), torch.enable_grad():
        gradients = _gradients(loss, weights, list(layers), create_graph=True)

        def product(z: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
            inner = torch.stack([(g * v).sum() for g, v in zip(gradients, z)]).sum()
            return torch.autograd.grad(inner, weights, retain_graph=True, allow_unused=True)

        return dict(zip(layers, hutchinson(signs, product, samples)))


def _gradients(loss: Loss, weights: list[Any], names: list[str], create_graph: bool) -> tuple[Tensor, ...]:
    value = loss()
    _finite(value)
    if not value.requires_grad:
        raise UserError("the loss that sensitivities are measured on does not depend on the model's weights.")
    found = torch.autograd.grad(value, weights, create_graph=create_graph, allow_unused=True)
    for name, gradient in zip(names, found):
        if gradient is None:
            raise UserError(f"the loss that sensitivities are measured on does not depend on layer {name!r}.")
    return found  # type: ignore[return-value]


def _finite(value: Tensor) -> float:
    if not bool(torch.isfinite(value)):
        raise UserError("the loss that sensitivities are measured on is not finite.")
    return float(value.detach())


@torch.no_grad()
def rounding_error(weight: Tensor, bits: int, tried: int = _SHARES) -> Tensor:
    """Q_b(w) - w on the per-channel symmetric grid of least squared error (the scale that training is heading for).

    tried: how many grids.
    """
    qn, qp = grid(bits, signed=True)
    rows = weight.detach().flatten(1)
    largest = rows.abs().amax(1, keepdim=True) / qp
    best, error = torch.zeros_like(rows), torch.full_like(largest, math.inf)
    for share in torch.linspace(1 / tried, 1, tried).tolist():
        step = (largest * share).clamp_min(torch.finfo(rows.dtype).tiny)
        difference = (rows / step).round_().clamp_(-qn, qp).mul_(step).sub_(rows)
        found = difference.square().sum(1, keepdim=True)
        better = found < error
        if bool(better.any()):
            best = torch.where(better, difference, best)
            error = torch.minimum(found, error)
    return best.view_as(weight)


@torch.no_grad()
def rounded_loss(model: nn.Module, loss: Loss, bits: Mapping[str, int]) -> float:
    """``loss()``, in eval mode, with the named layers' weights rounded to ``bits``; inf where that breaks it.

    Without ``bits`` the loss as it is, and a UserError when it is not finite.
    """
    weights: dict[str, Any] = {name: layer.weight for name, layer in float_layers(model, bits).items()}
    before = {name: weight.clone() for name, weight in weights.items()}
    with evaluating(model):
        if not bits:
            return _finite(loss())
        try:
            for name, weight in weights.items():
                weight += rounding_error(before[name], bits[name])
            found = float(loss())
            return found if math.isfinite(found) else math.inf
        finally:
            for name, weight in weights.items():
                weight.copy_(before[name])


def sensitivities(
    model: nn.Module,
    loss: Loss,
    names: Iterable[str] | None = None,
    choices: Iterable[int] = CHOICES,
    kind: str = "measured",
    seed: int = 0,
) -> dict[str, dict[int, float]]:
    """Expected cost of giving a layer b bits, by layer and b; never rising in b.

    ``names``: which layers (default: all that can be quantized); ``choices``: the b; ``kind``: one of three.

    ``measured``: by how much the loss changes with this layer alone rounded, a forward pass per layer and bit width; a
    fall counts as much as a rise, being luck that training does not keep.
    ``hessian``: tr(H)/n * ||Q_b(w) - w||^2 (HAWQ-V2, eq. 6). A trace that is not positive is noise or a saddle and
    would make a layer free; it counts as the least positive curvature found.
    ``gradient``: sum g^2 (Q_b(w) - w)^2 with g from one backward pass (the diagonal of the empirical Fisher matrix
    instead of the Hessian): many times cheaper, and blind where the loss has no slope.
    """
    if kind not in KINDS:
        raise unknown("sensitivity", kind, KINDS)
    layers = float_layers(model, names)
    if kind == "measured":
        start = rounded_loss(model, loss, {})
        return {n: _falling({b: abs(rounded_loss(model, loss, {n: b}) - start) for b in choices}) for n in layers}
    if kind == "hessian":
        traces = hessian_traces(model, loss, layers, seed=seed)
        curvature = {n: t / layers[n].weight.numel() for n, t in traces.items()}  # type: ignore[operator]
        floor = min((c for c in curvature.values() if c > 0), default=1.0)
        weight = {n: torch.tensor(max(c, floor)) for n, c in curvature.items()}
    else:
        weights: list[Any] = [m.weight for m in layers.values()]
        with evaluating(model), _differentiable(weights), torch.enable_grad():
            found = _gradients(loss, weights, list(layers), create_graph=False)
        weight = {n: g.detach().square() for n, g in zip(layers, found)}
    table: dict[str, dict[int, float]] = {}
    for name, layer in layers.items():
        errors = {b: rounding_error(layer.weight, b).square() for b in choices}  # type: ignore[arg-type]
        table[name] = _falling({b: float((weight[name] * error).sum()) for b, error in errors.items()})
    return table


def _falling(costs: Mapping[int, float]) -> dict[int, float]:
    """``costs`` by bits, none above the one of fewer bits."""
    found, least = {}, math.inf
    for bits in sorted(costs):
        found[bits] = least = min(least, costs[bits])
    return found


def flatness_map(
    model: nn.Module,
    loss: Loss,
    bits: dict[str, int],
    rise: float = 0.01,
    samples: int = 16,
    seed: int = 0,
    tried: int = _SHARES,
) -> list[dict[str, Any]]:
    """How far a layer may move against how far its grid moves it, one row per layer of a *float* model.

    ``bits``: by layer; ``samples``: probes of the trace; ``tried``: grids that are tried for a layer. ``curvature`` =
    tr(H)/n; ``reach`` = the l2 length of a random move that raises the loss by ``rise``, sqrt(2 * rise / curvature)
    (None where the curvature is not positive); ``grid_move`` = ||Q_b(w) - w||_2; ``strain`` = (grid_move / reach)^2:
    above 1 the grid alone is expected to cost more than ``rise``.
    """
    layers = float_layers(model, bits)
    traces = hessian_traces(model, loss, layers, samples, seed)
    rows = []
    for name, layer in layers.items():
        weight: Tensor = layer.weight  # type: ignore[assignment]
        curvature = traces[name] / weight.numel()
        move = float(rounding_error(weight, bits[name], tried).norm())
        reach = math.sqrt(2 * rise / curvature) if curvature > 0 else None
        strain = None if reach is None else (move / reach) ** 2
        rows.append({"name": name, "bits": bits[name], "curvature": curvature, "reach": reach, "grid_move": move,
                     "strain": strain})  # fmt: skip
    return rows
