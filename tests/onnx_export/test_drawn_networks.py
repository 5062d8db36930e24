"""Drawn networks end in a file that is its reference, or in a UserError that names the module: nothing else."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from drawn_networks import Block, Net, networks
from float64 import in_float64
from hypothesis import HealthCheck, given, settings

from flatcompress import quant
from flatcompress.errors import UserError
from flatcompress.onnx_export import certify, export

torch.set_num_threads(1)
X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
DRAWS = int(os.environ.get("DRAWN_NETWORKS", "60"))  # 2000 for the record


@pytest.mark.slow
@settings(max_examples=DRAWS, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(networks())
def test_parity_or_an_error_that_names_the_module(drawn: tuple[Net, int]) -> None:
    model, bits = drawn
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"drawn-{os.getpid()}.onnx"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quant.quantize(model, bits, bits, example_input=X[:2])
            quant.calibrate(model, [X])
            model.train()(X).square().mean().backward()
            exported = export(model.eval(), X[:2], path)
    except UserError as error:
        assert "'" in str(error), error
        return
    finally:
        found = path.read_bytes() if path.exists() else b""
        path.unlink(missing_ok=True)
    session = onnxruntime.InferenceSession(found, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    with torch.no_grad():
        expected = exported.reference(X).numpy()
    span = float(np.ptp(expected)) / 255 or 1.0
    for count in (1, 3, 6):
        result = session.run(None, {name: X[:count].numpy()})[0]
        # ties of rounding move single codes; a wrong kernel moves most
        assert np.median(np.abs(result - expected[:count])) <= 2 * span


def agrees_with_float64(model: Net, bits: int, path: Path) -> None:
    """A certificate that holds says so of a file that means what its reference computes, whatever evaluates it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quant.quantize(model, bits, bits, example_input=X[:2])
        quant.calibrate(model, [X])
        exported = export(model.eval(), X[:2], path, "int8", opset=21)  # what onnx's evaluator has operators of
        parity = certify(exported, [X], latency_runs=0, write=False)["parity"]
    with torch.no_grad():
        expected = exported.reference(X).numpy()
    furthest = float(np.abs(in_float64(path, X.numpy()) - expected).max()) / parity["step"]
    assert furthest <= 1.0 + 4.0 * parity["unoptimized"]["roundoff_steps"]


def test_a_file_evaluated_in_float64_is_its_reference(tmp_path: Path) -> None:
    torch.manual_seed(1)
    gated = Block("plain", 3, "batch", 2, "gate", 4)
    agrees_with_float64(Net([gated, Block("same", 2, "none", 3, "concat", 4)], "mean", False), 8, tmp_path / "m.onnx")


@pytest.mark.slow
@settings(max_examples=max(5, DRAWS // 20), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(networks())
def test_drawn_files_evaluated_in_float64_are_their_references(drawn: tuple[Net, int]) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"drawn-double-{os.getpid()}.onnx"
    try:
        agrees_with_float64(*drawn, path)
    except UserError as error:
        assert "'" in str(error), error
    finally:
        path.unlink(missing_ok=True)
