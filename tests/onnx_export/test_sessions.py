"""Sessions that are shared, and timing that ends when its time is over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from flatcompress import onnx_export
from flatcompress.onnx_export.runtime import latency, sessions


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx_export.export(nn.Linear(3, 2), torch.zeros(2, 3), path, profile="float32")
    return path


def test_a_file_is_loaded_once_for_each_set_of_options_inside_and_never_outside(file: Path) -> None:
    assert sessions.session(file) is not sessions.session(file)
    with sessions.shared():
        first = sessions.session(file)
        with sessions.shared():  # of the block around it
            assert sessions.session(str(file)) is first
        others = [sessions.session(file, optimized=False), sessions.session(file, fused=False)]
        others += [sessions.session(file, threads=2), sessions.session(file, idle=True)]
        assert len({id(handle) for handle in (first, *others)}) == 5
        assert sessions.session(file) is first
    assert sessions.session(file) is not first


def test_the_session_that_shows_the_kernels_is_the_usual_one(file: Path) -> None:
    with sessions.shared():
        sessions.kernels(file)
        known = sessions.session(file)
        assert sessions.session(file) is known


def test_a_file_that_was_written_anew_is_loaded_anew(file: Path, tmp_path: Path) -> None:
    with sessions.shared():
        before = sessions.session(file)
        onnx_export.export(nn.Linear(3, 7), torch.zeros(2, 3), file, profile="float32")
        after = sessions.session(file)
        assert after is not before and after.get_outputs()[0].shape[1] == 7


def test_rounds_and_loadings_are_as_many_as_fit_and_are_told(file: Path) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 0.5
        return now[0]

    few = latency.measure({"a": file, "b": file}, runs=30, clock=clock, seconds=0.1)
    assert {row["runs"] for row in few.values()} == {latency.FEWEST_ROUNDS}
    many = latency.measure({"a": file}, runs=30, clock=clock, seconds=1e6)
    assert many["a"]["runs"] == 30
    unbounded = latency.measure({"a": file}, runs=3, clock=clock)["a"]
    assert set(unbounded) == {"median_ms", "p10_ms", "p90_ms", "load_ms"}
