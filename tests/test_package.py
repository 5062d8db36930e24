"""The package as it would be published: what is in the wheel and the sdist, and a run with nothing else at hand."""

from __future__ import annotations

import importlib.metadata as metadata
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import flatcompress

ROOT = Path(flatcompress.__file__).parents[1]
QUICK = {"epochs": 2}

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not in an installed package")


def test_the_version_is_the_same_everywhere():
    assert metadata.version("flatcompress") == flatcompress.__version__
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    assert cited == flatcompress.__version__


def test_the_changelog_has_a_section_for_this_version_or_an_unreleased_one():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## (Unreleased|{re.escape(flatcompress.__version__)})", text, flags=re.M)


WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def test_the_workflow_file_is_one_by_its_published_schema():
    pytest.importorskip("check_jsonschema", reason="needs check-jsonschema (extra dev)")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(WORKFLOW)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_workflow_does_what_the_ci_script_does():
    """Every command of the Makefile's targets that .ci/run makes is a step of the job for all systems."""
    steps = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]["checks"]["steps"]
    said = " ; ".join(" ".join(step.get("run", "").split()) for step in steps)
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wanted = re.findall(r"^\.venv/bin/(.+)$", script, flags=re.M)
    for target in re.findall(r"^make (\w+)", script, flags=re.M):
        rules = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", makefile, flags=re.M)
        assert rules, target
        wanted += [line.strip().removeprefix("$(BIN)/") for line in rules[1].splitlines()]
    assert len(wanted) >= 7
    assert [command for command in wanted if command not in said] == []


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """A wheel and an sdist, built from the checkout."""
    pytest.importorskip("build", reason="needs the package build (extra dev)")
    pytest.importorskip("hatchling", reason="needs hatchling (extra dev)")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return {"wheel": next(folder.glob("*.whl")), "sdist": next(folder.glob("*.tar.gz"))}


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(built):
    names = set(zipfile.ZipFile(built["wheel"]).namelist())
    listed = subprocess.run(
        ["git", "ls-files", "flatcompress"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert set(listed) <= names
    assert "flatcompress/py.typed" in names


@pytest.mark.slow
def test_the_sdist_holds_the_tests_and_no_run(built):
    with tarfile.open(built["sdist"]) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"tests/test_package.py", "configs/quickstart.yaml", "pyproject.toml", "LICENSE"} <= inside
    assert not any(name.startswith(("runs/", ".venv")) for name in inside)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_installs_alone_and_runs_the_starter_recipe(built, kind, tmp_path):
    """In an environment of its own (dependencies are this one's), in a folder that is not the checkout."""
    venv.create(tmp_path / "env", system_site_packages=False, with_pip=False)
    python = next((tmp_path / "env").glob("[bS]*/python*"))
    target = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", target, str(built[kind])], check=True, capture_output=True)
    packages = [p for p in sys.path if p.endswith("site-packages")]
    (Path(target) / "zz_dependencies.pth").write_text("\n".join(packages), encoding="utf-8")

    def flatcompress_command(*words: str) -> str:
        command = [python, "-P", "-m", "flatcompress", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.run(
        [python, "-P", "-c", "import flatcompress; print(flatcompress.__file__)"],
        cwd=tmp_path, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert str(tmp_path) in where
    flatcompress_command("init", "mine.yaml")
    recipe = yaml.safe_load((tmp_path / "mine.yaml").read_text(encoding="utf-8"))
    recipe["data"] |= {"size": 8, "copies": 1, "batch_size": 128, "corruptions": ["contrast/3"], "corrupted_count": 64}
    for entry in recipe["stages"]:
        for name, body in entry.items():
            if name != "export":
                body |= QUICK
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    flatcompress_command("run", "mine.yaml", "--quiet")
    assert (tmp_path / "runs" / "quickstart" / "model.onnx").exists()


def test_importing_the_pipeline_loads_nothing_that_few_runs_need() -> None:
    unwanted = ("sklearn", "onnxscript", "networkx")
    code = f"import sys, flatcompress.pipeline; print([m for m in {unwanted} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
