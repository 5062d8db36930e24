"""A network in an ONNX file comes back as a module: equal, prunable, quantizable; a file not to be trusted does not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from flatcompress import models, onnx_export, prune, quant
from flatcompress.errors import UserError
from flatcompress.models import from_onnx
from flatcompress.onnx_export.runtime.sessions import run, session


def written(model: nn.Module, x: torch.Tensor, path, **options) -> str:
    """The file that torch's own exporter makes of a model."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), (x,), path, dynamo=False, input_names=["x"], output_names=["y"], **options)
    return str(path)


def equal(path, x: torch.Tensor) -> nn.Module:
    """The module of a file, after its outputs were compared with onnxruntime's."""
    module = from_onnx(path, x[:2])
    with torch.no_grad():
        found = module(x).numpy()
    expected = run(session(path), [x.numpy()])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(expected).max())))
    return module


@pytest.mark.parametrize("name", ["resnet8", "mobilenet_v2", "vit_tiny"])
def test_a_file_of_torchs_exporter_gives_equal_outputs_under_the_models_own_names(name, tmp_path):
    model = models.build(name, num_classes=5, input_shape=(3, 32, 32), seed=0)
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    path = written(model, x, tmp_path / "m.onnx", dynamic_axes={"x": {0: "n"}, "y": {0: "n"}})
    found = equal(path, x)
    ours = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    theirs = {n for n, m in found.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert len(theirs) == len(ours) and len(theirs & ours) >= 0.9 * len(ours)


def test_a_file_fixed_to_a_batch_of_one_takes_any_batch(tmp_path):
    model = models.build("ds_cnn", num_classes=5, input_shape=(1, 20, 12), seed=0).eval()
    x = torch.randn(4, 1, 20, 12, generator=torch.Generator().manual_seed(0))
    module = from_onnx(written(model, x[:1], tmp_path / "m.onnx"))
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(x), rtol=1e-5, atol=1e-5)


def test_from_a_file_to_a_smaller_certified_file(tmp_path):
    model = models.build("resnet8", num_classes=4, input_shape=(3, 16, 16), seed=0)
    x = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    written(model, x[:1], tmp_path / "float.onnx")
    module = models.build(f"onnx:{tmp_path}/float.onnx", num_classes=4, input_shape=(3, 16, 16))
    before = sum(p.numel() for p in module.parameters())
    prune.prune(module, x[:2], ratio=0.5, importance="group_l2")
    assert sum(p.numel() for p in module.parameters()) < 0.75 * before
    quant.quantize(module, 4, 4, example_input=x[:2])
    quant.calibrate(module, [x])
    exported = onnx_export.export(module.eval(), x[:2], tmp_path / "packed.onnx")
    certificate = onnx_export.certify(exported, [x], latency_runs=0)
    assert certificate["holds"], certificate["failures"]


def test_a_quantized_file_comes_back_dequantized(tmp_path):
    model = models.build("resnet8", num_classes=4, input_shape=(3, 16, 16), seed=0)
    x = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    quant.quantize(model, 8, 4, example_input=x[:2])
    quant.calibrate(model, [x])
    onnx_export.export(model.eval(), x[:2], tmp_path / "m.onnx", "packed")
    module = from_onnx(tmp_path / "m.onnx")
    assert sum(isinstance(m, nn.Conv2d) for m in module.modules()) == 9
    with torch.no_grad():
        found, expected = module(x), model(x)
    assert float((found - expected).abs().max()) < 0.3 * float(expected.max() - expected.min())


def test_a_file_of_quantize_static_comes_back_dequantized(tmp_path):
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    model = models.build("resnet8", num_classes=4, input_shape=(3, 16, 16), seed=0)
    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    path = written(model, x[:1], tmp_path / "m.onnx")

    class Reader(CalibrationDataReader):
        rows = iter([{"x": row[None].numpy()} for row in x])

        def get_next(self):
            return next(self.rows, None)

    quantize_static(path, tmp_path / "q.onnx", Reader(), activation_type=QuantType.QUInt8, per_channel=True)
    module = from_onnx(tmp_path / "q.onnx")
    with torch.no_grad():
        found, expected = module(x), model.eval()(x)
    assert float((found - expected).abs().max()) < 0.05 * float(expected.max() - expected.min())


def made(nodes, constants, shape=("n", 4), outputs=("y",)) -> onnx.ModelProto:
    """A small model of nodes with an input x."""
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    start = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))
    graph = helper.make_graph(nodes, "g", [start], ends, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_perceptron_as_scikit_learn_writes_one(tmp_path):
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "coefficient"], ["a"]),
        helper.make_node("Add", ["a", "intercepts"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "coefficient1"], ["d"]),
        helper.make_node("Add", ["d", "intercepts1"], ["e"]),
        helper.make_node("Softmax", ["e"], ["y"], axis=1),
    ]
    shapes = {"coefficient": (4, 8), "intercepts": (1, 8), "coefficient1": (8, 3), "intercepts1": (1, 3)}
    constants = {name: random.random(shape, np.float32) for name, shape in shapes.items()}
    onnx.save(made(nodes, constants), tmp_path / "m.onnx")
    module = equal(tmp_path / "m.onnx", torch.randn(5, 4))
    assert [type(m).__name__ for m in module.children()] == ["Linear", "Linear"]


LOOP = helper.make_node("Loop", ["", "", "x"], ["y"], name="round", body=helper.make_graph([], "b", [], []))
HUGE = {"c": np.float32(1), "s": np.array([1 << 40])}


@pytest.mark.parametrize(
    ("node", "constants", "message"),
    [
        (LOOP, {}, "node 'round'"),
        (helper.make_node("NonMaxSuppression", ["x", "x"], ["y"], name="boxes"), {}, "'boxes' .NonMaxSuppression"),
        (helper.make_node("Expand", ["c", "s"], ["y"], name="big"), HUGE, "would make a tensor of"),
        (helper.make_node("Steal", ["x"], ["y"], domain="evil.domain"), {}, "unknown domains"),
        (helper.make_node("Relu", ["nothing"], ["y"], name="lost"), {}, "'lost' .Relu. does not run"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(node, constants, message, tmp_path):
    onnx.save(made([node], constants), tmp_path / "m.onnx")
    with pytest.raises(UserError, match=message):
        from_onnx(tmp_path / "m.onnx", torch.zeros(2, 4))


def test_no_file_and_open_sizes_are_said(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        from_onnx(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(UserError, match="ONNX"):
        from_onnx(tmp_path / "text.onnx")
    onnx.save(made([helper.make_node("Relu", ["x"], ["y"])], {}, shape=("n", 3, "h", "w")), tmp_path / "open.onnx")
    with pytest.raises(UserError, match="give an example_input"):
        from_onnx(tmp_path / "open.onnx")
    assert from_onnx(tmp_path / "open.onnx", torch.zeros(2, 3, 8, 8))(torch.zeros(1, 3, 9, 9)).shape == (1, 3, 9, 9)
