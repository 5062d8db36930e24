"""The dry run: every stage's surgery on an untrained copy, so that wrong input is found before anything runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from flatcompress import flat
from flatcompress.errors import Interrupted, UserError
from flatcompress.stages import features_inside
from flatcompress.stages.context import RunContext
from flatcompress.stages.keys import TrainingKeys
from flatcompress.stages.stage import stage_of
from flatcompress.training import compiling, optimizers, schedules


def dry_run(run: RunContext, stages: Sequence[tuple[str, Any]]) -> None:
    """Cut and quantize a copy of the model as ``stages``, (kind, config), will.

    UserError names the stage and what is wrong with it.
    """
    model: nn.Module = copy.deepcopy(run.model).cpu()
    example = run.example().cpu()
    _check_output(run, model, example)
    assert run.layout  # a layout that the forward does not take is refused here
    _check_stages(run, stages)
    if run.compiles:
        compiling.check(run.device)
    for index, (kind, config) in enumerate(stages):
        try:
            stage_of(kind).dry_run(model, example, config)
        except UserError as error:
            raise UserError(f"stages.{index}.{kind}: {error}") from None


def _check_output(run: RunContext, model: nn.Module, example: Tensor) -> None:
    model.eval()
    try:
        out: Any = model(example)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the model cannot read the data: images are {tuple(run.data.input_shape)}, and its forward says: {reason}"
        ) from None
    if not isinstance(out, Tensor):
        raise UserError(f"the model gives {type(out).__name__} for {len(example)} images; wanted one tensor.")
    _, y = run.data.test.__getitems__(list(range(len(example))))
    problem = run.task.output(out, y, run.data.classes)
    if problem is not None:
        raise UserError(problem)
    _check_task(run, out.detach(), y)


def _check_task(run: RunContext, out: Tensor, y: Tensor) -> None:
    """Loss and metrics must take what the model gives; those of the user's own may be wrong in any way."""
    task = run.task
    try:
        loss = task.loss(out.requires_grad_(), y)
        found = float(loss.detach())
        if task.name == "own":
            task.measure([(out, y)])
    except (UserError, Interrupted):
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"task {task.name!r}: its loss or a metric cannot read outputs {tuple(out.shape)} and targets "
            f"{tuple(y.shape)} ({reason})."
        ) from None
    if loss.numel() != 1 or not loss.requires_grad or math.isnan(found):
        raise UserError(
            f"task {task.name!r}: the loss must be one number that depends on the output, found {found:g} of shape "
            f"{tuple(loss.shape)}."
        )


def _check_stages(run: RunContext, stages: Sequence[tuple[str, Any]]) -> None:
    """What a stage cannot do for this task. UserError names the stage."""
    for index, (kind, config) in enumerate(stages):
        try:
            if getattr(config, "features", None) == "inside":
                features_inside.spectra_of(dict(run.data.features))
            if not isinstance(config, TrainingKeys):
                continue
            _check_loop(run, config)
            run.task.training_loss(config.label_smoothing)
            if flat.METHODS[config.flat_method()].facts.of_logits and run.task.agreement != "argmax":
                raise UserError(
                    f"method {config.flat_method()!r} compares probabilities of classes on the last axis of an output, "
                    f"and task {run.task.name!r} has none there: take another method, such as sam."
                )
        except UserError as error:
            raise UserError(f"stages.{index}.{kind}: {error}") from None


def _check_loop(run: RunContext, config: TrainingKeys) -> None:
    """The optimizer and the schedule work, and the batches of a step are there."""
    n = len(run.data.train)
    optimizers.try_out(*config.optimizer.arguments)
    if isinstance(config.schedule, str) and config.schedule not in schedules.NAMES:
        raise UserError(f"schedule {config.schedule!r} stands for an object given in Python; name a schedule instead.")
    schedules.try_out(config.schedule, config.optimizer.lr)
    wanted = config.accumulate * run.batch_size * run.accelerator.num_processes
    if config.accumulate > 1 and wanted > n:
        raise UserError(f"accumulate {config.accumulate}: a step would take {wanted} samples, and there are {n}.")
    if run.mixing is not None and run.task.name in ("segmentation", "sequence", "reconstruction", "detection"):
        raise UserError(f"mixup and cutmix (data.augment) mix whole targets; task {run.task.name!r} has other ones.")
