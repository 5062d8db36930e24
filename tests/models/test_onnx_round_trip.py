"""ONNX files of four origins: in, equal; pruned, quantized, out, certified."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from flatcompress import models, onnx_export, prune, quant
from flatcompress.models import from_onnx
from flatcompress.onnx_export.runtime.sessions import feed, session


def written(model: nn.Module, example: tuple[torch.Tensor, ...], path, names: list[str]) -> None:
    """The file that torch's own exporter makes of a model, for any batch."""
    axes = {name: {0: "n"} for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), example, path, dynamo=False, input_names=names, output_names=["y"],
                          dynamic_axes={**axes, "y": {0: "n"}})  # fmt: skip


def round_trip(path, batches: list[Any], folder, ratio: float = 0.5) -> dict[str, Any]:
    """From the file to a pruned W8A8 file and its certificate."""
    module = from_onnx(path, batches[0])
    handle = session(path)
    given = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
    expected = handle.run(None, feed(handle, tuple(v.numpy() for v in given)))[0]
    with torch.no_grad():
        found = module.eval()(*given).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(expected).max())))
    before = sum(p.numel() for p in module.parameters())
    prune.prune(module, batches[0], ratio=ratio)
    assert sum(p.numel() for p in module.parameters()) < 0.9 * before
    quant.quantize(module, 8, 8, example_input=batches[0])
    quant.calibrate(module, batches)
    exported = onnx_export.export(module.eval(), batches[0], folder / "packed.onnx")
    certificate = onnx_export.certify(exported, batches, latency_runs=0)
    assert certificate["holds"], certificate["failures"]
    assert onnx_export.verify(exported.path).holds
    return certificate


def test_a_perceptron(tmp_path):
    random, sizes = np.random.default_rng(0), [12, 32, 24, 3]
    nodes, constants, last = [], [], "x"
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        weights = {f"w{i}": random.standard_normal((inputs, outputs)), f"b{i}": random.standard_normal((1, outputs))}
        constants += [numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights.items()]
        nodes += [helper.make_node("MatMul", [last, f"w{i}"], [f"m{i}"]),
                  helper.make_node("Add", [f"m{i}", f"b{i}"], [f"a{i}"])]  # fmt: skip
        last = f"a{i}"
        if i < 2:
            nodes.append(helper.make_node("Relu", [last], [f"r{i}"]))
            last = f"r{i}"
    nodes.append(helper.make_node("Softmax", [last], ["y"], axis=1))
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 12])]
    graph = helper.make_graph(
        nodes, "g", ends, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], constants
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    torch.manual_seed(0)
    certificate = round_trip(tmp_path / "m.onnx", [torch.randn(16, 12) for _ in range(3)], tmp_path)
    assert certificate["integer"]["share_of_macs"] == 1.0


def without_rounding(path) -> onnx.ModelProto:
    """A quantized file whose activations are not rounded: a pair of quantizers is the ReLU that it took in, if any."""
    model = onnx.load(path)
    made = {name: node for node in model.graph.node for name in node.output}
    constants = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        before = made.get(node.input[0])
        if node.op_type == "DequantizeLinear" and before is not None and before.op_type == "QuantizeLinear":
            zero = constants[before.input[2]]
            kind = "Relu" if (zero == np.iinfo(zero.dtype).min).all() else "Identity"
            nodes.append(helper.make_node(kind, [before.input[0]], [node.output[0]]))
        elif node.op_type != "QuantizeLinear":
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


@pytest.mark.parametrize("kind", ["QUInt8", "QInt8"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_file_of_quantize_static_is_read_as_the_network_it_was_made_of(kind, per_channel, tmp_path):
    from onnxruntime.quantization import QuantType

    x, module = quantized_file(tmp_path, activation_type=QuantType[kind], per_channel=per_channel)
    handle = session(without_rounding(tmp_path / "q.onnx").SerializeToString(), optimized=False)
    expected = handle.run(None, {"x": x.numpy()})[0]
    with torch.no_grad():
        found = module(x).numpy()
    largest = float(np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * largest)
    floats = session(tmp_path / "m.onnx").run(None, {"x": x.numpy()})[0]
    assert np.abs(found - floats).max() < 0.1 * largest  # but for its weights, which were rounded


def quantized_file(tmp_path, **options) -> tuple[torch.Tensor, nn.Module]:
    """A batch that onnxruntime calibrated a network on, and the module that the file of it becomes."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    torch.manual_seed(0)
    x = torch.randn(16, 3, 16, 16)
    written(models.build("resnet8", num_classes=4, input_shape=(3, 16, 16), seed=0), (x,), tmp_path / "m.onnx", ["x"])

    class Reader(CalibrationDataReader):
        rows = iter([{"x": row[None].numpy()} for row in x])

        def get_next(self):
            return next(self.rows, None)

    quantize_static(tmp_path / "m.onnx", tmp_path / "q.onnx", Reader(), **options)
    return x, from_onnx(tmp_path / "q.onnx", x)


def test_a_file_of_quantize_static(tmp_path):
    x, module = quantized_file(tmp_path)
    prune.prune(module, x, ratio=0.5)
    quant.quantize(module, 8, 8, example_input=x)
    quant.calibrate(module, [x])
    exported = onnx_export.export(module.eval(), x, tmp_path / "packed.onnx")
    certificate = onnx_export.certify(exported, [x], latency_runs=0)
    assert certificate["holds"] and certificate["integer"]["share_of_macs"] == 1.0


def test_a_transformers_classifier_with_its_mask(tmp_path):
    hub = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = hub.DistilBertConfig(vocab_size=60, dim=32, hidden_dim=64, n_layers=2, n_heads=4, num_labels=3,
                                  max_position_embeddings=16)  # fmt: skip

    class Logits(nn.Module):
        """Ids and mask in, logits out."""

        def __init__(self) -> None:
            super().__init__()
            self.model = hub.DistilBertForSequenceClassification._from_config(config, attn_implementation="eager")

        def forward(self, ids, mask):
            return self.model(input_ids=ids, attention_mask=mask).logits

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.ones(6, 10, dtype=torch.int64)
        mask[::2, 7:] = 0
        return torch.randint(0, 60, (6, 10)), mask

    batches = [batch() for _ in range(3)]
    written(Logits(), batches[0], tmp_path / "m.onnx", ["ids", "mask"])
    certificate = round_trip(tmp_path / "m.onnx", batches, tmp_path, ratio=0.25)
    assert certificate["integer"]["share_of_macs"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "ghostnet_050"])
def test_a_timm_network(name, tmp_path):
    timm = pytest.importorskip("timm", exc_type=Exception)
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 64, 64) for _ in range(2)]
    written(timm.create_model(name, num_classes=10), (batches[0],), tmp_path / "m.onnx", ["x"])
    assert round_trip(tmp_path / "m.onnx", batches, tmp_path)["integer"]["share_of_macs"] > 0.95
