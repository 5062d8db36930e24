"""Frozen parameters are left alone, and cost no stage its end: transfer learning, a fixed backbone, fixed norms."""

from __future__ import annotations

import copy

import pytest
import torch
from stage_pieces import SHAPE, config, context
from torch import nn

from flatcompress import quant
from flatcompress.errors import UserError
from flatcompress.stages import run_stage
from flatcompress.stages.dry_run import dry_run
from flatcompress.stages.measure import layer_sharpness, measure


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(SHAPE[0], 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def frozen(part: str) -> nn.Module:
    model = net()
    for name, parameter in model.named_parameters():
        is_frozen = {
            "one weight": name == "0.weight",
            "backbone": not name.startswith("8."),
            "all but norms": parameter.ndim > 1,
            "everything": True,
        }[part]
        parameter.requires_grad_(not is_frozen)
    return model


STAGES = {
    "train": ("train", {"method": "sam"}),
    "adasap": ("prune", {"ratio": 0.3}),
    "taylor": ("prune", {"ratio": 0.3, "method": "taylor"}),
    "hessian": ("prune", {"ratio": 0.3, "method": "magnitude", "importance": "hessian"}),
    "masks": ("sparsify", {"pattern": "2:4"}),
    "gaqat": ("quantize", {"method": "gaqat", "K": 2}),
    "bits": ("quantize", {"method": "lsq", "bits": "auto", "effective_bits": 4.0, "sensitivity": "hessian"}),
}


@pytest.mark.parametrize(
    ("stage", "part"),
    [
        ("train", "all but norms"), ("adasap", "all but norms"), ("taylor", "one weight"), ("hessian", "backbone"),
        ("masks", "backbone"), ("gaqat", "one weight"), ("bits", "backbone"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_stage_with_frozen_parameters_ends_or_is_refused_before_it_begins(stage: str, part: str) -> None:
    kind, keys = STAGES[stage]
    work = context(lambda: frozen(part))
    before = copy.deepcopy(work.model).state_dict()
    c = config(kind, **keys)
    try:
        dry_run(work, [(kind, c)])
    except UserError as error:
        assert "frozen" in str(error)
        return
    run_stage(kind, work, c)
    row = measure(work, kind, "", 0.0, 0)
    assert row["sharpness"] is not None
    if kind in ("train", "quantize"):
        assert torch.equal(before["0.weight"], work.model.state_dict()["0.weight"])


@pytest.mark.parametrize("stage", ["train", "adasap", "taylor", "masks"])
def test_a_model_that_is_frozen_whole_is_refused_before_anything_runs(stage: str) -> None:
    kind, keys = STAGES[stage]
    with pytest.raises(UserError, match="every parameter of the model is frozen"):
        dry_run(context(lambda: frozen("everything")), [(kind, config(kind, **keys))])


def test_scales_are_trained_where_every_weight_is_frozen() -> None:
    work = context(lambda: frozen("everything"))
    run_stage("quantize", work, config("quantize", method="lsq", epochs=1, flatness_map=False))
    assert torch.equal(work.model.state_dict()["0.weight"], net().state_dict()["0.weight"])


def test_frozen_layers_have_no_sharpness_of_their_own() -> None:
    assert set(layer_sharpness(context(lambda: frozen("backbone")))) == {"8"}
    assert layer_sharpness(context(lambda: frozen("everything"))) == {}


@pytest.mark.parametrize("kind", ["hessian", "gradient"])
def test_what_a_layer_minds_of_rounding_does_not_depend_on_who_trains_it(kind: str) -> None:
    x, y = torch.randn(8, *SHAPE), torch.arange(8) % 4
    found = []
    for model in (net(), frozen("backbone")):
        before = [p.requires_grad for p in model.parameters()]
        loss = lambda m=model: nn.functional.cross_entropy(m(x), y)  # noqa: E731
        found.append(quant.sensitivities(model, loss, kind=kind))
        assert [p.requires_grad for p in model.parameters()] == before
    for name, costs in found[0].items():
        assert found[1][name] == pytest.approx(costs, rel=1e-4)
