"""Drawn networks end in a file that is its reference, or in a UserError that names the module: nothing else."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from drawn_networks import Net, networks
from hypothesis import HealthCheck, given, settings

from flatcompress import quant
from flatcompress.errors import UserError
from flatcompress.onnx_export import export

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
