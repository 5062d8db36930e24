"""The C model of one exported file: decide, write beside it, and compare with onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from flatcompress.onnx_export.c import build, checking, folder
from flatcompress.onnx_export.c.layers import Decided, decide
from flatcompress.onnx_export.c.read import read

FOLDER = "c"
Judged = Callable[[NDArray[np.float32], NDArray[np.float32]], tuple[dict[str, Any], list[str]]]
PRODUCTS = 20_000_000_000  # that a comparison may take: about half a minute on a desktop processor


@dataclass
class CModel:
    """``folder`` holds ``NAME.c`` and what belongs to it; ``figures`` are for the certificate."""

    folder: Path
    name: str
    decided: Decided
    figures: dict[str, Any]

    @property
    def outputs(self) -> int:
        """Floats of one sample's output."""
        return int(np.prod(self.decided.program.outputs))

    def run(
        self, samples: NDArray[np.float32], flags: tuple[str, ...] = ("-O2",)
    ) -> tuple[NDArray[np.float32], str] | None:
        """Compile and run here: outputs [N, outputs] and the compiler, or None without one."""
        return build.run_here(self.folder, self.name, samples, self.outputs, flags)


def prepare(reference: fx.GraphModule, pack_activations: bool = False) -> Decided:
    """Everything but the writing. UserError when the model has no C form, naming the module.

    pack_activations: codes of up to 4 bits two to a byte in RAM, for some more instructions.
    """
    return decide(read(reference), pack_activations)


def place(path: Path) -> Path:
    """Where the C of an ONNX file goes: the folder ``c`` beside it, or its own where that is called so."""
    return path.parent if path.parent.name == FOLDER else path.parent / FOLDER


def write(decided: Decided, path: Path) -> CModel:
    """Write the C of the ONNX file ``path``."""
    name, target = folder.identifier(path.stem), place(path)
    figures = folder.write(decided, name, target)
    return CModel(target, name, decided, {**figures, "proof": decided.proof()})


def section(
    model: CModel,
    inputs: NDArray[np.float32],
    expected: NDArray[np.float32],
    reference: NDArray[np.float32],
    judged: Judged,
) -> dict[str, Any]:
    """The certificate's section ``c``. inputs: float32 [N, ...]; expected, reference: what onnxruntime and the torch
    reference give for them.

    A processor without VNNI adds pairs of 8-bit products in 16 bits, and there onnxruntime itself may differ from the
    reference; such samples are counted and the C is held against the reference, which is exact. A model with steps on
    real values (``float_steps``) is held to what rounding explains, as onnxruntime itself is: judged compares outputs
    with the reference's, and says in sentences what is beyond.
    """
    count = int(np.clip(PRODUCTS // max(1, model.decided.program.macs), 1, len(inputs)))
    chosen = np.linspace(0, len(inputs) - 1, count).round().astype(np.int64)
    found = model.run(inputs[chosen])
    if found is None:
        equality: dict[str, Any] = {"compiler": None, "samples": 0, "bit_equal": None}
        return {**model.figures, "equality": equality, "note": "not run: this machine has no C compiler"}
    same = bit_equal(found[0], expected[chosen])
    exact, straying = bit_equal(found[0], reference[chosen]), ~bit_equal(expected[chosen], reference[chosen])
    equality = {
        "compiler": found[1],
        "samples": count,
        "bit_equal": float(same.mean()),
        "bit_equal_reference": float(exact.mean()),
        "onnxruntime_off_reference": int(straying.sum()),
    }
    if model.decided.program.floats:
        row, sentences = judged(reference[chosen], found[0].reshape(reference[chosen].shape))
        steps = checking.check(model.folder, model.name, model.decided.program, inputs[chosen])
        wrong = [] if steps is None else steps["wrong"]
        sentences += [f"{w['module']}: {w['values']} values are not what its own inputs give." for w in wrong[:3]]
        equality |= {**row, "bit_equal": equality["bit_equal"], "steps": steps, "beyond": sentences}
    else:
        equality["wrong"] = int((~same & ~(straying & exact)).sum())
    return {**model.figures, "equality": equality}


def bit_equal(found: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.bool_]:
    """[N]: whether every bit of a sample's outputs is the same."""
    one, other = (np.ascontiguousarray(v, np.float32).reshape(len(v), -1) for v in (found, expected))
    return (one.view(np.uint32) == other.view(np.uint32)).all(1)


def failures(section: dict[str, Any]) -> list[str]:
    """Why section ``c`` keeps a certificate from holding."""
    wrong, samples = section["equality"].get("wrong", 0), section["equality"]["samples"]
    if beyond := section["equality"].get("beyond"):
        return [f"the C model: {sentence}" for sentence in beyond]
    return [f"the C model's output bits are not onnxruntime's on {wrong} of {samples} samples."] if wrong else []
