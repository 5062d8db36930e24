"""What makes two recipes the same: defaults do not count, harmless keys do not count, everything else does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from flatcompress import data, flat, models
from flatcompress.errors import UserError
from flatcompress.recipe import SCHEMA, identity, parse_recipe
from flatcompress.recipe.schema import DataConfig, ModelConfig, Recipe
from flatcompress.stages import STAGES, stage_of
from flatcompress.stages.keys import OptimizerConfig
from flatcompress.stages.prune_methods import PRUNE_METHODS
from flatcompress.stages.qat_methods import QAT_METHODS

PINNED = Path(__file__).with_name("pinned_defaults.json")
STAGE = {"train": {"method": "sam", "epochs": 3}}


def recipe(**changes: Any) -> Recipe:
    return parse_recipe({"stages": [STAGE, {"quantize": {}}], **changes})


def _text(value: Any) -> str:
    return value.__name__ if callable(value) else repr(value)


def defaults() -> dict[str, Any]:
    """Every default that a recipe's result depends on, by section."""

    def of(model: Any) -> dict[str, Any]:
        fields = model.model_fields.items()
        return {k: f.default for k, f in fields if not f.is_required() and f.default_factory is None}

    sections = {
        "recipe": of(Recipe),
        "data": of(DataConfig),
        "model": of(ModelConfig),
        "optimizer": of(OptimizerConfig),
    }
    sections |= {f"stage {kind}": of(stage_of(kind).config) for kind in STAGES}
    sections |= {f"pruning method {k}": dataclasses.asdict(e()) for k, e in PRUNE_METHODS.items()}
    sections |= {f"QAT method {k}": dataclasses.asdict(e()) for k, e in QAT_METHODS.items()}
    for registry in (flat.METHODS, data.DATASETS, models.MODELS):
        sections |= {f"{registry.kind} {k}": e.defaults for k, e in registry.items()}
    return json.loads(json.dumps({"schema": SCHEMA, **sections}, default=_text))


def test_a_changed_default_raises_the_schema_number():
    """New keys and rows need no new number: they are off by default. Write the pins anew with
    ``python tests/test_identity.py`` after raising `flatcompress.recipe.schema.SCHEMA`."""
    pinned, now = json.loads(PINNED.read_text()), defaults()
    changed = [
        f"{section}.{key}: {value!r} -> {now[section][key]!r}"
        for section, keys in pinned.items()
        if isinstance(keys, dict) and section in now
        for key, value in keys.items()
        if key in now[section] and now[section][key] != value
    ]
    assert not changed or pinned["schema"] < SCHEMA, f"raise SCHEMA and write the pins anew: {changed}"
    assert pinned["schema"] == SCHEMA, "write the pins anew: python tests/test_identity.py"


@pytest.mark.parametrize(
    "changes",
    [{"name": "other"}, {"output_dir": "elsewhere"}, {"threads": 3}, {"data": {"workers": 2}}, {"log": ["wandb"]},
     {"checkpoint_every": 7}, {"on_divergence": "skip"}, {"seed": 0}, {"data": {"batch_size": 64}},
     {"stages": [{"train": {"method": "sam", "epochs": 3, "rho": 0.05, "optimizer": {"lr": 3e-3}}}, {"quantize": {}}]}],
    ids=str,
)  # fmt: skip
def test_what_cannot_change_the_result_leaves_the_identity_alone(changes):
    assert identity.digest(recipe(**changes)) == identity.digest(recipe())


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"precision": "bf16"}, {"data": {"batch_size": 32}}, {"data": {"size": 8}}, {"model": {"width": 8}},
     {"stages": [STAGE]}, {"stages": [{"train": {"method": "sam", "epochs": 3, "rho": 0.1}}, {"quantize": {}}]}],
    ids=str,
)  # fmt: skip
def test_what_can_change_the_result_is_another_identity(changes):
    assert identity.digest(recipe(**changes)) != identity.digest(recipe())


def test_recipes_that_begin_alike_share_the_identity_of_their_beginning():
    longer = recipe(stages=[STAGE, {"quantize": {"weight_bits": 3}}])
    assert identity.digest(longer) != identity.digest(recipe())
    assert identity.digest(longer, 1) == identity.digest(recipe(), 1) == identity.digest(recipe(stages=[STAGE]))


def test_a_written_recipe_has_the_identity_of_the_one_it_was_written_from():
    assert identity.digest(parse_recipe(recipe().to_dict())) == identity.digest(recipe())
    assert identity.differences(parse_recipe(recipe().to_dict()), recipe()) == []


@pytest.mark.parametrize("schema", [SCHEMA + 1, 0, "two", None, True])
def test_a_recipe_of_a_newer_version_is_refused(schema):
    with pytest.raises(UserError, match=rf"schema: found .*up to schema {SCHEMA}"):
        recipe(schema=schema)


if __name__ == "__main__":
    PINNED.write_text(json.dumps(defaults(), indent=1, sort_keys=True) + "\n")
