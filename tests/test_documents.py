"""What the documents say is true: every recipe in configs/ is valid, every README command and snippet runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from flatcompress.cli.app import _guarded
from flatcompress.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
# the quick version of every training stage
QUICK = {"epochs": 2}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_recipe_is_valid(path: Path):
    raw = yaml.safe_load(path.read_text())
    if "stages" in raw:
        assert load_recipe(path).name == raw["name"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands() -> list[list[str]]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("flatcompress ")]


def test_readme_names_the_two_commands():
    first = next(iter(blocks("bash")))
    assert "make demo" in first
    assert "make test" in first


@pytest.fixture(scope="module")
def quick_checkout(tmp_path_factory) -> Path:
    """A folder that looks like the checkout, with quick recipes."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").mkdir()
    raw = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    raw["data"] |= {"size": 8, "copies": 1, "batch_size": 128, "corruptions": ["contrast/3"], "corrupted_count": 64}
    for entry in raw["stages"]:
        for kind, body in entry.items():
            if kind != "export":
                body |= QUICK
    (folder / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(raw))
    return folder


def test_readme_commands_run_in_order(quick_checkout, monkeypatch):
    monkeypatch.chdir(quick_checkout)
    found = commands()
    assert [c[1] for c in found if c[1] in ("run", "verify")][:2] == ["run", "verify"]
    for command in found:
        assert _guarded(command[1:]) == 0, command


def test_readme_python_runs(quick_checkout, monkeypatch):
    monkeypatch.chdir(quick_checkout)
    snippets = blocks("python")
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})
