"""``flatcompress debug``: where a run's accuracy goes, layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flatcompress import quant
from flatcompress.cli.commands import load_run, open_run
from flatcompress.errors import UserError
from flatcompress.stages.context import RunContext
from flatcompress.stages.measure import float_twin, train_batches
from flatcompress.storage import write_text_atomic
from flatcompress.store.runfolder import RunFolder

BATCH = 64


def debug_run(target: Path, samples: int) -> dict[str, Any]:
    """`quant.diagnose` of the newest quantized stage of a run folder (or of the folder an ONNX file lies in).

    Also ``float``: which network the errors are against, and ``file``: how far the exported file is from its reference,
    as the certificate has it. Written to ``debug.json`` in the run folder. UserError where nothing is quantized.
    """
    folder = target if target.is_dir() else target.parent
    run = load_run(folder)
    if not quant.is_quantized(run.model):
        raise UserError(f"{folder}: the newest finished stage is not quantized, so there is no rounding to find.")
    twin, which = _float(run, folder)
    batches = [x for x, _ in train_batches(run, samples, BATCH)]
    found = {"float": which, **quant.diagnose(run.model, twin.to(run.device), batches), "file": _parity(folder)}
    write_text_atomic(folder / "debug.json", json.dumps(found, indent=1) + "\n")
    return found


def _float(run: RunContext, folder: Path) -> tuple[nn.Module, str]:
    """The float network: the one before an untrained quantize stage, else the quantized one's own unrounded weights."""
    twin = float_twin(run)
    recipe, _ = open_run(folder)
    index, config = next((i, e.config) for i, e in enumerate(recipe.stages) if e.kind == "quantize")
    own = config.epochs > 0 or config.scaling != "none"  # type: ignore[attr-defined]
    if own:
        state, which = run.model.state_dict(), "the quantized network's own weights, unrounded"
    elif index:
        before = RunFolder(folder).load(f"{index - 1}-{recipe.stages[index - 1].kind}")
        state, which = before.state_dict, f"the network before the quantize stage ({before.stage})"
    else:
        state, which = run.build().state_dict(), "the network that the recipe starts from"
    kept: dict[str, torch.Tensor] = {k: v for k, v in state.items() if k in twin.state_dict()}
    twin.load_state_dict(kept)
    return twin, which


def _parity(folder: Path) -> dict[str, Any] | None:
    path = folder / "certificate.json"
    if not path.is_file():
        return None
    certificate = json.loads(path.read_text(encoding="utf-8"))
    return {"holds": certificate.get("holds"), "parity": certificate.get("parity")}
