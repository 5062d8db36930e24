"""The prune stage: perturb adaptively, remove channels while training, cut, train on robustly (arXiv 2306.14306).

Step 1 trains the dense model with a radius per channel, step 2 removes channels at prune events along a schedule
(zeroed and held at zero), then the model is cut for good, and step 3 trains on under a uniform radius. The other
pruning methods are the same three steps with another importance and another flat method.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from flatcompress import prune
from flatcompress.errors import unknown
from flatcompress.latency import device
from flatcompress.latency.table import LatencyTable
from flatcompress.stages.callbacks import MaskedWeights
from flatcompress.stages.context import RunContext
from flatcompress.stages.job import check_trainable, make_job, train
from flatcompress.stages.keys import (
    Bits,
    KeyProblem,
    NonNegative,
    Positive,
    RemovalKeys,
    Share,
    Size,
    event_steps,
    flat_hyper,
    known_flat_method,
    known_method,
    soft_epochs,
)
from flatcompress.stages.prune_methods import PRUNE_METHODS, PruneMethod
from flatcompress.stages.regularizer import SparsityRegularizer
from flatcompress.stages.stage import Facts, Phase, Stage, repeated
from flatcompress.training.callback import Callback

ShareOrNone = Annotated[float, Field(ge=0.0, lt=1.0)]
_LARGE = 0.5  # of a weight, on average over a neuron; AdaSAP's radii are not meant to go further
PRUNE_BUDGETS = ("ratio", "macs", "params", "bytes", "latency", "latency_ms", *device.UNITS)


class PruneConfig(RemovalKeys):
    """Remove channels while training, AdaSAP's three steps: perturb adaptively, remove, train on robustly."""

    method: str = Field("adasap", description="pruning method; see `flatcompress list prune-methods`")
    ratio: Share | None = Field(None, description="share of channels to remove (default 0.5 when no budget is given)")
    ratios: dict[str, ShareOrNone] | None = Field(
        None,
        description="share to remove of the group that holds a layer: {layer1.0.conv1: 0.5, 're:layer3.*': 0.25}; of "
        "every other group `ratio` (default here: 0)",
    )
    macs: Share | None = Field(None, description="budget: multiply-accumulates to keep, as a share")
    params: Share | None = Field(None, description="budget: parameters to keep, as a share")
    bytes: Size | None = Field(
        None, description="budget: bytes of the weights to keep, as a share or absolute (200k, 1.5M), at budget_bits"
    )
    budget_bits: Bits = Field(8, description="bits per weight that a bytes, flash or instructions budget is counted at")
    latency: Share | None = Field(
        None, description="budget: share of the dense model's int8 latency, measured per layer in onnxruntime here"
    )
    latency_ms: Positive | None = Field(None, description="budget: milliseconds in onnxruntime here, int8, one sample")
    flash: Size | None = Field(
        None, description="budget: bytes of flash of the C on a Cortex-M4 (32k), at budget_bits; goes with ram"
    )
    ram: Size | None = Field(None, description="budget: bytes of the C's arena (8k); goes with flash")
    instructions: Size | None = Field(
        None, description="budget: instructions of one inference of the C on a Cortex-M4 (2M); goes with flash and ram"
    )
    flat: str | None = Field(None, description="flat method while pruning, in place of the pruning method's own")
    importance: str | None = Field(None, description="channel importance; see `flatcompress list importances`")
    rho_min: NonNegative = Field(0.01, description="AdaSAP: radius of the most important channel")
    rho_max: Positive = Field(2.0, description="AdaSAP: radius of the least important channel, and of step 3")
    strength: NonNegative | None = Field(
        None, description="factor of the sparsity regularizer (masksparsity, group_norm, growing_reg); default: its own"
    )
    norm: Literal["global", "per_neuron"] = Field("global", description="AdaSAP: scope of the perturbation's norm")
    percentile: Annotated[float, Field(gt=0, le=100)] | None = Field(
        None, description="AdaSAP: clip the scores that make the radii at this percentile; default: no clipping"
    )
    ranking: Literal["global", "uniform", "isomorphic"] = Field(
        "global", description="rank channels across layers, within each, or across layers of the same structure"
    )
    round_to: Annotated[int, Field(ge=1)] | None = Field(None, description="keep multiples of this many channels")
    min_channels: Annotated[int, Field(ge=1)] = Field(2, description="channels that every layer keeps at least")
    floor: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        None,
        description="share of channels that every layer keeps at least; default: 0.1, and half of what a ratio leaves",
    )

    @property
    def label(self) -> str:
        return self.method

    @property
    def row(self) -> PruneMethod:
        """The pruning method's row."""
        return PRUNE_METHODS[known_method(self.method, PRUNE_METHODS, "pruning method")]()

    def flat_method(self) -> str:
        return self.row.flat if self.flat is None else known_flat_method(self.flat, "flat")

    @model_validator(mode="after")
    def _one_budget(self) -> PruneConfig:
        given = [name for name in PRUNE_BUDGETS if getattr(self, name) is not None]
        if len(given) > 1 and not set(given) <= set(device.UNITS):
            raise KeyProblem(
                given[1], f"give one budget, not {' and '.join(given)}; flash, ram and instructions go together."
            )
        if self.ratios is not None and given not in ([], ["ratio"]):
            raise KeyProblem("ratios", f"goes with ratio alone, not with {given[0]}.")
        if not given and self.ratios is None:
            self.ratio = 0.5
        if self.rho_min > self.rho_max:
            raise KeyProblem("rho_min", f"must not exceed rho_max ({self.rho_max}), found {self.rho_min}.")
        if self.importance is not None and self.importance not in prune.IMPORTANCES:
            raise KeyProblem("importance", str(unknown("importance", self.importance, prune.IMPORTANCES)))
        return self


class Removal(prune.ChannelSchedule, Callback):
    """Step 2: the package's schedule, its events spread as the recipe says, and a regularizer where there is one.

    A method with a regularizer has one event, at the end of step 2.
    """

    name = "removal"

    def __init__(self, run: RunContext, config: PruneConfig) -> None:
        self.run, self.config, self.method = run, config, config.row
        self.rho = config.hyper.get("rho", flat_hyper(config.flat_method()).get("rho"))
        self.regularizer: SparsityRegularizer | None = None
        method, steps, example = config.row, run.steps_per_epoch, run.example()
        super().__init__(
            run.model,
            example,
            budget(config, run.model, example),
            events=[soft_epochs(config) * steps] if method.regularizer != "none" else event_steps(config, steps),
            kind=config.removal,
            importance=config.importance or method.importance,
            limits=limits(config),
            ignore=config.ignore,
        )
        if method.regularizer != "none":
            strength = method.strength if config.strength is None else config.strength
            start = round(config.warmup_share * config.epochs * steps)
            self.regularizer = SparsityRegularizer(
                method.regularizer, self.groups, strength, start, lambda: self.choose(self.budget)
            )
        for group in self.protected:
            run.emit("protected", name=group.name, reason=group.reason)
        if self.per_neuron:
            self._warn_of_large_moves()

    def _warn_of_large_moves(self) -> None:
        named = list(self.model.named_parameters())
        params = [parameter for _, parameter in named]
        sizes = prune.relative_sizes(params, self.ball(params))
        largest, name = max(zip(sizes, (name for name, _ in named), strict=True))
        if largest > _LARGE:
            rho = self.config.rho_max
            warnings.warn(
                f"norm per_neuron moves weights of {name} by {largest:.0%} of themselves at rho_max {rho:g}, enough to "
                f"change signs; rho_max {rho * _LARGE / largest:.2g} would move them by half.",
                stacklevel=2,
            )

    @property
    def per_neuron(self) -> bool:
        """Is every row's perturbation bounded by its own norm?"""
        return self.method.adaptive and self.config.norm == "per_neuron"

    @property
    def slots(self) -> dict[str, Any]:
        """What goes into the flat engine's slots: the radius of its ball, and the regularizer on its gradients."""
        found: dict[str, Any] = {}
        if self.method.adaptive or self.rho is not None:
            found["radius"] = self.ball
        if self.regularizer is not None:
            found["compose"] = self.regularizer.compose
        return found

    def ball(self, params: list[nn.Parameter]) -> list[Any]:
        """A radius per channel: AdaSAP's eq. 2, or uniform; removed channels stay put."""
        c, rho = self.config, float(self.rho or 0.0)
        if not self.method.adaptive:
            return self.radius(params, rho, rho)
        return self.radius(params, c.rho_min, c.rho_max, c.percentile, norm=c.norm)

    def kept_after(self, event: int) -> list[torch.Tensor] | None:
        """What an event leaves: what the regularizer has chosen, or what the ranking says now."""
        chosen = None if self.regularizer is None else self.regularizer.keep
        return super().kept_after(event) if chosen is None else chosen

    def after_backward(self) -> None:
        """Removed channels stay put."""
        self.mask.mask_gradients_()

    def after_step(self, step: int) -> None:
        """Hold removed channels at zero; remove more when an event is due."""
        self.observe()
        if self.advance(step):
            kept, total = self.mask.channels
            self.run.emit("prune", step=step, kept_channels=kept, total_channels=total)

    def state_dict(self) -> dict[str, Any]:
        """The schedule's state and the regularizer's."""
        return {
            **super().state_dict(),
            "regularizer": None if self.regularizer is None else self.regularizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        super().load_state_dict({"steps": 0, **state})  # the loop says the step
        if self.regularizer is not None:
            self.regularizer.load_state_dict(state["regularizer"])


def phases(run: RunContext, config: PruneConfig) -> list[Phase]:
    """Steps 1 and 2 and the cut, then step 3. UserError when the budget cannot be met."""
    return [
        Phase("remove", partial(_remove, run, config), repeated(run, "cut")),
        Phase("recover", partial(_recover, run, config)),
    ]


def _remove(run: RunContext, config: PruneConfig, facts: Facts) -> Facts:
    """Steps 1 and 2, then the cut; the plan gains it."""
    removal = Removal(run, config)
    callbacks = [removal]  # it holds what is gone at zero by itself, and masks come after channels
    hyper = {**config.hyper, "scope": "per_row"} if removal.per_neuron else config.hyper
    job = make_job(
        run, config, callbacks, epochs=soft_epochs(config), eligible=lambda epoch: False, hyper=hyper, **removal.slots
    )
    train(run, job)
    cut = removal.shrink()
    run.plan = run.plan + cut
    return {"cut": cut.to_json()}


def _recover(run: RunContext, config: PruneConfig, facts: Facts) -> None:
    """Step 3: the cut model under a uniform radius."""
    first = soft_epochs(config)
    if first >= config.epochs:
        return
    # Plain ASAM whatever the norm of steps 1 and 2: per row it would move every gamma and bias by rho_max itself.
    hyper = {**config.hyper, "rho": config.rho_max} if config.row.adaptive else config.hyper
    callbacks = [MaskedWeights(run.model)]
    train(run, make_job(run, config, callbacks, epochs=config.epochs - first, first_epoch=first, hyper=hyper))


def dry_run(model: nn.Module, example: torch.Tensor, config: PruneConfig) -> None:
    """Cut a copy to the final budget, so that one that cannot be met, or scored, is known before anything runs."""
    check_trainable(model)
    if config.row.regularizer == "mask":
        prune.regularizers.require_gammas(prune.find_groups(model, example, config.ignore))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what would be left: these weights are not trained yet
        prune.prune(
            model,
            example,
            importance=config.importance or config.row.importance,
            budget=budget(config, model, example),
            ignore=config.ignore,
            batches=[(example, torch.zeros(len(example)))],
            loss=lambda output, y: (
                output.square().mean()
            ),  # any will do: the weights are random, the cut is thrown away
            **asdict(limits(config)),
        )


def limits(config: PruneConfig) -> prune.Limits:
    """What the ranking must respect."""
    return prune.Limits(config.ranking, config.round_to, config.min_channels, config.floor)


def budget(config: PruneConfig, model: nn.Module, example: torch.Tensor) -> prune.Budget:
    """What is to be met: a ratio is what goes, every other budget is what stays."""
    for kind in ("macs", "params", "bytes"):
        value = getattr(config, kind)
        if value is not None:
            return prune.Budget(kind, value, weight_bits=config.budget_bits)
    limits = {unit: found for unit in device.UNITS if (found := getattr(config, unit)) is not None}
    if limits:
        cost = device.DeviceCost(model, example, limits, weight_bits=config.budget_bits)
        return prune.Budget(
            "cost", 1.0, cost, absolute=True, knapsack=cost.weighs, called=cost.called, unmet=cost.unmet
        )
    milliseconds = config.latency or config.latency_ms
    if milliseconds is not None:
        absolute = config.latency_ms is not None
        called = "latency_ms" if absolute else "latency"
        return prune.Budget("cost", milliseconds, LatencyTable(model, example), absolute=absolute, called=called)
    if config.ratios is not None:
        return prune.Budget("ratio", config.ratio or 0.0, ratios=config.ratios)
    return prune.Budget("ratio", config.ratio if config.ratio is not None else 0.5)


STAGE = Stage(
    PruneConfig,
    phases,
    dry_run,
    refuses_after={
        "quantize": "cutting channels would reset the learned scales. Prune first.",
        "sparsify": "a cut would break the masks' pattern. Prune channels first.",
        "elastic": "the model is a family of widths by then. Prune channels first.",
    },
    needs_weights="would rank random weights. Put a 'train' stage before it or give model.weights.",
)
