from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import randomize_norms, toy_quantize
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from flatcompress import models
from flatcompress.errors import UserError
from flatcompress.onnx_export import bench, certify, export, verify
from flatcompress.onnx_export import verify as verify_function
from flatcompress.onnx_export.proof.diverging import first_diverging_layer
from flatcompress.storage import sha256_file


def _inputs(count: int = 48) -> torch.Tensor:
    return torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One certified export; tests copy its folder."""
    folder = tmp_path_factory.mktemp("certified")
    model = randomize_norms(models.build("resnet8", num_classes=10, input_shape=(1, 12, 12), seed=0, width=8))
    x = _inputs()
    toy_quantize(model, x)
    exported = export(model, x[:2], folder / "model.onnx")
    with torch.no_grad():
        labels = model(x).argmax(1)
    certificate = certify(exported, [x[:32], x[32:]], labels, model=model, latency_runs=3, recipe="recipe text")
    return folder, exported, certificate


@pytest.fixture
def copied(made, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(made[0], folder)
    return folder


def rewrite(folder: Path, **changes) -> None:
    path = folder / "certificate.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rehash(folder: Path) -> None:
    """What somebody would do who changes a file and its certificate."""
    certificate = json.loads((folder / "certificate.json").read_text())
    for part in ("file", "evidence"):
        certificate[part]["sha256"] = sha256_file(folder / certificate[part]["name"])
    (folder / "certificate.json").write_text(json.dumps(certificate))


def test_a_certificate_holds_and_says_why(made):
    folder, exported, certificate = made
    assert certificate["holds"] and certificate["failures"] == []
    assert certificate["parity"]["optimized"]["bit_equal"] == 1.0
    assert certificate["kernels"]["integer_layers"] == len(exported.layers) == 10
    assert certificate["kernels"]["not_integer"] == []
    assert certificate["metric"]["difference"] == 0.0
    assert certificate["metric"]["samples"] == 48
    assert certificate["size"]["bytes"] == (folder / "model.onnx").stat().st_size
    assert certificate["latency"]["threads"]["1"]["median_ms"] > 0
    assert json.loads((folder / "certificate.json").read_text()) == certificate


def test_verify_repeats_it_from_folder_file_or_certificate(made):
    folder = made[0]
    for path in (folder, folder / "model.onnx", folder / "certificate.json"):
        result = verify(path)
        assert result.holds, result.failures
        assert result.measured["optimized"]["equal_argmax"] == 1.0
        assert result.to_dict()["holds"] is True


@pytest.mark.parametrize("name", ["model.onnx", "evidence.safetensors"])
@pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 0.999])
def test_one_flipped_bit_is_found(copied, name, where):
    path = copied / name
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 4
    path.write_bytes(data)
    result = verify(copied)
    assert not result.holds
    assert any(name in failure and "not the one that was certified" in failure for failure in result.failures)


@pytest.mark.parametrize("name", ["model.onnx", "evidence.safetensors"])
@pytest.mark.parametrize("keep", [0, 7, 100, 5000])
def test_a_truncated_file_is_found_even_when_the_hash_was_adapted(copied, name, keep):
    path = copied / name
    path.write_bytes(path.read_bytes()[:keep])
    rehash(copied)
    result = verify(copied)
    assert not result.holds and any(name in failure for failure in result.failures)


def test_a_changed_weight_is_found_by_replay_when_the_hash_was_adapted(copied):
    model = onnx.load(copied / "model.onnx")
    words = max(model.graph.initializer, key=lambda t: len(t.raw_data) if t.data_type == TensorProto.UINT8 else 0)
    values = numpy_helper.to_array(words).copy()
    values.reshape(-1)[::2] = 0
    words.CopyFrom(numpy_helper.from_array(values, words.name))
    onnx.save(model, copied / "model.onnx")
    rehash(copied)
    assert any("steps from the reference" in failure for failure in verify(copied).failures)


def test_a_missing_model_or_evidence_is_named(copied):
    (copied / "model.onnx").unlink()
    (copied / "evidence.safetensors").unlink()
    failures = verify(copied).failures
    assert any("model is missing" in f for f in failures) and any("evidence is missing" in f for f in failures)


def test_nothing_to_check_is_the_users_error(copied, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        verify(tmp_path / "absent.onnx")
    (copied / "certificate.json").unlink()
    with pytest.raises(UserError, match="there is no certificate"):
        verify(copied / "model.onnx")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"schema": 99}', '{"schema": 1}', '{"schema": 1, "holds": true, "file": 3}', "[" * 100_000],
)
def test_a_foreign_or_damaged_certificate_is_the_users_error(copied, text):
    (copied / "certificate.json").write_text(text)
    with pytest.raises(UserError, match=r"certificate"):
        verify(copied)


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "a/b.onnx", "", "..", 7])
def test_a_certificate_cannot_name_files_elsewhere(copied, name):
    certificate = json.loads((copied / "certificate.json").read_text())
    rewrite(copied, file={**certificate["file"], "name": name})
    assert any("not a plain file name" in failure for failure in verify(copied).failures)


def test_a_link_is_not_followed(copied, tmp_path):
    target = tmp_path / "elsewhere.onnx"
    shutil.move(copied / "model.onnx", target)
    os.symlink(target, copied / "model.onnx")
    assert any("or a link" in failure for failure in verify(copied).failures)


def test_another_onnxruntime_is_noted(copied):
    certificate = json.loads((copied / "certificate.json").read_text())
    rewrite(copied, versions={**certificate["versions"], "onnxruntime": "1.2.3"})
    result = verify(copied)
    assert result.holds and any("certified with onnxruntime 1.2.3" in note for note in result.notes)


def test_a_certificate_that_does_not_hold_fails(copied):
    rewrite(copied, holds=False, failures=["argmax equals on 50 %."])
    assert any("argmax equals on 50 %." in failure for failure in verify(copied).failures)


def _foreign_models():
    def model(initializers=(), nodes=None, domain="", shape=(1, 12, 12)):
        nodes = nodes or [helper.make_node("Identity", ["input"], ["output"])]
        value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", *shape]) for n in ("input", "output")]
        graph = helper.make_graph(nodes, "g", value[:1], value[1:], list(initializers))
        imports = [helper.make_opsetid("", 13), helper.make_opsetid("x.y", 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=8)

    outside = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="../../etc/passwd")
    absurd = TensorProto(name="w", data_type=TensorProto.INT8, dims=[1 << 40], raw_data=b"1")
    short = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[64], raw_data=b"1234")
    size = numpy_helper.from_array(np.array([1 << 20, 1 << 20], np.int64), "s")
    grow = [helper.make_node("ConstantOfShape", ["s"], ["t"]), helper.make_node("Identity", ["input"], ["output"])]
    strange = [helper.make_node("Run", ["input"], ["output"], domain="x.y")]
    return {
        "lies in '../../etc/passwd'": model([outside]),
        "claims 1099511627776 values": model([absurd]),
        "claims 256 bytes and has 4": model([short]),
        "would make a tensor": model([size], grow),
        "unknown domains": model(nodes=strange),
        "does not take the evidence": model(shape=(3, 99, 99)),
        "output shape": model(),
    }


@pytest.mark.parametrize("message", list(_foreign_models()))
def test_a_foreign_model_is_refused_with_the_reason(copied, message):
    (copied / "model.onnx").write_bytes(_foreign_models()[message].SerializeToString())
    rehash(copied)
    assert any(message in failure for failure in verify(copied).failures)


def test_foreign_evidence_is_refused(copied):
    path = copied / "evidence.safetensors"
    tensors = load_file(path)
    for change in ({"input": tensors["input"][:3]}, {"reference": tensors["reference"].astype(np.float64)}):
        save_file({**tensors, **change}, path)
        rehash(copied)
        assert any("evidence.safetensors" in failure for failure in verify_function(copied).failures)


def test_wrong_labels_and_empty_sets_are_the_users_error(made):
    exported = made[1]
    with pytest.raises(UserError, match="5 labels for 48 samples"):
        certify(exported, [_inputs()], torch.zeros(5), write=False)
    with pytest.raises(UserError, match="non-empty"):
        certify(exported, [], write=False)


def test_without_labels_the_metric_is_null(made):
    certificate = certify(made[1], [_inputs()], latency_runs=0, write=False)
    assert certificate["metric"]["onnxruntime"] is None and certificate["latency"] is None and certificate["holds"]


def test_a_reference_that_differs_fails_and_names_the_first_layer(made, tmp_path):
    """The reference is changed here, so that the file and it no longer agree."""
    model = randomize_norms(models.build("resnet8", num_classes=10, input_shape=(1, 12, 12), seed=0, width=8))
    x = _inputs()
    toy_quantize(model, x)
    exported = export(model, x[:2], tmp_path / "model.onnx")
    exported.reference.layer2_0_conv1.weight[:, 0] = 7
    assert first_diverging_layer(exported, x)["name"] == "layer2.0.conv1"
    certificate = certify(exported, [x], latency_runs=0)
    assert not certificate["holds"] and certificate["parity"]["first_diverging_layer"]["name"] == "layer2.0.conv1"
    assert not verify(tmp_path).holds


def test_evidence_is_capped_and_spread(made, tmp_path):
    exported = made[1]
    certificate = certify(exported, [_inputs()], latency_runs=0, evidence_bytes=10 * 144 * 4, write=False)
    assert certificate["holds"]
    from flatcompress.onnx_export.proof.evidence import Evidence

    kept = Evidence(np.arange(100, dtype=np.float32).reshape(100, 1), np.zeros((100, 2), np.float32)).capped(40)
    assert kept.input.reshape(-1).tolist() == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]


def test_bench_compares_files(made):
    folder = made[0]
    result = bench([folder / "model.onnx", folder / "model.onnx"], threads=(1, 2), runs=2)
    assert len(result["files"]) == 2
    assert set(result["files"][0]["latency"]) == {"1", "2"}
    with pytest.raises(UserError, match="no such file"):
        bench(folder / "absent.onnx")
    with pytest.raises(UserError, match=r"cannot load|not an ONNX file"):
        bench(folder / "certificate.json")
    with pytest.raises(UserError, match="at least 1"):
        bench(folder / "model.onnx", runs=0)
