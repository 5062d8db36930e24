"""A second file beside the exported one that takes sound itself: its features are computed by ONNX operators.

Log-mel spectra and MFCC are floats whichever way they are computed, so the certificate of the model stays that of the
file without them; what is measured here is how far the operators' features are from numpy's, and how often the class
or the code of the output is another one for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import compose, helper, numpy_helper

from flatcompress.data.spectra import FLOOR, Spectra, cosines, mel_filters
from flatcompress.errors import UserError
from flatcompress.onnx_export.runtime import sessions
from flatcompress.randomness import derive
from flatcompress.storage import sha256_file, write_output

NAME = "model-sound.onnx"
OPSET = 17  # STFT
LARGEST = 0.01  # of the logarithm of an energy
_DRAWN = 64
_PREFIX = "features/"


def spectra_of(features: dict[str, Any]) -> Spectra:
    """The settings of the data set's features. UserError where its inputs are no features of sound.

    >>> spectra_of({"rate": 8000, "features": "logmel"}).length
    320
    """
    if "rate" not in features:
        raise UserError("features: inside is for data sets of sound (sounds, drawn-words); these inputs are none.")
    return Spectra(**features)


def samples_of(spectra: Spectra, frames: int) -> int:
    """How many samples ``frames`` windows reach over."""
    return (frames - 1) * spectra.step + spectra.length


def front(spectra: Spectra, frames: int, mean: float, std: float, opset: int, ir_version: int) -> onnx.ModelProto:
    """The graph from ``sound``, float32 [batch, samples], to ``inside``, float32 [batch, 1, frames, values].

    A window that is padded with zeros to the transform's size, as numpy's rfft pads it, is one window of STFT's on a
    sound with as many zeros behind it.
    """
    size = 1 << (spectra.length - 1).bit_length()
    window = np.zeros(size, np.float32)
    window[: spectra.length] = np.hanning(spectra.length + 1)[:-1]
    filters = mel_filters(spectra.rate, size, spectra.bands).T / size
    constants: dict[str, NDArray[Any]] = {
        "behind": np.array([0, 0, 0, size - spectra.length], np.int64),
        "step": np.array(spectra.step, np.int64),
        "window": window,
        "size": np.array(size, np.int64),
        "last": np.array([-1], np.int64),
        "one": np.array([1], np.int64),
        "filters": filters.astype(np.float32),
        "floor": np.array(FLOOR, np.float32),
        "mean": np.array(mean, np.float32),
        "std": np.array(std, np.float32),
    }
    nodes: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Pad", ["sound", "behind"], "padded", {}),
        ("Unsqueeze", ["padded", "last"], "signal", {}),
        ("STFT", ["signal", "step", "window", "size"], "spectrum", {"onesided": 1}),
        ("Mul", ["spectrum", "spectrum"], "squares", {}),
        ("ReduceSum", ["squares", "last"], "power", {"keepdims": 0}),
        ("MatMul", ["power", "filters"], "energy", {}),
        ("Add", ["energy", "floor"], "above", {}),
        ("Log", ["above"], "logs", {}),
    ]
    logs = "logs"
    if spectra.features == "mfcc":
        constants["cosines"] = cosines(spectra.bands, spectra.coefficients).T.astype(np.float32)
        nodes.append(("MatMul", [logs, "cosines"], "mfcc", {}))
        logs = "mfcc"
    nodes += [
        ("Unsqueeze", [logs, "one"], "image", {}),
        ("Sub", ["image", "mean"], "centred", {}),
        ("Div", ["centred", "std"], "inside", {}),
    ]
    values = spectra.coefficients if spectra.features == "mfcc" else spectra.bands
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, [out], name=out, **more) for kind, inputs, out, more in nodes],
        "features",
        [helper.make_tensor_value_info("sound", onnx.TensorProto.FLOAT, ["batch", samples_of(spectra, frames)])],
        [helper.make_tensor_value_info("inside", onnx.TensorProto.FLOAT, ["batch", 1, frames, values])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def write(source: Path, target: Path, features: dict[str, Any], mean: float, std: float) -> dict[str, Any]:
    """Write ``target``: the model ``source`` behind its features; what the certificate says of it.

    UserError where the inputs are no features of sound, or ``source`` has an opset without STFT.
    """
    spectra, model = spectra_of(features), onnx.load(source)
    (given,) = model.graph.input
    frames = given.type.tensor_type.shape.dim[2].dim_value
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < OPSET:
        raise UserError(
            f"features: inside needs ONNX opset {OPSET} (STFT), and the file has {opset}: set opset: {OPSET}."
        )
    before = compose.add_prefix(
        front(spectra, frames, mean, std, opset, model.ir_version), _PREFIX, rename_inputs=False
    )
    for entry in model.opset_import:
        if entry.domain not in ("", "ai.onnx"):
            before.opset_import.append(entry)
    whole = compose.merge_models(before, model, [(f"{_PREFIX}inside", given.name)], producer_name=model.producer_name)
    told = {entry.key: entry.value for entry in model.metadata_props}
    helper.set_model_props(whole, told | {"features": "inside"})
    write_output(target, whole.SerializeToString())
    return compared(source, target, spectra, frames, mean, std)


def compared(source: Path, target: Path, spectra: Spectra, frames: int, mean: float, std: float) -> dict[str, Any]:
    """How far the features of ``target`` are from numpy's on drawn sounds, and whether the answers are the same."""
    waves = drawn_sounds(spectra, samples_of(spectra, frames))
    plain = spectra(waves)
    outside = ((plain[:, None] - mean) / std).astype(np.float32)
    proto = onnx.load(target)
    alone = front(spectra, frames, 0.0, 1.0, proto.opset_import[0].version, proto.ir_version)
    inside = sessions.run(sessions.session(alone.SerializeToString()), [waves])[:, 0]
    expected, found = (sessions.run(sessions.session(p), [x]) for p, x in ((source, outside), (target, waves)))
    flat = [value.reshape(len(value), -1) for value in (expected, found)]
    return {
        "name": target.name,
        "sha256": sha256_file(target),
        "bytes": target.stat().st_size,
        "input": ["batch", samples_of(spectra, frames)],
        "sounds": len(waves),
        "largest_feature_error": float(np.abs(inside - plain).max()),
        "equal_class": float((flat[0].argmax(1) == flat[1].argmax(1)).mean()),
        "equal_output": float((flat[0] == flat[1]).all(1).mean()),
    }


def failures(section: dict[str, Any]) -> list[str]:
    """Why the second file is not the first one behind its features."""
    error = section["largest_feature_error"]
    if error <= LARGEST:
        return []
    return [f"{section['name']}: features differ from numpy's by up to {error:.3g} (logarithm); at most {LARGEST:g}."]


def drawn_sounds(spectra: Spectra, samples: int) -> NDArray[np.float32]:
    """[64, samples] in -1..1: harmonics under noise, loud and faint, clicks, and silence."""
    chance = np.random.default_rng(derive(0, "sounds that are compared"))
    time = np.arange(samples) / spectra.rate
    pitch = chance.uniform(60, spectra.rate / 4, (_DRAWN, 1, 1))
    order = np.arange(1, 5)[None, :, None]
    waves = (np.sin(2 * np.pi * pitch * order * time) / order).sum(1) * chance.uniform(0, 0.4, (_DRAWN, 1))
    waves += chance.normal(size=waves.shape) * 10 ** chance.uniform(-5, -1, (_DRAWN, 1))
    waves[1::8] *= np.linspace(0, 1, samples)
    waves[2::8, samples // 2] = 1.0
    waves[0] = 0.0
    return waves.clip(-1, 1).astype(np.float32)
