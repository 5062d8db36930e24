"""Two checkouts timed in turns, each with its own source."""

import pytest

from benchmarks import _against

LINES = """
import sys
from tool import SECONDS
for line in sys.stdin:
    print(SECONDS + float(sys.argv[1]), flush=True)
"""


@pytest.fixture
def checkouts(tmp_path, monkeypatch):
    for name, seconds in (("here", 1.0), ("there", 5.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tool.py").write_text(f"SECONDS = {seconds}\n")
    monkeypatch.setattr(_against, "HERE", tmp_path / "here")
    return tmp_path


def test_each_side_runs_the_lines_with_its_own_source_and_arguments(checkouts):
    found = _against.seconds(LINES, checkouts / "there", rounds=3, threads=1, here=["0.5"], there=["0.25"])
    assert found == ([1.5] * 3, [5.25] * 3)


def test_rounds_that_warm_up_are_left_out(checkouts):
    (checkouts / "there" / "tool.py").write_text("SECONDS = 5.0\n")
    lines = LINES.replace("    print(SECONDS", "    SECONDS += 1\n    print(SECONDS")
    assert _against.seconds(lines, checkouts / "there", 2, 1, ["0"], ["0"], warmup=0) == ([2.0, 3.0], [6.0, 7.0])
    assert _against.seconds(lines, checkouts / "there", 2, 1, ["0"], ["0"]) == ([3.0, 4.0], [7.0, 8.0])


def test_a_side_that_ends_is_an_error_and_no_time(checkouts):
    (checkouts / "there" / "tool.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(RuntimeError, match="ended without a time"):
        _against.seconds(LINES, checkouts / "there", rounds=1, threads=1, here=["0"], there=["0"])
