from __future__ import annotations

import itertools
import json

import numpy as np
import onnx
import pytest
import torch
from conftest import randomize_norms, toy_quantize
from onnx.reference import ReferenceEvaluator
from torch import nn

from flatcompress import models, prune, quant
from flatcompress.errors import UserError
from flatcompress.onnx_export import PROFILES, export
from flatcompress.onnx_export.proof import parity
from flatcompress.onnx_export.runtime.sessions import INTEGER_KERNELS, kernels, run, session

SMALL = {"mobilenet_v2": {"width": 0.35}, "resnet18": {"width": 8}, "resnet50": {"width": 8}, "vit_tiny": {"depth": 2}}
BUILT_IN = sorted(models.MODELS)


def inputs(count: int = 32, shape: tuple[int, int, int] = (1, 16, 16), seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def quantized(
    name: str, weight_bits: int = 4, activation_bits: int = 4, sparsity: float = 0.0, cut: float = 0, shape=(1, 16, 16)
) -> nn.Module:
    model = models.build(name, num_classes=10, input_shape=shape, seed=0, **SMALL.get(name, {}))
    randomize_norms(model)
    if cut:
        before = sum(p.numel() for p in model.parameters())
        prune.prune(model, inputs(2, shape), ratio=cut, round_to=1)
        assert sum(p.numel() for p in model.parameters()) < before
    if sparsity:
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                keep = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(1)) >= sparsity
                module.weight.data *= keep
    x = inputs(shape=shape)
    quant.quantize(model, weight_bits=weight_bits, activation_bits=activation_bits, example_input=x[:2])
    quant.calibrate(model, [x])
    return model.eval()


def compared(model: nn.Module, path, profile: str = "packed", x: torch.Tensor | None = None, **options):
    x = inputs() if x is None else x
    exported = export(model, x[:2], path, profile, **options)
    reference = parity.reference_outputs(exported.reference, [x])
    step = parity.output_step(reference)
    found = run(session(exported.path), [x.numpy()])
    plain = run(session(exported.path, optimized=False), [x.numpy()])
    return exported, parity.compare(reference, found, step), parity.compare(reference, plain, step)


def _matrix() -> list:
    """Every built-in model at four settings, its channels cut or not, its weights masked or not; most are slow."""
    cases = itertools.product([(4, 4), (2, 4), (8, 8), (3, 8)], (0, 0.8), (0, 0.4), BUILT_IN)
    found = []
    for (weights, activations), sparsity, cut, name in cases:
        plain, small = not sparsity and not cut, name in ("resnet8", "ds_cnn")
        fast = (weights == 4 and plain) or (small and bool(sparsity) == bool(cut))
        marks = () if fast else (pytest.mark.slow,)
        found.append(pytest.param(name, weights, activations, sparsity, cut, marks=marks))
    return found


@pytest.mark.parametrize(("name", "weights", "activations", "sparsity", "cut"), _matrix())
def test_built_in_models_match_their_reference_and_run_on_integers(name, weights, activations, sparsity, cut, tmp_path):
    model = quantized(name, weights, activations, sparsity, cut)
    exported, optimized, plain = compared(model, tmp_path / "m.onnx")
    assert optimized["largest_error_steps"] <= 1
    assert optimized["equal_argmax"] == 1.0
    # Without optimizations floats are convolved. Means of 16 pixels lie on a rounding boundary every so often, and an
    # untrained network's logits are close; 50 such layers make more of a code that moves.
    assert plain["mean_error_steps"] <= (20 if name == "resnet50" else 2)
    found = kernels(exported.path).of
    layers = [row["name"] for row in exported.layers]
    assert [n for n in layers[1:] if found.get(n) not in INTEGER_KERNELS] == []


@pytest.mark.parametrize("profile", ["packed", "int8", "int4"])
def test_profiles_give_the_same_bits(profile, tmp_path):
    model = quantized("resnet8", 3, 4)
    exported, optimized, _ = compared(model, tmp_path / "m.onnx", profile)
    assert optimized["bit_equal"] == 1.0
    assert kernels(exported.path).counts["QLinearConv"] == 9


@pytest.mark.skipif(not hasattr(onnx.TensorProto, "INT2"), reason="this onnx has no INT2")
def test_two_bit_weights_become_int2_tensors(tmp_path):
    model = quantized("resnet8", 2, 4)
    packed, _, _ = compared(model, tmp_path / "p.onnx")
    exported, optimized, _ = compared(model, tmp_path / "m.onnx", "int4")
    assert exported.opset == 25 and optimized["bit_equal"] == 1.0
    # A small layer with a flipped channel stays in INT4: a sign per channel would not pay.
    assert "INT2" in {row["encoding"] for row in exported.layers} <= {"INT2", "INT4", "int8"}
    assert exported.bytes < 1.2 * packed.bytes


@pytest.mark.parametrize("profile", ["float32", "float16"])
@pytest.mark.parametrize("name", ["resnet8", "vit_tiny"])
def test_float_profiles_match_the_model(profile, name, tmp_path):
    model = randomize_norms(models.build(name, num_classes=10, input_shape=(1, 16, 16), seed=0)).eval()
    x = inputs()
    exported, optimized, _ = compared(model, tmp_path / "m.onnx", profile)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(exported.reference(x), expected, rtol=1e-3, atol=1e-4)
    assert optimized["largest_error_steps"] <= (0.01 if profile == "float32" else 1)
    assert optimized["equal_argmax"] == 1.0


def test_the_reference_repeats_the_quantized_model_but_for_bias_rounding(tmp_path):
    model, x = quantized("resnet8", 8, 8), inputs(64)
    exported = export(model, x[:2], tmp_path / "m.onnx")
    with torch.no_grad():
        trained, reference = model(x).numpy(), exported.reference(x).numpy()
    assert (trained.argmax(1) == reference.argmax(1)).mean() >= 0.98


def test_a_model_of_foreign_quantizers_exports_by_the_protocol_alone(tmp_path):
    x = inputs()
    model = randomize_norms(models.build("resnet8", num_classes=10, input_shape=(1, 16, 16), seed=0))
    toy_quantize(model, x, bits=4, activation_bits=4)
    exported, optimized, _ = compared(model, tmp_path / "m.onnx")
    assert optimized["bit_equal"] == 1.0
    assert any(row["weight_bits"] == 4 for row in exported.layers)


def test_the_batch_is_dynamic(tmp_path):
    exported = export(quantized("vit_tiny"), inputs(2), tmp_path / "m.onnx")
    handle = session(exported.path)
    for count in (1, 3, 7):
        assert handle.run(None, {"input": inputs(count).numpy()})[0].shape == (count, 10)


def test_the_reference_evaluator_agrees(tmp_path):
    x = inputs(4)
    # opset 21: the evaluator knows no DequantizeLinear older than 19
    exported, _, _ = compared(quantized("resnet8"), tmp_path / "m.onnx", x=x, opset=21)
    found = ReferenceEvaluator(str(exported.path)).run(None, {"input": x.numpy()})[0]
    expected = parity.reference_outputs(exported.reference, [x])
    assert parity.compare(expected, found, parity.output_step(expected))["largest_error_steps"] <= 1


def test_openvino_agrees(tmp_path):
    openvino = pytest.importorskip("openvino")
    x = inputs(16)
    for name in ("resnet8", "vit_tiny"):
        exported, _, _ = compared(quantized(name), tmp_path / "m.onnx", x=x)
        core = openvino.Core()
        # Its own low-precision pass drops the inner quantizer of a residual addition: a step or two per addition.
        options = {"INFERENCE_PRECISION_HINT": "f32"}
        found = core.compile_model(core.read_model(str(exported.path)), "CPU", options)(x.numpy())[0]
        expected = parity.reference_outputs(exported.reference, [x])
        assert parity.compare(expected, found, parity.output_step(expected))["mean_error_steps"] <= 5
        assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.9


def test_packed_size_stays_near_the_information_limit(tmp_path):
    for sparsity in (0.0, 0.8):
        exported, _, _ = compared(quantized("resnet20", 3, 4, sparsity), tmp_path / "m.onnx")
        assert exported.bytes <= 1.10 * exported.theoretical_bytes + 25_000
        assert exported.bytes == exported.path.stat().st_size


def test_the_file_says_what_it_is(tmp_path):
    exported = export(
        quantized("resnet8"),
        inputs(2),
        tmp_path / "m.onnx",
        metadata={"accuracy": "0.9"},
        class_names=[str(i) for i in range(10)],
    )
    model = onnx.load(exported.path)
    found = {p.key: p.value for p in model.metadata_props}
    assert json.loads(found["classes"])[3] == "3"
    assert found["accuracy"] == "0.9"
    assert json.loads(found["flatcompress.layers"])["layer1.0.conv1"][:2] == [4, 4]
    names = {node.name for node in model.graph.node}
    assert {"conv1", "layer3.0.downsample.0", "fc"} <= names
    assert model.opset_import[0].version == 13
    assert model.graph.input[0].name == "input" and model.graph.output[0].name == "output"


@pytest.mark.parametrize("opset", [15, 18, 21, 23])
def test_a_higher_opset_changes_nothing_but_the_opset(opset, tmp_path):
    for name in ("resnet8", "vit_tiny"):
        exported, optimized, _ = compared(quantized(name), tmp_path / "m.onnx", opset=opset)
        assert exported.opset == max(opset, 17 if name == "vit_tiny" else 0)
        assert optimized["largest_error_steps"] <= 1


def test_a_model_is_not_changed_by_export(tmp_path):
    model, x = quantized("resnet8"), inputs(4)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    export(model, x, tmp_path / "m.onnx")
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_every_profile_is_reachable_and_described():
    assert {"packed", "int8", "int4", "float32", "float16", "qonnx"} <= set(PROFILES)
    assert all(entry.summary for entry in PROFILES.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profile": "packd"}, "Did you mean 'packed'"),
        ({"profile": "packed"}, "no layer is quantized"),
        ({"profile": "float32", "opset": 99}, "opset 99"),
        ({"profile": "float32", "metadata": {"a": 1}}, "text to text"),
    ],
)
def test_wrong_requests_say_what_is_allowed(change, message, tmp_path):
    model = models.build("resnet8", num_classes=10, input_shape=(1, 16, 16), seed=0)
    with pytest.raises(UserError, match=message):
        export(model, inputs(2), tmp_path / "m.onnx", **change)
    assert not (tmp_path / "m.onnx").exists()


def test_a_quantized_model_is_no_float_model(tmp_path):
    with pytest.raises(UserError, match="layers are quantized"):
        export(quantized("resnet8"), inputs(2), tmp_path / "m.onnx", "float32")


def test_an_unwritable_path_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    model = models.build("resnet8", num_classes=10, input_shape=(1, 16, 16), seed=0)
    with pytest.raises(UserError, match="cannot be written"):
        export(model, inputs(2), tmp_path / "file" / "m.onnx", "float32")


class _Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(1, 2, 3), _Digamma())

    def forward(self, x):
        return self.inner(x).flatten(1)


class _Digamma(nn.Module):
    def forward(self, x):
        return torch.digamma(x)


def test_an_operator_without_a_form_is_named_with_its_module(tmp_path):
    with pytest.raises(UserError, match=r"inner\.1.*digamma"):
        export(_Strange(), inputs(2), tmp_path / "m.onnx", "float32")


def test_lowering_is_bit_equal_to_onnxruntime_on_every_kernel(tmp_path):
    exported, optimized, _ = compared(quantized("resnet8", 4, 4), tmp_path / "m.onnx", x=inputs(256))
    assert optimized["bit_equal"] == 1.0
    assert np.isfinite(parity.reference_outputs(exported.reference, [inputs(4)])).all()


TRANSFORMERS = {
    "transformers:resnet": {"hidden_sizes": [16, 32], "depths": [1, 1], "embedding_size": 16, "layer_type": "basic"},
    "transformers:mobilenet_v2": {"depth_multiplier": 0.35},
    "transformers:vit": dict(  # noqa: C408
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=8
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_models_match_their_reference_and_run_on_integers(name, tmp_path):
    pytest.importorskip("transformers")
    shape = (3, 32, 32)
    model = models.build(name, num_classes=10, input_shape=shape, seed=0, config=TRANSFORMERS[name])
    x = inputs(16, shape)
    _, optimized, _ = compared(model.eval(), tmp_path / "f.onnx", "float32", x=x)
    assert optimized["largest_error_steps"] <= 0.01
    quant.quantize(model, weight_bits=4, activation_bits=4, example_input=x[:2])
    quant.calibrate(model, [x])
    exported, optimized, _ = compared(model.eval(), tmp_path / "m.onnx", x=x)
    assert optimized["largest_error_steps"] <= 1 and optimized["equal_argmax"] == 1.0
    found = kernels(exported.path).of
    assert [r["name"] for r in exported.layers[1:] if found.get(r["name"]) not in INTEGER_KERNELS] == []
