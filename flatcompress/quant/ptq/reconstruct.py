"""AdaRound (arXiv 2004.10568), layer by layer, and BRECQ (arXiv 2102.05426), block by block: rounding is learned.

    W~ = s * clip(floor(W / s) + h(V), -Qn, Qp)                                                            (eq. 22)
    h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1),  zeta = 1.1, gamma = -0.1                         (eq. 23)
    minimise ||y_float - y~||^2 + lambda * sum(1 - |2 h(V) - 1|^beta),  beta annealed from 20 to 2     (eq. 21, 24)

The inputs are those of the quantized path, the outputs wanted are the float network's (eq. 25). With zero steps the
result is rounding to nearest, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from flatcompress.quant.ptq.paths import Paths, Values, weight_replaced
from flatcompress.quant.quantizers.lsq import StepQuantizer
from flatcompress.quant.quantizers.modules import QuantizedLayer

aten = torch.ops.aten
ZETA, GAMMA = 1.1, -0.1
BETA_START, BETA_END, WARM_UP = 20.0, 2.0, 0.2
BATCH = 32


@dataclass(frozen=True)
class Schedule:
    """``steps`` of Adam with step size ``lr`` on V; ``regularization`` is lambda; ``drop``: QDrop's probability.

    ``scale_lr``: step size of the activation scales as a share of each scale (BRECQ, section 3.3); 0: fixed.
    """

    steps: int = 200
    lr: float = 2e-2
    regularization: float = 0.01
    scale_lr: float = 2e-3
    drop: float = 0.0


class SoftRounding:
    """One layer's rounding while it is learned."""

    def __init__(self, layer: QuantizedLayer) -> None:
        self.layer = layer
        self.quantizer: Any = layer.weight_quant.tensor_quant
        with torch.no_grad():
            self.step = self.quantizer.step().clone()
            ratio = layer.weight / self.step
            self.floor = ratio.floor()
            self.nearest = ratio.round() - self.floor
            rest = (ratio - self.floor).clamp(1e-4, 1 - 1e-4)
            self.start = -torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1)
        self.v = self.start.clone().requires_grad_(True)

    def share(self) -> Tensor:
        """h(V)."""
        return (torch.sigmoid(self.v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def weight(self) -> Tensor:
        """W~."""
        return (self.floor + self.share()).clamp(-self.quantizer.qn, self.quantizer.qp) * self.step

    def penalty(self, beta: float) -> Tensor:
        """sum of 1 - |2 h(V) - 1|^beta."""
        return (1 - (2 * self.share() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def settle(self) -> int:
        """Write the learned integers into the layer; returns how many went the other way than nearest."""
        # An untouched V stays with nearest: at a half, sigmoid and rounding to even need not agree.
        up = torch.where(self.v == self.start, self.nearest, (self.v >= 0).to(self.nearest))
        self._write(up)
        return int((up != self.nearest).sum())

    @torch.no_grad()
    def to_nearest(self) -> None:
        """Write the integers nearest to the weights into the layer."""
        self._write(self.nearest)

    def _write(self, up: Tensor) -> None:
        integers = (self.floor + up).clamp(-self.quantizer.qn, self.quantizer.qp)
        self.layer.weight.copy_(integers * self.step)


def reconstruct(
    paths: Paths,
    nodes: Sequence[fx.Node],
    inputs: Values,
    wanted: list[Tensor],
    end: fx.Node,
    schedule: Schedule,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Learn the rounding of every layer among ``nodes`` so that ``end`` gives ``wanted``; the layers change in place.

    ``inputs``: what nodes outside give on the quantized path, a value per batch. A block that the learned rounding
    does not improve on these samples stays at nearest. Returns the loss before and after, and how many weights were
    not rounded to nearest.
    """
    layers = [layer for n in nodes if (layer := paths.layer(n)) is not None and str(n.target) not in paths.shared]
    soft = [SoftRounding(layer) for layer in layers]
    block = _Block(paths, nodes, inputs, end, generator, schedule.drop)
    target = torch.cat(wanted)
    scales = _scales(paths, nodes) if schedule.scale_lr else []
    kept = [s.detach().clone() for s in scales]
    if schedule.steps and soft:
        before = block.loss(target)
        _learn(block, target, soft, scales, schedule, generator)
    flipped = sum(s.settle() for s in soft)
    if not (schedule.steps and soft):
        return {"flipped": flipped}
    after = block.loss(target)
    if after < before:
        return {"flipped": flipped, "loss_before": before, "loss_after": after}
    for s in soft:
        s.to_nearest()
    for scale, value in zip(scales, kept):
        scale.copy_(value)
    return {"flipped": 0, "loss_before": before, "loss_after": before}


def _scales(paths: Paths, nodes: Sequence[fx.Node]) -> list[Tensor]:
    quantizers = [paths.model.get_submodule(str(n.target)).tensor_quant for n in nodes if paths.is_quantizer(n)]
    return [q.scale for q in quantizers if isinstance(q, StepQuantizer)]  # type: ignore[union-attr]


def _learn(
    block: _Block,
    target: Tensor,
    soft: list[SoftRounding],
    scales: list[Any],
    schedule: Schedule,
    generator: torch.Generator,
) -> None:
    groups: list[dict[str, Any]] = [{"params": [s.v for s in soft], "lr": schedule.lr}]
    groups += [{"params": [s], "lr": schedule.scale_lr * float(s.detach().abs().mean())} for s in scales]
    optimizer = torch.optim.Adam(groups)
    wanted_grad = [s.requires_grad for s in scales]
    for scale in scales:
        scale.requires_grad_(True)
    norm = float(target.square().mean()) or 1.0
    try:
        for step in range(schedule.steps):
            picked = torch.randperm(len(target), generator=generator)[:BATCH]
            progress = step / schedule.steps
            with torch.enable_grad(), ExitStack() as stack:
                for s in soft:
                    stack.enter_context(weight_replaced(s.layer, s.weight()))
                loss = (block(picked) - target[picked]).square().mean() / norm
                if progress >= WARM_UP:
                    since = (progress - WARM_UP) / (1 - WARM_UP)
                    beta = BETA_END + (BETA_START - BETA_END) * (1 + math.cos(math.pi * since)) / 2
                    count = sum(s.v.numel() for s in soft)
                    loss = loss + schedule.regularization * sum(s.penalty(beta) for s in soft) / count
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
    finally:
        for scale, needed in zip(scales, wanted_grad):
            scale.requires_grad_(needed)
            scale.grad = None


class _Block:
    """Some nodes as a function of the samples picked; what they read from outside is kept per sample."""

    def __init__(
        self, paths: Paths, nodes: Sequence[fx.Node], inputs: Values, end: fx.Node, generator: Any, drop: float
    ) -> None:
        self.paths, self.end, self.generator, self.drop = paths, end, generator, drop
        self.nodes = list(nodes[: list(nodes).index(end) + 1])
        outside = {s for n in self.nodes for s in n.all_input_nodes if s not in set(self.nodes)}
        self.fixed: dict[fx.Node, Any] = {}
        self.sampled: dict[fx.Node, Tensor] = {}
        self.sizes: list[fx.Node] = []
        for source in outside:
            if source.target is aten.sym_size.int and source.args[1] == 0:
                self.sizes.append(source)
            elif source.op == "get_attr" or not isinstance(inputs[source][0], Tensor):
                self.fixed[source] = inputs[source][0]
            else:
                self.sampled[source] = torch.cat(inputs[source]).detach()

    def __call__(self, picked: Tensor) -> Tensor:
        values: Values = {source: [value] for source, value in self.fixed.items()}
        values |= {source: [len(picked)] for source in self.sizes}
        values |= {source: [value[picked]] for source, value in self.sampled.items()}
        for node in self.nodes:
            made = self.paths.value(node, values, 0, quantized=True)
            if self.drop and self.paths.is_quantizer(node):
                made = self._dropped(values[node.args[0]][0], made)  # type: ignore[index]
            values[node] = [made]
        return values[self.end][0]

    def _dropped(self, before: Tensor, after: Tensor) -> Tensor:
        """QDrop (arXiv 2203.05740, eq. 8): each activation is left unquantized with probability ``drop``."""
        if not torch.is_grad_enabled():
            return after
        kept = torch.rand(after.shape, generator=self.generator).to(after.device) < self.drop
        return torch.where(kept, before, after)

    @torch.no_grad()
    def loss(self, target: Tensor) -> float:
        """Mean squared error over all samples relative to the target's mean square."""
        total = 0.0
        for picked in torch.arange(len(target)).split(BATCH):
            total += float((self(picked) - target[picked]).square().sum())
        return total / (float(target.square().sum()) or 1.0)
