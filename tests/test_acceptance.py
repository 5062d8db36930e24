"""The same recipe on other models, domains, seeds and the user's own images: a certificate that holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import recipe, write

from flatcompress import Pipeline, models
from flatcompress.prune import CostModel

MODELS = {
    "resnet20": {"name": "resnet20"},
    "ds_cnn": {"name": "ds_cnn"},
    "mobilenet_v1_025": {"name": "mobilenet_v1_025"},
    "mobilenet_v2": {"name": "mobilenet_v2", "width": 0.25},
    "vit_tiny": {"name": "vit_tiny"},
    "transformers_mobilenet_v2": {"name": "transformers:mobilenet_v2", "config": {"depth_multiplier": 0.25}},
    "transformers_resnet": {
        "name": "transformers:resnet",
        "config": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
    },
}


def data(held_out: str) -> dict:
    return {"name": "rotated-digits", "held_out": held_out, "size": 16, "copies": 1, "batch_size": 128} | {
        "corruptions": "none"
    }


def model_named(name: str) -> dict:
    if name.startswith("transformers"):
        pytest.importorskip("transformers")
    return MODELS[name]


def shipped(path: Path):
    """Run a recipe: a certificate that holds, integers inside, a third of the float file. The result, rows by stage."""
    result = Pipeline.from_yaml(path).run()
    certificate = result.certificate
    assert certificate["holds"], certificate["failures"]
    assert certificate["kernels"]["not_integer_inside"] == []
    rows = {row["stage"]: row for row in result.ledger}
    assert rows["export"]["bytes"] < certificate["float"]["bytes"] / 3
    return result, rows


@pytest.mark.parametrize(
    "name", [pytest.param(m, marks=[pytest.mark.slow] * (m != "transformers_resnet")) for m in MODELS]
)
def test_every_kind_of_model_ends_in_a_certificate_that_holds(name: str, tmp_path):
    raw = recipe(model=model_named(name), data=data("15"), seed=3)
    raw["stages"] = [
        {"train": {"method": "sam", "epochs": 1}},
        {"prune": {"method": "adasap", "ratio": 0.4, "epochs": 2}},
        {"quantize": {"method": "gaqat", "K": 4, "epochs": 1}},
        {"export": {"profile": "packed", "latency": False}},
    ]
    _, rows = shipped(write(tmp_path, raw))
    assert rows["prune"]["macs"] < rows["train"]["macs"]


def draw(domain: str, kind: int, rng: np.random.Generator) -> Image.Image:
    """A bright square left, middle or right; each domain has its own colours and noise."""
    colours = {"day": (200, 180, 90), "night": (40, 60, 160), "snow": (230, 230, 240)}
    image = rng.normal(0, 12, (20, 20, 3)) + np.array(colours[domain]) * 0.4
    image[6:14, 1 + 6 * kind : 7 + 6 * kind] += 90
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


@pytest.fixture
def domains(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    root = tmp_path / "images"
    for domain in ("day", "night", "snow"):
        for kind, name in enumerate(("left", "middle", "right")):
            (root / domain / name).mkdir(parents=True)
            for i in range(30):
                draw(domain, kind, rng).save(root / domain / name / f"{i:03}.png")
    return root


@pytest.fixture
def folder(tmp_path) -> Path:
    rng = np.random.default_rng(1)
    root = tmp_path / "classes"
    for kind, name in enumerate(("left", "middle", "right")):
        (root / name).mkdir(parents=True)
        for i in range(16):
            draw("day", kind, rng).save(root / name / f"{i:02}.png")
    return root


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "ds_cnn", "vit_tiny", "transformers_mobilenet_v2"])
def test_one_recipe_prunes_quantizes_and_exports_for_onnxruntime(name: str, folder, tmp_path):
    source = {"name": "folder", "path": str(folder), "size": 16, "batch_size": 16, "corruptions": "none"}
    dense = models.build(**model_named(name), num_classes=3, input_shape=(3, 16, 16), seed=0)
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    raw = recipe(model=model_named(name) | {"weights": str(tmp_path / "dense.safetensors")}, data=source)
    raw["stages"] = [
        {"prune": {"method": "adasap", "macs": 0.7, "epochs": 1, "schedule_steps": 2}},
        {"quantize": {"method": "gaqat", "K": 2, "epochs": 1}},
        {"export": {"profile": "packed", "latency": False}},
    ]
    result, rows = shipped(write(tmp_path, raw))
    costs = CostModel(dense, torch.zeros(1, 3, 16, 16))
    assert rows["prune"]["macs"] <= 0.7 * costs.macs(costs.dense)
    x = np.zeros((2, 3, 16, 16), np.float32)
    session = onnxruntime.InferenceSession(str(result.onnx), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x})
    assert logits.shape == (2, 3) and np.isfinite(logits).all()


@pytest.mark.parametrize("held_out", ["night", "snow"])
def test_a_folder_of_domains_works_without_code_changes(held_out: str, domains, tmp_path):
    source = {"name": "domains", "path": str(domains), "held_out": held_out, "size": 20, "batch_size": 16}
    raw = recipe(data=source | {"corruptions": ["gaussian_noise/1"]}, seed=5)
    raw["stages"] = [
        {"train": {"method": "asam", "epochs": 8, "optimizer": {"lr": 0.005}}},
        {"prune": {"method": "adasap", "macs": 0.5, "epochs": 4}},
        {"quantize": {"method": "gaqat", "K": 4, "epochs": 2}},
        {"export": {"latency": False}},
    ]
    result = Pipeline.from_yaml(write(tmp_path, raw)).run()
    assert result.certificate["holds"], result.certificate["failures"]
    assert result.ledger[1]["macs"] <= 0.5 * result.ledger[0]["macs"]
    assert result.ledger[-1]["accuracy"]["test"] > 0.8
    assert result.ledger[-1]["accuracy"]["held_out"] is not None
