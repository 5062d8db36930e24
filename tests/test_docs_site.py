"""The documentation: every code block runs, every public name is documented, every link leads somewhere."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import flatcompress
from flatcompress.cli.app import _guarded, app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if p.parent.name != "results")
LINKED = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")), ROOT / "export" / "README.md"]
PACKAGES = ["flatcompress", *(f"flatcompress.{name}" for name in flatcompress._PACKAGES)]
# A block that cannot run by itself says why: <!-- not run: the reason -->
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?```(?P<language>python|bash)\n(?P<code>.*?)```", flags=re.S
)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, code) of what a page's reader runs, in order; of commands the tutorials' alone."""
    languages = ("python", "bash") if page.parent.name == "tutorials" else ("python",)
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [(m["language"], m["code"]) for m in found if m["reason"] is None and m["language"] in languages]


def commands(code: str) -> list[list[str]]:
    """The flatcompress commands of a bash block, without the program's name; a line may end in a backslash."""
    lines = (shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines())
    return [words[1:] for words in lines if words and Path(words[0]).name == "flatcompress"]


RUN = [p for p in PAGES if blocks(p) and p.name != "flat.md"]  # flat.md's are run by tests/flat/test_flat_docs.py


@pytest.mark.parametrize("page", RUN, ids=lambda p: p.relative_to(DOCS).as_posix())
def test_code_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names: dict[str, object] = {"__name__": "page"}
    for number, (language, code) in enumerate(blocks(page)):
        if language == "python":
            exec(compile(code, f"{page.name} block {number}", "exec"), names)
        else:
            assert [_guarded(words) for words in commands(code)] == [0] * len(commands(code))


SHOWN = [p for p in LINKED if "```bash" in p.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", SHOWN, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_command_that_a_page_shows_has_these_options(page):
    """Parsed as the program parses it, and not run."""
    program = typer.main.get_command(app)
    for _, code in re.findall(r"```(bash|text)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S):
        for name, *words in commands(code):
            program.commands[name].make_context(name, words)  # type: ignore[attr-defined]


TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda p: p.stem)
def test_a_tutorial_has_a_picture_and_is_in_the_contents(page):
    pictures = re.findall(r"!\[[^\]]{20,}\]\((\.\./assets/[^)]+\.png)\)", page.read_text(encoding="utf-8"))
    assert pictures and all((page.parent / picture).is_file() for picture in pictures)
    assert f"tutorials/{page.name}" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_documented(package):
    module = importlib.import_module(package)
    assert inspect.getdoc(module), f"{package} has no docstring"
    for name in getattr(module, "__all__", ()):
        found = getattr(module, name)
        if inspect.isclass(found) or inspect.isroutine(found) or inspect.ismodule(found):
            assert inspect.getdoc(found), f"{package}.{name} has no docstring"
        if inspect.isclass(found):
            fields = getattr(found, "__dataclass_fields__", {})  # these stand in the class's own docstring
            for key, member in vars(found).items():
                if (
                    key not in fields
                    and not key.startswith("_")
                    and (inspect.isroutine(member) or isinstance(member, property))
                ):
                    assert inspect.getdoc(member), f"{package}.{name}.{key} has no docstring"


# What these mean is the same everywhere; the first lines of the API reference say it.
USUAL = {"model", "example_input", "batches", "seed", "path"}


def test_every_argument_of_a_public_function_is_in_its_docstring():
    missing = []
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in filter(lambda n: inspect.isroutine(getattr(module, n)), getattr(module, "__all__", ())):
            function = getattr(module, name)
            said = set(re.findall(r"\w+", inspect.getdoc(function) or ""))
            taken = inspect.signature(function).parameters.values()
            named = {p.name for p in taken if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
            missing += [f"{package}.{name}: {argument}" for argument in sorted(named - said - USUAL)]
    assert missing == []
    introduction = (DOCS / "_site" / "hooks.py").read_text(encoding="utf-8")
    assert all(f"`{name}`" in introduction for name in USUAL)


def links(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    return [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]


@pytest.mark.parametrize("page", LINKED, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_to_files_lead_somewhere(page):
    made = {"lists.md", "recipe.md", "command-line.md", "api.md"}  # written when the site is built
    for target in links(page):
        if not target or "://" in target or target.startswith("mailto:") or Path(target).name in made:
            continue
        assert (page.parent / target).exists(), f"{page.name}: {target} is not there"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "site" / "reference" / "api.html").exists()
