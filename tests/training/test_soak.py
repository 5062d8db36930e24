"""A long run of a small model: the process neither grows nor collects open files."""

from __future__ import annotations

import gc
import os
import statistics
from pathlib import Path

import pytest
import small_runs


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def watched(folder, epochs, **options):
    """(memory, open files) after each epoch of one long stage that saves at every step."""
    seen = []

    def look(row):
        if row["event"] == "epoch":
            gc.collect()
            seen.append((resident(), open_files()))

    stage = {"train": {"method": "sagm", "epochs": epochs, "averaging": "ema"}}
    small_runs.pipeline(stage, checkpoint_every=1, **options).run(folder, display=look)
    return seen


def growth(values):
    """Median of the last tenth over the median of the second tenth (the first warms up), minus 1."""
    tenth = max(1, len(values) // 10)
    return statistics.median(values[-tenth:]) / statistics.median(values[tenth : 2 * tenth]) - 1


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("epochs", [12, pytest.param(1000, marks=pytest.mark.slow)])
def test_memory_stays_flat_and_open_files_constant(epochs, tmp_path, monkeypatch):
    small_runs.only_training(monkeypatch)
    seen = watched(tmp_path / "run", epochs)
    assert len(seen) == epochs
    grown = growth([memory for memory, _ in seen])
    print(f"{epochs} epochs: memory {grown:+.2%}, open files {min(f for _, f in seen)}..{max(f for _, f in seen)}")
    assert grown < 0.02
    assert len({files for _, files in seen[1:]}) == 1
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2  # the stage and the pointer: the rest is gone
