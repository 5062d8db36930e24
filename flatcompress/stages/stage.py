"""What a stage is: one record of its keys, its phases, its dry run and the order it may stand in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from flatcompress.errors import RunError
from flatcompress.plan import Plan, apply_plan
from flatcompress.registry import Registry
from flatcompress.stages.context import RunContext
from flatcompress.stages.keys import StageKeys, TrainingKeys

Facts = dict[str, Any]  # plain data: saved with every state of a later phase
Earlier = Sequence[tuple[str, Any]]  # (kind, config) of the stages before, in order


def _nothing(facts: Facts) -> None:
    """There is nothing to repeat."""


@dataclass(frozen=True)
class Phase:
    """One part of a stage; a stage that is interrupted resumes in the middle of the phase that was running.

    ``run(facts)`` does it, with what earlier phases found, and returns what later ones need, as plain data.
    ``restore(facts)`` is called in its place when a later phase resumes: it repeats what ``run`` did to the
    architecture, from the facts alone. Weights come with the resumed phase's own state.
    """

    name: str
    run: Callable[[Facts], Facts | None]
    restore: Callable[[Facts], None] = _nothing


def repeated(run: RunContext, key: str) -> Callable[[Facts], None]:
    """The ``restore`` of a phase whose facts hold, under ``key``, the plan of what it did to the model."""

    def restore(facts: Facts) -> None:
        plan = Plan.from_json(facts[key])
        run.model = apply_plan(run.model, plan, run.example())
        run.plan = run.plan + plan

    return restore


def _no_dry_run(model: nn.Module, example: Tensor, config: Any) -> None:
    """Nothing to try out."""


def _always_fits(config: Any, earlier: Earlier) -> str | None:
    return None


@dataclass(frozen=True)
class Stage:
    """One kind of stage.

    config: its keys in a recipe, a `StageKeys` or, for one that trains, a `TrainingKeys`. They are all there is to
        its reference page, its JSON schema and its error texts.
    phases: ``phases(run, config)`` -> what it does, in order.
    dry_run: ``dry_run(model, example, config)`` does its surgery on an untrained copy on the CPU, so that wrong input
        is a UserError before anything runs.
    refuses_after: earlier kind -> the reason why it cannot come after that one, and what to do.
    needs_weights: why it needs a trained model; empty when it does not.
    ends: why nothing but its own kind may follow; empty when other stages may.
    fits: ``fits(config, earlier)`` -> what is wrong with this config after these stages, or None.
    measured: the pipeline measures the model afterwards into the ledger's row; a stage that is not adds its own row.
    """

    config: type[StageKeys]
    phases: Callable[[RunContext, Any], Sequence[Phase]]
    dry_run: Callable[[nn.Module, Tensor, Any], None] = _no_dry_run
    refuses_after: Mapping[str, str] = field(default_factory=dict)
    needs_weights: str = ""
    ends: str = ""
    fits: Callable[[Any, Earlier], str | None] = _always_fits
    measured: bool = True

    @property
    def trains(self) -> bool:
        """Does it train the model?"""
        return issubclass(self.config, TrainingKeys)


STAGES = Registry("stage")


def stage_of(kind: str) -> Stage:
    """The record of a stage kind. UserError with the nearest spelling when there is none."""
    return STAGES[kind]()


def order_problem(kind: str, config: Any, earlier: Earlier, has_weights: bool) -> str | None:
    """Why a stage makes no sense after ``earlier``, or None.

    ``kind``, ``config``: the stage and its keys; ``has_weights``: the model comes with trained weights.
    """
    stage = stage_of(kind)
    ended = next((before for before, _ in earlier if stage_of(before).ends and before != kind), None)
    if ended is not None:
        return f"'{kind}' comes after '{ended}': {stage_of(ended).ends}"
    refused = next((before for before, _ in earlier if before in stage.refuses_after), None)
    if refused is not None:
        return f"'{kind}' comes after '{refused}': {stage.refuses_after[refused]}"
    if stage.needs_weights and not has_weights and not any(stage_of(before).trains for before, _ in earlier):
        return f"'{kind}' {stage.needs_weights}"
    return stage.fits(config, earlier)


def run_stage(kind: str, run: RunContext, config: Any) -> RunContext:
    """Run the phases of a stage, from the one that ``run.resume`` was saved in; returns ``run``, changed.

    ``kind``, ``config``: the stage and its keys.

    RunError when the saved state belongs to no phase of the stage.
    """
    run.accumulate = config.accumulate if isinstance(config, TrainingKeys) else 1
    if isinstance(config, TrainingKeys):
        config = config.within(run.steps_per_epoch)
    phases = stage_of(kind).phases(run, config)
    begun, first = run.passes, 0
    facts: Facts = {}
    if run.resume is not None:
        facts, first = _resumed(kind, run, phases)
    for phase in phases[first:]:
        run.phase = {"name": phase.name, "facts": dict(facts), "passes": run.passes - begun}
        facts |= phase.run(facts) or {}
        run.resume = None
    return run


def _resumed(kind: str, run: RunContext, phases: Sequence[Phase]) -> tuple[Facts, int]:
    """What the phases before the interrupted one found, and its index; they are restored."""
    assert run.resume is not None
    context: Any = run.resume.get("context")
    names = [phase.name for phase in phases]
    try:
        first, facts, passes = names.index(context["name"]), dict(context["facts"]), int(context["passes"])
    except (KeyError, TypeError, ValueError):
        raise RunError(
            f"the saved state is of no phase of the stage {kind!r} ({', '.join(names)}): another version of "
            "flatcompress wrote it. Use --restart to start over, or finish the run with that version."
        ) from None
    run.passes += passes
    for phase in phases[:first]:
        phase.restore(facts)
    return facts, first
