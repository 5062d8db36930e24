from __future__ import annotations

import json

import pytest
from fabricated_run import write_run
from typer.testing import CliRunner

from flatcompress.cli.app import app
from flatcompress.errors import UserError
from flatcompress.report import compare, gather

ATTACK = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    one, other = write_run(folder / "one", "one"), write_run(folder / "other", ATTACK, seed=1)
    recipe = (other / "recipe.yaml").read_text().replace("ratio: 0.5", "ratio: 0.7").replace("seed: 0", "seed: 1")
    (other / "recipe.yaml").write_text(recipe)
    ledger = json.loads((other / "ledger.json").read_text())
    ledger["rows"][-1]["bytes"] = 20_000
    (other / "ledger.json").write_text(json.dumps(ledger))
    log = (other / "log.jsonl").read_text().replace('"name": "stage2.0.conv1", "kind"', '"name": "renamed", "kind"')
    (other / "log.jsonl").write_text(log)
    return [one, other]


def test_what_differs_in_the_recipes_and_nothing_else_is_listed(runs):
    rows = {row["name"]: row["values"] for row in compare.compare(runs)["recipe"]}
    assert rows == {"name": ["one", ATTACK], "seed": [0, 1], "stages.1.prune.ratio": [0.5, 0.7]}


def test_a_stage_that_one_recipe_lacks_is_one_row_and_the_others_are_compared_with_their_like(runs):
    found = [gather(folder) for folder in runs]
    stages = [stage for stage in found[1].recipe["stages"] if "prune" not in stage]
    found[1].recipe = {**found[0].recipe, "stages": stages}
    rows = {row["name"]: row["values"] for row in compare.recipe(found)}
    assert rows == {"stages.1.prune": ["there", None]}


def test_the_smaller_file_is_the_best_of_its_row(runs):
    row = next(r for r in compare.compare(runs)["figures"] if r["name"] == "Size")
    assert row["values"] == [23_412, 20_000] and row["best"] == 1
    assert next(r for r in compare.compare(runs)["figures"] if r["name"] == "Test")["best"] is None  # a tie


def test_a_layer_that_a_run_does_not_have_is_a_gap(runs):
    rows = {row["name"]: row for row in compare.compare(runs)["layers"]}
    assert rows["renamed"]["cells"][0] is None and rows["renamed"]["differs"]
    assert rows["stage2.0.conv1"]["cells"][1] is None
    assert len(rows) == 11


def test_a_run_beside_itself_differs_in_nothing(runs):
    found = compare.compare([runs[0], runs[0]])
    assert found["recipe"] == [] and not any(row["differs"] for row in found["layers"])
    assert all(row["best"] is None for row in found["figures"])


def test_the_page_escapes_names_and_needs_no_network(runs, tmp_path):
    page = compare.build(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    assert ATTACK not in page and "&lt;script&gt;alert(1)" in page and "<img" not in page
    assert page.count("<script>") == 1 and page.count('data-tip="') == 2
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize("n", [1, 7])
def test_too_few_and_too_many_runs_are_refused(runs, n):
    with pytest.raises(UserError, match="2 to 6 run folders"):
        compare.compare([runs[0]] * n)


def test_the_command_prints_tables_and_json(runs, tmp_path):
    command = ["compare", *map(str, runs), "-o", str(tmp_path / "page.html")]
    printed = CliRunner().invoke(app, command)
    assert printed.exit_code == 0, printed.output
    for words in ("stages.1.prune.ratio", "23.4 kB", "20.0 kB", "renamed", "page.html"):
        assert words in printed.output, words
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)
    assert found["figures"] == compare.compare(runs)["figures"]
