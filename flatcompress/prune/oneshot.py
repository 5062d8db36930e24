"""`prune`: find the groups, score them, cut once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flatcompress.errors import UserError
from flatcompress.modules import evaluating
from flatcompress.plan import Plan
from flatcompress.prune.budgets.choice import Budget, choose
from flatcompress.prune.budgets.cost import CostModel
from flatcompress.prune.dependency.groups import Group, Survey
from flatcompress.prune.dependency.survey import survey
from flatcompress.prune.importance import IMPORTANCES, RunningScore, score
from flatcompress.prune.inputs import Example, call, mapped
from flatcompress.prune.ranking import Limits
from flatcompress.prune.soft import shrink

Batches = Iterable[tuple[Example, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


def prune(
    model: nn.Module,
    example_input: Example,
    ratio: float | None = None,
    importance: str = "group_l2",
    *,
    macs: float | None = None,
    params: float | None = None,
    bytes: float | None = None,
    budget: Budget | None = None,
    ranking: str = "global",
    round_to: int | None = None,
    min_channels: int = 1,
    floor: float | None = None,
    ignore: Sequence[str] = (),
    batches: Batches | None = None,
    loss: Loss = functional.cross_entropy,
    weight_bits: float = 8,
    **options: Any,
) -> Plan:
    """Remove channels and heads of ``model`` at once, in place; returns the plan that repeats it.

    One budget: ``ratio`` (share of channels to remove; 0.5 when nothing is given), or what may be left: ``macs``,
    ``params``, ``bytes`` (up to 1 a share, above 1 absolute; bytes at ``weight_bits``), or a `Budget`, which also
    takes a cost function such as a latency table. ``ranking``, ``round_to``, ``min_channels``, ``floor``: `Limits`.
    ``example_input``: one batch; several arguments are a tuple, or a dictionary by name.
    ``ignore``: layer names or ``re:PATTERN``. Gradient importances use ``.grad`` as it is, or average over
    ``batches`` of (input, target) under ``loss``. ``importance``: a name in `IMPORTANCES`.
    Modules stay plain torch modules; parameters are new objects, so build the optimizer afterwards.
    UserError, with the model untouched: no such name, budget out of reach, pattern without a match, nothing to prune.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> plan = prune(net, torch.zeros(1, 3, 8, 8), ratio=0.5)
    >>> net[0].out_channels, net[2].in_channels
    (4, 4)
    """
    _ = IMPORTANCES[importance]
    limits = Limits(ranking, round_to, min_channels, floor)
    budget = _one_budget(ratio, {"macs": macs, "params": params, "bytes": bytes}, budget, weight_bits)
    found = survey(model, example_input, ignore)
    require_groups(model, found)
    scores = _scores(model, found.groups, importance, batches, loss, options)
    costs = None if budget.kind == "ratio" else CostModel(model, example_input)
    keep = choose(found.groups, scores, budget, limits, costs=costs)
    if all(bool(k.all()) for k in keep):
        raise NothingPruned(nothing_pruned(budget))
    return shrink(model, found.groups, keep, example_input)


class NothingPruned(UserError):
    """The dense model meets the budget already."""


def require_groups(model: nn.Module, found: Survey) -> None:
    """UserError with every reason when a model has nothing that can be cut."""
    if not found.groups:
        reasons = "; ".join(f"{g.name}: {g.reason}" for g in found.protected) or "it has no convolution or linear layer"
        raise UserError(f"nothing in {type(model).__name__} can be pruned: {reasons}.")


def nothing_pruned(budget: Budget) -> str:
    """The message for a budget that the dense model meets already."""
    if budget.kind == "ratio":
        return (
            f"nothing was pruned: ratio {budget.value:g} is less than half a step of round_to; raise it, or round_to=1."
        )
    asked = budget.called if budget.unmet is not None else f"the {budget.called} budget {budget.value:g}"
    return f"nothing was pruned: the dense model is within {asked} already."


def _one_budget(
    ratio: float | None, left: dict[str, float | None], budget: Budget | None, weight_bits: float
) -> Budget:
    given = [Budget(kind, value, weight_bits=weight_bits) for kind, value in left.items() if value is not None]
    if budget is not None:
        given.append(budget)
    if ratio is not None:
        given.append(Budget("ratio", ratio))
    if len(given) > 1:
        raise UserError(f"give one pruning budget, not {len(given)}: {', '.join(b.kind for b in given)}.")
    return given[0] if given else Budget("ratio", 0.5)


def _scores(
    model: nn.Module, groups: list[Group], importance: str, batches: Batches | None, loss: Loss, options: dict[str, Any]
) -> list[Tensor]:
    if not IMPORTANCES[importance].facts.needs_gradients or batches is None:
        return score(groups, importance, **options)
    running = RunningScore(groups, importance, **options)
    observe(model, running, batches, loss, per_sample=IMPORTANCES[importance].facts.per_sample)
    return running.scores()


def _singly(inputs: Example, targets: Tensor) -> Iterator[tuple[Example, Tensor]]:
    """The samples of a batch as batches of one."""
    for i in range(len(targets)):
        one = slice(i, i + 1)
        yield mapped(inputs, itemgetter(one)), targets[one]


def observe(model: nn.Module, running: RunningScore, batches: Batches, loss: Loss, per_sample: bool = False) -> None:
    """Feed ``running`` with the gradients of ``loss`` on ``batches`` (eval mode); gradients are put back afterwards.

    ``per_sample``: one backward per sample, as the Hessian diagonal needs.
    """
    before = [(p, p.grad) for p in model.parameters()]
    try:
        with evaluating(model), torch.enable_grad():
            for inputs, targets in batches:
                for x, y in _singly(inputs, targets) if per_sample else [(inputs, targets)]:
                    model.zero_grad(set_to_none=True)
                    value = loss(call(model, x), y)
                    if not value.requires_grad:
                        raise UserError(
                            "this importance needs gradients, and the loss has none: every parameter is frozen "
                            "(requires_grad is False), or the model's output is detached."
                        )
                    value.backward()
                    running.update()
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient
