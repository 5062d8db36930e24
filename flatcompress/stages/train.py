"""The train stage: into a flat minimum."""

from __future__ import annotations

from functools import partial

from pydantic import Field
from torch import Tensor, nn

from flatcompress.stages.averaging import Averaging
from flatcompress.stages.callbacks import MaskedWeights
from flatcompress.stages.context import RunContext
from flatcompress.stages.job import check_trainable, make_job, train
from flatcompress.stages.keys import AveragingKind, FlatKeys
from flatcompress.stages.stage import Facts, Phase, Stage
from flatcompress.training.callback import Callback


class TrainConfig(FlatKeys):
    """Train the model into a flat minimum."""

    averaging: AveragingKind = Field("none", description="average the weights over steps")


def dry_run(model: nn.Module, example: Tensor, config: TrainConfig) -> None:
    """There must be something to train."""
    check_trainable(model)


def phases(run: RunContext, config: TrainConfig) -> list[Phase]:
    """One: train; the plan stays as it is."""
    return [Phase("train", partial(_train, run, config))]


def callbacks(run: RunContext, config: TrainConfig) -> list[Callback]:
    """What takes part. Masks first: the average sees what they hold at zero."""
    found: list[Callback] = [MaskedWeights(run.model)]
    if config.averaging != "none":
        found.append(Averaging(run, config.averaging, config.epochs))
    return found


def _train(run: RunContext, config: TrainConfig, facts: Facts) -> None:
    train(run, make_job(run, config, callbacks(run, config)))


STAGE = Stage(
    TrainConfig,
    phases,
    dry_run,
    refuses_after={
        "quantize": "put those epochs into the quantize stage, which trains too.",
        "elastic": "the model is a family of widths by then. Put those epochs into the elastic stage.",
    },
)
