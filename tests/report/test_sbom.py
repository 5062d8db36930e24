"""The bill of materials names the file, what it was made of and with what, and is valid CycloneDX."""

from __future__ import annotations

import hashlib
import json
import sys

import pytest
from fabricated_run import write_run

from flatcompress.errors import UserError
from flatcompress.report import sbom


@pytest.fixture
def run(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "model.onnx").write_bytes(b"onnx")
    return folder


def test_it_lists_file_network_data_and_packages_with_hash_and_versions(run):
    pytest.importorskip("cyclonedx")
    made = json.loads(sbom.build(run).read_text())
    assert (made["bomFormat"], made["specVersion"]) == ("CycloneDX", "1.6")
    whole = made["metadata"]["component"]
    assert whole["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(b"onnx").hexdigest()}]
    kinds = {part["name"]: part["type"] for part in made["components"]}
    assert kinds["resnet8"] == "machine-learning-model" and kinds["rotated-digits"] == "data"
    versions = json.loads((run / "certificate.json").read_text())["versions"]
    assert {p["name"]: p["version"] for p in made["components"] if "version" in p} == versions
    below = next(row for row in made["dependencies"] if row["ref"] == whole["bom-ref"])
    assert len(below["dependsOn"]) == len(made["components"])


def test_it_is_valid_against_the_schema(run):
    pytest.importorskip("jsonschema")
    validation = pytest.importorskip("cyclonedx.validation.json")
    from cyclonedx.schema import SchemaVersion

    try:
        wrong = validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(sbom.build(run).read_text())
    except Exception as error:
        if "Missing" not in type(error).__name__:
            raise
        pytest.skip(str(error))
    assert wrong is None


def test_the_same_run_gives_the_same_bill(run):
    pytest.importorskip("cyclonedx")
    assert sbom.build(run).read_text() == sbom.build(run).read_text()


def test_a_run_without_a_file_and_a_missing_package_are_one_sentence(run, monkeypatch):
    pytest.importorskip("cyclonedx")
    (run / "model.onnx").unlink()
    with pytest.raises(UserError, match="no exported file"):
        sbom.build(run)
    monkeypatch.setitem(sys.modules, "cyclonedx.output.json", None)
    with pytest.raises(UserError, match=r"pip install 'flatcompress\[trust\]'"):
        sbom.build(run)
