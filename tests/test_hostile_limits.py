"""Files from a stranger that are too large, grow when they are read, or lead to another place."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import small_runs
from onnx import TensorProto, helper, numpy_helper
from test_session_runs import on, signalled
from tiny_net import build

from flatcompress import data
from flatcompress.cli import app as cli
from flatcompress.errors import Interrupted, UserError
from flatcompress.onnx_export.proof import inspect_file
from flatcompress.plan import Plan
from flatcompress.store import checkpoint
from flatcompress.store.runfolder import read_ledger
from flatcompress.yaml_source import MAX_BYTES


def grown(path: Path, size: int) -> Path:
    """The file with zeros at its end that take no room on the disk."""
    with open(path, "ab") as file:
        file.truncate(size)
    return path


def test_a_recipe_over_the_size_limit_is_refused(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\n" + "#" * MAX_BYTES)
    assert cli._guarded(["validate", str(path)]) == 2
    assert f"at most {MAX_BYTES} are read" in capsys.readouterr().err


def test_a_ledger_over_the_size_limit_is_refused_and_costs_the_report_only_its_part(tmp_path):
    (tmp_path / "ledger.json").write_text('{"schema": 1, "rows": []}')
    grown(tmp_path / "ledger.json", 17 << 20)
    with pytest.raises(UserError, match="more than the 16777216 allowed"):
        read_ledger(tmp_path / "ledger.json")
    assert cli._guarded(["report", str(tmp_path)]) == 0


@pytest.mark.parametrize("name", ["plan.json", "state.json", "manifest.json"])
def test_a_checkpoint_with_a_giant_of_json_is_refused_before_it_is_read(name, tmp_path):
    path = checkpoint.save_stage(tmp_path / "checkpoints", "0-train", Plan(), build(10).state_dict())
    grown(path / name, 1 << 40)
    with pytest.raises(UserError, match=rf"{name}: 1099511627776 bytes, more than"):
        checkpoint.load(path)


def test_a_certificate_over_the_size_limit_is_refused(tmp_path, capsys):
    (tmp_path / "certificate.json").write_text("{}")
    grown(tmp_path / "certificate.json", 1 << 30)
    assert cli._guarded(["verify", str(tmp_path)]) == 2
    assert "too large for a certificate" in capsys.readouterr().err


def test_an_onnx_file_over_the_size_limit_is_refused(tmp_path, capsys):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"x")
    assert cli._guarded(["bench", str(grown(path, inspect_file.MOST_BYTES + 1))]) == 2
    assert "larger than" in capsys.readouterr().err


def test_a_gzip_bomb_is_refused(tmp_path, monkeypatch):
    from flatcompress.data.images import cifar_mnist

    monkeypatch.setattr(cifar_mnist, "_MOST", 100_000)
    bomb = gzip.compress(bytes(10_000_000))
    assert len(bomb) < 100_000
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(bomb)
    with pytest.raises(UserError, match="unpacks to more than any file of this data set"):
        data.load("mnist", path=str(tmp_path))


def test_an_artifact_that_a_checkpoint_names_cannot_lie_elsewhere(tmp_path, monkeypatch):
    small_runs.only_training(monkeypatch)
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        small_runs.pipeline(small_runs.TRAIN, small_runs.TRAIN).run(folder, display=on("row", signalled(1)))
    stage = folder / "checkpoints" / "0-train"
    state = json.loads((stage / "state.json").read_text())
    state["extra"]["artifacts"] = {"onnx": "../../etc/passwd"}
    (stage / "state.json").write_text(json.dumps(state))
    manifest = json.loads((stage / "manifest.json").read_text())
    manifest["files"]["state.json"]["sha256"] = hashlib.sha256((stage / "state.json").read_bytes()).hexdigest()
    (stage / "manifest.json").write_text(json.dumps(manifest))
    result = small_runs.pipeline(small_runs.TRAIN, small_runs.TRAIN).run(folder)
    assert result.onnx == folder / "passwd"


# ---------------------------------------------------------------------------- tensors in odd places of an ONNX file


def elsewhere() -> TensorProto:
    tensor = TensorProto(name="far", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../secret")
    return tensor


def giant() -> TensorProto:
    return TensorProto(name="big", data_type=TensorProto.FLOAT, dims=[1 << 20, 1 << 20], raw_data=b"1234")


def sizes() -> TensorProto:
    return numpy_helper.from_array(np.array([1 << 20, 1 << 20]), "sizes")


def model(nodes, initializer=(), sparse=()):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [*nodes, helper.make_node("Identity", ["x"], ["y"])], "g", [value("x", 1, [1])], [value("y", 1, [1])],
        initializer=list(initializer), sparse_initializer=list(sparse),
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def branch(nodes=(), initializer=()):
    inner = model(nodes, initializer).graph
    return helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=inner)


def constant(tensor):
    return helper.make_node("Constant", [], ["c"], value=tensor)


def sparse(values):
    indices = numpy_helper.from_array(np.arange(4), "indices")
    return onnx.SparseTensorProto(values=values, indices=indices, dims=[9])


ODD = {
    "initializer": (lambda: model([], [elsewhere()]), "../../secret"),
    "constant": (lambda: model([constant(elsewhere())]), "../../secret"),
    "branch": (lambda: model([branch(initializer=[elsewhere()])]), "../../secret"),
    "constant in a branch of a branch": (lambda: model([branch([branch([constant(elsewhere())])])]), "../../secret"),
    "sparse": (lambda: model([], sparse=[sparse(elsewhere())]), "../../secret"),
    "huge": (lambda: model([], [giant()]), "1099511627776 values"),
    "huge constant": (lambda: model([constant(giant())]), "1099511627776 values"),
    "growing in a branch": (
        lambda: model([branch([helper.make_node("ConstantOfShape", ["sizes"], ["s"])], [sizes()])]),
        "would make a tensor",
    ),
    "operator in a branch": (
        lambda: model([branch([helper.make_node("Evil", ["x"], ["e"], domain="evil.ops")])]),
        "unknown domains",
    ),
}


@pytest.mark.parametrize("place", ODD)
def test_what_a_model_should_not_hold_is_found_wherever_it_lies(place, tmp_path, capsys):
    make, said = ODD[place]
    path = tmp_path / "model.onnx"
    path.write_bytes(make().SerializeToString())
    assert cli._guarded(["bench", str(path)]) == 2
    assert said in capsys.readouterr().err
