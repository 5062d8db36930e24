"""The rehearsal: every stage's surgery on an untrained copy, and its file, so that what is wrong is found early."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from flatcompress.errors import UserError
from flatcompress.stages import export, prune, quantize, sparsify
from flatcompress.stages.workpiece import Workpiece


def rehearse(work: Workpiece, entries: list[Any]) -> None:
    """Cut, quantize and write a copy of the model as the stages will. UserError names the stage and what is wrong."""
    model: nn.Module = copy.deepcopy(work.model).cpu()
    example = work.example().cpu()
    _check_output(work, model, example)
    for index, entry in enumerate(entries):
        try:
            if entry.kind != "export":
                _check_trainable(model, entry)
            if entry.kind == "prune":
                prune.rehearse(model, example, entry.config)
            elif entry.kind == "sparsify":
                sparsify.rehearse(model, example, entry.config)
            elif entry.kind == "quantize":
                quantize.rehearse(model, example, entry.config)
            elif entry.kind == "export":
                export.rehearse(model, example, entry.config)
        except UserError as error:
            raise UserError(f"stages.{index}.{entry.kind}: {error}") from None


def _check_trainable(model: nn.Module, entry: Any) -> None:
    """A stage that trains the float model needs a parameter that may move; learned scales come with `quantize`."""
    if entry.kind == "quantize" and not quantize.float_epochs(entry.config):
        return
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("every parameter of the model is frozen (requires_grad is False): there is nothing to train.")


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
