from __future__ import annotations

from types import SimpleNamespace

import pytest
from stage_pieces import SHAPE, config, workpiece

from flatcompress import models
from flatcompress.errors import UserError
from flatcompress.stages.configs import ExportConfig
from flatcompress.stages.rehearse import rehearse


def entries(profile: str) -> list[SimpleNamespace]:
    export = ExportConfig.model_validate({"profile": profile})
    return [
        SimpleNamespace(kind="quantize", config=config("quantize")),
        SimpleNamespace(kind="export", config=export),
    ]


def transformer():
    return models.build("vit_tiny", num_classes=4, input_shape=SHAPE, seed=0, depth=1)


def test_a_recipe_that_exports_c_is_refused_before_it_runs_where_a_module_has_no_c_form():
    with pytest.raises(UserError, match=r"stages.1.export: module '.+': .*no C form"):
        rehearse(workpiece(transformer), entries("c"))
    rehearse(workpiece(transformer), entries("packed"))


def test_a_recipe_whose_model_has_a_c_form_passes():
    rehearse(workpiece(), entries("c"))
