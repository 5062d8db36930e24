"""The prune stage: perturb adaptively, remove channels while training, cut, train on robustly (arXiv 2306.14306).

Step 1 trains the dense model with a radius per channel, step 2 removes channels at prune events along a schedule
(zeroed and held at zero), then the model is cut for good, and step 3 trains on under a uniform radius. The other
pruning methods are the same three steps with another importance and another flat method.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from flatcompress import prune
from flatcompress.plan import Plan, apply_plan
from flatcompress.stages.configs import PruneConfig, RemovalKeys, flat_hyper
from flatcompress.stages.methods import PRUNE_METHODS, PruneMethod
from flatcompress.stages.pull import Pull
from flatcompress.stages.train import finish, make_job
from flatcompress.stages.workpiece import Workpiece
from flatcompress.training.loop import Job, epoch_batches, fit, restore_best

_LARGE = 0.5  # of a weight, on average over a neuron; AdaSAP's radii are not meant to go further


def run(work: Workpiece, config: PruneConfig) -> Workpiece:
    """Prune ``work.model`` to the budget of ``config``; the plan gains the cut. UserError when it cannot be met."""
    resume = work.resume
    if resume is not None and resume["context"].get("phase") == "recover":
        cut = Plan.from_json(resume["context"]["cut"])
        work.model = apply_plan(work.model, cut, work.example())
        passes = int(resume["context"]["passes"])
    else:
        cut, passes = _remove(work, config)
        work.resume = None
    work.plan = work.plan + cut
    work.passes += passes
    _recover(work, config, cut, passes)
    return work


def rehearse(model: nn.Module, example: torch.Tensor, config: PruneConfig) -> None:
    """Cut a copy to the final budget, so that one that cannot be met, or scored, is known before anything runs."""
    if PRUNE_METHODS[config.method].make().pull == "mask":
        prune.regularizers.require_gammas(prune.find_groups(model, example, config.ignore))
    prune.prune(
        model,
        example,
        importance=config.importance or PRUNE_METHODS[config.method].make().importance,
        budget=budget(config, model, example),
        ignore=config.ignore,
        batches=[(example, torch.zeros(len(example), dtype=torch.long, device=example.device))],
        **asdict(limits(config)),
    )


def limits(config: PruneConfig) -> prune.Limits:
    """What the ranking must respect."""
    given = {} if config.floor is None else {"floor": config.floor}
    return prune.Limits(config.ranking, config.round_to, config.min_channels, **given)


def budget(config: PruneConfig, model: nn.Module, example: torch.Tensor) -> prune.Budget:
    """What is to be met: a ratio is what goes, every other budget is what stays."""
    for kind in ("macs", "params", "bytes"):
        value = getattr(config, kind)
        if value is not None:
            return prune.Budget(kind, value, weight_bits=config.budget_bits)
    milliseconds = config.latency or config.latency_ms
    if milliseconds is not None:
        from flatcompress.stages.latency_table import LatencyTable

        absolute = config.latency_ms is not None
        called = "latency_ms" if absolute else "latency"
        return prune.Budget("cost", milliseconds, LatencyTable(model, example), absolute=absolute, called=called)
    return prune.Budget("ratio", config.ratio if config.ratio is not None else 0.5)


def soft_epochs(config: RemovalKeys) -> int:
    """Epochs of steps 1 and 2, at least one; at least one is left for step 3 when there are two."""
    wanted = math.ceil((config.warmup_share + config.prune_share) * config.epochs)
    return max(1, min(wanted, config.epochs - 1))


def event_steps(config: RemovalKeys, steps_per_epoch: int) -> list[int]:
    """The optimizer steps after which channels are removed, evenly spaced over step 2."""
    end = soft_epochs(config) * steps_per_epoch
    total = config.epochs * steps_per_epoch
    start = min(round(config.warmup_share * total), end - 1)
    end = min(end, max(start + config.schedule_steps, round((config.warmup_share + config.prune_share) * total)))
    steps = [
        start + max(1, round((end - start) * r / config.schedule_steps)) for r in range(1, config.schedule_steps + 1)
    ]
    return sorted({min(s, end) for s in steps})


class Removal(prune.ChannelSchedule):
    """Step 2 of the stage: the room's schedule, its events spread as the recipe says, and a pull where there is one.

    A hook of the training loop. A method with a pull has one event, at the end of step 2.
    """

    def __init__(self, work: Workpiece, config: PruneConfig, method: PruneMethod) -> None:
        self.work, self.config, self.method = work, config, method
        self.rho = config.hyper.get("rho", flat_hyper(config.flat_method()).get("rho"))
        self.pull: Pull | None = None
        steps = len(epoch_batches(len(work.data.train), work.batch_size, 0, 0, 0, work.accelerator.num_processes))
        example = work.example()
        super().__init__(
            work.model,
            example,
            budget(config, work.model, example),
            events=[soft_epochs(config) * steps] if method.pull != "none" else event_steps(config, steps),
            kind=config.removal,
            importance=config.importance or method.importance,
            limits=limits(config),
            ignore=config.ignore,
        )
        if method.pull != "none":
            strength = method.strength if config.strength is None else config.strength
            start = round(config.warmup_share * config.epochs * steps)
            self.pull = Pull(method.pull, self.groups, strength, start, lambda: self.choose(self.budget))
        for group in self.protected:
            work.emit("protected", name=group.name, reason=group.reason)
        if method.adaptive and config.norm == "per_neuron":
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
    def plugs(self) -> dict[str, Any]:
        """What goes into the flat engine's slots: the radius of its ball, and the pull on its gradients."""
        found: dict[str, Any] = {}
        if self.method.adaptive or self.rho is not None:
            found["radius"] = self.ball
        if self.pull is not None:
            found["compose"] = self.pull.compose
        return found

    def ball(self, params: list[nn.Parameter]) -> list[Any]:
        """A radius per channel: AdaSAP's eq. 2, or uniform; removed channels stay put."""
        c, rho = self.config, float(self.rho or 0.0)
        if not self.method.adaptive:
            return self.radius(params, rho, rho)
        return self.radius(params, c.rho_min, c.rho_max, c.percentile, norm=c.norm)

    def kept_after(self, event: int) -> list[torch.Tensor] | None:
        """What an event leaves: what the pull has chosen, or what the ranking says now."""
        chosen = None if self.pull is None else self.pull.keep
        return super().kept_after(event) if chosen is None else chosen

    def after_step(self, step: int) -> None:
        """Hold removed channels at zero; remove more when an event is due."""
        self.observe()
        if self.advance(step):
            kept, total = self.mask.channels
            self.work.emit("prune", step=step, kept_channels=kept, total_channels=total)

    def state_dict(self) -> dict[str, Any]:
        """The schedule's state and the pull's."""
        return {**super().state_dict(), "pull": None if self.pull is None else self.pull.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        super().load_state_dict({"steps": 0, **state})  # the loop says the step
        if self.pull is not None:
            self.pull.load_state_dict(state["pull"])


def _remove(work: Workpiece, config: PruneConfig) -> tuple[Plan, int]:
    """Steps 1 and 2, then the cut; returns the cut's plan and the passes they took."""
    method = PRUNE_METHODS[config.method].make()
    removal = Removal(work, config, method)
    job = make_job(work, config, epochs=soft_epochs(config), hyper=_hyper(config, method), **removal.plugs)
    job.hooks = {"removal": removal}
    job.context = {"phase": "remove"}
    job.after_backward = removal.mask.mask_gradients_
    job.after_step = removal.after_step
    job.eligible = lambda epoch: False
    fit(job)
    passes = finish(work, job)
    return removal.shrink(), passes


def _recover(work: Workpiece, config: PruneConfig, cut: Plan, passes: int) -> None:
    """Step 3: the cut model under a uniform radius."""
    first = soft_epochs(config)
    if first >= config.epochs:
        return
    method = PRUNE_METHODS[config.method].make()
    # Plain ASAM whatever the norm of steps 1 and 2: per row it would move every gamma and bias by rho_max itself.
    hyper = {**config.hyper, "rho": config.rho_max} if method.adaptive else config.hyper
    job: Job = make_job(work, config, epochs=config.epochs - first, first_epoch=first, hyper=hyper)
    job.context = {"phase": "recover", "cut": cut.to_json(), "passes": passes}
    fit(job)
    restore_best(job)
    work.passes += finish(work, job)


def _hyper(config: PruneConfig, method: PruneMethod) -> dict[str, Any]:
    hyper = config.hyper
    if method.adaptive and config.norm == "per_neuron":
        hyper = {**hyper, "scope": "per_row"}
    return hyper
