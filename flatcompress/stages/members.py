"""One network of a family, as a run that every other piece can measure and write like any run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flatcompress import prune
from flatcompress.plan import Plan, apply_plan
from flatcompress.prune import elastic
from flatcompress.stages.context import RunContext


def family_of(run: RunContext) -> elastic.Family | None:
    """The family that ``run.model`` is; None for one network."""
    return run.model if isinstance(run.model, elastic.Family) else None


def split(plan: Plan) -> tuple[Plan, dict[str, Any]]:
    """What came before the "elastic" step of ``plan``, which is its last, and that step's data."""
    assert plan.steps[-1].kind == "elastic"
    return Plan(plan.steps[:-1]), plan.steps[-1].data


def full(run: RunContext) -> RunContext:
    """``run`` with the full network of its family in the family's place; itself where there is no family."""
    family = family_of(run)
    if family is None:
        return run
    before, data = split(run.plan)
    return replace(run, model=family.full, plan=before + elastic.member_plans(data)[-1][1])


def trained(run: RunContext, index: int) -> RunContext:
    """``run`` with a copy of the network of the family's ``widths[index]``."""
    family = family_of(run)
    assert family is not None
    before, data = split(run.plan)
    return replace(run, model=family.network(index), plan=before + elastic.member_plans(data)[index][1])


def mixed(run: RunContext, width: float | Mapping[str, float]) -> RunContext:
    """``run`` with a network of another width, or of a width per group, that was never trained as such.

    UserError: names that are no groups, widths that are no shares. BatchNorm's statistics are still another network's.
    """
    family = family_of(run)
    assert family is not None
    before, data = split(run.plan)
    example = run.example().cpu()
    fresh = apply_plan(run.build().cpu(), before, example)
    groups = prune.find_groups(fresh, example, data["ignore"])
    keep = elastic.kept_units(groups, data["orders"], width)
    network, plan = elastic.mixed(family.cpu(), data, fresh, groups, keep, example)
    family.to(run.device)
    return replace(run, model=network.to(run.device), plan=before + plan)
