"""The shorten stage: whole blocks taken out, then training on, with the whole network as a teacher."""

from __future__ import annotations

import copy
from functools import partial
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from flatcompress.prune import depth
from flatcompress.stages.callbacks import Distillation, MaskedWeights
from flatcompress.stages.context import RunContext
from flatcompress.stages.job import check_trainable, make_job, train
from flatcompress.stages.keys import FlatKeys, NonNegative
from flatcompress.stages.measure import train_batches
from flatcompress.stages.stage import Facts, Phase, Stage, repeated
from flatcompress.training.callback import Callback

SAMPLES = 512


class ShortenConfig(FlatKeys):
    """Take out the residual blocks that change least, then train on."""

    blocks: Annotated[int, Field(ge=1)] = Field(1, description="how many blocks go, those of the least influence")
    distill: NonNegative = Field(1.0, description="weight of distillation from the network before")
    ignore: list[str] = Field(default_factory=list, description="blocks that stay: names or re:PATTERN")


def phases(run: RunContext, config: ShortenConfig) -> list[Phase]:
    """The cut, then the training; the plan gains the blocks that went."""
    teacher = copy.deepcopy(run.model).eval().requires_grad_(False) if config.distill else None
    return [
        Phase("cut", partial(_cut, run, config), repeated(run, "plan")),
        Phase("train", partial(_train, run, config, teacher)),
    ]


def _cut(run: RunContext, config: ShortenConfig, facts: Facts) -> Facts:
    batches = [x for x, _ in train_batches(run, SAMPLES)]
    plan, found = depth.remove_blocks(run.model, config.blocks, batches, config.ignore)
    run.emit("blocks", removed=plan.steps[0].data["removed"], influence=found)
    run.plan = run.plan + plan
    return {"plan": plan.to_json()}


def _train(run: RunContext, config: ShortenConfig, teacher: nn.Module | None, facts: Facts) -> None:
    callbacks: list[Callback] = [MaskedWeights(run.model)]
    if teacher is not None:
        callbacks.append(Distillation(teacher, config.distill, run.task))
    train(run, make_job(run, config, callbacks))


def dry_run(model: nn.Module, example: Tensor, config: ShortenConfig) -> None:
    """Shorten a copy, so that one that has too few blocks is known before anything runs."""
    check_trainable(model)
    depth.remove_blocks(model, config.blocks, [example], config.ignore)


STAGE = Stage(
    ShortenConfig,
    phases,
    dry_run,
    refuses_after={
        "quantize": "the learned scales fit the deeper network. Shorten first.",
        "sparsify": "the masks were chosen for the deeper network. Shorten first.",
        "elastic": "the model is a family of widths by then. Shorten first.",
    },
    needs_weights="would take out blocks of random weights. Put a 'train' stage before it or give model.weights.",
)
