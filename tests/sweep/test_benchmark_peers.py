"""The peers' benchmark: its arithmetic, its rows, its verdicts, and that a peer that fails is said to have failed."""

from __future__ import annotations

import argparse
import json
import subprocess
import xml.etree.ElementTree as ElementTree

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from benchmarks import _common, _pareto, _peer_envs, _peer_page, _peer_rows, _peer_runs, _sweeps, peers
from flatcompress.recipe import parse_recipe

POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8)


@given(POINTS)
def test_hypervolume_is_the_area_of_cells_that_some_point_dominates(points):
    cells = sum(any(c <= x and g > y for c, g in points) for x in range(8) for y in range(2, 10))
    assert _pareto.hypervolume(points, (8, 2)) == cells


@given(POINTS)
def test_front_keeps_exactly_what_nothing_dominates(points):
    def beaten(p):
        return any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)

    assert _pareto.front(points) == sorted({p for p in points if not beaten(p)})


def test_user_lines_counts_code_between_the_markers_only():
    text = "import a\n# user code\nimport b\n\n# end\nc = 1\n# user code\n# why\nd = 2  # so\ne = (\n    3\n)\n# end\nf"
    assert _peer_rows.user_lines(text) == 5


ROWS = [*_peer_rows.peers(False), *_peer_rows.own(12, False)]


def test_rows_are_complete_and_in_an_order_that_can_be_run():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    for i, row in enumerate(ROWS):
        assert row.environment is None or row.environment in _peer_envs.PACKAGES
        assert (_peer_rows.SCRIPTS / f"{row.script}.py").exists()
        assert {n for n in (row.after, row.tuned_as) if n} <= set(names[:i])
        assert _peer_rows.lines(row, ROWS) > 5
    assert _peer_rows.HEADLINE in names
    after = next(row for row in ROWS if row.after == "Torch-Pruning")
    alone = next(row for row in ROWS if row.name == "Torch-Pruning")
    assert _peer_rows.lines(after, ROWS) > _peer_rows.lines(alone, ROWS)


MODEL = {"name": "resnet8", "weights": "start.safetensors"}


@pytest.mark.parametrize("row", _peer_rows.own(12, False), ids=lambda row: row.name)
def test_own_rows_are_valid_recipes_within_the_budget(row):
    stages = json.loads(row.flags[1])
    parse_recipe({"name": "x", "data": {"name": "styled-shapes"}, "model": MODEL, "stages": stages})
    assert sum(s[k].get("epochs", 0) for s in stages for k in s if k in ("prune", "quantize")) == 12


@pytest.mark.parametrize("batch", [1, 3, "n"])
def test_files_are_graded_whatever_batch_size_they_take(tmp_path, batch):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    x = np.eye(2, dtype=np.float32)[[0, 1, 1, 0, 1]]
    assert _peer_runs.score(_peer_runs.open_session(tmp_path / "m.onnx"), x, np.array([0, 1, 0, 0, 0])) == 0.6


def arena(folder):
    return _peer_runs.Arena(folder, 0, 1, 1, {})


def test_a_script_that_fails_is_a_problem_in_its_own_words(tmp_path):
    peer = _peer_rows.Peer("broken", "tool", "no_such_script", None)
    assert "no_such_script" in arena(tmp_path).script(peer, tmp_path / "out", (), 1)["problem"]


def test_everybody_carries_the_cost_of_the_start_once(tmp_path):
    here = arena(tmp_path)
    folder = here.of(PEER.name)
    folder.mkdir()
    (folder / "graded.json").write_text(json.dumps(figures(0.5, 1, 1.0) | {"seconds": 10.0, "passes": 100}))
    by_name = {row.name: row for row in ROWS}
    passes = {name: here.with_start(row, {"seconds": 1.0, "passes": 7})["passes"] for name, row in by_name.items()}
    assert passes["Torch-Pruning"] == passes["Torch-Pruning + quantize_static"] == 107
    assert passes[PEER.name] == passes["float ERM + quantize_static"] == 7  # made of the start itself
    assert passes["flatcompress: from scratch: SAGM, AdaSAP, GAQAT W4A4"] == 7
    epochs = {name: here._epochs(row) for name, row in by_name.items()}  # a start of one, a budget of one
    assert epochs[PEER.name] == 1 and epochs["Torch-Pruning"] == 1 and epochs["Torch-Pruning + quantize_static"] == 0
    assert epochs["pytorch_optimizer SAM from scratch"] == epochs["Torch-Pruning, twice the epochs"] == 2


def test_an_environment_that_pip_cannot_make_is_reported(tmp_path, monkeypatch):
    def refuse(command):
        raise subprocess.CalledProcessError(1, command, stderr="WARNING: x\nERROR: No matching distribution for y\n")

    monkeypatch.setattr(_peer_envs, "_run", refuse)
    monkeypatch.setattr(_peer_envs, "FOLDER", tmp_path)
    monkeypatch.setattr(_peer_envs, "ROOT", tmp_path)
    found = arena(tmp_path).script(_peer_rows.START, tmp_path / "out", (), 1)
    assert found["problem"] == "could not be installed: ERROR: No matching distribution for y"


def figures(accuracy, size, ms):
    return {"val": 0.5, "test": 0.6, "held_out": accuracy, "corrupted": accuracy, "bytes": size, "ms": ms,
            "seconds": 1.0, "passes": 28}  # fmt: skip


PEER = _peer_rows.START
OURS = next(row for row in ROWS if row.name == _peer_rows.HEADLINE)


@pytest.mark.parametrize(
    ("ours", "holds", "says"),
    [((0.6, 10, 1.0), True, ""), ((0.6, 10, 1.02), True, ""), ((0.6, 10, 1.1), False, "1.100 ms against 1.000 ms"),
     ((0.6, 21, 1.0), False, "0.0 kB"), ((0.4, 10, 0.5), False, "-10.0 points")],
)  # fmt: skip
def test_a_file_beats_a_peer_only_where_it_is_more_robust_and_not_larger(ours, holds, says):
    found = {0: {PEER.name: figures(0.5, 20, 1.0), OURS.name: figures(*ours)}}
    peer, own = _peer_page.summaries([PEER, OURS], found)
    verdict = _peer_page.compare(own, peer)
    assert verdict.holds is holds and says in verdict.text()


def test_page_plot_and_results_say_what_was_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_sweeps, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(_common, "RESULTS", tmp_path / "results")
    failed = next(row for row in ROWS if row.tool == "NNCF")
    found = {
        seed: {PEER.name: figures(0.5, 4000, 1.0), OURS.name: figures(0.4, 1000, 1.0), failed.name: {"problem": "why"}}
        for seed in (0, 1)
    }
    options = argparse.Namespace(quick=False, check=True, epochs=12)
    absent = next(row for row in ROWS if row.tool == "torchao")
    code = _peer_page.publish("peers", [PEER, failed, absent, OURS], found, {}, options, 12)
    page = (tmp_path / "docs" / "peers.md").read_text()
    assert code == 1 and "For 0 of 1 files" in page and f"{failed.name}: why" in page
    assert f"Not run yet (the same command runs them and adds them): {absent.name}." in page
    assert "float ERM" in (tmp_path / "docs" / "what-did-not-work.md").read_text()
    kept = json.loads((tmp_path / "results" / "peers.json").read_text())
    assert len(kept["runs"]) == 6 and kept["missed"][0].startswith("DOES NOT HOLD")
    # float: nothing saved in bytes; ours: 3/4 of the width x (0.4 - 1/12) of the height
    boxes = {b["tool"]: b for b in kept["hypervolume"]}
    assert boxes["float"]["bytes"] == 0 and boxes["flatcompress"]["bytes"] == pytest.approx(
        0.75 * (0.4 - 1 / 12) / (1 - 1 / 12)
    )
    ElementTree.parse(tmp_path / "docs" / "peers.svg")
    assert "MISSED" in capsys.readouterr().out


def test_only_takes_along_the_rows_it_needs():
    options = peers.arguments(["--only", "Torch-Pruning, pytorch_optimizer SAM + quantize_static"])
    names = [row.name for row in peers.chosen(options)]
    assert names == ["Torch-Pruning, pytorch_optimizer SAM", "Torch-Pruning, pytorch_optimizer SAM + quantize_static"]
    options = peers.arguments(["--only", "*Pruning, twice the epochs + quantize_static"])
    names = [row.name for row in peers.chosen(options)]
    assert names == ["Torch-Pruning", "Torch-Pruning, twice the epochs",
                     "Torch-Pruning, twice the epochs + quantize_static"]  # fmt: skip
