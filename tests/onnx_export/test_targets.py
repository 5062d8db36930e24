"""Targets: what each sets, what its lint finds, and what its tool makes of a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import randomize_norms
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from flatcompress import models, quant
from flatcompress.errors import UserError
from flatcompress.onnx_export import PROFILES, TARGETS, certify, check_target, export, verify
from flatcompress.onnx_export.proof import parity
from flatcompress.onnx_export.runtime.sessions import INTEGER_KERNELS, kernels, run, session
from flatcompress.onnx_export.targets import judge, lint, table, tools

WRITTEN = [name for name in TARGETS if not TARGETS[name]().instead]
SHAPE = (1, 16, 16)


def quantized(name: str = "resnet8", bits: int = 8, **options) -> tuple[nn.Module, torch.Tensor]:
    model = models.build(name, num_classes=10, input_shape=SHAPE, seed=0, **{"vit_tiny": {"depth": 1}}.get(name, {}))
    randomize_norms(model)
    x = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(0))
    quant.quantize(model, weight_bits=bits, activation_bits=4 if bits == 4 else 8, example_input=x[:2], **options)
    quant.calibrate(model, [x])
    return model.eval(), x


def written(target: str, path, name: str = "resnet8", bits: int = 8, **options):
    chosen = TARGETS[target]()
    model, x = quantized(name, bits, **chosen.quantize, **options)
    return export(model, x[:2], path, chosen.profile), x


@pytest.mark.parametrize(("target", "name"), [*((t, "resnet8") for t in WRITTEN), ("tensorrt", "vit_tiny")])
def test_a_target_s_file_keeps_its_published_rules(target, name, tmp_path):
    if TARGETS[target]().profile == "litert":
        pytest.importorskip("ai_edge_litert")
    exported, x = written(target, tmp_path / "m.onnx", name, 4)
    model = onnx.load(exported.path)
    assert [sentence for rule in TARGETS[target]().rules for sentence in rule(model)] == []
    expected = parity.reference_outputs(exported.reference, [x])
    found = run(session(exported.path), [x.numpy()])
    assert parity.compare(expected, found, parity.output_step(expected))["largest_error_steps"] <= 1


@pytest.mark.parametrize("profile", ["qdq", "openvino"])
def test_plain_forms_still_run_on_integer_kernels(profile, tmp_path):
    model, x = quantized(bits=8)
    exported = export(model, x[:2], tmp_path / "m.onnx", profile)
    layers = [row["name"] for row in exported.layers]
    found = kernels(exported.path).of
    assert [n for n in layers if found.get(n) not in INTEGER_KERNELS] == []


def test_codes_that_int8_with_zero_point_0_does_not_hold_are_refused_and_symmetric_ones_are_not(tmp_path):
    model, x = quantized()
    with pytest.raises(UserError, match="symmetric: true"):
        export(model, x[:2], tmp_path / "m.onnx", "qdq_symmetric")
    model, x = quantized(symmetric=True)
    exported = export(model, x[:2], tmp_path / "m.onnx", "qdq_symmetric")
    zeros = [numpy_helper.to_array(t) for t in onnx.load(exported.path).graph.initializer if t.data_type == 3]
    assert all(not zero.any() for zero in zeros if zero.ndim == 0)


def test_symmetric_excludes_a_quantizer_with_zero_points():
    with pytest.raises(UserError, match="zero points"):
        quantized(symmetric=True, method="lsq+")


def test_a_plan_says_symmetric_only_where_it_is():
    model = models.build("resnet8", num_classes=10, input_shape=SHAPE, seed=0)
    plain = quant.quantize(model, example_input=torch.zeros(2, *SHAPE))
    assert "symmetric" not in plain.of_kind("quantizers")[0]["settings"]
    other = models.build("resnet8", num_classes=10, input_shape=SHAPE, seed=0)
    plan = quant.quantize(other, 8, 8, example_input=torch.zeros(2, *SHAPE), symmetric=True)
    assert plan.of_kind("quantizers")[0]["settings"]["symmetric"] is True
    again = models.build("resnet8", num_classes=10, input_shape=SHAPE, seed=0)
    quant.apply(again, plan.of_kind("quantizers")[0])
    assert all(row["signed"] for row in plan.of_kind("quantizers")[0]["activations"])


def graph(*nodes, **constants) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    made = helper.make_graph(list(nodes), "g", [], [], tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 13)])


def node(kind, *names, out="y", **attributes):
    return helper.make_node(kind, list(names), [out], **attributes)


BREACHES = {
    "domain": (lint.operators(), graph(node("Quant", "x", domain="elsewhere")), "elsewhere"),
    "opset": (lint.opset(19), graph(), "opset 13"),
    "codes": (
        lint.codes(TensorProto.INT8),
        graph(node("QuantizeLinear", "x", "s", "z"), s=np.float32(1), z=np.uint8(0)),
        "uint8",
    ),
    "zero point": (
        lint.symmetric,
        graph(node("QuantizeLinear", "x", "s", "z"), s=np.float32(1), z=np.int8(3)),
        "zero point",
    ),
    "weights": (
        lint.symmetric_weights,
        graph(node("DequantizeLinear", "w", "s", "z"), w=np.zeros(2, np.uint8), s=np.float32(1), z=np.uint8(128)),
        "uint8",
    ),
    "bias": (
        lint.real_biases,
        graph(node("DequantizeLinear", "b", "s"), b=np.zeros(2, np.int32), s=np.float32(1)),
        "int32",
    ),
    "scale": (
        lint.per_channel,
        graph(
            node("Mul", "a", "a", out="s"), node("DequantizeLinear", "w", "s"), a=np.float32(1), w=np.zeros(2, np.int8)
        ),
        "computed",
    ),
    "plain": (
        lint.plain,
        graph(node("QuantizeLinear", "x", "s", out="q"), node("Clip", "q"), s=np.float32(1)),
        "integer tensor",
    ),
    "unpacked": (
        lint.plain,
        graph(
            node("Cast", "w", out="c", to=3),
            node("DequantizeLinear", "c", "s"),
            w=np.zeros(2, np.uint8),
            s=np.float32(1),
        ),
        "neither a constant",
    ),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_of_a_rule_is_found(breach):
    rule, model, words = BREACHES[breach]
    assert words in " ".join(rule(model))


def test_a_missing_tool_and_a_target_without_one_are_said(tmp_path, monkeypatch):
    exported, x = written("openvino", tmp_path / "m.onnx")
    absent = table.Target("openvino", "openvino", tool=tools.Tool("no-such-package", "openvino", tools.openvino))
    monkeypatch.setattr("flatcompress.onnx_export.targets.checking._target", lambda name: absent)
    found = check_target(exported, [x], "openvino")
    assert found["run"] is None and "flatcompress[openvino]" in found["why_not"] and found["failures"] == []
    monkeypatch.undo()
    exported, x = written("tensorrt", tmp_path / "t.onnx")
    found = check_target(exported, [x], "tensorrt")
    assert found["run"] is None and "nothing was run" in found["why_not"] and "not run on a device" in found["device"]


def test_a_tool_that_gives_other_outputs_or_none_fails(tmp_path, monkeypatch):
    exported, x = written("onnxruntime-cpu", tmp_path / "m.onnx")
    assert check_target(exported, [x], "onnxruntime-cpu")["failures"] == []

    def wrong(path, names, batches, output):
        result, how = tools.onnxruntime(path, names, batches, output)
        return result + 50 * result.std(), how

    def broken(path, names, batches, output):
        raise RuntimeError("no such operator")

    for runs, words in ((wrong, "steps from the reference"), (broken, "does not run the file")):
        other = table.Target("onnxruntime-cpu", "packed", tool=tools.Tool("onnxruntime", None, runs))
        monkeypatch.setattr("flatcompress.onnx_export.targets.checking._target", lambda name, other=other: other)
        assert words in " ".join(check_target(exported, [x], "onnxruntime-cpu")["failures"])


def test_a_file_of_another_profile_and_executorch_are_refused(tmp_path):
    exported, x = written("onnxruntime-cpu", tmp_path / "m.onnx")
    with pytest.raises(UserError, match="reads profile 'qdq'"):
        check_target(exported, [x], "qnn")
    with pytest.raises(UserError, match="no ExecuTorch"):
        check_target(exported, [x], "executorch")
    with pytest.raises(UserError, match="openvino"):
        check_target(exported, [x], "openvin")


@pytest.mark.parametrize("name", ["resnet8", pytest.param("resnet20", marks=pytest.mark.slow)])
def test_openvino_computes_what_onnxruntime_does(name, tmp_path):
    pytest.importorskip("openvino")
    for bits in (7, 4):  # with 8 its int8 kernels saturate on processors without VNNI
        exported, x = written("openvino", tmp_path / "m.onnx", name, bits, first_last_bits=7)
        found = check_target(exported, [x], "openvino")
        assert found["failures"] == [] and found["run"]["equal_argmax"] == 1.0
        assert "CPU plugin, 0 of" not in found["run"]["how"]


@pytest.mark.parametrize("target", ["tensorrt", "qnn"])
def test_weights_that_saturate_here_do_not_count_against_a_file_for_another_tool(target, tmp_path):
    chosen = TARGETS[target]()
    model = models.build("resnet8", num_classes=10, input_shape=SHAPE, seed=0)
    randomize_norms(model)
    x = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(0))
    quant.post_training(model, [x], 8, 8, method="lsq", correction="none", **chosen.quantize)
    exported = export(model.eval(), x[:2], tmp_path / "m.onnx", chosen.profile)
    certificate = certify(exported, [x], latency_runs=0, evaluations=16)
    assert certificate["holds"] and not certificate["parity"]["fused"] and certificate["integer"]["holds"] is None
    assert verify(tmp_path / "m.onnx").holds


def test_layers_that_the_tool_computes_in_floats_are_a_warning(tmp_path, monkeypatch):
    exported, x = written("onnxruntime-cpu", tmp_path / "m.onnx")

    def half(path, names, batches, output):
        result, told = tools.onnxruntime(path, names, batches, output)
        return result, {**told, "integer_layers": 4, "layers": 10}

    other = table.Target("openvino", "packed", tool=tools.Tool("onnxruntime", None, half))
    monkeypatch.setattr("flatcompress.onnx_export.targets.checking._target", lambda name: other)
    certificate = {"failures": [], "warnings": [], "holds": True}
    judge(certificate, exported, [x], "openvino", "argmax")
    assert certificate["holds"] and "6 of 10 layers compute in floats" in " ".join(certificate["warnings"])
    assert "quantizer: lsq" in " ".join(certificate["warnings"])


def test_qonnx_executes_its_profile(tmp_path):
    pytest.importorskip("qonnx")
    exported, x = written("hls4ml", tmp_path / "m.onnx", bits=4)
    found = check_target(exported, [x], "hls4ml")
    assert found["failures"] == [] and found["run"]["samples"] == 8


@pytest.mark.slow
def test_qualcomm_s_emulation_loads_its_file(tmp_path):
    pytest.importorskip("onnxruntime_qnn")
    exported, x = written("qnn", tmp_path / "m.onnx", "ds_cnn")
    found = check_target(exported, [x], "qnn")
    assert found["failures"] == [] and found["run"]["samples"] == 16 and " 0 of" not in found["run"]["how"]


def test_the_docs_and_the_lists_name_the_same_profiles_and_targets():
    root = Path(__file__).parents[2]
    readme, page = (root / "export" / "README.md").read_text(), (root / "docs" / "export.md").read_text()
    targets = {line.split("|")[1].strip().strip("`"): line.split("|")[2].strip().strip("`")
               for line in readme.split("## Targets")[1].splitlines() if line.startswith("| `")}  # fmt: skip
    assert targets == {name: TARGETS[name]().profile or "none" for name in TARGETS}
    section = page.split("## Profiles")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert {name.strip().strip("`") for row in rows for name in row.split(",")} == set(PROFILES)


def test_a_certificate_keeps_the_target_s_row(tmp_path):
    exported, x = written("tensorrt", tmp_path / "m.onnx")
    certificate = certify(exported, [x], latency_runs=0, evaluations=16)
    judge(certificate, exported, [x], "tensorrt", "argmax")
    assert certificate["holds"] and certificate["target"]["name"] == "tensorrt"
    assert any("nothing was run" in warning for warning in certificate["warnings"])
    json.dumps(certificate)
