"""Files from a stranger: nothing that they name is imported or opened, whatever they hold is answered."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import small_runs
import torch
from onnx import TensorProto, helper
from tiny_net import build

from flatcompress import onnx_export
from flatcompress.cli import app as cli
from flatcompress.errors import UserError
from flatcompress.plan import Plan, apply_plan
from flatcompress.store import checkpoint
from flatcompress.store.runfolder import RunFolder
from flatcompress.store.runlog import RunLog

ROOT = Path(__file__).parents[1]
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A run folder with everything a verb reads, in which every name is an attack; ``marker`` exists once it works."""
    marker = tmp_path / "was_imported"
    (tmp_path / "evil_module.py").write_text(f"open({str(marker)!r}, 'w').close()\ndef factory(**k): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = build(10).eval()
    exported = onnx_export.export(model, torch.randn(2, 1, 8, 8), tmp_path / "run.onnx", profile="float32")
    run = RunFolder(tmp_path / "run").create()
    exported.path.rename(run.onnx)
    x, y = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
    moved = onnx_export.export(model, x, run.onnx, profile="float32")
    certificate = onnx_export.certify(moved, [x], [y], model=model, latency_runs=0)
    certificate |= {"model": "evil_module:factory", "import": "evil_module", "layers": [{"name": SCRIPT}]}
    run.certificate.write_text(json.dumps(certificate))
    run.recipe.write_text(
        f"name: '{SCRIPT}'\nmodel: {{name: 'evil_module:factory'}}\ndata: {{name: 'evil_module:factory'}}\n"
        "x: !!python/object/apply:evil_module.factory []\nstages: [{train: {method: evil_module:factory}}]\n"
    )
    run.write_ledger([{"stage": SCRIPT, "method": "evil_module:factory", "accuracy": {SCRIPT: "evil_module"}}])
    with RunLog(run.log) as log:
        log.event("run", name=SCRIPT, classes=[SCRIPT], model="evil_module:factory")
        log.event("layers", stage="0-train", layers=[{"name": SCRIPT, "kind": "evil_module:factory"}])
    return run, marker


@pytest.mark.parametrize("verb", [["verify"], ["report"], ["verify", "--json"], ["bench", "--runs", "3"]])
def test_nothing_named_in_a_file_is_imported(verb, stranger, capsys):
    run, marker = stranger
    target = run.onnx if verb[0] == "bench" else run.path
    assert cli._guarded([verb[0], str(target), *verb[1:]]) in (0, 2, 3)
    assert not marker.exists()
    assert "evil_module" not in sys.modules
    if verb == ["report"]:
        page = run.report.read_text()
        assert SCRIPT not in page and "&lt;script&gt;" in page


def test_a_file_whose_tensors_lie_elsewhere_is_not_followed(stranger, capsys, tmp_path):
    run, _ = stranger
    secret = tmp_path / "secret"
    secret.write_bytes(b"\0" * 4096)
    model = onnx.load(run.onnx)
    tensor = next(t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    run.onnx.write_bytes(model.SerializeToString())
    certificate = json.loads(run.certificate.read_text())
    certificate["file"]["sha256"] = hashlib.sha256(run.onnx.read_bytes()).hexdigest()
    run.certificate.write_text(json.dumps(certificate))
    assert cli._guarded(["bench", str(run.onnx)]) == 2
    assert cli._guarded(["verify", str(run.path)]) == 3
    said = capsys.readouterr()
    assert "../secret" in said.err and "../secret" in said.out


def test_a_file_that_grows_without_bound_is_refused(tmp_path, capsys):
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [1 << 20, 1 << 20])
    node = helper.make_node("ConstantOfShape", ["shape"], ["big"])
    add = helper.make_node("Add", ["x", "big"], ["y"])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node, add], "bomb", [value("x", 1, [1, 1])], [value("y", 1, [None, None])], initializer=[shape]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "bomb.onnx"
    path.write_bytes(model.SerializeToString())
    assert cli._guarded(["bench", str(path)]) == 2
    assert "bomb.onnx" in capsys.readouterr().err


def test_a_checkpoint_is_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/exploded",)

    path = checkpoint.save_stage(tmp_path / "checkpoints", "0-train", Plan(), build(10).state_dict())
    torch.save({"a": Bomb()}, path / "model.safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["model.safetensors"]["sha256"] = hashlib.sha256(
        (path / "model.safetensors").read_bytes()
    ).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="not a sound safetensors file"):
        checkpoint.load(path)
    assert not (tmp_path / "exploded").exists()


def test_an_alias_bomb_in_a_run_folder_does_nothing(stranger, capsys):
    run, _ = stranger
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    run.recipe.write_text(bomb)
    assert cli._guarded(["report", str(run.path)]) == 0
    assert cli._guarded(["verify", str(run.path)]) in (0, 3)
    assert cli._guarded(["sharpness", str(run.path)]) == 2
    with pytest.raises(UserError, match="not a recipe any more"):
        small_runs.pipeline(small_runs.TRAIN).run(run.path)


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "latest/../../x"])
def test_the_pointer_to_the_newest_checkpoint_cannot_leave_the_folder(path, tmp_path):
    checkpoint.save_stage(tmp_path / "checkpoints", "0-train", Plan(), build(10).state_dict())
    (tmp_path / "checkpoints" / "latest").write_text(path)
    assert checkpoint.load_latest(tmp_path / "checkpoints").path.name == "0-train"


@pytest.mark.parametrize("data", [{"layers": 3}, {"layers": {"conv1": [[]]}}, {"layers": ["x"], "quantizers": 1}])
@pytest.mark.parametrize("kind", ["channels", "masks", "quantizers"])
def test_a_damaged_plan_step_is_a_user_error_that_names_the_step(kind, data):
    plan = Plan.from_json(json.dumps({"schema": 1, "steps": [{"kind": kind, "data": data}]}))
    with pytest.raises(UserError, match=rf"steps\[0\]|{kind}|plan"):
        apply_plan(build(10), plan, torch.zeros(2, 1, 8, 8))


def test_mutated_files_of_every_kind_are_answered():
    """The short version of `python -m tests.fuzz --count 20000`."""
    done = subprocess.run([sys.executable, "-m", "tests.fuzz", "--count", "120", "--seed", "3"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "mutated inputs, 0 tracebacks, crashes or hangs" in done.stdout


def test_an_input_that_fails_is_shrunk_to_the_simplest_that_does():
    from tests.fuzz_drawn import explore
    from tests.fuzz_mutate import mutated_json

    sound = {"schema": 1, "rows": [{"stage": "train", "accuracy": {"test": 0.5}, "params": 7} for _ in range(4)]}
    seen = []

    def check(rng):
        try:
            seen.append(json.loads(mutated_json(json.dumps(sound).encode(), rng)))
        except ValueError:
            return "refused"
        return "answered" if isinstance(seen[-1], dict) and "rows" in seen[-1] else "the rows are gone"

    with pytest.raises(AssertionError, match="the rows are gone"):
        explore(check, 200, 1)
    assert seen[-1] == {"schema": 1}


def test_a_run_killed_again_and_again_ends_in_the_same_bits():
    """The short version of `python -m tests.faults --kills 200`."""
    done = subprocess.run([sys.executable, "-m", "tests.faults", "--kills", "2", "--seed", "4"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "failed 0, lost stages 0, differences 0" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [["tests.faults", "--kills", "200"], ["tests.faults", "--every-call"], ["tests.fuzz", "--count", "20000"]],
    ids=["kills", "every call", "fuzz"],
)
def test_the_long_version(words):
    assert subprocess.run([sys.executable, "-m", *words], cwd=ROOT).returncode == 0
