"""The sparsify stage: single weights to zero while training, unstructured or N:M, held there for good.

Step 1 trains as it is, step 2 masks more weights at every event of the schedule (arXiv 1710.01878; N:M at once, arXiv
2104.08378), the rest trains what is left. The masks are buffers beside the weights: every later stage holds them, bit
for bit, and on a symmetric grid a zero stays a zero.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flatcompress.prune import masks
from flatcompress.prune.schedule import left_after
from flatcompress.stages.configs import SparsifyConfig
from flatcompress.stages.prune import event_steps
from flatcompress.stages.train import also_after_step, finish, make_job
from flatcompress.stages.workpiece import Workpiece
from flatcompress.training.loop import fit, restore_best


def run(work: Workpiece, config: SparsifyConfig) -> Workpiece:
    """Mask and train ``work.model``; the plan gains the masks."""
    masking = Masking(work, config)
    plan = masking.masks.plan()
    masks.apply(work.model, plan.steps[0].data)
    job = make_job(work, config)
    events = event_steps(config, job.steps_per_epoch)
    events = events[:1] if masking.at_once else events
    job.hooks = {"masking": masking}
    also_after_step(job, lambda step: masking.after_step(step, events))
    job.eligible = lambda epoch: masking.event >= len(events)
    fit(job)
    restore_best(job)
    work.passes += finish(work, job)
    work.plan = work.plan + plan
    return work


def rehearse(model: nn.Module, example: Tensor, config: SparsifyConfig) -> None:
    """Mask a copy, so that a pattern which fits no layer is known before anything runs."""
    masks.sparsify(model, config.target, config.pattern, scope=config.scope, ignore=config.ignore)


class Masking:
    """The masks as they grow, one event after the other. A hook of the training loop."""

    def __init__(self, work: Workpiece, config: SparsifyConfig) -> None:
        self.work, self.config = work, config
        self.masks = masks.WeightMasks(work.model, config.pattern, scope=config.scope, ignore=config.ignore)
        self.at_once = config.pattern != "unstructured" or config.removal == "one_shot"
        self.event = 0
        for name, reason in self.masks.skipped.items():
            work.emit("protected", name=name, reason=reason)

    def after_step(self, step: int, events: list[int]) -> None:
        """Mask more when an event is due."""
        if self.event >= len(events) or step < events[self.event]:
            return
        self.event += 1
        target = self.config.target
        if target is not None:
            target = 1.0 - left_after(self.config.removal, 1.0, 1.0 - target, self.event, len(events))
        self.masks.update(target)
        self.work.emit("sparsify", step=step, sparsity=masks.sparsity(self.work.model))

    def state_dict(self) -> dict[str, Any]:
        """The event counter; the masks are buffers of the model."""
        return {"event": self.event}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.event = int(state["event"])
