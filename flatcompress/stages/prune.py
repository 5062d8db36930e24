"""The prune stage: perturb adaptively, remove channels while training, cut, train on robustly (arXiv 2306.14306).

Step 1 trains the dense model with a radius per channel, step 2 removes channels at prune events along a schedule
(zeroed and held at zero), then the model is cut for good, and step 3 trains on under a uniform radius. The other
pruning methods are the same three steps with another importance and another flat method.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from flatcompress import prune
from flatcompress.plan import Plan, apply_plan
from flatcompress.prune.oneshot import require_groups
from flatcompress.prune.schedule import left_after
from flatcompress.stages.configs import PruneConfig, RemovalKeys, flat_hyper
from flatcompress.stages.methods import PRUNE_METHODS, PruneMethod
from flatcompress.stages.pull import Pull
from flatcompress.stages.train import finish, make_job
from flatcompress.stages.workpiece import Workpiece
from flatcompress.training.loop import Job, epoch_batches, fit, restore_best


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
    """Cut a copy to the final budget, so that a budget that cannot be met is known before anything runs."""
    prune.prune(
        model,
        example,
        importance="random",
        budget=budget(config, model, example),
        ranking=config.ranking,
        round_to=config.round_to,
        min_channels=config.min_channels,
        ignore=config.ignore,
    )


def budget(config: PruneConfig, model: nn.Module, example: torch.Tensor) -> prune.Budget:
    """What is to be met: a ratio is what goes, every other budget is what stays."""
    for kind in ("macs", "params", "bytes"):
        value = getattr(config, kind)
        if value is not None:
            return prune.Budget(kind, value, weight_bits=config.budget_bits)
    milliseconds = config.latency or config.latency_ms
    if milliseconds is not None:
        from flatcompress.stages.latency_table import LatencyTable

        table = LatencyTable(model, example)
        return prune.Budget("cost", milliseconds, table, absolute=config.latency_ms is not None)
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


class Removal:
    """Step 2's state: the mask, the running importance and the next prune event. A hook of the training loop."""

    def __init__(self, work: Workpiece, config: PruneConfig, method: PruneMethod) -> None:
        self.work, self.config = work, config
        self.importance = config.importance or method.importance
        self.adaptive = method.adaptive
        self.rho = config.hyper.get("rho", flat_hyper(config.flat_method()).get("rho"))
        example = work.example()
        self.budget = budget(config, work.model, example)
        found = prune.survey(work.model, example, config.ignore)
        require_groups(work.model, found)
        self.groups = found.groups
        self.mask = prune.SoftMask(self.groups)
        self.limits = prune.Limits(config.ranking, config.round_to, config.min_channels)
        self.costs = prune.CostModel(work.model, example)
        gradient_based = self.importance in prune.NEEDS_GRADIENTS
        self.running = prune.RunningScore(self.groups, self.importance) if gradient_based else None
        self.pull: Pull | None = None
        self.event = 0
        for group in found.protected:
            work.emit("protected", name=group.name, reason=group.reason)

    def start_pull(self, method: PruneMethod, start: int) -> Pull:
        """The pull of a method that has one, from step ``start`` on; it decides then which units will go."""
        strength = method.strength if self.config.strength is None else self.config.strength
        self.pull = Pull(method.pull, self.groups, strength, start, lambda: self.choose(self.budget))
        return self.pull

    def choose(self, target: prune.Budget) -> list[torch.Tensor]:
        """The units that stay within ``target``, bool per unit and group; removed ones stay removed."""
        return prune.choose(self.groups, self.scores(), target, self.limits, costs=self.costs, keep=self.mask.keep)

    def scores(self) -> list[torch.Tensor]:
        """One importance per unit and group, normalised within its group."""
        if self.running is not None:
            return self.running.scores()
        return prune.score(self.groups, self.importance)

    def radius(self, params: list[nn.Parameter]) -> list[Any]:
        """A radius per channel for the flat engine's ball: AdaSAP's eq. 2, or uniform; removed channels stay put."""
        c = self.config
        rho = float(self.rho or 0.0)
        low, high, norm = (c.rho_min, c.rho_max, c.norm) if self.adaptive else (rho, rho, "global")
        scores = prune.score(self.groups, "group_l2" if self.running is not None else self.importance)
        return prune.adaptive_radius(self.groups, scores, params, low, high, norm=norm, keep=self.mask.keep)

    def after_step(self, step: int, events: list[int]) -> None:
        """Hold removed channels at zero; remove more when an event is due."""
        self.mask.apply_()
        if self.running is not None:
            self.running.update()
        if self.event < len(events) and step >= events[self.event]:
            self.event += 1
            self._remove(len(events))
            kept, total = self.mask.channels
            self.work.emit("prune", step=step, kept_channels=kept, total_channels=total)

    def _remove(self, events: int) -> None:
        chosen = self.pull.keep if self.pull is not None else None
        self.mask.remove_(self.choose(self._target(events)) if chosen is None else chosen)
        if self.running is not None:
            self.running.reset()

    def _target(self, events: int) -> prune.Budget:
        """The budget of the present event: from the dense model to the final one along the removal schedule."""
        if self.event >= events:
            return self.budget
        kind, removal = self.budget.kind, self.config.removal
        if kind == "ratio":
            return prune.Budget("ratio", 1.0 - left_after(removal, 1.0, 1.0 - self.budget.value, self.event, events))
        dense = self.budget.measure(self.costs)(self.costs.dense)
        left = left_after(removal, dense, self.budget.limit(dense), self.event, events)
        return replace(self.budget, value=left, absolute=True)

    def state_dict(self) -> dict[str, Any]:
        """Mask, event counter, running scores and pull."""
        parts = {"running": self.running, "pull": self.pull}
        own = {name: None if part is None else part.state_dict() for name, part in parts.items()}
        return {"mask": self.mask.state_dict(), "event": self.event, **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.mask.load_state_dict(state["mask"])
        self.event = state["event"]
        if self.running is not None:
            self.running.load_state_dict(state["running"])
        if self.pull is not None:
            self.pull.load_state_dict(state["pull"])


def _remove(work: Workpiece, config: PruneConfig) -> tuple[Plan, int]:
    """Steps 1 and 2, then the cut; returns the cut's plan and the passes they took."""
    method = PRUNE_METHODS[config.method].make()
    removal = Removal(work, config, method)
    plugs: dict[str, Any] = {"radius": removal.radius} if method.adaptive or removal.rho is not None else {}
    steps = len(epoch_batches(len(work.data.train), work.batch_size, 0, 0, 0, work.accelerator.num_processes))
    if method.pull != "none":
        plugs["compose"] = removal.start_pull(method, round(config.warmup_share * config.epochs * steps)).compose
    job = make_job(work, config, epochs=soft_epochs(config), hyper=_hyper(config, method), **plugs)
    job.hooks = {"removal": removal}
    job.context = {"phase": "remove"}
    events = event_steps(config, steps) if method.pull == "none" else [soft_epochs(config) * steps]
    job.after_backward = removal.mask.mask_gradients_
    job.after_step = lambda step: removal.after_step(step, events)
    job.eligible = lambda epoch: False
    fit(job)
    passes = finish(work, job)
    return prune.shrink(work.model, removal.groups, removal.mask, work.example()), passes


def _recover(work: Workpiece, config: PruneConfig, cut: Plan, passes: int) -> None:
    """Step 3: the cut model under a uniform radius."""
    first = soft_epochs(config)
    if first >= config.epochs:
        return
    method = PRUNE_METHODS[config.method].make()
    hyper = _hyper(config, method)
    if method.adaptive:
        hyper = {**hyper, "rho": config.rho_max}
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
