"""How two networks hang together: the error on the way from one to the other, and how alike their outputs are.

With both, `regime` says in which of the three regimes of pruning (arXiv 2305.18383) a pruned network is, and what
helps: more temperature (shorter training, smaller batches, a larger rho before pruning), less of it, or less pressure.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.flat.averaging import update_bn
from flatcompress.modules import evaluating, logits_of

Error = Callable[[Tensor, Tensor], Tensor]  # (output, y) -> sum over the batch
Batches = Sequence[tuple[Tensor, Tensor]]


def misclassified(output: Tensor, y: Tensor) -> Tensor:
    """Samples whose largest logit is not their class's."""
    return (output.argmax(-1) != y).sum()


@torch.no_grad()
def linear_connectivity(
    first: nn.Module, second: nn.Module, batches: Batches, error: Error = misclassified, points: int = 5
) -> float:
    """LMC: the mean error of two networks minus the error on the line between, where these differ most, in percent.

    Below 0 a barrier lies between the two; near 0 they are connected (arXiv 2305.18383, section 3; the path is the
    straight line that the authors' released code evaluates). batches: training data, [(x, y)]; running statistics are
    estimated anew at each of ``points`` places between the ends. UserError where the two differ in shape.
    """
    a, b = first.state_dict(), second.state_dict()
    if a.keys() != b.keys() or any(a[k].shape != b[k].shape for k in a):
        raise UserError("the two networks differ in their tensors: there is no line between them.")
    if points < 1:
        raise UserError(f"points is at least 1, found {points}.")
    mean = (_mean_error(first, batches, error) + _mean_error(second, batches, error)) / 2
    between = copy.deepcopy(first)
    gaps = []
    for i in range(1, points + 1):
        share = i / (points + 1)
        between.load_state_dict({k: _mixed(a[k], b[k], share) for k in a})
        update_bn(between, [x for x, _ in batches])
        gaps.append(mean - _mean_error(between, batches, error))
    return 100 * max(gaps, key=abs)


def _mixed(a: Tensor, b: Tensor, share: float) -> Tensor:
    return a if not a.is_floating_point() else torch.lerp(a, b, share)


@torch.no_grad()
def _mean_error(model: nn.Module, batches: Batches, error: Error) -> float:
    with evaluating(model):
        total = sum(float(error(logits_of(model(x)), y)) for x, y in batches)
    return total / sum(len(y) for _, y in batches)


def cka(a: Tensor, b: Tensor) -> float:
    """Linear centred kernel alignment of outputs [N, p] and [N, q], 0 to 1 (arXiv 1905.00414, section 3).

    ||A^T B||_F^2 / (||A^T A||_F ||B^T B||_F) of the centred outputs; 0 where one of them is constant.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 5.0]])
    >>> round(cka(x, 3 * x), 6)
    1.0
    """
    a, b = (m.double() - m.double().mean(0) for m in (a.flatten(1), b.flatten(1)))
    size = (a.T @ a).norm() * (b.T @ b).norm()
    return float((a.T @ b).square().sum() / size) if size > 0 else 0.0


@torch.no_grad()
def output_similarity(first: nn.Module, second: nn.Module, batches: Batches) -> float:
    """`cka` of the outputs of two networks on ``batches``."""
    with evaluating(first), evaluating(second):
        outputs = [torch.cat([logits_of(model(x)) for x, _ in batches]) for model in (first, second)]
    return cka(*outputs)


@dataclass(frozen=True)
class Regime:
    """What `regime` found. ``name``: I, II-A or II-B; ``lmc`` in percent of error; ``similarity`` 0 to 1."""

    name: str
    lmc: float
    similarity: float
    advice: str


ADVICE = {
    "I": (
        "the pruned networks are not connected: train the dense network at a higher temperature (a larger learning "
        "rate or rho, smaller batches, fewer epochs), or prune less."
    ),
    "II-A": (
        "connected, with unlike outputs: train the dense network at a lower temperature (more epochs, a smaller "
        "learning rate or rho, larger batches)."
    ),
    "II-B": "connected, with like outputs: the pruning rate is well borne; more training changes little.",
}


def regime(
    first: nn.Module, second: nn.Module, batches: Batches, barrier: float = 1.0, alike: float = 0.9, points: int = 5
) -> Regime:
    """The regime of two networks that were pruned from one dense network and retrained with different seeds.

    I: linear connectivity below -``barrier`` percent of training error; else II-B where the outputs' similarity is at
    least ``alike``, II-A where it is not (arXiv 2305.18383, figure 1; the paper reads both borders off its diagrams, so
    the two numbers are yours to set).
    """
    lmc = linear_connectivity(first, second, batches, points=points)
    similarity = output_similarity(first, second, batches)
    name = "I" if lmc < -barrier else "II-B" if similarity >= alike else "II-A"
    return Regime(name, lmc, similarity, ADVICE[name])
