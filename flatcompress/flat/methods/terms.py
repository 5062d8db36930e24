"""TERM: loss terms that flatten without a perturbation. Add them to the loss inside the closure.

SAF and MESA (arXiv 2205.14083) pull the present logits z towards older ones z_old of the same samples:
    lam tau^2 KL( softmax(z_old / tau) || softmax(z / tau) )
SAF takes z_old from some epochs ago, MESA from an average of the weights.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.flat.averaging import EMA
from flatcompress.flat.engine.hyper import non_negative
from flatcompress.flat.methods.trust import divergence, elsewhere


def trust_region(logits: Tensor, target: Tensor, scale: float = 1.0, temperature: float = 1.0) -> Tensor:
    """``scale * KL(target || model)``, mean over samples: keeps the function near that of ``target`` (detached)."""
    return scale * divergence(logits, target.detach(), temperature)


def npo(loss: Tensor, reference: Tensor, beta: float = 0.1) -> Tensor:
    """NPO: -2 / beta mean log sigmoid(beta (loss - reference)), which falls as a model forgets (arXiv 2404.05868).

    ``loss``, ``reference``: [B] losses of the samples to forget under the model and under the model before (detached).
    It slows down once a sample is forgotten, where the negative loss would not. UserError for beta <= 0.
    """
    if not beta > 0:
        raise UserError(f"beta is {beta!r}; NPO needs beta > 0")
    return -2 / beta * nn.functional.logsigmoid(beta * (loss - reference.detach())).mean()


class SAF:
    """Sharpness-aware training for free: KL to the sample's own logits ``delay`` epochs ago (arXiv 2205.14083, eq. 8).

    Call ``set_epoch(e)`` as each epoch begins, and the object with sample indices and logits in the closure; it records
    the logits of every epoch on the CPU, ``samples * (delay + 1) * classes`` floats. The term is 0 outside
    ``start < epoch < end`` and for samples not seen ``delay`` epochs ago. Under data parallelism a process must see
    the same samples in every epoch.
    """

    def __init__(
        self,
        samples: int,
        classes: int,
        lam: float = 0.3,
        tau: float = 5.0,
        delay: int = 3,
        start: int = 5,
        end: int = 300,
    ) -> None:
        non_negative(lam=lam)
        if delay < 1 or tau <= 0:
            raise UserError(f"delay is {delay!r} and tau {tau!r}; SAF needs delay >= 1 epoch and tau > 0")
        self.lam, self.tau, self.delay, self.start, self.end = lam, tau, delay, start, end
        self.shape = (samples, classes)
        self.epoch = 0
        self._history: deque[Tensor] = deque(maxlen=delay + 1)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch: open its record."""
        self.epoch = epoch
        self._history.append(torch.full(self.shape, float("nan")))

    def __call__(self, indices: Tensor, logits: Tensor) -> Tensor:
        """The term for samples ``indices`` [B] with logits [B, classes]; records the logits."""
        where = indices.detach().cpu()
        self._history[-1][where] = logits.detach().float().cpu()
        if not self.start < self.epoch < self.end or len(self._history) <= self.delay:
            return logits.sum() * 0.0
        old = self._history[0][where].to(logits)
        seen = ~old.isnan().any(dim=-1)
        if not bool(seen.any()):
            return logits.sum() * 0.0
        share = seen.float().mean().to(logits)
        return self.lam * self.tau**2 * share * divergence(logits[seen], old[seen], self.tau)

    def state_dict(self) -> dict[str, Any]:
        """Epoch and recorded logits."""
        return {"epoch": self.epoch, "history": [h.clone() for h in self._history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.epoch = state["epoch"]
        self._history = deque((h.clone() for h in state["history"]), maxlen=self.delay + 1)


class MESA:
    """Memory-efficient sharpness-aware training: KL to an EMA model on the same input (arXiv 2205.14083, section 4.2).

    Call ``update()`` after each step and the object with input and logits in the closure. One more forward a step, one
    copy of the weights. The term is 0 outside ``start < epoch < end``.
    """

    def __init__(
        self,
        model: nn.Module,
        lam: float = 0.8,
        tau: float = 5.0,
        decay: float = 0.9998,
        start: int = 5,
        end: int = 300,
    ) -> None:
        non_negative(lam=lam)
        if tau <= 0:
            raise UserError(f"tau is {tau!r}; the temperature must be > 0")
        self.model, self.lam, self.tau, self.start, self.end = model, lam, tau, start, end
        self.average = EMA(model, decay)
        self.average.update()
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch."""
        self.epoch = epoch

    def update(self) -> None:
        """Take the present weights into the average."""
        self.average.update()

    def __call__(self, x: Tensor, logits: Tensor) -> Tensor:
        """The term for input x and its logits [B, classes]."""
        if not self.start < self.epoch < self.end:
            return logits.sum() * 0.0
        old = elsewhere(self.model, self.average.weights(), (x,))
        return self.lam * self.tau**2 * divergence(logits, old, self.tau)

    def state_dict(self) -> dict[str, Any]:
        """Epoch and average."""
        return {"epoch": self.epoch, "average": self.average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.epoch = state["epoch"]
        self.average.load_state_dict(state["average"])
