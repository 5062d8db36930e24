"""What other packages add is found, named and run; one that is broken stops nobody. The examples run in docs' tests."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from flatcompress import extend, extensions, flat, models
from flatcompress.cli.commands import catalogue
from flatcompress.errors import UserError
from flatcompress.recipe import json_schema, parse_recipe
from flatcompress.registry import Registry
from flatcompress.stages import STAGES

MODULE = """
from flatcompress import extend, flat

@extend.flat_method("acme_plain", "the base optimizer, by another name", "0000.00000")
def plain(strength: float = 2.0):
    return flat.Method()

@extend.model("acme_linear", "one linear layer")
def linear(num_classes, input_shape):
    from torch import nn
    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0] * input_shape[1] * input_shape[2], num_classes))
"""
FUNCTION = """
def register():
    from flatcompress import extend
    from flatcompress.stages import Phase, StageKeys

    class Keys(StageKeys):
        "Nothing happens."

    extend.stage("acme_rest", "nothing", config=Keys)(lambda run, config: [Phase("rest", lambda facts: None)])
"""


def install(folder: Path, name: str, points: str, **modules: str) -> None:
    """A distribution as pip leaves it: modules, and a .dist-info folder with its metadata and entry points."""
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[flatcompress]\n{points}\n")
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder for installed packages; what they register is gone after the test."""
    for registry in (flat.METHODS, models.MODELS, STAGES):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(extensions, "_loaded", set())
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for module in ("acme_module", "acme_function", "acme_broken"):
        sys.modules.pop(module, None)


def test_an_installed_package_adds_what_its_entry_points_name(site):
    install(site, "acme", "one = acme_module\ntwo = acme_function:register", acme_module=MODULE, acme_function=FUNCTION)
    assert "acme_plain" not in flat.METHODS._entries
    recipe = parse_recipe(
        {"model": "acme_linear" and {"name": "acme_linear"},
         "stages": [{"train": {"method": "acme_plain", "strength": 3}}, {"acme_rest": {}}]}
    )  # fmt: skip
    assert recipe.stages[0].config.hyper == {"strength": 3}
    rows = {row["name"]: row for table in catalogue().values() for row in table}
    for name in ("acme_plain", "acme_linear", "acme_rest"):
        assert rows[name]["from"] == "acme 1.2"
    assert rows["sam"]["from"] == rows["train"]["from"] == "flatcompress"
    assert rows["acme_plain"]["defaults"] == {"strength": 2.0} and rows["acme_plain"]["paper"] == "0000.00000"
    assert "strength" in json.dumps(json_schema())


def test_only_a_name_that_is_not_built_in_loads_extensions(site):
    install(site, "acme", "one = acme_module", acme_module=MODULE)
    assert flat.METHODS["sam"].name == "sam" and "resnet8" in models.MODELS
    assert "acme_module" not in sys.modules
    with pytest.raises(UserError, match=r"Did you mean 'acme_plain'"):
        flat.METHODS["acme_plane"]
    assert "acme_module" in sys.modules


def test_a_broken_package_is_left_out_with_a_warning_that_names_it(site):
    install(site, "broken", "it = acme_broken", acme_broken="import a_module_that_is_nowhere")
    install(site, "acme", "one = acme_module", acme_module=MODULE)
    with pytest.warns(UserWarning, match=r"extension 'it' of broken 1\.2 cannot be loaded and is left out \(ModuleNot"):
        assert "acme_plain" in flat.METHODS
    assert "nothing" not in flat.METHODS  # and said once


def test_a_name_that_is_taken_is_refused_with_who_has_it(site):
    with pytest.raises(ValueError, match="'sam' is registered twice, first by flatcompress"):
        extend.flat_method("sam", "mine")(lambda rho=1.0: flat.Method())


def test_a_script_s_own_rows_say_their_module():
    colours = Registry("colour")
    assert colours.add("red", lambda: None, "warm").origin == __name__
