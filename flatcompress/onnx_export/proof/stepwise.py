"""Parity step by step, for networks that carry one rounded code a long way.

Where real arithmetic (a norm, a softmax, a resize) lies between two quantizers, its last bits differ from runtime to
runtime, a code that lies on a rounding boundary moves by one, and a deep network may make many output steps of that.
Comparing outputs alone would then prove nothing. Here every tensor of codes of the file is read out, and the reference
is run with the file's codes in place of its own after each of them: so each step of the reference starts from what the
file had, and may differ by one code, and only where its own value before rounding lies within `TIE` of a boundary.
The output that follows from the file's last codes may differ by one output step, as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from flatcompress.onnx_export.exporting import Exported
from flatcompress.onnx_export.lower import integer
from flatcompress.onnx_export.proof.codes import read_out
from flatcompress.onnx_export.proof.judging import LARGEST_STEPS
from flatcompress.onnx_export.proof.samples import Samples, flat

TIE = 0.01  # of a code: how near a rounding boundary a value lies that may go either way
SAMPLES = 8


@dataclass
class _Found:
    """What the steps add up to."""

    codes: int = 0
    moved: int = 0
    wrong: dict[str, int] = field(default_factory=dict)


def stepwise(exported: Exported, inputs: Samples, output: int, step: float) -> dict[str, Any]:
    """The certificate's part: ``holds``, how many codes there were and moved, and the steps that are wrong.

    ``inputs``: at most `SAMPLES` of them, spread over all, are used. ``step``: one output step.
    """
    chosen = inputs.chosen(torch.linspace(0, len(inputs) - 1, min(len(inputs), SAMPLES)).round().long())
    names = [name for name in _code_nodes(exported.reference) if name in exported.tensors]
    codes, outputs = read_out(exported, names, chosen, output)
    result = outputs.astype(np.float64)
    found = _Found()
    with torch.no_grad():
        followed = _Following(exported.reference, codes, found).run(*chosen)
    expected = flat(followed)[output].double().numpy()
    steps = float(np.abs(expected - result).max() / step)
    wrong = [{"name": exported.paths[name], "codes": count} for name, count in found.wrong.items()]
    return {
        "samples": inputs.count(chosen),
        "codes": found.codes,
        "moved": found.moved,
        "wrong": wrong,
        "output_steps": steps if np.isfinite(steps) else None,
        "holds": not wrong and found.codes > 0 and steps <= LARGEST_STEPS,
    }


def _code_nodes(reference: fx.GraphModule) -> list[str]:
    """The nodes that put out codes: every one that rounds, clamps or looks up."""
    found = []
    for node in reference.graph.nodes:
        module = reference.get_submodule(str(node.target)) if node.op == "call_module" else None
        kinds = (integer.Quantize, integer.ClampCodes, integer.Table)
        if isinstance(module, kinds) or (isinstance(module, integer.Rounded) and module.out_grid is not None):
            found.append(node.name)
    return found


class _Following(fx.Interpreter):
    """Runs a reference, compares each step's codes with the file's, and goes on with the file's."""

    def __init__(self, reference: fx.GraphModule, codes: Mapping[str, NDArray[np.int16]], found: _Found) -> None:
        super().__init__(reference)
        self.codes, self.found = codes, found

    def run_node(self, n: fx.Node) -> Any:
        if n.name not in self.codes:
            return super().run_node(n)
        module = self.fetch_attr(str(n.target))
        args, _ = self.fetch_args_kwargs_from_env(n)
        own = module(*args)
        theirs = torch.from_numpy(self.codes[n.name].astype(np.float32)).reshape(own.shape)
        differs = own != theirs
        self.found.codes += own.numel()
        if bool(differs.any()):
            allowed = differs & ((own - theirs).abs() <= 1) & _on_a_boundary(module, args)
            self.found.moved += int(differs.sum())
            wrong = int((differs & ~allowed).sum())
            if wrong:
                self.found.wrong[n.name] = wrong
        return theirs


def _on_a_boundary(module: nn.Module, args: tuple[Any, ...]) -> Tensor:
    """Where the value before rounding lies within `TIE` of the middle between two codes."""
    if isinstance(module, integer.Rounded):
        value = module.value(*args)
    elif isinstance(module, integer.Quantize):
        value = args[0] / integer.scale32(module.grid.scale)
    else:  # clamps and tables round nothing
        return torch.zeros_like(args[0], dtype=torch.bool)
    return (value.double() - value.double().floor() - 0.5).abs() <= TIE
