"""Single weights at zero: unstructured and N:M masks that hold bit for bit through everything that comes later.

A mask is a bool buffer ``weight_mask`` beside the weight, so it is in the state dict and follows the layer through
quantization. Masked weights are exactly zero, and `enforce_` puts them back after anything that moves weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from flatcompress.errors import UserError, unknown
from flatcompress.modules import walked, weight_of
from flatcompress.plan import Plan, Step
from flatcompress.prune.dependency import axes
from flatcompress.prune.dependency.survey import match

NAME = "weight_mask"
_PATTERN = re.compile(r"(\d+):(\d+)")
SCOPES = ("global", "layer")


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """(N, M) of an "N:M" pattern, None for "unstructured".

    >>> parse_pattern("2:4")
    (2, 4)
    """
    if pattern == "unstructured":
        return None
    found = _PATTERN.fullmatch(pattern)
    if found is None or not 0 < int(found[1]) < int(found[2]):
        raise unknown("sparsity pattern", pattern, ("unstructured", "2:4", "1:4"))
    return int(found[1]), int(found[2])


def nm_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Bool mask of ``weight`` that keeps the ``n`` largest |w| of every ``m`` consecutive input channels.

    Groups run along dimension 1 for every output and kernel position (arXiv 2104.08378); its size must be a multiple
    of ``m``. Of equal weights the earlier stays.
    """
    rows = weight.detach().abs().movedim(1, -1)
    groups = rows.reshape(-1, m)
    kept = groups.argsort(dim=1, descending=True, stable=True)[:, :n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, kept, True)
    return mask.reshape(rows.shape).movedim(-1, 1).contiguous()


def masked_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """(name, layer, mask) of every layer that carries a weight mask."""
    for name, module in model.named_modules():
        mask = module._buffers.get(NAME)
        if mask is not None:
            yield name, module, mask


def maskable(model: nn.Module) -> list[nn.Module]:
    """The layers that a mask may be put on, for whoever looks every step; walking the model takes most of the time."""
    return [module for module in walked(model) if isinstance(module, (_ConvNd, nn.Linear))]


@torch.no_grad()
def enforce_(model: nn.Module, layers: Iterable[nn.Module] | None = None) -> None:
    """Zero every masked weight of ``model`` again, exactly; call after each optimizer step.

    ``layers``: what `maskable` gave, where that is known.
    """
    for module in maskable(model) if layers is None else layers:
        mask = module._buffers.get(NAME)
        if mask is not None:
            module.get_parameter("weight").masked_fill_(~mask, 0)


@torch.no_grad()
def mask_gradients_(model: nn.Module, layers: Iterable[nn.Module] | None = None) -> None:
    """Zero the gradients of masked weights, so that norms, clipping and momentum do not see them."""
    for module in maskable(model) if layers is None else layers:
        mask = module._buffers.get(NAME)
        gradient = None if mask is None else module.get_parameter("weight").grad
        if mask is not None and gradient is not None:
            gradient.masked_fill_(~mask, 0)


def sparsity(model: nn.Module) -> float:
    """Share of zeros among the weights that carry a mask; 0 without masks."""
    masks = [mask for _, _, mask in masked_layers(model)]
    total = sum(mask.numel() for mask in masks)
    return 1 - sum(int(mask.sum()) for mask in masks) / total if total else 0.0


class WeightMasks:
    """Masks over the convolution and linear weights of ``model``, which only ever grow.

    ``pattern``: "unstructured" or "N:M". ``scope`` of unstructured masks: "global" ranks |w| over all layers, "layer"
    inside each. ``ignore``: layer names or ``re:PATTERN``. N:M leaves out depthwise layers and those whose inputs M
    does not divide; ``skipped`` says why. Masks that are there already stay.
    UserError: an unknown pattern or scope, an ignore pattern without a match, no layer left.
    """

    def __init__(
        self, model: nn.Module, pattern: str = "unstructured", *, scope: str = "global", ignore: Sequence[str] = ()
    ) -> None:
        if scope not in SCOPES:
            raise unknown("mask scope", scope, SCOPES)
        self.model, self.pattern, self.scope = model, pattern, scope
        self._nm = parse_pattern(pattern)
        ignored = match(model, ignore)
        self.layers: dict[str, nn.Module] = {}
        self.skipped: dict[str, str] = {}
        for name, module in model.named_modules():
            if isinstance(module, (_ConvNd, nn.Linear)):
                reason = "it is ignored" if name in ignored else self._unfit(module)
                if reason is None:
                    self.layers[name] = module
                else:
                    self.skipped[name] = reason
        if not self.layers:
            reasons = "; ".join(f"{n}: {r}" for n, r in self.skipped.items()) or "no convolution or linear layer"
            raise UserError(f"no layer of {type(model).__name__} can take {pattern} masks ({reasons}).")

    def _unfit(self, module: nn.Module) -> str | None:
        if self._nm is None:
            return None
        if axes.is_depthwise(module):
            return "a depthwise filter has one input channel"
        if isinstance(module, _ConvNd) and module.transposed:
            return "no hardware reads N:M patterns of transposed convolutions"
        inputs = module.get_parameter("weight").shape[1]
        return f"{inputs} input channels are no multiple of {self._nm[1]}" if inputs % self._nm[1] else None

    def update(self, target: float | None = None) -> None:
        """Mask until ``target`` (share of zeros) is reached, smallest |w| first; N:M needs no target.

        Already masked weights stay masked. UserError when the target is no share in [0, 1).
        """
        magnitudes = {name: self._magnitude(module) for name, module in self.layers.items()}
        if self._nm is not None:
            masks = {name: nm_mask(value, *self._nm) for name, value in magnitudes.items()}
        elif target is None or not 0 <= target < 1:
            raise UserError(f"sparsity is the share of zero weights, at least 0 and below 1; found {target}.")
        elif self.scope == "global":
            masks = _smallest_out(magnitudes, target)
        else:
            masks = {n: mask for n, v in magnitudes.items() for mask in _smallest_out({n: v}, target).values()}
        for name, module in self.layers.items():
            _set_mask(module, masks[name])
        enforce_(self.model)

    def _magnitude(self, module: nn.Module) -> Tensor:
        """|w|, and -1 where it is masked: those go first."""
        weight = module.get_parameter("weight").detach().abs()
        mask = module._buffers.get(NAME)
        return weight if mask is None else weight.masked_fill(~mask, -1)

    def plan(self) -> Plan:
        """The step that puts the buffers in place again; the masks themselves are in the state dict."""
        shapes = {name: list(module.get_parameter("weight").shape) for name, module in self.layers.items()}
        return Plan([Step("masks", {"pattern": self.pattern, "layers": shapes})])


def _smallest_out(magnitudes: dict[str, Tensor], target: float) -> dict[str, Tensor]:
    flat = torch.cat([value.flatten() for value in magnitudes.values()])
    mask = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    mask[flat.argsort(stable=True)[: round(target * len(flat))]] = False
    parts = mask.split([value.numel() for value in magnitudes.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(magnitudes.items(), parts, strict=True)}


def _set_mask(module: nn.Module, mask: Tensor) -> None:
    before = module._buffers.get(NAME)
    module.register_buffer(NAME, mask if before is None else mask & before)


def sparsify(
    model: nn.Module,
    target: float | None = None,
    pattern: str = "unstructured",
    *,
    scope: str = "global",
    ignore: Sequence[str] = (),
) -> Plan:
    """Mask the smallest weights of ``model`` at once, in place; see `WeightMasks`.

    >>> net = nn.Sequential(nn.Linear(8, 4))
    >>> _ = sparsify(net, 0.75)
    >>> int((net[0].weight == 0).sum())
    24
    """
    masks = WeightMasks(model, pattern, scope=scope, ignore=ignore)
    masks.update(target)
    return masks.plan()


def apply(model: nn.Module, data: dict[str, Any], example_input: Tensor | None = None) -> nn.Module:
    """Put the mask buffers of a "masks" step on ``model``, in place; the state dict fills them.

    UserError names the first layer that is missing or has another shape; nothing is changed then.
    """
    parse_pattern(data["pattern"])
    modules = dict(model.named_modules())
    for name, shape in data["layers"].items():
        weight = weight_of(modules.get(name))
        if weight is None:
            raise UserError(f"{name}: the plan masks this layer, which {type(model).__name__} does not have.")
        if list(weight.shape) != list(shape):
            raise UserError(f"{name}: the plan masks a weight of {shape}, this model has {list(weight.shape)}.")
    for name in data["layers"]:
        module = modules[name]
        if NAME not in module._buffers:
            module.register_buffer(NAME, torch.ones_like(module.get_parameter("weight"), dtype=torch.bool))
    return model
