"""What the documents say is true: every recipe in configs/ is valid, every README command and snippet runs."""

from __future__ import annotations

import json
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
PHOTOGRAPHS = (ROOT / "docs" / "tutorials" / "photographs.md").read_text(encoding="utf-8")
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


def own_images(text: str) -> list[list[str]]:
    """The three commands for a folder of one's own, as words."""
    block = next(b for b in re.findall(r"```bash\n(.*?)```", text, flags=re.S) if "--data photos" in b)
    return [shlex.split(line.split("#")[0]) for line in block.splitlines()]


def test_the_first_pages_say_the_same_three_commands():
    """And the first of them is a target of the Makefile."""
    found = own_images(README)
    assert found == own_images((ROOT / "docs" / "index.md").read_text(encoding="utf-8")) and len(found) == 3
    assert found[0] == ["make", "install"]
    assert re.search(r"^install:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    assert [words[:2] for words in found[1:]] == [[".venv/bin/flatcompress", "init"], [".venv/bin/flatcompress", "run"]]


@pytest.mark.slow
def test_the_commands_for_a_folder_of_ones_own_end_in_a_certified_file(tmp_path, monkeypatch):
    """Typed as they stand, after the installation, on drawn images of three classes."""
    monkeypatch.chdir(tmp_path)
    drawing = next(iter(re.findall(r"```python\n(.*?)```", PHOTOGRAPHS, flags=re.S)))
    exec(compile(drawing, "photographs.md", "exec"), {})
    for _, *words in own_images(README)[1:]:
        assert _guarded(words) == 0
    certificate = json.loads(Path("runs/photos/certificate.json").read_text(encoding="utf-8"))
    ledger = json.loads(Path("runs/photos/ledger.json").read_text(encoding="utf-8"))
    assert certificate["holds"] and Path("runs/photos/report.html").exists()
    assert ledger["rows"][-1]["accuracy"]["test"] > 0.8
