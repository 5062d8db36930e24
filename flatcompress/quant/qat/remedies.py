"""What is done to the scales that `ScaleConflict` has decided on: functions from gradients to gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flatcompress.quant.qat.disorder import total

SLOW = 0.1  # how far a scale moves under the remedy "slow", as a share of its step
Mix = tuple[float, float]


def dropped(task: Tensor, smooth: Tensor, frozen: Tensor, mix: Mix, target: str) -> Tensor:
    """a * m_task * g_task + b * m_smooth * g_smooth, the masks 0 where ``frozen`` and ``target`` says so; [scales]."""
    kept = (~frozen).to(task)
    keep_task = kept if target in ("task", "both") else torch.ones_like(kept)
    keep_smooth = kept if target in ("smooth", "both") else torch.ones_like(kept)
    a, b = mix
    return a * keep_task * task + b * keep_smooth * smooth


def projected(task: Tensor, smooth: Tensor, groups: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
    """PCGrad (arXiv 2001.06782): the smaller of two opposing gradients without its part along the larger.

    Returns where they oppose, bool [scales], and the combined gradient there; one vector per group.
    """
    t, s = task.double(), smooth.double()  # squares of tiny gradients are no numbers in single precision
    dot, task_square, smooth_square = (total(v, groups) for v in (t * s, t.square(), s.square()))
    opposing = dot < 0
    task_goes, smooth_goes = opposing & (task_square < smooth_square), opposing & (task_square >= smooth_square)
    none = torch.zeros_like(dot)
    t = t - torch.where(task_goes, dot / smooth_square, none)[groups] * smooth
    s = s - torch.where(smooth_goes, dot / task_square, none)[groups] * task
    a, b = mix
    return opposing[groups], (a * t + b * s).to(task)


class SlowSteps:
    """Scales that take a tenth of their step, whatever the optimizer: remembered before it, put back after it."""

    def __init__(self, scales: Sequence[nn.Parameter]) -> None:
        self.scales = list(scales)
        self._before: tuple[list[Tensor], list[Tensor]] | None = None

    def remember(self, slow: Sequence[Tensor]) -> None:
        """Where the scales are, and which of their entries are to be slow."""
        self._before = [p.detach().clone() for p in self.scales], [mask.clone() for mask in slow]

    @torch.no_grad()
    def after_step(self) -> None:
        """Go back nine tenths of the step; nothing when nothing was remembered."""
        if self._before is None:
            return
        for scale, before, mask in zip(self.scales, *self._before):
            scale.copy_(torch.where(mask.view_as(scale), before.lerp(scale, SLOW), scale))
        self._before = None
