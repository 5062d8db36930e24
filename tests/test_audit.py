"""The audit of licences and vulnerabilities that continuous integration runs."""

from __future__ import annotations

import importlib.metadata as metadata
import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "audit.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="not in an installed package")


@pytest.fixture
def audit():
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tool(tmp_path, monkeypatch, audit):
    """Puts a pip-audit in place that prints ``out`` and ``err``."""

    def put(out="", err="", code=0):
        path = tmp_path / "pip-audit"
        path.write_text(
            f"#!{sys.executable}\nimport sys\nsys.stdout.write({out!r})\nsys.stderr.write({err!r})\nsys.exit({code})\n"
        )
        path.chmod(0o755)
        monkeypatch.setattr(audit.shutil, "which", lambda name, path=None: str(tmp_path / "pip-audit"))

    return put


def rows(*found):
    return json.dumps({"dependencies": list(found), "fixes": []})


def test_without_the_tool_the_audit_is_skipped_and_says_so(audit, monkeypatch, capsys):
    monkeypatch.setattr(audit.shutil, "which", lambda name, path=None: None)
    assert audit.vulnerabilities() == 0
    assert "pip-audit: skipped, it is not installed" in capsys.readouterr().out


def test_where_the_index_cannot_be_reached_the_audit_is_skipped_with_the_reason(audit, tool, capsys):
    tool(err="Traceback\n  ...\nConnectionError: Max retries exceeded with url: /pypi/torch/json\n", code=1)
    assert audit.vulnerabilities() == 0
    said = capsys.readouterr().out
    assert "pip-audit: skipped, the index cannot be reached (ConnectionError: Max retries exceeded" in said


def test_an_index_without_advisories_is_said(audit, tool, capsys):
    tool(rows({"name": "torch", "skip_reason": "Dependency not found on PyPI"}))
    assert audit.vulnerabilities() == 0
    assert "has advisories for none of the 1 packages" in capsys.readouterr().out


def test_a_known_vulnerability_is_named_and_counted(audit, tool, capsys):
    bad = {"name": "pillow", "version": "1.0", "vulns": [{"id": "CVE-2025-1", "fix_versions": []}]}
    tool(rows(bad, {"name": "torch", "version": "2.9", "vulns": []}), code=1)
    assert audit.vulnerabilities() == 1
    assert "! pillow 1.0: CVE-2025-1" in capsys.readouterr().out


def test_every_licence_of_the_install_is_listed_and_permissive(audit, capsys):
    assert audit.licences() == 0
    said = capsys.readouterr().out
    assert "every licence is permissive" in said and "torch" in said


def test_the_runtimes_of_torchs_cuda_wheel_may_be_proprietary_and_nothing_else(audit, monkeypatch, capsys):
    monkeypatch.setattr(audit, "licence", lambda distribution: "Other/Proprietary License")
    ones = dict.fromkeys(("nvidia-nccl-cu12", "torch"), metadata.distribution("torch"))
    monkeypatch.setattr(audit, "dependencies", lambda name: ones)
    assert audit.licences() == 1
    said = capsys.readouterr().out
    assert "! torch" in said and "! nvidia" not in said


def test_a_licence_that_is_not_permissive_is_marked(audit, monkeypatch, capsys):
    monkeypatch.setattr(audit, "licence", lambda distribution: "GPL-3.0-only")
    assert audit.licences() > 0
    assert "! torch" in capsys.readouterr().out
