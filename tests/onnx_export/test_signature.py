"""A signature holds for what was signed by whom, and for nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import randomize_norms, toy_quantize

from flatcompress import models
from flatcompress.cli.app import _guarded
from flatcompress.errors import UserError
from flatcompress.onnx_export import certify, export, sign, verify


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signed")
    x = torch.randn(16, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    model = randomize_norms(models.build("resnet8", num_classes=10, input_shape=(1, 12, 12), seed=0, width=8))
    toy_quantize(model, x)
    certify(export(model, x[:2], folder / "model.onnx"), [x], latency_runs=0)
    return folder


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two pairs of keys: {owner: (private, public)}."""
    pytest.importorskip("model_signing", reason="needs the extra trust")
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    folder, found = tmp_path_factory.mktemp("keys"), {}
    for owner in ("ours", "theirs"):
        key = ec.generate_private_key(ec.SECP256R1())
        private, public = folder / f"{owner}.pem", folder / f"{owner}.pub"
        private.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
        public.write_bytes(key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
        found[owner] = (private, public)
    return found


def test_what_was_signed_verifies_with_the_owners_key_and_with_no_other(run, keys):
    assert sign(run, keys["ours"][0]) == run / "model.sig"
    held = verify(run, keys["ours"][1])
    assert held.holds and any("signature of the owner" in note for note in held.notes)
    refused = verify(run, keys["theirs"][1])
    assert not refused.holds and "signature does not hold" in refused.failures[0]


@pytest.mark.parametrize("name", ["model.onnx", "certificate.json", "evidence.safetensors", "sbom.cdx.json"])
def test_one_changed_byte_of_any_signed_file_is_found(name, run, keys):
    (run / "sbom.cdx.json").write_text("{}")
    sign(run, keys["ours"][0])
    data = (run / name).read_bytes()
    (run / name).write_bytes(data + b" ")
    assert f"Hash mismatch for '{name}'" in " ".join(verify(run, keys["ours"][1]).failures)


def test_other_files_of_the_folder_may_come_and_change(run, keys):
    (run / "log.jsonl").write_text("a")
    sign(run, keys["ours"][0])
    (run / "log.jsonl").write_text("b")
    (run / "report.html").write_text("new")
    assert verify(run, keys["ours"][1]).holds


def test_a_signature_over_something_else_is_none_over_the_file(run, keys, made, tmp_path):
    """A true signature of the owner that leaves the file out: taken from a folder whose certificate names another."""
    other = shutil.copytree(made, tmp_path / "other")
    (other / "model.onnx").rename(other / "small.onnx")
    told = json.loads((other / "certificate.json").read_text())
    told["file"]["name"] = "small.onnx"
    (other / "certificate.json").write_text(json.dumps(told))
    sign(other, keys["ours"][0])
    for name in ("model.sig", "small.onnx", "certificate.json"):
        shutil.copy(other / name, run / name)
    told["file"]["name"] = "model.onnx"
    assert verify(run, keys["ours"][1]).holds
    (run / "certificate.json").write_text(json.dumps(told))
    assert not verify(run, keys["ours"][1]).holds


def test_a_signature_that_is_there_and_not_asked_for_is_said(run, keys):
    sign(run, keys["ours"][0])
    assert any("was not checked" in note for note in verify(run).notes)


def test_a_missing_signature_fails_and_wrong_keys_are_the_users_mistake(run, keys, tmp_path):
    assert "no signature" in verify(run, keys["ours"][1]).failures[0]
    with pytest.raises(UserError, match="not a file"):
        sign(run, tmp_path / "nothing.pem")
    for wrong in (keys["ours"][1], run / "model.onnx"):
        with pytest.raises(UserError, match="private key"):
            sign(run, wrong)
    sign(run, keys["ours"][0])
    with pytest.raises(UserError, match="public key"):
        verify(run, keys["ours"][0])
    (run / "model.sig").write_text("{}")
    assert "does not hold" in verify(run, keys["ours"][1]).failures[0]


def test_the_commands_sign_and_check(run, keys, capsys):
    assert _guarded(["sign", str(run), "--key", str(keys["ours"][0])]) == 0
    assert _guarded(["verify", str(run), "--key", str(keys["ours"][1])]) == 0
    assert _guarded(["verify", str(run), "--key", str(keys["theirs"][1])]) == 3
    assert _guarded(["sign", str(run / "nowhere"), "--key", str(keys["ours"][0])]) == 2


def test_a_key_can_be_checked_with_what_every_linux_has(run, keys):
    """The bundle is DSSE: whoever has openssl alone can check it."""
    sign(run, keys["ours"][0])
    envelope = json.loads((run / "model.sig").read_text())["dsseEnvelope"]
    assert envelope["payloadType"] == "application/vnd.in-toto+json" and len(envelope["signatures"]) == 1


def test_without_the_package_it_is_one_sentence(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    key = tmp_path / "key.pem"
    key.write_text("x")
    for call in (lambda: sign(run, key), lambda: verify(run, key)):
        with pytest.raises(UserError, match=r"pip install 'flatcompress\[trust\]'"):
            call()


def test_nothing_of_it_is_imported_without_a_signature():
    code = "import sys, flatcompress.onnx_export; sys.exit('model_signing' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
