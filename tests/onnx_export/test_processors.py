"""What onnxruntime computes of a file under qemu's Haswell and Nehalem equals what it computes here.

Haswell has AVX2 and no VNNI, so its u8 x s8 kernels add two products in 16 bits; Nehalem has SSE4.2 alone.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import emulated
import numpy as np
import pytest
import torch
from conftest import randomize_norms

from flatcompress import models, quant
from flatcompress.onnx_export import certify, export

SMALL = {"mobilenet_v2": {"width": 0.35}, "resnet18": {"width": 8}, "resnet50": {"width": 8}, "vit_tiny": {"depth": 2}}
X = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def train_briefly(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(4):
        x, y = torch.randn(16, 1, 16, 16, generator=generator), torch.randint(0, 10, (16,), generator=generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def write(folder: Path, name: str, bits: int, trained: bool) -> dict:
    """Export one network into ``folder``; its certificate."""
    model = models.build(name, num_classes=10, input_shape=(1, 16, 16), seed=0, **SMALL.get(name, {}))
    randomize_norms(model)
    if trained:
        train_briefly(model)
    quant.quantize(model, weight_bits=bits, activation_bits=bits, example_input=X[:2])
    quant.calibrate(model, [X])
    path = folder / f"{name}-{bits}-{'trained' if trained else 'untrained'}.onnx"
    return certify(export(model.eval(), X[:2], path), [X], latency_runs=0, write=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    if shutil.which("qemu-x86_64") is None:
        pytest.skip("qemu-x86_64 is not installed (Debian: apt-get install qemu-user)")
    folder = tmp_path_factory.mktemp("processors")
    np.save(folder / "input.npy", X.numpy())
    found = {}
    for name in sorted(models.MODELS):
        for bits in (8, 4):
            for trained in (False, True):
                certificate = write(folder, name, bits, trained)
                found[Path(certificate["file"]["name"]).stem] = certificate
    emulated.main(folder, "here.npz")
    return folder, found


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["Haswell", "Nehalem"])
def test_a_file_gives_the_same_bits_on_another_processor_or_the_certificate_names_what_rounds(processor, files):
    folder, certificates = files
    command = ["qemu-x86_64", "-cpu", processor, sys.executable, emulated.__file__, str(folder), f"{processor}.npz"]
    subprocess.run(command, check=True, capture_output=True, timeout=1800)
    here, there = np.load(folder / "here.npz"), np.load(folder / f"{processor}.npz")
    different = [name for name in certificates if not np.array_equal(here[name], there[name])]
    print(processor, len(certificates) - len(different), "of", len(certificates), "equal; different:")
    for name in different:
        row = certificates[name]
        steps = float(np.abs(here[name] - there[name]).max()) / row["parity"]["step"]
        print(f"  {name}: {steps:.3f} steps, roundoff {row['parity']['optimized']['roundoff_steps']:.3f}")
    unnamed = [name for name in different if not certificates[name]["kernels"]["rounds"]]
    assert unnamed == []
    assert len(different) <= len(certificates) // 8
