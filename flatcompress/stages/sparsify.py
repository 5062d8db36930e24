"""The sparsify stage: single weights to zero while training, unstructured or N:M, held there for good.

Step 1 trains as it is, step 2 masks more weights at every event of the schedule (arXiv 1710.01878; N:M at once, arXiv
2104.08378), the rest trains what is left. The masks are buffers beside the weights: every later stage holds them, bit
for bit, and on a symmetric grid a zero stays a zero.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.prune import masks
from flatcompress.prune.schedule import left_after
from flatcompress.stages.callbacks import MaskedWeights
from flatcompress.stages.context import RunContext
from flatcompress.stages.job import check_trainable, make_job, train
from flatcompress.stages.keys import KeyProblem, RemovalKeys, Share, event_steps, known_flat_method
from flatcompress.stages.stage import Facts, Phase, Stage
from flatcompress.training.callback import Callback


class SparsifyConfig(RemovalKeys):
    """Mask single weights while training; the masks hold through every later stage."""

    method: str = Field("sam", description="flat-minima method to train with; see `flatcompress list methods`")
    pattern: str = Field("unstructured", description="unstructured, or N:M such as 2:4 and 1:4 (N stay of every M)")
    sparsity: Share | None = Field(None, description="share of zero weights (unstructured; default 0.5)")
    scope: Literal["global", "layer"] = Field("global", description="rank |w| over all layers or inside each")
    removal: Literal["exponential", "cubic", "one_shot"] = Field("cubic", description="schedule of the events")

    @property
    def label(self) -> str:
        return self.method

    def flat_method(self) -> str:
        return known_flat_method(self.method)

    @property
    def target(self) -> float | None:
        """Share of zeros of an unstructured pattern; None for N:M, which says it itself."""
        return self.sparsity

    @model_validator(mode="after")
    def _one_pattern(self) -> SparsifyConfig:
        try:
            found = masks.parse_pattern(self.pattern)
        except UserError as error:
            raise KeyProblem("pattern", str(error)) from None
        if found is not None and self.sparsity is not None:
            raise KeyProblem("sparsity", f"pattern {self.pattern!r} says the sparsity itself; leave this key out.")
        if found is None and self.sparsity is None:
            self.sparsity = 0.5
        return self


class Masking(Callback):
    """The masks as they grow, one event after the other; ``events``: the optimizer steps at which more is masked."""

    name = "masking"

    def __init__(self, run: RunContext, config: SparsifyConfig, events: list[int] | None = None) -> None:
        self.run, self.config = run, config
        self.masks = masks.WeightMasks(run.model, config.pattern, scope=config.scope, ignore=config.ignore)
        events = event_steps(config, run.steps_per_epoch) if events is None else events
        self.events = events[:1] if config.pattern != "unstructured" or config.removal == "one_shot" else events
        self.event = 0
        for name, reason in self.masks.skipped.items():
            run.emit("protected", name=name, reason=reason)

    @property
    def done(self) -> bool:
        """Has everything been masked that is to go?"""
        return self.event >= len(self.events)

    def after_step(self, step: int) -> None:
        """Mask more when an event is due."""
        if self.done or step < self.events[self.event]:
            return
        self.event += 1
        target = self.config.target
        if target is not None:
            target = 1.0 - left_after(self.config.removal, 1.0, 1.0 - target, self.event, len(self.events))
        self.masks.update(target)
        self.run.emit("sparsify", step=step, sparsity=masks.sparsity(self.run.model))

    def state_dict(self) -> dict[str, Any]:
        """The event counter; the masks are buffers of the model."""
        return {"event": self.event}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.event = int(state["event"])


def phases(run: RunContext, config: SparsifyConfig) -> list[Phase]:
    """One: mask and train; the plan gains the masks."""
    return [Phase("sparsify", partial(_sparsify, run, config))]


def _sparsify(run: RunContext, config: SparsifyConfig, facts: Facts) -> None:
    masking = Masking(run, config)
    plan = masking.masks.plan()
    masks.apply(run.model, plan.steps[0].data)
    callbacks = [masking, MaskedWeights(run.model)]  # what an event masks is zero from that step on
    train(run, make_job(run, config, callbacks, eligible=lambda epoch: masking.done))
    run.plan = run.plan + plan


def dry_run(model: nn.Module, example: Tensor, config: SparsifyConfig) -> None:
    """Mask a copy, so that a pattern which fits no layer is known before anything runs."""
    check_trainable(model)
    masks.sparsify(model, config.target, config.pattern, scope=config.scope, ignore=config.ignore)


STAGE = Stage(
    SparsifyConfig,
    phases,
    dry_run,
    refuses_after={
        "quantize": "the learned scales fit the dense weights. Sparsify first.",
        "elastic": "the model is a family of widths by then, which share their weights.",
    },
    needs_weights="would rank random weights. Put a 'train' stage before it or give model.weights.",
)
