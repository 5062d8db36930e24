"""Whole blocks taken out: which ones, that one which says nothing goes exactly, and the stage that does it."""

from __future__ import annotations

import pytest
import torch
from stage_pieces import config, context
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.plan import Plan, apply_plan
from flatcompress.prune import depth
from flatcompress.recipe import parse_recipe
from flatcompress.stages import run_stage


class Residual(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(scale * torch.tensor([[0.0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]]))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


def net(*scales: float) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(*[Residual(s) for s in scales]), nn.Linear(4, 2)).eval()


def test_influence_by_hand():
    """x = (1, 0, 0, 0) becomes (1, 0, 0, s): the cosine is 1 / sqrt(1 + s^2)."""
    model = nn.Sequential(Residual(0.0), nn.Sequential(Residual(1.0), nn.Linear(4, 2)))
    found = depth.influences(model, [torch.eye(4)[:1]])
    assert found == pytest.approx({"0": 0.0, "1.0": 1 - 2**-0.5}, abs=1e-6)


def test_a_block_that_says_nothing_goes_exactly_and_the_plan_repeats_it():
    model, x = net(0.5, 0.0, 0.3), torch.randn(6, 3)
    before = model(x)
    plan, found = depth.remove_blocks(model, 1, [x])
    assert plan.of_kind("blocks")[0]["removed"] == ["1.1"] and set(found) == {"1.0", "1.1", "1.2"}
    assert torch.equal(model(x), before)
    again = apply_plan(net(0.5, 0.0, 0.3), Plan.from_json(plan.to_json()))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), before)


def test_what_cannot_go_is_refused_and_the_model_is_whole():
    model, x = net(0.5, 0.1), torch.randn(6, 3)
    for keys, message in (
        ({"count": 3}, "3 blocks are to go, and 2 could"),
        ({"count": 2, "ignore": ["1.0"]}, "2 blocks are to go, and 1 could"),
        ({"count": 1, "ignore": ["nothing"]}, "matches no layer"),
    ):
        with pytest.raises(UserError, match=message):
            depth.remove_blocks(model, batches=[x], **keys)
    with pytest.raises(UserError, match="no block"):
        depth.influences(nn.Sequential(nn.Linear(3, 2)), [x])
    assert len(list(model.parameters())) == 6
    with pytest.raises(UserError, match="does not have"):
        apply_plan(model, Plan.from_json('{"schema": 1, "steps": [{"kind": "blocks", "data": {"removed": ["9"]}}]}'))


def test_the_stage_takes_blocks_out_and_the_plan_builds_what_it_trained():
    run = run_stage("shorten", context(), config("shorten", blocks=1, epochs=1))
    (step,) = run.plan.of_kind("blocks")
    assert step["removed"] == ["layer1.0"]
    again = apply_plan(run.build(), run.plan, run.example())
    again.load_state_dict(run.model.state_dict())
    assert torch.equal(again.eval()(run.example()), run.model.eval()(run.example()))
    with pytest.raises(UserError, match="Shorten first"):
        parse_recipe({"name": "x", "stages": [{"train": {}}, {"quantize": {}}, {"shorten": {}}]}, "")
