"""A long run of a small model: the process neither grows nor collects open files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import small_runs
from soak import Watch, growth

ROOT = Path(__file__).parents[2]
needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


@needs_proc
def test_memory_stays_flat_and_open_files_constant(tmp_path, monkeypatch):
    small_runs.only_training(monkeypatch)
    watch = Watch()
    stage = {"train": {"method": "sagm", "epochs": 20, "averaging": "ema"}}
    small_runs.pipeline(stage, checkpoint_every=5).run(tmp_path / "run", display=watch)
    assert [s.epochs for s in watch.stages] == [20] and len(watch.stages[0].memory) == 20
    assert watch.problems() == []
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2  # the stage and the pointer: the rest is gone


def test_growth_is_seen():
    assert growth([100] * 10) == 0.0
    watch = Watch()
    for kind in ("stage", *["epoch"] * 40):
        watch({"event": kind, "stage": "0-train", "epochs": 40})
    stage = watch.stages[0]
    stage.memory = [1000 + i for i in range(40)]
    assert watch.problems()[0].startswith("round 0 0-train: memory grew by 3.")
    stage.memory, stage.files = [1000] * 40, {7, 8}
    assert watch.problems() == ["round 0 0-train: open files between 7 and 8"]


@needs_proc
@pytest.mark.slow
def test_the_long_soak():
    assert subprocess.run([sys.executable, "-m", "tests.soak"], cwd=ROOT).returncode == 0
