"""The page and the guide of the microcontroller benchmark are what its results give, and say what is not in them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import _board_page, _common, _emx, _peer_envs, _published_boards, board_costs, microcontroller
from flatcompress.errors import UserError
from flatcompress.onnx_export.c import board

RESULTS = json.loads((_common.RESULTS / "microcontroller.json").read_text(encoding="utf-8"))
GUIDE = _board_page.GUIDE.read_text(encoding="utf-8")
RESNET8 = next(r for r in RESULTS["rows"] if (r["net"], r["bits"], r["zeros"]) == ("resnet8", "W4A4", 0.0))


def test_page_and_guide_are_what_the_results_give():
    """`python -m benchmarks.microcontroller --page` writes both anew."""
    assert _board_page.PAGE.read_text(encoding="utf-8") == _board_page.page(RESULTS)
    assert _board_page.guide(GUIDE, RESULTS) == GUIDE


def test_the_guide_has_no_figure_of_ours_outside_its_marks():
    before, rest = GUIDE.split(_board_page.BEGIN)
    outside = before + rest.split(_board_page.END)[1]
    assert re.findall(r"\d,\d{3}", outside) == []


def test_a_guide_without_marks_is_refused():
    with pytest.raises(ValueError, match="must hold the lines"):
        _board_page.guide("# Guide\n", RESULTS)


def test_every_row_and_every_missed_target_is_on_the_page():
    page = _board_page.page(RESULTS)
    for row in [*RESULTS["rows"], *RESULTS["trained"]]:
        assert f"{row['instructions']:,}" in page or f"{row['instructions'] / 1e6:.2f}" in _board_page.tables(RESULTS)
    assert all(text in page for text in RESULTS["missed"])


def test_a_missing_environment_leaves_the_columns_empty_and_says_so(tmp_path, monkeypatch, capsys):
    """From pip's refusal to the page."""
    _emx.problem.cache_clear()
    monkeypatch.setattr(_peer_envs, "ensure", lambda name: _peer_envs.Environment(None, f"ERROR: no {name}"))
    nothing = np.zeros((1, 4), np.float32)
    assert _emx.row(torch.nn.Linear(4, 4), torch.zeros(1, 4), nothing, nothing, tmp_path) == {}
    assert list(tmp_path.iterdir()) == []

    row = {key: value for key, value in RESNET8.items() if not key.startswith("emx")}
    monkeypatch.setattr(microcontroller, "measured", lambda *_: row)
    monkeypatch.setattr(board, "missing", lambda *_: None)
    monkeypatch.setattr(_common, "RESULTS", tmp_path / "results")
    assert microcontroller.main(["--quick"]) == 0
    _emx.problem.cache_clear()
    assert "emx-onnx-cgen: ERROR: no emx; its columns are empty." in capsys.readouterr().out
    found = json.loads((tmp_path / "results" / "microcontroller-quick.json").read_text())
    page = _board_page.page(found)
    assert "emx-onnx-cgen could not be installed, so that its columns are empty: ERROR: no emx" in page
    assert f"{row['at -O2']:,}" in page


def test_what_emx_says_stands_in_its_row_instead_of_a_figure():
    row = {key: value for key, value in RESNET8.items() if not key.startswith("emx")}
    page = _board_page.page({**RESULTS, "rows": [{**row, "emx profile": "int8", "emx says": "undefined reference"}]})
    assert "| - | - | - | - | int8 | undefined reference |" in page


def test_a_published_runtime_is_called_faster_only_below_our_instructions():
    speed = next(s for s in _published_boards.SPEED if s.net == "resnet8")
    assert speed.cycles * speed.throughput == pytest.approx(_published_boards.MHZ)
    row = {**RESNET8, "bits": "W8A8"}
    fastest = min(s.cycles for s in _published_boards.SPEED if s.net == "resnet8")
    slower = _board_page.tables({"rows": [{**row, "instructions": int(1.01e6 * fastest)}]})
    faster = _board_page.tables({"rows": [{**row, "instructions": int(0.99e6 * fastest)}]})
    assert "these are faster than our" in slower and slower.count("million cycles") == 1
    assert "No published runtime takes fewer cycles" in faster


def test_every_published_figure_has_a_source_with_an_address():
    for entry in (*_published_boards.MEMORY, *_published_boards.SPEED):
        assert entry.net in _board_page.TINY and _published_boards.SOURCES[entry.source][1].startswith("https://")


@pytest.mark.parametrize(
    ("changed", "says"),
    [({}, None), ({"bits right": False}, "output bits differ"), ({"flash": 10**6}, "bytes of flash"),
     ({"ram": 10**6}, "bytes of RAM, the bound is"), ({"packed ram": 10**6}, "bytes of RAM packed"),
     ({"a product": 9.0}, "instructions a product")],
)  # fmt: skip
def test_every_missed_target_is_named(changed, says):
    row = {"net": "resnet8", "bits": "W4A4", "zeros": 0.0, "flash": 1000, "true": 1000, "channels": 1, "ram": 100,
           "bound": 100, "packed ram": 60, "instructions": 100, "a product": 1.0, "bits right": True}  # fmt: skip
    row |= changed
    found = microcontroller.missed([row])
    assert found == [] if says is None else len(found) == 1 and says in found[0] and "resnet8 W4A4" in found[0]


def test_a_trained_network_has_the_targets_of_its_kind():
    limit = RESNET8["true"] + 6 * RESNET8["channels"]
    row = {**RESNET8, "net": "mine", "flash": limit + 5001}
    assert len(microcontroller.missed([{**row, "kind": "ds_cnn"}])) == 1
    assert microcontroller.missed([{**row, "kind": "ds_cnn", "flash": limit + 5000}]) == []
    assert microcontroller.missed([{**row, "kind": "another", "flash": 10**6}]) == []


def test_sparse_cells_are_held_to_half_of_their_dense_ones():
    row = {**RESNET8, "instructions": 1000, "a product": 1.0}
    said = microcontroller.missed([row, {**row, "zeros": 0.8, "instructions": 501}])
    assert said == ["resnet8 W4A4, 80% zeros: 0.501 of the dense instructions, 0.5 allowed."]


def test_page_alone_measures_nothing(tmp_path, monkeypatch):
    shutil.copy(_common.RESULTS / "microcontroller.json", tmp_path)
    (tmp_path / "guide.md").write_text(f"a\n{_board_page.BEGIN}\nold\n{_board_page.END}\nb\n")
    monkeypatch.setattr(_common, "RESULTS", tmp_path)
    monkeypatch.setattr(_board_page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(_board_page, "GUIDE", tmp_path / "guide.md")
    monkeypatch.setattr(board, "measure", lambda *_: pytest.fail("measured"))
    assert microcontroller.main(["--page"]) == 0
    assert (tmp_path / "page.md").read_text() == _board_page.page(RESULTS)
    text = (tmp_path / "guide.md").read_text()
    assert text.startswith("a\n") and text.endswith("\nb\n") and "old" not in text


def test_an_autoencoder_is_graded_by_the_area_under_its_curve():
    row = {"accuracy": {"test": None}, "metrics": {"mse": {"test": 0.7}, "auroc": {"test": 0.9, "corrupted": 0.8}}}
    assert microcontroller.accuracy(row) == {"metric": "auroc", "test": 0.9, "held_out": None, "corrupted": 0.8}
    plain = {"accuracy": {"test": 0.5, "held_out": 0.4, "corrupted": 0.3}}
    assert microcontroller.accuracy(plain) == {"metric": "accuracy", **plain["accuracy"]}


def test_a_board_of_ones_own_is_named_where_its_tools_are_missing(tmp_path):
    own = dataclasses.replace(_emx.BOARD, tools="nowhere-")
    assert str(board.missing(own)).startswith("nowhere-gcc ")
    with pytest.raises(UserError, match="emulated m4 with PSRAM"):
        board.measure(tmp_path, "model", np.zeros((1, 1), np.float32), 1, own)


HOST = """#include <stdio.h>
#include "math.h"
int main(void)
{
    for (int i = -9000; i <= 9000; i++) {
        const float v = (float)i * 0.01f;
        printf("%.9g %.9g %.9g %.9g\\n", (double)v, (double)expf(v), (double)erff(v * 0.1f), (double)nearbyintf(v));
    }
    return 0;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_what_the_board_brings_for_emx_is_right_to_4e_7(tmp_path):
    (tmp_path / "math.h").write_text(_emx.MATH)
    (tmp_path / "host.c").write_text(HOST)
    line = [
        "cc",
        "-O1",
        "-std=c99",
        "-fno-builtin",
        f"-I{tmp_path}",
        str(tmp_path / "host.c"),
        "-o",
        str(tmp_path / "host"),
    ]
    subprocess.run(line, check=True)
    told = subprocess.run([str(tmp_path / "host")], check=True, capture_output=True, text=True).stdout
    v, exponential, error, nearest = np.array([row.split() for row in told.splitlines()], np.float64).T
    inside = np.abs(v) <= 87
    assert np.abs(exponential / np.exp(v) - 1)[inside].max() < 2e-7
    assert np.all(exponential[v > 88] == np.inf) and np.all(exponential[v < -87] == 0)
    assert np.abs(error - torch.erf(torch.from_numpy(v * 0.1)).numpy()).max() < 4e-7
    assert np.array_equal(nearest, np.rint(v))


def test_a_table_of_few_programs_is_not_written(capsys, monkeypatch):
    monkeypatch.setattr(board_costs, "measured", lambda *_: pytest.fail("measured"))
    assert board_costs.main(["--quick", "--write"]) == 2
    assert "leave out --quick" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(board.missing() is not None or shutil.which("make") is None, reason="needs make and a board")
def test_the_commands_from_recipe_to_board_run_as_typed(tmp_path):
    section = GUIDE.split("## Step by step")[1].split("\n## ")[0]
    script = "\n".join(re.findall(r"```bash\n(.*?)```", section, flags=re.S))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env={**os.environ, "PATH": path},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every output bit equal: True" in done.stdout and "libmodel.a" in done.stdout
