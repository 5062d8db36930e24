"""A user's own points, settings that go together, and what the first points of a search are spread over."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from itertools import pairwise

import pytest
import yaml
from searches import RECIPE, SPACE, search

from flatcompress.errors import UserError
from flatcompress.search import given, warm
from flatcompress.search.space import expand
from flatcompress.search.spec import load_search

RATIOS, BITS, RHO = "stages.1.prune.ratios", "stages.2.quantize.bits", "stages.2.quantize.rho"
AT = "stages.2.quantize"
METHODS = [{f"{AT}.method": "lsq_sam", f"{AT}.epochs": 2}, {f"{AT}.method": "lsq_sagm", f"{AT}.epochs": 3}]
WIDE = {
    **SPACE,
    "seed": {"low": 0, "high": 8, "step": 2},
    "stages.1.prune.optimizer.lr": {"choice": [1e-3, 2e-3, 4e-3]},
    "method": {"together": METHODS},
}


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    return expand(search(tmp_path_factory.mktemp("space"), space=WIDE))[0]


def of(space, *starts):
    """The points of ``starts`` in a space."""
    kept = space.search.starts
    try:
        space.search.starts = list(starts)
        return given.points(space)
    finally:
        space.search.starts = kept


def drawn(space, seed):
    draw = random.Random(seed)
    found = {p.name: draw.choice(p.choices) if p.choices else 2 * draw.randrange(5) for p in space.parameters}
    return found | {RHO: draw.uniform(0.02, 0.5)}


@pytest.mark.parametrize("seed", range(5))
def test_a_recipe_that_the_space_makes_is_read_back_as_its_point(space, seed):
    values = drawn(space, seed)
    assert of(space, space.recipe(values).to_dict()) == [values]


def test_a_recipe_without_a_prune_stage_cuts_nothing(space):
    values = {n: json.dumps(0.0) if n.startswith(RATIOS) else v for n, v in drawn(space, 0).items()}
    recipe = space.recipe(values).to_dict()
    assert [next(iter(s)) for s in recipe["stages"]] == ["train", "quantize"]
    (found,) = of(space, recipe)
    assert found["stages.1.prune.optimizer.lr"] == "0.001"  # the base recipe's is not in the space
    assert {n: v for n, v in found.items() if ".prune." not in n} == {
        n: v for n, v in values.items() if ".prune." not in n
    }
    assert {v for n, v in found.items() if n.startswith(RATIOS)} == {"0.0"}


def test_one_number_is_for_all_and_what_is_not_named_is_as_in_the_base_recipe(space):
    (found,) = of(space, {BITS: 4, RHO: 0.1, "stages.1.prune.optimizer.lr": 0.002, "seed": 4})
    assert {v for n, v in found.items() if n.startswith(BITS)} == {"4"} and found["seed"] == 4
    cut = {n.partition(":")[2]: v for n, v in found.items() if n.startswith(RATIOS)}
    assert cut.pop("layer1.0.conv1") == "0.5" and set(cut.values()) == {"0.0"}
    assert found["method"] == json.dumps(METHODS[0])
    each = {p.part: 8 if i else 2 for i, p in enumerate(p for p in space.parameters if p.key == BITS)}
    named = {BITS: each, RHO: 0.1, "stages.1.prune.optimizer.lr": 0.002}
    (other,) = of(space, named)
    assert Counter(v for n, v in other.items() if n.startswith(BITS)) == {"8": len(each) - 1, "2": 1}
    assert of(space, named, copy.deepcopy(named)) == [other]


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"stages.2.quantize.bitz": 4}, r"starts\.0: stages\.2\.quantize\.bitz is not in the space"),
        ({BITS: 5}, r"starts\.0: stages\.2\.quantize\.bits:.*5 is not in the space\. Allowed: 2, 4, 8"),
        ({BITS: {"layer1.0.conv1": 4}}, "says nothing of"),
        ({RHO: 0.9}, r"0\.9 is not in the space\. Allowed: 0\.02 to 0\.5"),
        ({"seed": 3}, "Allowed: 0 to 8 in steps of 2"),
        ({"seed": True}, "Allowed: 0 to 8"),
        ({"method": {f"{AT}.method": "gaqat"}}, "is not in the space"),
        ({**RECIPE, "stages": [{"train": {}}, {"prune": {"ratio": 0.5}}]}, "the recipe has no such stage"),
        ({**RECIPE, "stages": [{"train": {}}, {"prune": {"macs": 0.5}}, {"quantize": {}}]}, "does not say it of"),
        ({**RECIPE, "stages": [{"train": {"epochz": 1}}]}, "epochz"),
        ("mine.yaml", "load the search with load_search"),
    ],
)
def test_a_start_that_the_space_does_not_hold_is_refused(space, start, message):
    usual = {BITS: 4, RHO: 0.1, "stages.1.prune.optimizer.lr": 0.002, "seed": 4}
    known = isinstance(start, dict) and "stages" not in start
    with pytest.raises(UserError, match=message):
        of(space, {**usual, **start} if known else start)


def test_a_start_may_be_a_recipe_file_beside_the_search(tmp_path, space):
    values = drawn(space, 1)
    (tmp_path / "mine.yaml").write_text(space.recipe(values).to_yaml())
    raw = {"recipe": RECIPE, "space": WIDE, "starts": ["mine.yaml"]}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    assert given.points(expand(load_search(tmp_path / "search.yaml"))[0]) == [values]


def test_settings_that_go_together_are_one_choice(space, tmp_path):
    values = {**drawn(space, 2), "method": json.dumps(METHODS[1])}
    last = space.recipe(values).stages[-1].config
    assert (last.method, last.epochs) == ("lsq_sagm", 3)
    setting = [{"stages.0.train.epochs": 1, f"{AT}.epochs": 1}, {"stages.0.train.epochs": 3}]
    mixed, _ = expand(search(tmp_path, space={**SPACE, "split": {"together": setting}}, full_stages=1))
    point = {p.name: p.choices[0] if p.choices else 0.1 for p in mixed.parameters}
    other = {**point, "split": json.dumps(setting[1])}
    assert [mixed.beginning(v).stages[0].config.epochs for v in (point, other)] == [1, 3]
    assert [mixed.recipe(v).stages[-1].config.epochs for v in (point, other)] == [1, 2]


@pytest.mark.parametrize(
    ("varied", "message"),
    [
        ({"m": {"together": [{f"{AT}.rho": 0.1}]}}, "varied twice, once by 'm'"),
        ({"m": {"together": [{f"{AT}.methodd": "lsq"}]}}, "methodd"),
        ({"m": {"together": [{"stages.7.quantize.K": 3}]}}, "no such key"),
        ({"m": {"together": []}}, "at least 1"),
        ({"m": {"together": [{"seed": 1}], "choice": [1]}}, "give one of"),
        ({"m": {"together": [{"seed": 1}, {"seed": 1}]}}, "given twice"),
    ],
)
def test_wrong_settings_that_go_together_are_refused(tmp_path, varied, message):
    with pytest.raises(UserError, match=message):
        expand(search(tmp_path, space={**SPACE, **varied}))


def test_every_other_first_point_is_spread_evenly_and_the_rest_is_as_the_user_says(space):
    kept = space.search.warm_start, space.search.starts
    run = expand(search(space.search.output_dir, space=WIDE))[1]
    own = [{BITS: 8, RHO: r, "stages.1.prune.optimizer.lr": 0.001, "seed": 0} for r in (0.1, 0.2)]
    try:
        space.search.warm_start, space.search.starts = 12, own
        points = warm.points(space, run, False, print)
        assert points == warm.points(space, run, False, print) and len(points) == 12
        space.search.warm_start = 1
        assert len(warm.points(space, run, False, print)) == 1
    finally:
        space.search.warm_start, space.search.starts = kept
    assert [p[RHO] for p in points[::2]] == [0.1, 0.2, 0.1, 0.2, 0.1, 0.2]
    spread = points[1::2]
    assert Counter(p["method"] for p in spread) == {json.dumps(m): 3 for m in METHODS}
    assert set(Counter(p["stages.1.prune.optimizer.lr"] for p in spread).values()) == {2}
    rhos = sorted(p[RHO] for p in spread)
    ratios = [b / a for a, b in pairwise(rhos)]
    assert len(set(rhos)) == 6 and max(ratios) == pytest.approx(min(ratios))
    for point in spread:
        space.recipe(point)
