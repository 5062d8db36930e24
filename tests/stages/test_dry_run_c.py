from __future__ import annotations

import pytest
from stage_pieces import SHAPE, config, context

from flatcompress import models
from flatcompress.errors import UserError
from flatcompress.stages.dry_run import dry_run
from flatcompress.stages.export import ExportConfig


def entries(profile: str) -> list[tuple]:
    return [("quantize", config("quantize")), ("export", ExportConfig.model_validate({"profile": profile}))]


def transformer():
    return models.build("vit_tiny", num_classes=4, input_shape=SHAPE, seed=0, depth=1)


def test_a_recipe_that_exports_c_is_refused_before_it_runs_where_a_module_has_no_c_form():
    with pytest.raises(UserError, match=r"stages.1.export: module '.+': .*no C form"):
        dry_run(context(transformer), entries("c"))
    dry_run(context(transformer), entries("packed"))


def test_a_recipe_whose_model_has_a_c_form_passes():
    dry_run(context(), entries("c"))
