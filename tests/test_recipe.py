"""The recipe: what is accepted, and that every refusal names file, line, key, value and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flatcompress import data, models
from flatcompress.errors import UserError
from flatcompress.recipe import Recipe, json_schema, load_recipe, parse_recipe
from flatcompress.yaml_source import parse_yaml

GOOD = """\
name: tiny
data: {name: rotated-digits, held_out: "75"}
model: {name: resnet8}
stages:
  - train: {method: sam, rho: 0.05, epochs: 2}
  - prune: {method: adasap, ratio: 0.5, epochs: 2}
  - quantize: {method: gaqat, weight_bits: 4, activation_bits: 4, epochs: 1}
  - export: {profile: packed}
"""


@pytest.fixture
def recipe_file(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_written_recipe_loads_back_equal(recipe_file):
    recipe = load_recipe(recipe_file(GOOD))
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_set_overrides_nested_keys(recipe_file):
    recipe = load_recipe(recipe_file(GOOD), ["stages.1.prune.ratio=0.7", "data.batch_size=32", "seed=3"])
    assert recipe.stages[1].config.ratio == 0.7
    assert (recipe.data.batch_size, recipe.seed) == (32, 3)


def test_method_hyper_parameters_are_keys_of_the_stage(recipe_file):
    recipe = load_recipe(recipe_file(GOOD), ["stages.0.train.rho=1e-1"])
    assert recipe.stages[0].config.hyper == {"rho": 0.1}


def test_schema_describes_every_stage():
    schema = json_schema()
    assert "rho" in schema["$defs"]["TrainConfig"]["properties"]
    assert {"TrainConfig", "PruneConfig", "QuantizeConfig", "ExportConfig"} <= set(schema["$defs"])


def edit(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


BAD = {
    "unknown_top_key": (edit("name: tiny", "name: tiny\nmodle: {name: resnet8}"), [":2:", "modle", "'model'"]),
    "misspelt_stage": (edit("- prune:", "- prun:"), [":6:", "prun", "train, prune"]),
    "misspelt_method": (edit("method: sam", "method: sagn"), [":5:", "sagn", "'sagm'"]),
    "misspelt_hyper": (edit("rho: 0.05", "roh: 0.05"), [":5:", "roh", "'rho'"]),
    "misspelt_key": (edit("weight_bits", "weigth_bits"), [":7:", "weigth_bits", "'weight_bits'"]),
    "ratio_too_big": (edit("ratio: 0.5", "ratio: 1.5"), [":6:", "ratio", "1.5", "less than 1"]),
    "ratio_zero": (edit("ratio: 0.5", "ratio: 0"), [":6:", "ratio", "greater than 0"]),
    "bits_one": (edit("weight_bits: 4", "weight_bits: 1"), [":7:", "weight_bits", "1", "2"]),
    "bits_nine": (edit("activation_bits: 4", "activation_bits: 9"), [":7:", "activation_bits", "9", "8"]),
    "bits_text": (edit("weight_bits: 4", "weight_bits: four"), [":7:", "weight_bits", "four"]),
    "negative_rho": (edit("rho: 0.05", "rho: -0.05"), [":5:", "rho", "-0.05"]),
    "rho_text": (edit("rho: 0.05", "rho: large"), [":5:", "rho", "large"]),
    "rho_nan": (edit("rho: 0.05", "rho: .nan"), [":5:", "rho", "nan"]),
    "zero_epochs": (edit("rho: 0.05, epochs: 2", "rho: 0.05, epochs: 0"), [":5:", "epochs", "0"]),
    "unknown_data": (edit("rotated-digits", "rotated-digit"), [":2:", "data.name", "'rotated-digits'"]),
    "unknown_model": (edit("resnet8", "resnet9"), [":3:", "model.name", "resnet9"]),
    "unknown_profile": (edit("profile: packed", "profile: paked"), [":8:", "'packed'"]),
    "two_budgets": (edit("ratio: 0.5", "ratio: 0.5, macs: 0.5"), [":6:", "one budget"]),
    "no_stages": (GOOD.split("stages:")[0] + "stages: []\n", [":4:", "stages"]),
    "stages_missing": (GOOD.split("stages:")[0], ["stages", "missing"]),
    "export_first": (
        "stages:\n  - export: {profile: float32}\n  - train: {}\n",
        [":2:", "nothing trained"],
    ),
    "train_after_export": (GOOD + "  - train: {}\n", [":9:", "after 'export'"]),
    "prune_after_quantize": (
        "stages:\n  - train: {}\n  - quantize: {}\n  - prune: {}\n",
        [":4:", "after 'quantize'"],
    ),
    "quantize_twice": ("stages:\n  - train: {}\n  - quantize: {}\n  - quantize: {}\n", [":4:", "already quantized"]),
    "prune_untrained": ("stages:\n  - prune: {}\n", [":2:", "random weights"]),
    "packed_float": ("stages:\n  - train: {}\n  - export: {profile: packed}\n", [":3:", "float32"]),
    "bad_device": (GOOD + "device: gpu\n", [":9:", "device", "gpu", "Allowed: auto, cpu, mps, cuda, cuda:N"]),
    "bad_name": (edit("name: tiny", "name: ../up"), [":1:", "name", "../up"]),
    "not_yaml": ("stages: [", ["not valid YAML"]),
    "tab": ("name: x\n\tstages: []\n", [":2", "not valid YAML"]),
    "alias": ("a: &a [1]\nb: *a\n", ["aliases"]),
    "duplicate_key": (GOOD + "name: other\n", [":9", "twice"]),
    "python_tag": ("name: !!python/object/apply:os.system ['true']\n", ["not valid YAML"]),
    "a_list": ("- 1\n- 2\n", ["mapping"]),
    "empty": ("", ["mapping"]),
    "deep": ("[" * 100 + "]" * 100, ["nested"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_recipe_is_one_readable_message(name: str, recipe_file):
    text, expected = BAD[name]
    path = recipe_file(text)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert str(path) in message
    for part in expected:
        assert part in message
    assert "Traceback" not in message
    assert "pydantic" not in message


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("stages.9.train.epochs=1", "items 0 to 3"),
        ("noequals", "key=value"),
        ("stages.x=1", "items 0 to 3"),
        ("name.first=1", "has no key"),
        ("stages.0.train.epochs=[", "not valid YAML"),
    ],
)
def test_bad_override_says_what_is_wrong(setting: str, part: str, recipe_file):
    with pytest.raises(UserError, match=r"--set") as caught:
        load_recipe(recipe_file(GOOD), [setting])
    assert part in str(caught.value)


def test_missing_recipe_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")


def test_every_problem_is_reported_at_once(recipe_file):
    text = edit("ratio: 0.5", "ratio: 1.5").replace("weight_bits: 4", "weight_bits: 1")
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file(text))
    assert "ratio" in str(caught.value)
    assert "weight_bits" in str(caught.value)


yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=True) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    path=st.sampled_from(["name", "seed", "device", "data", "model", "stages", "data.batch_size"]), value=yaml_values
)
def test_any_value_is_accepted_or_refused_by_a_user_error(path: str, value):
    raw = yaml.safe_load(GOOD)
    target = raw
    *parents, last = path.split(".")
    for key in parents:
        target = target[key]
    target[last] = value
    try:
        assert isinstance(parse_recipe(raw), Recipe)
    except UserError as error:
        assert str(error)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text_parses_or_is_refused(text: str):
    try:
        parse_yaml(text, "text")
    except UserError as error:
        assert "text" in str(error)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"train": {"epochs": 1, "optimizer": "adam"}}, "name: adam"),
        ({"export": {"profile": "tflite"}}, "microcontrollers"),
    ],
)
def test_what_people_write_first_is_answered_with_what_to_write(stage, words):
    with pytest.raises(UserError, match=words):
        parse_recipe({"stages": [{"train": {"epochs": 1}}, stage] if "export" in stage else [stage]})


def test_a_key_that_is_begun_is_the_one_that_is_meant():
    with pytest.raises(UserError, match="Did you mean 'batch_size'"):
        data.load("folder", batch=8)
    with pytest.raises(UserError, match="weights: FILE"):
        models.build("resnet8", num_classes=2, input_shape=(1, 8, 8), pretrained=True)
