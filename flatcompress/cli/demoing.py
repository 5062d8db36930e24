"""``flatcompress demo``: one static folder that runs a run's exported file in the browser."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flatcompress.cli.commands import open_run
from flatcompress.data import DataBundle
from flatcompress.errors import UserError
from flatcompress.onnx_export.runtime import sessions
from flatcompress.storage import read_json, write_error, write_output

PAGE = Path(__file__).parent / "demo"
PACKAGE = "onnxruntime-web"
WEB_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
SAMPLES = 256
WEBGPU = (
    "backend 'webgpu' is refused: onnxruntime-web computes QuantizeLinear and DequantizeLinear of uint8 wrongly there, "
    "and says nothing. Use wasm, which gives the same outputs as Python."
)


def demo(folder: Path, out: Path | None, web: Path | None, backend: str = "wasm") -> dict[str, Any]:
    """Write the demo of run ``folder``: the page, its file, up to 256 test images and Python's outputs on them.

    ``web``: a folder of the npm package onnxruntime-web; None looks for node_modules here and above, then asks npm.
    Returns {"folder", "samples", "bytes"}. UserError for a run without an exported classifier of images, or where the
    package is missing; RunError when the disk refuses.
    """
    if backend != "wasm":
        raise UserError(WEBGPU if backend == "webgpu" else f"backend {backend!r}: there is wasm alone.")
    onnx, certificate = folder / "model.onnx", folder / "certificate.json"
    if not onnx.is_file() or not certificate.is_file():
        raise UserError(f"{folder}: no model.onnx and certificate.json. Finish a run with an export stage first.")
    _, pipeline = open_run(folder)
    bundle = pipeline.load_data()
    _check(bundle)
    target = out or folder / "demo"
    try:
        (target / "ort").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            _copy_runtime(_web_package(web, Path(scratch)), target / "ort")
        for name in ("index.html", "demo.js", "demo.css"):
            shutil.copyfile(PAGE / name, target / name)
        shutil.copyfile(onnx, target / "model.onnx")
    except OSError as error:
        raise write_error(target, error) from error
    count = _write_samples(bundle, onnx, target)
    facts = _facts(bundle, pipeline.recipe.name, read_json(certificate), onnx, count)
    write_output(target / "demo.json", json.dumps(facts, indent=1).encode())
    return {"folder": str(target), "samples": count, "bytes": onnx.stat().st_size}


def _check(bundle: DataBundle) -> None:
    named = bundle.task.name  # the data may bring it
    if named != "classification" or not bundle.classes:
        raise UserError(f"demo draws classes of images; the task of this run is {named!r}.")
    shape = tuple(bundle.input_shape)
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise UserError(f"demo draws grey or colour images; this run's inputs are {shape}.")
    if bundle.intensity is not None:
        raise UserError("demo reads eight-bit images; this run's have more (data.intensity), which no browser decodes.")


def _web_package(given: Path | None, scratch: Path) -> Path:
    here = [given] if given else [p / "node_modules" / PACKAGE for p in (Path.cwd(), *Path.cwd().parents)]
    found = next((p for p in here if all((p / "dist" / name).is_file() for name in WEB_FILES)), None)
    if found is not None:
        return found
    if given is not None:
        raise UserError(f"{given}: not the npm package {PACKAGE}, it has no dist/{WEB_FILES[0]}.")
    npm = shutil.which("npm")
    how = f"Run 'npm install {PACKAGE}' here, or give its folder with --web."
    if npm is None:
        raise UserError(f"the npm package {PACKAGE} is not here, and neither is npm. {how}")
    command = [npm, "install", "--silent", "--no-save", "--ignore-scripts", "--prefix", str(scratch), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = scratch / "node_modules" / PACKAGE
    if done.returncode or not (found / "dist" / WEB_FILES[0]).is_file():
        raise UserError(f"npm could not install {PACKAGE} ({done.stderr.strip()[:200] or done.returncode}). {how}")
    return found


def _copy_runtime(package: Path, target: Path) -> None:
    for name in WEB_FILES:
        shutil.copyfile(package / "dist" / name, target / name)
    for path in (package / "package.json", *package.glob("LICENSE*"), *package.glob("ThirdParty*")):
        if path.is_file():
            shutil.copyfile(path, target / path.name)


def _write_samples(bundle: DataBundle, onnx: Path, target: Path) -> int:
    """images.bin (uint8 NCHW), labels.bin (int32) and expected.bin (float32, the file's outputs through Python)."""
    n = min(SAMPLES, len(bundle.test))
    chosen = torch.randperm(len(bundle.test), generator=torch.Generator().manual_seed(0))[:n].tolist()
    x, y = bundle.test.__getitems__(chosen)
    session = sessions.session(onnx)
    outputs = np.concatenate([sessions.run(session, [x[i : i + 1].numpy()]) for i in range(n)])
    write_output(target / "images.bin", bundle.test.pixels(chosen).numpy().tobytes())
    write_output(target / "labels.bin", y.numpy().astype("<i4").tobytes())
    write_output(target / "expected.bin", outputs.astype("<f4").tobytes())
    return n


def _facts(bundle: DataBundle, name: str, certificate: dict[str, Any], onnx: Path, samples: int) -> dict[str, Any]:
    dense = certificate.get("float") or {}
    metric = certificate.get("metric") or {}
    return {
        "name": name,
        "classes": list(bundle.classes),
        "shape": list(bundle.input_shape),
        "mean": list(bundle.mean),
        "std": list(bundle.std),
        "samples": samples,
        "bytes": onnx.stat().st_size,
        "float_bytes": dense.get("bytes"),
        "faster": dense.get("faster"),
        "accuracy": metric.get("onnxruntime"),
        "holds": certificate.get("holds"),
    }
