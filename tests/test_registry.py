"""Rows carry what others must know of them: facts have types, bounds hold for defaults and are enforced early."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from flatcompress import flat, onnx_export, prune
from flatcompress.cli.commands import catalogue
from flatcompress.errors import UserError
from flatcompress.recipe import json_schema, parse_recipe
from flatcompress.registry import Registry

BOUNDED = [(name, key) for name, entry in flat.METHODS.items() for key in entry.facts.bounds]


@dataclass(frozen=True)
class Light:
    warm: bool = False


def test_a_row_is_called_and_its_facts_have_types():
    colours = Registry("colour", Light)
    assert colours.add("blue", lambda depth=2: depth, "cold")(depth=3) == 3
    assert not colours["blue"].facts.warm and colours.add("red", lambda: 0, "", warm=True).facts.warm
    with pytest.raises(TypeError):
        colours.add("green", lambda: 0, "", loud=True)


@pytest.mark.parametrize(("name", "key"), BOUNDED)
def test_a_value_outside_its_bounds_is_refused_in_the_recipe_and_by_the_method(name, key):
    entry = flat.METHODS[name]
    bounds, default = entry.facts.bounds[key], entry.defaults[key]
    assert default is None or bounds.problem(default) is None
    stage = {"train": {"method": name, key: bounds.low - 1}}
    with pytest.raises(UserError, match=f"stages.0.train.{key}: must"):
        parse_recipe({"name": "x", "data": {"name": "rotated-digits"}, "model": {"name": "resnet8"}, "stages": [stage]})
    net = torch.nn.Linear(2, 1)
    with pytest.raises(UserError):
        flat.create(name, net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), **{key: bounds.low - 1})


def test_gradient_importances_are_those_that_fail_without_gradients():
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 3))
    groups = prune.find_groups(net, torch.zeros(1, 1, 8, 8))
    for name, entry in prune.IMPORTANCES.items():
        if entry.facts.needs_gradients:
            with pytest.raises(UserError, match="gradients"):
                prune.score(groups, name)
        else:
            assert not entry.facts.per_sample and len(prune.score(groups, name)) == len(groups)


def test_profiles_say_what_they_need():
    profiles = {name: entry() for name, entry in onnx_export.PROFILES.items()}
    assert {name for name, profile in profiles.items() if not profile.integer} == {"float32", "float16"}
    plain = {"qdq", "qdq_int8", "qdq_symmetric"}
    assert {name for name, profile in profiles.items() if profile.modules} == {"qonnx", "openvino", *plain}
    assert {name for name, profile in profiles.items() if profile.form} == plain
    assert {name for name, profile in profiles.items() if not profile.integer_kernels} >= {"qonnx"}


def test_the_schema_gives_one_default_only_where_the_methods_agree():
    keys = json_schema()["$defs"]["TrainConfig"]["properties"]
    assert keys["k"]["default"] == 5
    assert "default" not in keys["rho"] and "sam 0.05" in keys["rho"]["description"]


def test_no_default_is_shown_as_an_address():
    shown = [row["defaults"] for rows in catalogue().values() for row in rows]
    assert not any("0x" in str(value) for defaults in shown for value in defaults.values())
