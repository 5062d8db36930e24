"""The main job: one recipe becomes a verified file; what is finished is never done twice; Python gets the same."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import onnxruntime as ort
import pytest
import torch
from tiny import recipe, write
from torch import nn

from flatcompress import Pipeline, apply_plan
from flatcompress.errors import RunError, UserError
from flatcompress.stages import run_stage
from flatcompress.stages.export import ExportConfig
from flatcompress.stages.quantize import QuantizeConfig
from flatcompress.stages.train import TrainConfig
from flatcompress.store import checkpoint


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    path = write(folder)
    return path, Pipeline.from_yaml(path).run()


def test_every_stage_has_a_ledger_row_and_the_last_is_the_file_itself(finished):
    _, result = finished
    assert [row["stage"] for row in result.ledger] == ["train", "prune", "quantize", "export"]
    last = result.ledger[-1]
    assert last["bytes"] == result.onnx.stat().st_size
    assert last["latency_ms"] > 0
    assert json.loads((result.folder / "ledger.json").read_text())["rows"] == result.ledger
    for row in result.ledger:
        assert 0 <= row["accuracy"]["test"] <= 1
        assert 0 <= row["accuracy"]["held_out"] <= 1
        assert 0 <= row["accuracy"]["corrupted"] <= 1


def test_pruning_halves_the_macs_and_four_bits_make_the_file_small(finished):
    _, result = finished
    rows = {row["stage"]: row for row in result.ledger}
    assert rows["prune"]["macs"] <= 0.5 * rows["train"]["macs"]
    assert rows["quantize"]["bytes"] < rows["prune"]["bytes"] / 5
    assert result.certificate["float"]["smaller"] >= 8


def test_certificate_holds_and_every_inner_layer_is_integer(finished):
    _, result = finished
    certificate = result.certificate
    assert certificate["holds"] is True
    assert certificate["kernels"]["not_integer_inside"] == []
    assert certificate["parity"]["optimized"]["largest_error_steps"] <= 1
    assert certificate["parity"]["optimized"]["equal_argmax"] >= 0.999
    assert certificate["file"]["sha256"] == digest(result.onnx)


def test_file_runs_alone_in_a_default_session(finished):
    path, result = finished
    data = Pipeline.from_yaml(path).load_data()
    x, y = data.test.__getitems__(list(range(64)))
    outputs = ort.InferenceSession(str(result.onnx)).run(None, {"input": x.numpy()})[0]
    assert outputs.shape == (64, 10)
    assert np.isfinite(outputs).all()
    assert float((outputs.argmax(1) == y.numpy()).mean()) > 0.3  # a tiny run, yet far from chance


def test_run_folder_holds_what_the_design_promises(finished):
    _, result = finished
    names = {p.name for p in result.folder.iterdir()}
    wanted = {"recipe.yaml", "ledger.json", "log.jsonl", "report.html", "model.onnx", "certificate.json", "checkpoints"}
    assert wanted <= names
    for stage in ("0-train", "1-prune", "2-quantize", "3-export"):
        files = {p.name for p in (result.folder / "checkpoints" / stage).iterdir()}
        assert {"plan.json", "model.safetensors", "state.json"} <= files


def test_checkpoint_rebuilds_the_same_model_from_plan_and_weights(finished):
    path, result = finished
    pipeline = Pipeline.from_yaml(path)
    data = pipeline.load_data()
    x, _ = data.test.__getitems__(list(range(32)))
    for stage in ("1-prune", "2-quantize"):
        saved = checkpoint.load(result.folder / "checkpoints" / stage)
        model = apply_plan(pipeline.builder(data)(), saved.plan, x[:2])
        model.load_state_dict(saved.state_dict)
    result.model.eval(), model.eval()
    assert torch.equal(model(x), result.model(x))


def test_same_seed_gives_the_same_bits(finished, tmp_path):
    _, result = finished
    again = Pipeline.from_yaml(write(tmp_path)).run()
    assert digest(again.onnx) == digest(result.onnx)


def test_finished_run_is_not_run_again(finished):
    path, result = finished
    before = {p: p.stat().st_mtime_ns for p in (result.folder / "checkpoints").rglob("*") if p.is_file()}
    again = Pipeline.from_yaml(path).run()
    assert again.ledger == result.ledger
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_run_goes_on_after_the_last_finished_stage(finished, tmp_path, monkeypatch):
    def failing(*kinds):
        def run(kind, *arguments):
            if kind in kinds:
                raise RunError("the disk is full")
            return run_stage(kind, *arguments)

        monkeypatch.setattr("flatcompress.pipeline.run_stage", run)

    path = write(tmp_path)
    failing("export")
    with pytest.raises(RunError):
        Pipeline.from_yaml(path).run()
    failing("train", "prune")
    resumed = Pipeline.from_yaml(path).run()
    _, undisturbed = finished
    assert digest(resumed.onnx) == digest(undisturbed.onnx)


def test_changed_recipe_is_refused_unless_only_later_stages_change(finished, tmp_path):
    raw = recipe(stages=recipe()["stages"][:1])
    Pipeline.from_yaml(write(tmp_path, raw)).run()
    with pytest.raises(UserError, match=r"seed: 0 -> 1"):
        Pipeline.from_yaml(write(tmp_path, raw | {"seed": 1})).run()
    longer = raw | {"stages": [*raw["stages"], {"export": {"profile": "float32", "latency": False}}]}
    result = Pipeline.from_yaml(write(tmp_path, longer)).run()
    assert [row["stage"] for row in result.ledger] == ["train", "export"]
    afresh = Pipeline.from_yaml(write(tmp_path, raw | {"seed": 1})).run(restart=True)
    assert [row["stage"] for row in afresh.ledger] == ["train"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.inner(x)).mean((2, 3)))


def stripes(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows or columns bright, plus noise: learnable in a moment."""
    y = torch.arange(n) % 2
    pattern = (torch.arange(8) % 2).float()
    x = torch.where(y.view(-1, 1, 1) == 0, pattern.view(1, 8, 1), pattern.view(1, 1, 8)).unsqueeze(1)
    return x + 0.3 * torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)), y


def test_own_module_and_own_data_from_python(tmp_path):
    torch.manual_seed(0)
    pipeline = Pipeline(
        model=Net(),
        data={"train": stripes(256, 0), "test": stripes(100, 1), "classes": ["rows", "columns"]},
        stages=[
            {"train": {"method": "sagm", "epochs": 4, "optimizer": {"lr": 0.01}}},
            {"prune": {"method": "magnitude", "ratio": 0.25, "epochs": 2}},
            QuantizeConfig(method="lsq", epochs=1),
            ExportConfig(profile="int8", latency=False),
        ],
        batch_size=32,
        device="cpu",
    )
    result = pipeline.run(tmp_path / "mine")
    assert result.certificate["holds"]
    assert result.ledger[-1]["accuracy"]["test"] > 0.9
    assert result.ledger[-1]["accuracy"]["held_out"] is None


def test_two_runs_of_one_program_may_differ_in_precision(tmp_path):
    for precision in ("bf16", "no"):
        pipeline = Pipeline(
            model=Net(),
            data={"train": stripes(64, 0), "test": stripes(16, 1)},
            stages=[{"train": {"method": "sam", "epochs": 1}}],
            batch_size=32,
            device="cpu",
            precision=precision,
        )
        assert pipeline.run(tmp_path / precision).ledger[0]["stage"] == "train"


def test_wrong_use_from_python_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="'test' is missing"):
        Pipeline(model=Net(), data={"train": stripes(8, 0)}, stages=[TrainConfig(epochs=1)])
    wrong = Pipeline(
        model=nn.Linear(3, 2), data={"train": stripes(64, 0), "test": stripes(8, 1)}, stages=[{"train": {}}]
    )
    with pytest.raises(UserError, match="cannot read the data"):
        wrong.run(tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
