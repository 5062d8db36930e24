"""Flat minima for domains that nobody has seen: UDIM, unknown-domain inconsistency minimization (arXiv 2403.07329).

An unseen domain is made of the batch itself: its inputs, moved to where the loss and its flatness are worst. SAM's
gradient on the batch is joined by that of an inconsistency, how differently the two domains' losses curve, read off the
gradients of single samples in the last layer. Written after the released code; equation numbers are not checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.flat.engine.snapshot import Buffers
from flatcompress.flat.factory import create
from flatcompress.modules import logits_of
from flatcompress.registry import Registry

_TINY = 1e-12


def worst_inputs(model: nn.Module, x: Tensor, y: Tensor, rho: float, move: float) -> Tensor:
    """x + move u, u along the gradient in x of L(w; x) + rho ||grad_w L(w; x)||; a gradient through a gradient.

    ``x`` [B, ...], ``y`` [B] class numbers. As in the released code u has length 1 over the batch in every place of an
    input, so a single sample moves by +-``move`` everywhere.
    """
    moved = x.detach().clone().requires_grad_()
    loss = F.cross_entropy(logits_of(model(moved)), y)
    weights = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
    size = torch.stack([g.square().sum() for g in grads if g is not None]).sum().clamp_min(_TINY**2).sqrt()
    (u,) = torch.autograd.grad(loss + rho * size, moved)
    return x.detach() + move * F.normalize(u, dim=0, eps=_TINY)


def gradient_spread(errors: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy's gradients of every sample in a linear layer: of its weight [B, O * K] and its bias [B, O].

    ``errors``: softmax minus one-hot [B, O]; ``features``: what the layer is given [B, K].
    """
    return torch.einsum("bo,bk->bok", errors, features).flatten(1), errors


def inconsistency(own: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """How the losses of two domains differ around w, of `gradient_spread`'s results, the first domain the seen one.

    mean((v - v~)^2) / 4 over the layer's entries, v and v~ the domains' variances of the gradients around the first
    domain's mean; and the mean square of the second one's gradients.
    """
    spread = []
    for mine, its in zip(own, other, strict=True):
        centre = mine.mean(0)
        spread.append((mine - centre).square().mean(0) - (its - centre).square().mean(0))
    return torch.cat(spread).square().mean() / 4 + torch.stack([g.square().mean() for g in other]).sum()


class Udim:
    """Trains ``model`` (a classifier) by UDIM around the optimizer ``base``: SAM plus lam times the inconsistency.

    ``head``: the last linear layer, called once, whose output are the logits. ``rho``: SAM's radius and the weight of
    flatness in the search for inputs; ``move``: how far inputs go; ``lam``: of the inconsistency, 0 is SAM bit for bit.
    The released code trains by SAM for the first third of the steps: leave ``lam`` at 0 until then. A step is worth
    about eight passes: SAM's two, three for the inputs, three for the inconsistency of a batch of twice the size.
    UserError: a head that is no linear layer of the model, negative numbers.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> udim = Udim(net, torch.optim.SGD(net.parameters(), 0.1), net[2])
    >>> float(udim.step(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))) > 0
    True
    """

    def __init__(
        self, model: nn.Module, base: torch.optim.Optimizer, head: nn.Module, *, rho: float = 0.05, move: float = 0.005,
        lam: float = 0.5,
    ) -> None:  # fmt: skip
        if not isinstance(head, nn.Linear) or not any(m is head for m in model.modules()):
            raise UserError(f"head is the model's last linear layer, found {type(head).__name__}.")
        if min(rho, move, lam) < 0:
            raise UserError(f"rho {rho:g}, move {move:g} and lam {lam:g} are at least 0.")
        self.model, self.head, self.rho, self.move, self.lam = model, head, rho, move, lam
        self.optimizer: Any = create("sam", model, base, rho=rho)
        self._buffers = Buffers(model)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One update on the batch ``x`` [B, ...], ``y`` [B] class numbers; the loss before it."""
        further = self._further(x, y) if self.lam else None
        loss: Tensor = self.optimizer.step(self._closure(x, y, further))
        return loss

    def _closure(self, x: Tensor, y: Tensor, further: list[Tensor | None] | None) -> Callable[[], Tensor]:
        passes = [0]

        def closure() -> Tensor:
            loss = F.cross_entropy(logits_of(self.model(x)), y)
            loss.backward()
            passes[0] += 1
            if further is not None and passes[0] == 2:  # the ascent is SAM's alone
                for parameter, grad in zip(self._weights(), further, strict=True):
                    if grad is not None and parameter.grad is not None:
                        parameter.grad.add_(grad)
            return loss

        return closure

    def _weights(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _further(self, x: Tensor, y: Tensor) -> list[Tensor | None]:
        """lam times the inconsistency's gradient at w; running statistics stay."""
        self._buffers.walk()
        with self._buffers.frozen():
            both = torch.cat([x, worst_inputs(self.model, x, y, self.rho, self.move)])
            seen: list[Tensor] = []
            handle = self.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
            try:
                logits = logits_of(self.model(both))
            finally:
                handle.remove()
            if len(seen) != 1 or seen[0].ndim != 2 or logits.shape[-1] != self.head.out_features:
                raise UserError("head must be called once, on features [B, K], and give the model's logits.")
            errors = logits.softmax(1) - F.one_hot(torch.cat([y, y]), logits.shape[1])
            own, other = (gradient_spread(e, f) for e, f in zip(errors.chunk(2), seen[0].chunk(2)))
            value = self.lam * inconsistency(own, other)
            return list(torch.autograd.grad(value, self._weights(), allow_unused=True))


DOMAIN_METHODS = Registry("domain method")
DOMAIN_METHODS.add("udim", Udim, "SAM, and as flat on inputs moved to where that is worst", "2403.07329")
