"""The train stage: into a flat minimum."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from pydantic import Field, model_validator
from torch import Tensor, nn

from flatcompress.stages import emphasis as emphases
from flatcompress.stages.averaging import Averaging
from flatcompress.stages.callbacks import MaskedWeights
from flatcompress.stages.context import RunContext
from flatcompress.stages.job import check_trainable, divided, make_job, train
from flatcompress.stages.keys import AveragingKind, FlatKeys
from flatcompress.stages.stage import Facts, Phase, Stage
from flatcompress.training.callback import Callback


class TrainConfig(FlatKeys):
    """Train the model into a flat minimum."""

    averaging: AveragingKind = Field("none", description="average the weights over steps")
    emphasis: str | dict[str, Any] | None = Field(
        None, description="which samples count more: see `flatcompress list emphases`; a name, or {name: useful, ...}"
    )

    @model_validator(mode="after")
    def _known_emphasis(self) -> TrainConfig:
        self.emphasis = emphases.read(self.emphasis)
        return self

    @property
    def needs_whole(self) -> str | None:
        return self.climbs_alone

    @property
    def emphasized(self) -> emphases.Row | None:
        """What ``emphasis`` names."""
        return emphases.row_of(self.emphasis) if isinstance(self.emphasis, dict) else None


def dry_run(model: nn.Module, example: Tensor, config: TrainConfig) -> None:
    """There must be something to train."""
    check_trainable(model)


def phases(run: RunContext, config: TrainConfig) -> list[Phase]:
    """Train; before it, with USEFUL, find the samples that are learned slowly. The plan stays as it is."""
    row = config.emphasized
    if row is not None:
        emphases.check_task(run, row)
    if isinstance(row, emphases.Useful):
        return [Phase("separate", partial(_separate, run, config, row)), Phase("train", partial(_useful, run, config))]
    return [Phase("train", partial(_train, run, config))]


def callbacks(run: RunContext, config: TrainConfig) -> list[Callback]:
    """What takes part. Masks first: the average sees what they hold at zero."""
    found: list[Callback] = [MaskedWeights(run.model)]
    if config.averaging != "none":
        found.append(Averaging(run, config.averaging, config.epochs))
    return found


def _separate(run: RunContext, config: TrainConfig, row: emphases.Useful, facts: Facts) -> Facts:
    return {"slow": emphases.separate(run, config, row, [MaskedWeights(run.model)])}


def _useful(run: RunContext, config: TrainConfig, facts: Facts) -> None:
    row = config.emphasized
    assert isinstance(row, emphases.Useful)
    with emphases.seen_more_often(run, facts["slow"], row.upsample):
        config = config.within(run.steps_per_epoch)  # longer epochs: max_steps leaves fewer of them
        with divided(run):
            train(run, make_job(run, config, callbacks(run, config)))


def _train(run: RunContext, config: TrainConfig, facts: Facts) -> None:
    row = config.emphasized
    with divided(run):
        if not isinstance(row, emphases.ClassBalanced):
            train(run, make_job(run, config, callbacks(run, config)))
            return
        weights = emphases.weighing(run, config, row)
        train(run, replace(make_job(run, config, [weights, *callbacks(run, config)]), loss=weights))


STAGE = Stage(
    TrainConfig,
    phases,
    dry_run,
    refuses_after={
        "quantize": "put those epochs into the quantize stage, which trains too.",
        "elastic": "the model is a family of widths by then. Put those epochs into the elastic stage.",
    },
)
