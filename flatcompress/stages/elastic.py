"""The elastic stage: one training, a family of nested widths out of it (MatFormer, arXiv 2310.07707).

The units of every group of channels are put in an order by their importance, each width keeps the first of them, and
all widths train on one set of weights. What comes after quantizes every width, and exports any, or a mix of them.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from flatcompress import prune
from flatcompress.errors import UserError, unknown
from flatcompress.plan import Plan
from flatcompress.prune import elastic
from flatcompress.stages import families
from flatcompress.stages.context import RunContext
from flatcompress.stages.job import check_trainable
from flatcompress.stages.keys import FlatKeys, KeyProblem
from flatcompress.stages.stage import Facts, Phase, Stage, repeated

Width = Annotated[float, Field(gt=0.0, le=1.0)]


class ElasticConfig(FlatKeys):
    """Train nested widths at once; every width can be exported afterwards."""

    widths: Annotated[list[Width], Field(min_length=1)] = Field(
        default_factory=lambda: [0.25, 0.5, 0.75, 1.0], description="shares of the channels, rising to 1"
    )
    sampling: Literal["one", "narrow", "sandwich", "all"] = Field(
        "one", description="widths of a step: one, drawn evenly or narrow ones more often; full, narrowest and one; all"
    )
    narrow_power: Annotated[float, Field(ge=0.0)] = Field(
        1.0, description="sampling: narrow draws a width with a probability of 1 / width to this power"
    )
    importance: str = Field(
        "group_l2", description="what orders the channels; see `flatcompress list importances` (of weights alone)"
    )
    min_channels: Annotated[int, Field(ge=1)] = Field(2, description="channels that every layer keeps at least")
    ignore: list[str] = Field(default_factory=list, description="layers that keep their width: names or re:PATTERN")

    @model_validator(mode="after")
    def _known(self) -> ElasticConfig:
        if sorted(set(self.widths)) != self.widths or self.widths[-1] != 1.0:
            raise KeyProblem("widths", f"must rise to 1.0, the full network; found {self.widths}.")
        if self.narrow_power != 1.0 and self.sampling != "narrow":
            raise KeyProblem("narrow_power", f"is for sampling: narrow, found sampling: {self.sampling}.")
        if self.importance not in prune.IMPORTANCES:
            raise KeyProblem("importance", str(unknown("importance", self.importance, prune.IMPORTANCES)))
        if prune.IMPORTANCES[self.importance].facts.needs_gradients:
            raise KeyProblem("importance", f"{self.importance!r} needs gradients, and the order is made before any.")
        return self


def phases(run: RunContext, config: ElasticConfig) -> list[Phase]:
    """The nested widths, then their training."""
    return [
        Phase("nest", partial(_nest, run, config), repeated(run, "plan")),
        Phase("train", partial(_train, run, config)),
    ]


def nested(model: nn.Module, found: prune.Survey, config: ElasticConfig) -> tuple[elastic.Family, Plan]:
    """``model``, of which ``found`` says what can be cut, as a family, and its plan.

    UserError: nothing can be cut, or widths that are no different.
    """
    if not found.groups and len(config.widths) > 1:
        raise UserError(f"nothing in {type(model).__name__} can be narrower: {found.explain()}")
    orders = elastic.orders_of(found.groups, prune.score(found.groups, config.importance))
    return elastic.nest(model, found.groups, orders, config.widths, config.min_channels, config.ignore)


def _nest(run: RunContext, config: ElasticConfig, facts: Facts) -> Facts:
    found = prune.survey(run.model, run.example(), config.ignore)
    for group in found.protected:
        run.emit("protected", name=group.name, reason=group.reason)
    run.model, plan = nested(run.model, found, config)
    run.plan = run.plan + plan
    return {"plan": plan.to_json()}


def _train(run: RunContext, config: ElasticConfig, facts: Facts) -> None:
    families.fit(run, config, config.sampling, [], config.narrow_power)
    if len(config.widths) > 1:  # each width has seen a part of the steps
        families.estimate_statistics(run)


def dry_run(model: nn.Module, example: Tensor, config: ElasticConfig) -> None:
    """Nest a copy, so that a network that has nothing to cut is known before anything runs."""
    check_trainable(model)
    model = copy.deepcopy(model)
    nested(model, prune.survey(model, example, config.ignore), config)


STAGE = Stage(
    ElasticConfig,
    phases,
    dry_run,
    refuses_after={
        "quantize": "cutting channels would reset the learned scales. Put 'quantize' after it.",
        "sparsify": "a cut would break the masks' pattern.",
        "elastic": "the model is a family of widths already.",
    },
)
