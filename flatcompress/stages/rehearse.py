"""The rehearsal: every stage's surgery on an untrained copy, so that wrong input is found before anything runs."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from flatcompress import onnx_export, quant
from flatcompress.errors import UserError
from flatcompress.stages import prune, quantize, sparsify
from flatcompress.stages.workpiece import Workpiece


def rehearse(work: Workpiece, entries: list[Any]) -> None:
    """Cut and quantize a copy of the model as the stages will. UserError names the stage and what is wrong with it."""
    model: nn.Module = copy.deepcopy(work.model).cpu()
    example = work.example().cpu()
    _check_output(work, model, example)
    for index, entry in enumerate(entries):
        try:
            if entry.kind == "prune":
                prune.rehearse(model, example, entry.config)
            elif entry.kind == "sparsify":
                sparsify.rehearse(model, example, entry.config)
            elif entry.kind == "quantize":
                quantize.rehearse(model, example, entry.config)
            elif entry.kind == "export" and entry.config.profile == "c":
                _check_c(model, example)
        except UserError as error:
            raise UserError(f"stages.{index}.{entry.kind}: {error}") from None


def _check_c(model: nn.Module, example: Any) -> None:
    """Whether every module has a C form; the grids need some data before they can be lowered."""
    tried = copy.deepcopy(model)
    quant.calibrate(tried, [example])
    onnx_export.check_c(tried.eval(), example)


def _check_output(work: Workpiece, model: nn.Module, example: Any) -> None:
    model.eval()
    try:
        out = model(example)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the model cannot read the data: images are {tuple(work.data.input_shape)}, and its forward says: {reason}"
        ) from None
    wanted = (len(example), len(work.data.classes))
    shape = tuple(getattr(out, "shape", ()))
    if shape != wanted:
        raise UserError(f"the model gives {shape or type(out).__name__} for {len(example)} images; wanted {wanted}.")
