"""Guards around the base optimizer's step: clipping coordinates, and a step size inside the Taylor radius.

flat.create("sam", model, optimizer, filters=[coordinate_clip(0.1)], safety=GhostRadius(model))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.flat.engine import vectors
from flatcompress.flat.engine.context import Step
from flatcompress.flat.engine.vectors import Vector
from flatcompress.flat.measures.curvature import jacobian_product
from flatcompress.flat.measures.measuring import probed
from flatcompress.flat.methods.trust import Tap
from flatcompress.modules import logits_of


def coordinate_clip(share: float = 0.1) -> Callable[[Step, Vector], Vector]:
    """Clip ``|g_i|`` of each tensor at its (1 - share) quantile (arXiv 2306.00204): removes directional sharpness.

    The paper clips 0.1 % to 50 % of the coordinates, by optimizer.
    """
    if not 0 <= share < 1:
        raise UserError(f"share is {share!r}; the clipped share of coordinates must lie in 0 <= share < 1")

    def kept(step: Step, gradient: Vector) -> Vector:
        return [_clipped(g, share) for g in gradient]

    return kept


def _clipped(g: Tensor, share: float) -> Tensor:
    above = int(share * g.numel())
    if above == 0:
        return g
    limit = g.abs().reshape(-1).kthvalue(g.numel() - above).values
    return g.clamp(-limit, limit)


def ghost_radius(model: nn.Module, inputs: Sequence[object], direction: Sequence[Tensor]) -> float:
    """How far the softmax's Taylor series reaches along ``direction``: pi / max over samples of a's spread.

    a = J_z v for the unit vector v along ``direction`` (one tensor per trainable parameter), in evaluation mode; the
    spread of a sample is max_k a_k - min_k a_k (arXiv 2603.13552). inputs: the model's positional arguments.
    """
    with probed(model, lambda z, y: z.sum()) as at:
        size = vectors.norm(direction)
        v = vectors.scale(direction, vectors.ratio(torch.ones_like(size), size))

        def logits() -> Tensor:
            return logits_of(at.model(*inputs))

        a = jacobian_product(logits, at.params, v)
    spread = (a.amax(dim=-1) - a.amin(dim=-1)).max()
    return math.pi / max(float(spread), 1e-12)


class GhostRadius:
    """The safe step: the learning rate is scaled by min(1, rho_a / (lr ||g||)) for this step (arXiv 2603.13552).

    Hears the model's inputs by a forward hook; `close` removes it. After a step ``last_radius`` is rho_a and
    ``last_scale`` the factor. The norm is the gradient's also when the base optimizer is Adam.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.last_radius: float | None = None
        self.last_scale = 1.0
        self._tap = Tap(model)
        self._hearing = self._tap.listening()
        self._hearing.__enter__()

    def close(self) -> None:
        """Remove the hook."""
        self._hearing.__exit__(None, None, None)

    @contextmanager
    def __call__(self, step: Step, gradient: Vector) -> Iterator[None]:
        """Around the base step: learning rates are scaled inside and as before afterwards."""
        if self._tap.logits is None:
            raise UserError("GhostRadius did not see the model being called: give it the module that the closure calls")
        self.last_radius = ghost_radius(self.model, self._tap.args, vectors.scale(gradient, -1.0))
        size = float(vectors.norm(gradient))
        rates = [group["lr"] for group in step.base.param_groups]
        move = max(float(rate) for rate in rates) * size
        self.last_scale = min(1.0, self.last_radius / move) if move > 0 else 1.0
        try:
            for group in step.base.param_groups:
                group["lr"] = group["lr"] * self.last_scale
            yield
        finally:
            for group, rate in zip(step.base.param_groups, rates):
                group["lr"] = rate
