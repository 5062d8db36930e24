"""Searches: what is refused before anything is trained, who goes on, where a search begins, what its front holds."""

from __future__ import annotations

import json
import sys

import pytest
from searches import RECIPE, SPACE, search

from flatcompress.cli import app as cli
from flatcompress.errors import UserError
from flatcompress.search import measures
from flatcompress.search import study as studies
from flatcompress.search.driver import _check_ends, run_search
from flatcompress.search.front import Front
from flatcompress.search.halving import Point, crowding, dominates, fronts, promotion, ranked
from flatcompress.search.space import expand
from flatcompress.search.spec import load_search, parse_search
from flatcompress.search.study import Record, Study


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    return expand(search(tmp_path_factory.mktemp("space")))[0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"spaces": {}}, r"unknown key\. Did you mean 'space'"),
        ({"space": {}}, "at least 1"),
        ({"space": {"seed": {"low": 3, "high": 1}}}, "the range is empty"),
        ({"space": {"seed": {"choice": []}}}, "at least 1"),
        ({"space": {"seed": {"choices": [1]}}}, r"unknown key\. Did you mean 'choice'"),
        ({"space": {"seed": {"low": 0, "high": 1, "choice": [1]}}}, "give one of"),
        ({"space": {"seed": {"low": 0}}}, "low and high go together"),
        ({"space": {"seed": {"low": 0, "high": 1, "log": True}}}, "log needs low above 0"),
        ({"objectives": {"robst": "maximize"}}, "Did you mean 'robust'"),
        ({"objectives": {"robust": "up"}}, "maximize"),
        ({"budgets": {"robust": 1}}, "unknown budget"),
        ({"fidelities": ["full", 1]}, "the last is full"),
        ({"fidelities": [2, 1, "full"]}, "from cheap to full"),
        ({"sampler": "bohb"}, "tpe"),
        ({"timeout": "soon"}, "timeout"),
    ],
)
def test_wrong_searches_are_refused(tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        search(tmp_path, **keys)


@pytest.mark.parametrize(
    ("varied", "message"),
    [
        ({"stages.2.quantize.rhoo": {"low": 0.1, "high": 1.0}}, "rhoo"),
        ({"stages.2.quantise.rho": {"low": 0.1, "high": 1.0}}, r"no such key .*stages\.2\.quantize"),
        ({"stages.7.quantize.rho": {"low": 0.1, "high": 1.0}}, "no such key"),
        ({"stages.2.quantize.method": {"choice": ["lsq", "lsqq"]}}, "lsqq"),
        ({"stages.2.quantize.bits": {"per_layer": [4, 9]}}, "bits"),
        ({"stages.2.quantize.weight_bits": {"per_layer": [4, 8]}}, "per_layer is for bits"),
        ({"stages.1.prune.ratios": {"per_group": [0.5, 1.0]}}, "ratios"),
        ({"stages.0.train.epochs": {"low": 0, "high": 2}}, "epochs"),
    ],
)
def test_what_the_recipe_does_not_have_is_refused_before_anything_is_trained(tmp_path, varied, message):
    with pytest.raises(UserError, match=message):
        expand(search(tmp_path, space=varied))
    assert not list(tmp_path.rglob("*.json"))


def test_a_search_without_optuna_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    path = tmp_path / "search.yaml"
    path.write_text(json.dumps({"recipe": RECIPE, "space": SPACE, "output_dir": str(tmp_path / "runs")}))
    assert cli._guarded(["search", str(path)]) == 2
    assert "pip install 'flatcompress[search]'" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["postgresql://me:secret@127.0.0.1:1/none", "sqlite:////no/such/folder/study.db",
                                 "nosuch://x", "study.txt"])  # fmt: skip
def test_a_storage_out_of_reach_is_refused_without_its_password(url):
    optuna = pytest.importorskip("optuna")
    with pytest.raises(UserError, match="storage ") as error:
        studies.opened(optuna, url)
    assert "secret" not in str(error.value)


def test_objectives_that_the_data_cannot_answer_are_refused(tmp_path):
    pytest.importorskip("optuna")
    recipe = {**RECIPE, "data": {**RECIPE["data"], "held_out": "none"}}
    for objectives, message in (({"robust": "maximize"}, "no held-out domain"), ({"latency_ms": "minimize"}, "export")):
        with pytest.raises(UserError, match=message):
            run_search(search(tmp_path, recipe=recipe, objectives=objectives), print, None)


@pytest.mark.parametrize(("bits", "table"), [(8, 8), (None, 8), (7, 4), (2, 4)])
def test_milliseconds_are_those_of_the_activation_bits(tmp_path, monkeypatch, bits, table):
    made = []
    monkeypatch.setattr(measures, "_table", lambda run, bits=8: made.append(bits) or (lambda widths: 10.0 * bits))
    monkeypatch.setattr(measures.Measuring, "_widths", lambda self, there, recipe: {})
    wanted = search(tmp_path, objectives={"robust": "maximize", "ms": "minimize"})
    space, run = expand(wanted)
    values = {p.name: p.choices[-1] if p.choices else 0.1 for p in space.parameters}
    recipe = space.recipe(values)
    recipe.stages[-1].config.activation_bits = bits
    measuring = measures.Measuring(wanted, run)
    assert [measuring._ms(None, recipe) for _ in range(2)] == [10.0 * table] * 2
    assert made == ([8] if table == 8 else [8, 4])


def test_every_layer_and_group_is_a_parameter_and_values_make_a_recipe(space):
    assert space.shared == 1
    layers = [p for p in space.parameters if p.key.endswith(".bits")]
    groups = [p for p in space.parameters if p.key.endswith(".ratios")]
    assert len(layers) >= 5 and len(groups) >= 3
    values = {p.name: p.choices[-1] if p.choices else 0.1 for p in space.parameters}
    recipe = space.recipe(values)
    assert set(recipe.stages[2].config.bits.values()) == {8} and set(recipe.stages[1].config.ratios.values()) == {0.5}
    assert recipe.stages[2].config.hyper["rho"] == 0.1
    cheap = space.recipe(values, "post_training")
    assert [entry.config.epochs for entry in cheap.stages] == [2, 1, 0]
    assert [entry.config.epochs for entry in space.recipe(values, 1).stages] == [2, 1, 1]
    uncut = {**values, **{p.name: p.choices[0] for p in groups}}
    assert [entry.kind for entry in space.recipe(uncut).stages] == ["train", "quantize"]
    _check_ends(space)


def test_full_stages_are_trained_in_full_at_every_fidelity_and_points_that_agree_share_them(tmp_path):
    varied = {**SPACE, "stages.0.train.epochs": {"choice": [2, 3]}}
    assert expand(search(tmp_path, space=varied))[0].shared == 0
    space, _ = expand(search(tmp_path, space=varied, full_stages=1))
    values = {p.name: p.choices[-1] if p.choices else 0.1 for p in space.parameters}
    assert [entry.config.epochs for entry in space.recipe(values, "post_training").stages] == [3, 1, 0]
    others = {**values, "stages.2.quantize.rho": 0.3, "stages.0.train.epochs": "2"}
    starts = [space.beginning(v) for v in (values, {**values, "stages.2.quantize.rho": 0.3}, others)]
    assert [len(start.stages) for start in starts] == [1, 1, 1]
    assert starts[0] == starts[1] and starts[2].stages[0].config.epochs == 2
    with pytest.raises(UserError, match="full_stages is 3, and the recipe has 3 stages"):
        expand(search(tmp_path, full_stages=3))


def test_of_many_choices_a_new_point_is_one_of_other_choices(tmp_path):
    pytest.importorskip("optuna")
    wanted = search(tmp_path)
    study = Study(wanted, expand(wanted)[0])
    values = {p.name: p.choices[-1] if p.choices else 0.1 for p in study.space.parameters}
    nearly = {**values, "stages.2.quantize.rho": 0.2}
    assert study._told_apart(values) == study._told_apart(nearly)  # 3^6 choices and more for six trials
    few = search(tmp_path / "few", space={"stages.2.quantize.rho": SPACE["stages.2.quantize.rho"]})
    study = Study(few, expand(few)[0])
    assert study._told_apart({"stages.2.quantize.rho": 0.1}) != study._told_apart({"stages.2.quantize.rho": 0.2})


def test_domination_within_budgets_comes_first():
    inside, outside, farther = Point(0, (9, 9)), Point(1, (0, 0), 0.1), Point(2, (0, 0), 0.2)
    assert dominates(inside, outside) and dominates(outside, farther) and not dominates(outside, inside)
    points = [Point(i, v) for i, v in enumerate([(0, 4), (1, 2), (2, 1), (4, 0), (3, 3), (5, 5)])]
    assert [[p.number for p in f] for f in fronts(points)] == [[0, 1, 2, 3], [4], [5]]
    assert crowding(points[:4])[0] == float("inf") > crowding(points[:4])[1] > 0
    assert set(ranked(points)[:2]) == {0, 3} and ranked(points)[-1] == 5


def test_the_best_go_on_from_the_highest_rung_down_and_each_once():
    low = [Point(i, (float(i),)) for i in range(6)]
    assert promotion([low, [], []], {}, 2) == (0, 1)
    assert promotion([low, low[:2], []], {0: 1, 1: 1}, 2) == (0, 2)
    assert promotion([low, low[:2], low[:1]], {0: 2, 1: 1}, 2) == (2, 1)
    assert promotion([low[:1], [], []], {}, 2) is None
    entered = {0: 2, 1: 1, 2: 1}
    assert promotion([low, low[:3], low[:1]], entered, 2) is None


def fake(number, accuracy, size, top=2):
    return Record(number, number, {}, {top: {"robust": accuracy, "bytes": size, "passes": 1.0}})


def test_a_front_holds_what_nothing_beats_within_the_budgets(tmp_path, space, monkeypatch):
    monkeypatch.setattr(type(space), "recipe", lambda self, values, *rest: expand_once)
    expand_once = __import__("flatcompress.recipe", fromlist=["parse_recipe"]).parse_recipe(RECIPE)
    found = search(tmp_path, budgets={"bytes": 50})
    records = [fake(0, 0.9, 40), fake(1, 0.8, 20), fake(2, 0.7, 30), fake(3, 0.99, 60), Record(4, 4, {}, {0: {}})]
    front = Front.of(found, space, records)
    assert [p.number for p in front.points] == [0, 1] and front.counts["full"] == 4
    text, data = front.write()
    assert [p["trial"] for p in data["front"]] == [0, 1] and "90.0 %" in text
    assert {p.name for p in (found.folder / "recipes").iterdir()} == {"trial-0000.yaml", "trial-0001.yaml"}
    page = (found.folder / "front.html").read_text()
    assert page.count("<circle") == 4 and "robust against bytes" in page


def test_a_study_is_taken_up_again_and_belongs_to_one_search(tmp_path, space):
    pytest.importorskip("optuna")
    mine = search(tmp_path)
    first = Study(mine, space)
    values = first.suggest([])[0]
    record = first.add(values)
    first.result(record, 0, {"robust": 0.5, "bytes": 10.0})
    again = Study(mine, space)
    (found,) = again.records()
    assert found.values == values and found.results == {0: {"robust": 0.5, "bytes": 10.0}} and found.pending is None
    again.claim(found, 1)
    assert again.records()[0].pending == 1 and not first.is_stale(again.records()[0])
    again.result(found, 2, {"robust": 0.6, "bytes": 10.0})
    assert not again.records()[0].open and again.study.best_trials[0].values == [0.6, 10.0]
    with pytest.raises(UserError, match="another recipe, space"):
        Study(search(tmp_path, budgets={"bytes": 1000}), space)


def test_a_study_of_an_earlier_version_goes_on(tmp_path, space):
    pytest.importorskip("optuna")
    found = Study(search(tmp_path), space).study.user_attrs["flatcompress"]
    assert found == "a7563510839e188e293db5f9844605c8419fbd539b113a069553afe94e8e0542"


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_what_is_tried_next_depends_on_seed_and_results_alone(tmp_path, space, sampler):
    pytest.importorskip("optuna")

    def proposals(folder, seed=0):
        study, records, found = Study(search(folder, sampler=sampler, seed=seed), space), [], []
        for n in range(13):
            values, kept = study.suggest(records)
            found.append(values)
            records.append(Record(n, n, values, {0: {"robust": n / 7 % 1, "bytes": 10.0 * n}}, sampler=kept))
        return found

    first = proposals(tmp_path / "a")
    assert first == proposals(tmp_path / "b") != proposals(tmp_path / "c", seed=1)
    assert len({json.dumps(v, sort_keys=True) for v in first}) == 13


def test_a_small_space_is_tried_to_its_end_whatever_the_sampler_prefers(tmp_path):
    pytest.importorskip("optuna")
    mine = search(tmp_path, space={"stages.2.quantize.K": {"choice": list(range(2, 18))}}, n_trials=30)
    study, records = Study(mine, expand(mine)[0]), []
    for n in range(16):
        values, kept = study.suggest(records)
        records.append(Record(n, n, values, {0: {"robust": float(n == 0), "bytes": 10.0}}, sampler=kept))
    assert len({json.dumps(r.values) for r in records}) == 16
    assert study.suggest(records) is None


def test_a_file_finds_its_recipe_beside_it(tmp_path):
    (tmp_path / "base.yaml").write_text(json.dumps(RECIPE))
    (tmp_path / "search.yaml").write_text(json.dumps({"recipe": "base.yaml", "space": SPACE, "timeout": "2h"}))
    found = load_search(tmp_path / "search.yaml")
    assert found.recipe["model"]["width"] == 4 and found.timeout == 7200
    with pytest.raises(UserError, match="a search is a mapping"):
        parse_search([1])
