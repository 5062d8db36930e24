"""docs/methods.md is what the registries say, and every row of it has a test that exists and names the method."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs" / "_site"))

import methods_page  # noqa: E402

from flatcompress.cli.commands import CATALOGUE  # noqa: E402

# Brevitas's stock quantizers are not ours to test against a paper; they have none.
UNTESTED = {("quantizers", "brevitas"), ("quantizers", "brevitas-stats")}


def test_the_page_is_what_the_registries_say():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert text == methods_page.page(), "python docs/_site/methods_page.py > docs/methods.md"


@pytest.mark.parametrize("kind", methods_page.TITLES)
def test_every_method_of_the_project_is_on_the_page_with_a_test(kind):
    own = {entry.name for entry in CATALOGUE[kind].values() if entry.origin == "flatcompress"}
    assert own - {name for k, name in UNTESTED if k == kind} == set(methods_page.TESTS[kind])


TESTS = [t for of in methods_page.TESTS.values() for t in of.values()] + [row[-1] for row in methods_page.BESIDE]


@pytest.mark.parametrize("file", sorted({t.split("::")[0] for t in TESTS}))
def test_every_test_on_the_page_exists(file):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    named = {t.split("::")[1] for t in TESTS if t.startswith(file)}
    assert named <= there
