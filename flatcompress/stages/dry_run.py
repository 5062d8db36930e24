"""The dry run: every stage's surgery on an untrained copy, so that wrong input is found before anything runs."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.stages.context import RunContext
from flatcompress.stages.stage import stage_of


def dry_run(run: RunContext, stages: Iterable[tuple[str, Any]]) -> None:
    """Cut and quantize a copy of the model as ``stages``, (kind, config), will.

    UserError names the stage and what is wrong with it.
    """
    model: nn.Module = copy.deepcopy(run.model).cpu()
    example = run.example().cpu()
    _check_output(run, model, example)
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
    wanted = (len(example), len(run.data.classes))
    shape = tuple(out.shape) if isinstance(out, Tensor) else ()
    if shape != wanted:
        raise UserError(f"the model gives {shape or type(out).__name__} for {len(example)} images; wanted {wanted}.")
