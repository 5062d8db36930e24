"""One call from a trained network to a verified file and the recipe that repeats it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flatcompress import Pipeline, compress, models, onnx_export
from flatcompress.compressing.options import stages
from flatcompress.errors import UserError
from flatcompress.recipe import load_recipe

SHAPE = (3, 8, 8)


def factory(num_classes: int = 4, input_shape=SHAPE) -> torch.nn.Module:
    """The same small network every time; it has four classes, whoever asks."""
    return models.build("resnet8", num_classes=4, input_shape=SHAPE, seed=1, width=4)


def inputs(count: int = 60) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, *SHAPE)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nothing", "inputs", "labelled"])
def test_a_factory_with_or_without_data_gives_a_file_that_holds(kind, tmp_path):
    path = tmp_path / "d.npz"
    labels = {"y": np.arange(60) % 4} if kind == "labelled" else {}
    np.savez(path, x=inputs(), **labels)
    data = None if kind == "nothing" else path
    made = compress("test_compress:factory", data, tmp_path / "out", input_shape=SHAPE)
    assert made.certificate["holds"] and made.onnx.exists() and made.rows[1]["bytes"] < made.rows[0]["bytes"]
    assert any("drawn" in note for note in made.notes) == (kind == "nothing")
    assert any("agreement" in note for note in made.notes) == (kind != "labelled")
    assert load_recipe(made.recipe).stages[0].kind == "quantize"


@pytest.mark.slow
def test_an_onnx_file_is_compressed(tmp_path):
    source = tmp_path / "net.onnx"
    onnx_export.export(factory().eval(), torch.zeros(2, *SHAPE), source, "float32")
    made = compress(str(source), None, tmp_path / "out", input_shape=SHAPE)
    assert made.certificate["holds"] and made.rows[0]["accuracy"] == 1.0


@pytest.mark.slow
def test_the_recipe_of_compress_repeats_its_file_byte_for_byte(tmp_path):
    np.savez(tmp_path / "d.npz", x=inputs())
    made = compress("test_compress:factory", tmp_path / "d.npz", tmp_path / "out", bits="w4a8", input_shape=SHAPE)
    again = Pipeline.from_yaml(made.recipe).run(tmp_path / "again", restart=True)
    assert again.onnx is not None and again.onnx.read_bytes() == made.onnx.read_bytes()


@pytest.mark.slow
def test_a_budget_that_is_met_already_cuts_nothing_and_says_so(tmp_path):
    np.savez(tmp_path / "d.npz", x=inputs())
    options = {"epochs": 1, "budget": "500ms", "input_shape": SHAPE}
    made = compress("test_compress:factory", tmp_path / "d.npz", tmp_path / "out", **options)
    assert made.certificate["holds"] and any("nothing was cut" in note for note in made.notes)


def numbers(num_classes: int = 1, input_shape=SHAPE) -> torch.nn.Module:
    """Four numbers an input."""
    return factory()


def masks(num_classes: int = 2, input_shape=SHAPE) -> torch.nn.Module:
    """Two classes a pixel."""
    torch.manual_seed(0)
    first, last = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 2, 1)
    return torch.nn.Sequential(first, torch.nn.BatchNorm2d(8), torch.nn.ReLU(), last)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "network"), [("regression", "numbers"), ("segmentation", "masks")])
def test_other_tasks_are_compressed_from_an_npz_with_targets(task, network, tmp_path):
    y = inputs()[:, :, 0, :4].mean(1) if task == "regression" else (inputs()[:, 0] > 0).astype(np.int64)
    np.savez(tmp_path / "d.npz", x=inputs(), y=y)
    made = compress(f"test_compress:{network}", tmp_path / "d.npz", tmp_path / "out", task=task)
    metric = made.rows[0]["metric"]
    assert made.certificate["holds"] and metric != "accuracy" and made.rows[1][metric] is not None
    assert load_recipe(made.recipe).task == task


def test_a_task_without_its_targets_is_refused(tmp_path):
    with pytest.raises(UserError, match="arrays x and y"):
        compress("test_compress:numbers", None, tmp_path / "out", task="regression")


def test_a_target_narrows_weights_that_it_would_not_run_on_integers():
    (quantize,) = (stage["quantize"] for stage in stages("8", target="openvino") if "quantize" in stage)
    assert quantize["weight_bits"] == quantize["first_last_bits"] == 7 and quantize["quantizer"] == "lsq"
    (quantize,) = (stage["quantize"] for stage in stages("8", target="qnn") if "quantize" in stage)
    assert quantize["weight_bits"] == 8 and "first_last_bits" not in quantize


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": "5"}, "w4a8"),
        ({"keep": 0.5}, "epochs"),
        ({"budget": "500kB"}, "auto"),
        ({"bits": "auto", "budget": "lots"}, "kB"),
        ({"data": "nowhere.npz"}, "no such file"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_runs(options, words, tmp_path):
    with pytest.raises(UserError, match=words):
        compress("test_compress:factory", out=tmp_path / "out", input_shape=SHAPE, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cut", [{"keep": 0.5}, {"budget": "3ms"}])
def test_a_trained_network_is_cut_by_taylor(cut):
    assert stages("4", epochs=2, **cut)[0]["prune"]["method"] == "taylor"
