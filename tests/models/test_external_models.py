"""Models from other libraries and from the user's own module: sized for the data, or one clear message."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from flatcompress.errors import UserError
from flatcompress.models import build

torch.set_num_threads(1)

FACTORY = """
import torch
from torch import nn
from typing import NamedTuple

def net(num_classes, input_shape, hidden=4):
    c, h, w = input_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(c * h * w, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
def everything(**options):
    assert set(options) == {"num_classes", "input_shape"}
    return net(**options)
def bare():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
def no_module():
    return 3
def wrong_classes(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(48, num_classes + 1))
def raises():
    raise RuntimeError("no weights today")
class Tupled(nn.Module):
    def __init__(self):
        super().__init__()
    def forward(self, x):
        return (x, x)
class Fails(nn.Module):
    def __init__(self):
        super().__init__()
    def forward(self, x):
        return x.reshape(7, 11)
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(FACTORY)
    (tmp_path / "own_broken.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "own_syntax.py").write_text("def (:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield
    for name in ("own_models", "own_broken", "own_syntax"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["net", "everything", "bare"])
def test_a_factory_in_the_current_folder_is_found_and_given_what_it_asks_for(own_module, name):
    model = build(f"own_models:{name}", num_classes=5, input_shape=(3, 4, 4))
    assert model(torch.zeros(2, 3, 4, 4)).shape == (2, 5)
    assert model.training and model.input_shape == (3, 4, 4)


def test_factory_options_are_passed_on(own_module):
    assert build("own_models:net", num_classes=5, input_shape=(3, 4, 4), hidden=9)[1].out_features == 9


@pytest.mark.parametrize(
    ("name", "options", "fragments"),
    [
        ("own_models:nett", {}, ["'nett'", "Did you mean 'net'"]),
        ("own_model:net", {}, ["no module 'own_model'"]),
        ("own_models:no_module", {}, ["int", "torch.nn.Module"]),
        ("own_models:wrong_classes", {}, ["(1, 5)", "(1, 6)"]),
        ("own_models:raises", {}, ["RuntimeError", "no weights today"]),
        ("own_models:Tupled", {}, ["(1, 5)", "tuple"]),
        ("own_models:Fails", {}, ["fails on an image"]),
        ("own_models:net", {"hiden": 3}, ["hiden"]),
        ("own_broken:net", {}, ["importing it failed", "a_module_that_is_not_there"]),
        ("own_syntax:net", {}, ["importing it failed", "SyntaxError"]),
    ],
)
def test_a_bad_factory_is_one_clear_message(own_module, name, options, fragments):
    with pytest.raises(UserError) as caught:
        build(name, num_classes=5, input_shape=(3, 4, 4), **options)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


@pytest.mark.parametrize("name", ["timm", "torchvision", "transformers"])
def test_a_library_that_is_not_installed_names_its_extra(name, monkeypatch):
    for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [_Hide(name), *sys.meta_path])
    with pytest.raises(UserError, match=rf"pip install 'flatcompress\[{name}\]'") as caught:
        build(f"{name}:resnet18", num_classes=5, input_shape=(3, 32, 32))
    assert "need it installed" in str(caught.value)


class _Hide:
    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname, path=None, target=None):
        if fullname == self.name:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


@pytest.mark.parametrize(
    "body",
    ["raise RuntimeError('operator torchvision::nms does not exist')", "import a_part_that_is_missing", "1 / 0"],
)
@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_a_library_that_is_there_but_does_not_import_says_so(name, body, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(body + "\n")
    for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="is installed but cannot be imported") as caught:
        build(f"{name}:resnet18", num_classes=5, input_shape=(3, 32, 32))
    assert torch.__version__ in str(caught.value) and f"flatcompress[{name}]" in str(caught.value)


def test_a_stand_in_timm_gets_classes_channels_and_size(tmp_path, monkeypatch):
    """The call protocol only: the image size is offered first and withdrawn from models that refuse it."""
    (tmp_path / "timm.py").write_text(
        "from torch import nn\n"
        "def is_model(name): return name == 'plain'\n"
        "def list_models(): return ['plain']\n"
        "def create_model(name, num_classes, in_chans, pretrained=False):\n"
        "    return nn.Sequential(nn.Conv2d(in_chans, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),"
        " nn.Linear(4, num_classes))\n"
    )
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        model = build("timm:plain", num_classes=3, input_shape=(2, 8, 8))
        assert model(torch.zeros(1, 2, 8, 8)).shape == (1, 3)
        with pytest.raises(UserError, match="Did you mean 'plain'"):
            build("timm:plane", num_classes=3, input_shape=(2, 8, 8))
    finally:
        sys.modules.pop("timm", None)


def test_importing_the_room_imports_no_optional_library():
    code = (
        "import flatcompress.models, sys; "
        "assert not {'timm', 'torchvision', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


TINY = {
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"},
    "vit": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "mobilenet_v2": {"depth_multiplier": 0.25},
}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 24)])
def test_transformers_types_are_built_from_their_config_offline(name, shape):
    pytest.importorskip("transformers")
    model = build(f"transformers:{name}", num_classes=7, input_shape=shape, seed=0, config=TINY[name]).eval()
    x = torch.randn(2, *shape)
    assert model(x).shape == (2, 7)
    again = build(f"transformers:{name}", num_classes=7, input_shape=shape, seed=0, config=TINY[name]).eval()
    assert torch.equal(model(x), again(x))


ODD = {  # types with several classification heads, whose logits are elsewhere, or both
    "deit": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "levit": {"hidden_sizes": [16, 16, 16], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [4, 4, 4]}
    | {"down_ops": [["Subsample", 4, 4, 4, 2, 2], ["Subsample", 4, 4, 4, 2, 2]]},
    "perceiver": {"num_latents": 4, "d_latents": 16, "num_self_attends_per_block": 1, "num_self_attention_heads": 2}
    | {"num_cross_attention_heads": 1},
    "pp_lcnet": {"class_expand": 16, "scale": 0.25},
}


@pytest.mark.parametrize("name", ODD)
def test_transformers_types_with_odd_heads_give_logits_too(name):
    pytest.importorskip("transformers", minversion="5.0" if name == "pp_lcnet" else None)
    model = build(f"transformers:{name}", num_classes=7, input_shape=(3, 64, 64), seed=0, config=ODD[name]).eval()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_a_transformers_folder_brings_its_weights_and_a_new_head_when_the_classes_differ(tmp_path):
    pytest.importorskip("transformers")
    model = build("transformers:resnet", num_classes=7, input_shape=(3, 16, 16), seed=0, config=TINY["resnet"])
    model.model.save_pretrained(tmp_path / "saved")
    same = build(f"transformers:{tmp_path}/saved", num_classes=7, input_shape=(3, 16, 16), seed=5)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))
    other = build(f"transformers:{tmp_path}/saved", num_classes=4, input_shape=(3, 16, 16), seed=5)
    assert other(torch.zeros(2, 3, 16, 16)).shape == (2, 4)
    stem = next(k for k in model.state_dict() if "embedder" in k)
    assert torch.equal(model.state_dict()[stem], other.state_dict()[stem])


@pytest.mark.parametrize(
    ("name", "arguments", "fragments"),
    [
        ("transformers:resnett", {}, ["'resnett'", "Did you mean 'resnet'"]),
        ("transformers:bert", {}, ["unknown transformers model type"]),
        ("transformers:resnet", {"config": {"depht": [1]}}, ["'depht'", "'depths'"]),
        ("transformers:resnet", {"width": 3}, ["config", "width"]),
        ("transformers:resnet", {"config": {"depths": "many"}}, ["transformers:resnet"]),
        ("transformers:./nowhere/at/all", {}, ["config.json"]),
    ],
)
def test_wrong_transformers_settings_are_named(name, arguments, fragments):
    pytest.importorskip("transformers")
    with pytest.raises(UserError) as caught:
        build(name, num_classes=7, input_shape=(3, 16, 16), **arguments)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value
