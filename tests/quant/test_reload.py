"""Every built-in model and transformers' three, at W4A4 and W2A4: train, save, reload in a new process, same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flatcompress import models, quant

torch.set_num_threads(1)

SHAPES = {"ds_cnn": (1, 20, 10), "vit_tiny": (3, 16, 16), "mobilenet_v1_025": (3, 16, 16), "mobilenet_v2": (3, 16, 16)}
OPTIONS: dict[str, dict] = {
    "resnet18": {"width": 4},
    "resnet50": {"width": 4},
    "mobilenet_v2": {"width": 0.25},
}
CONFIGS: dict[str, dict] = {
    "transformers:resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "transformers:mobilenet_v2": {"depth_multiplier": 0.25},
    "transformers:vit": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
                         "patch_size": 8},
}  # fmt: skip
NAMES = [*models.MODELS, *CONFIGS]

# The other process: nothing but the plan, the weights and how the model was built.
RELOAD = """
import json, sys, torch
from safetensors.torch import load_file
from flatcompress import apply_plan, models, Plan
torch.set_num_threads(1)
for folder in json.loads(sys.argv[1]):
    how = json.load(open(f"{folder}/how.json"))
    model = apply_plan(models.build(**how), Plan.load(f"{folder}/plan.json"))
    model.load_state_dict(load_file(f"{folder}/model.safetensors"))
    saved = load_file(f"{folder}/io.safetensors")
    assert torch.equal(model.eval()(saved["x"]), saved["y"]), folder
print("equal")
"""


def build_arguments(name: str) -> dict:
    how: dict = {"name": name, "num_classes": 4, "input_shape": SHAPES.get(name, (3, 16, 16))}
    if name in CONFIGS:
        how["config"] = CONFIGS[name]
    known = models.MODELS[name].defaults if name in models.MODELS else {}
    return how | {k: v for k, v in OPTIONS.get(name, {}).items() if k in known}


def train_and_save(name: str, bits: int, folder: Path) -> None:
    how = build_arguments(name)
    model = models.build(**how, seed=0)
    plan = quant.quantize(model, bits, 4)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batches = [torch.randn(8, *how["input_shape"], generator=generator) for _ in range(3)]
    quant.calibrate(model, batches[:1])
    model.train()
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    x = batches[0]
    y = model.eval()(x).detach()
    folder.mkdir()
    (folder / "how.json").write_text(json.dumps(how))
    (folder / "plan.json").write_text(plan.to_json())
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    save_file({"x": x, "y": y.contiguous()}, folder / "io.safetensors")


def reload_elsewhere(folders: list[Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, json.dumps([str(f) for f in folders])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr[-3000:]


def test_small_models_reload_bit_for_bit_in_a_new_process(tmp_path: Path) -> None:
    chosen = [("resnet8", 4), ("ds_cnn", 2), ("vit_tiny", 2)]
    for name, bits in chosen:
        train_and_save(name, bits, tmp_path / f"{name}-{bits}")
    reload_elsewhere([tmp_path / f"{name}-{bits}" for name, bits in chosen])


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 2])
def test_all_models_reload_bit_for_bit_in_a_new_process(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folders = []
    for name in NAMES:
        folders.append(tmp_path / name.replace(":", "-"))
        train_and_save(name, bits, folders[-1])
    reload_elsewhere(folders)
