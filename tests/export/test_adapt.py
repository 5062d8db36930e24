"""The kit's adapting script: answers as the stream comes, forgets when told, reads a run folder."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flatcompress import Pipeline
from flatcompress.flat.adapting import Sar

KIT = Path(__file__).parents[2] / "export"


def test_answers_are_those_of_the_adapting_network_and_forgetting_begins_anew(monkeypatch):
    monkeypatch.syspath_prepend(str(KIT))
    import adapt

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = torch.randn(3, 8, 4)
    same = [x[0], x[1], x[0]]
    options = {"margin": 1.0, "lr": 1.0, "recovery": 0.0}
    going_on = list(adapt.answers(Sar(copy.deepcopy(model), **options), same))
    anew = list(adapt.answers(Sar(copy.deepcopy(model), **options), same, reset_every=16))
    assert all(torch.equal(a, b) for a, b in zip(going_on[:2], anew[:2]))
    assert torch.equal(anew[2], anew[0]) and not torch.equal(going_on[2], going_on[0])
    torch.testing.assert_close(going_on[0].sum(1), torch.ones(8))


@pytest.mark.slow
def test_the_script_predicts_files_with_a_run_folder(tmp_path):
    Pipeline(
        model={"name": "resnet8"},
        data={"name": "rotated-digits", "domains": ["0"], "size": 8, "test_fraction": 0.6, "corruptions": "none"},
        stages=[{"train": {"epochs": 1}}, {"quantize": {"method": "lsq", "epochs": 1}}, {"export": {"latency": False}}],
        device="cpu", threads=1, measure="off",
    ).run(tmp_path / "run")  # fmt: skip
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(5):
        np.save(folder / f"{index}.npy", np.random.default_rng(index).integers(0, 256, (8, 8), np.uint8))
    command = [sys.executable, str(KIT / "adapt.py"), str(tmp_path / "run"), str(folder), "--batch", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [Path(line.split()[0]).name for line in lines] == [f"{i}.npy" for i in range(5)]
    assert "steps" in done.stderr
    wrong = subprocess.run([*command[:2], str(tmp_path), str(folder)], capture_output=True, text=True, timeout=300)
    assert wrong.returncode == 2 and "no run folder" in wrong.stderr and "Traceback" not in wrong.stderr
