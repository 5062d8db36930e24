from __future__ import annotations

import pytest
from pydantic import ValidationError
from stage_pieces import SoftmaxOverChannels, config, context

from flatcompress.errors import UserError
from flatcompress.stages.dry_run import dry_run
from flatcompress.stages.export import ExportConfig


def entries(profile: str) -> list[tuple]:
    return [("quantize", config("quantize")), ("export", ExportConfig.model_validate({"profile": profile}))]


def test_activations_are_packed_by_profile_c_alone():
    assert ExportConfig.model_validate({"profile": "c", "pack_activations": True}).pack_activations
    with pytest.raises(ValidationError, match="'int8' writes no C, whose RAM it is about: take profile: c"):
        ExportConfig.model_validate({"profile": "int8", "pack_activations": True})


def test_a_recipe_that_exports_c_is_refused_before_it_runs_where_a_module_has_no_c_form():
    with pytest.raises(UserError, match=r"stages.1.export: module 'after': .*no C form"):
        dry_run(context(SoftmaxOverChannels), entries("c"))
    dry_run(context(SoftmaxOverChannels), entries("packed"))


def test_a_recipe_whose_model_has_a_c_form_passes():
    dry_run(context(), entries("c"))
    packed = ExportConfig.model_validate({"profile": "c", "pack_activations": True})
    dry_run(context(), [("quantize", config("quantize")), ("export", packed)])
