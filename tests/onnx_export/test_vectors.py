from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from flatcompress.onnx_export.emit.builder import GraphBuilder
from flatcompress.onnx_export.pack.vectors import bits_of, store_floats, store_integers, stored_bits

ort.set_default_logger_severity(3)


def through(builder: GraphBuilder, names: list[str], kind: int) -> list[list[np.ndarray]]:
    """What onnxruntime and the reference evaluator make of the named tensors."""
    for name in names:
        builder.nodes.append(helper.make_node("Identity", [name], [f"out_{name}"]))
    outputs = [helper.make_tensor_value_info(f"out_{name}", kind, [None]) for name in names]
    model = builder.model([], outputs)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [session.run(None, {}), ReferenceEvaluator(model).run(None, {})]


@settings(max_examples=25, deadline=None)
@example([(1, 23, 0)])  # 24 bits: the upper digit alone fills a byte
@given(st.lists(st.tuples(st.integers(1, 2000), st.integers(0, 31), st.integers(0, 99)), min_size=1, max_size=5))
def test_any_biases_come_back(specs):
    vectors = {}
    for i, (count, bits, seed) in enumerate(specs):
        vectors[f"v{i}"] = np.random.default_rng(seed).integers(-(1 << bits), 1 << bits, count).astype(np.int32)
    builder = GraphBuilder()
    made = store_integers(builder, vectors)
    for found in through(builder, [made[name] for name in vectors], TensorProto.INT32):
        for result, vector in zip(found, vectors.values()):
            np.testing.assert_array_equal(result, vector)


@settings(max_examples=25, deadline=None)
@given(st.floats(-60, 20), st.floats(0, 12), st.integers(1400, 3000), st.integers(0, 99))
def test_any_scales_come_back_bit_for_bit(middle, spread, count, seed):
    rng = np.random.default_rng(seed)
    vectors = {n: np.exp2(rng.normal(middle, spread / 3, count)).astype(np.float32) for n in ("a", "b")}
    builder = GraphBuilder()
    made = store_floats(builder, vectors)
    if not made:  # so many exponents that there is nothing to save
        return
    for found in through(builder, [made[name] for name in vectors], TensorProto.FLOAT):
        for result, vector in zip(found, vectors.values()):
            np.testing.assert_array_equal(result.view(np.uint32), vector.view(np.uint32))


def test_scales_of_a_thin_network_take_less_than_they_did():
    scales = {"a": np.exp2(np.random.default_rng(0).normal(-7, 1, 8000)).astype(np.float32)}
    builder = GraphBuilder()
    assert store_floats(builder, scales)
    assert builder.model([], []).ByteSize() < 8000 * 27.5 / 8 + 1000


def test_few_scales_zeros_and_subnormals_stay_as_they_are():
    many = np.full(4000, 1e-40, np.float32)
    for vectors in ({"a": np.ones(10, np.float32)}, {"a": many}, {"a": np.zeros(4000, np.float32)}, {}):
        builder = GraphBuilder()
        assert store_floats(builder, vectors) == {} and not builder.nodes


@pytest.mark.parametrize(("values", "bits"), [([0], 8), ([127, -128], 8), ([128], 9), ([-129], 9), ([-(1 << 20)], 21)])
def test_bits_of_a_bias(values, bits):
    assert bits_of(np.array(values, np.int32)) == bits
    assert bits <= stored_bits(bits) <= bits + 1


def test_layers_of_unlike_biases_get_streams_of_their_own():
    rng = np.random.default_rng(0)
    wide, narrow = rng.integers(-(1 << 15), 1 << 15, 4000), rng.integers(-(1 << 9), 1 << 9, 4000)
    builder = GraphBuilder()
    store_integers(builder, {"wide": wide.astype(np.int32), "narrow": narrow.astype(np.int32)})
    assert builder.model([], []).ByteSize() < 4000 * (16 + 10) / 8 + 800
