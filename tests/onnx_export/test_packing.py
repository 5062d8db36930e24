from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from flatcompress.errors import UserError
from flatcompress.onnx_export import packing, unpack
from flatcompress.onnx_export.builder import GraphBuilder

ort.set_default_logger_severity(3)


def integers(shape: tuple[int, ...], bits: int, sparsity: float, seed: int) -> np.ndarray:
    """Random weights on the signed grid, with a share of zeros."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), shape)
    return np.where(rng.random(shape) < sparsity, 0, values).astype(np.int8)


def model_of(tensors: dict[str, tuple[np.ndarray, packing.Encoding]]) -> onnx.ModelProto:
    """A model without inputs whose outputs are the unpacked tensors."""
    builder = GraphBuilder()
    made = unpack.write(builder, tensors)
    outputs = []
    for name, (values, _) in tensors.items():
        builder.nodes.append(helper.make_node("Identity", [made[name]], [name]))
        outputs.append(helper.make_tensor_value_info(name, TensorProto.INT8, list(values.shape)))
    model = builder.model([], outputs)
    onnx.checker.check_model(model, full_check=True)
    return model


def through_onnxruntime(model: onnx.ModelProto) -> list[np.ndarray]:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {})


def through_reference(model: onnx.ModelProto) -> list[np.ndarray]:
    return ReferenceEvaluator(model).run(None, {})


shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)
tensors = st.tuples(shapes, st.integers(2, 8), st.sampled_from([0.0, 0.5, 0.8, 0.97, 1.0]), st.integers(0, 999))


@settings(max_examples=40, deadline=None)
@given(st.lists(tensors, min_size=1, max_size=4))
def test_any_tensors_come_back_through_onnxruntime_and_the_reference_evaluator(specs):
    made = {}
    for i, (shape, bits, sparsity, seed) in enumerate(specs):
        values = integers(shape, bits, sparsity, seed)
        made[f"t{i}"] = (values, packing.choose(values, bits))
    model = model_of(made)
    for run in (through_onnxruntime, through_reference):
        for result, (values, _) in zip(run(model), made.values()):
            assert result.dtype == np.int8
            np.testing.assert_array_equal(result, values)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(2, 8), st.floats(0, 1), st.integers(0, 999))
def test_every_encoding_that_applies_is_lossless(shape, bits, sparsity, seed):
    values = integers(shape, bits, sparsity, seed)
    width, offset = packing.value_range(values, bits)
    encodings = {packing.Encoding("dense", width, offset)}
    encodings |= {encoding for encoding, _ in packing._sparse_candidates(values, width, offset)}
    encodings.add(packing.Encoding("dense", 8, -128))
    for encoding in encodings:
        model = model_of({"t0": (values, encoding)})
        np.testing.assert_array_equal(through_onnxruntime(model)[0], values, err_msg=str(encoding))
        np.testing.assert_array_equal(through_reference(model)[0], values, err_msg=str(encoding))


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
@pytest.mark.parametrize("bits", range(2, 8))
def test_headroom_multiplies_what_comes_out(bits, sparsity):
    values = integers((16, 24, 3, 3), bits, sparsity, bits)
    encoding = dataclasses.replace(packing.choose(values, bits), headroom=7 - bits)
    model = model_of({"t0": (values, encoding)})
    for run in (through_onnxruntime, through_reference):
        np.testing.assert_array_equal(run(model)[0], values << (7 - bits))


@pytest.mark.parametrize("width", range(1, 8))
@pytest.mark.parametrize("count", [1, 31, 32, 33, 1000])
def test_words_hold_what_was_packed_and_waste_little(width, count):
    codes = np.random.default_rng(width).integers(0, 1 << width, count)
    words = packing.pack(codes, width)
    np.testing.assert_array_equal(packing.unpack(words, width, count), codes)
    assert words.nbytes == packing.packed_bytes(count, width)
    assert words.nbytes <= 1.07 * count * width / 8 + 8


def test_a_value_outside_its_grid_gets_one_more_bit():
    values = np.array([-7, 8, -8], np.int8)  # a sign flip of a 4-bit channel that held -8
    assert packing.choose(values, 4) == packing.Encoding("dense", 5, -8)
    shifted = np.array([-7, 8], np.int8)
    assert packing.choose(shifted, 4) == packing.Encoding("dense", 4, -7)
    for tensor in (values, shifted):
        model = model_of({"t0": (tensor, packing.choose(tensor, 4))})
        np.testing.assert_array_equal(through_onnxruntime(model)[0], tensor)


@pytest.mark.parametrize(("sparsity", "kind"), [(0.0, "dense"), (0.8, "mask")])
def test_the_smallest_encoding_wins(sparsity, kind):
    assert packing.choose(integers((64, 64, 3, 3), 4, sparsity, 0), 4).kind == kind


def test_one_of_four_is_stored_as_indices():
    values = np.zeros((32, 64), np.int8)
    values[:, ::4] = 3
    encoding = packing.choose(values, 4)
    assert (encoding.kind, encoding.n, encoding.m) == ("nm", 1, 4) or encoding.m > 4
    assert packing.choose(values.reshape(32, 64, 1, 1), 4).kind == "nm"


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8])
def test_stored_size_is_within_a_tenth_of_the_information_limit(bits, sparsity):
    values = integers((64, 32, 3, 3), bits, sparsity, bits)
    model = model_of({"t0": (values, packing.choose(values, bits))})
    assert model.ByteSize() <= 1.10 * packing.theoretical_bytes(values, bits) + 800


def test_unpacking_is_folded_away_when_onnxruntime_loads_the_file(tmp_path):
    cells = {}
    for i, (bits, sparsity) in enumerate([(3, 0.0), (4, 0.8), (4, 0.0), (7, 0.0)]):
        values = integers((32, 16, 3, 3), bits, sparsity, i)
        cells[f"t{i}"] = (values, packing.choose(values, bits))
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    ort.InferenceSession(model_of(cells).SerializeToString(), options, providers=["CPUExecutionProvider"])
    folded = onnx.load(options.optimized_model_filepath)
    assert {node.op_type for node in folded.graph.node} <= {"Identity"}


@pytest.mark.parametrize("bits", [1, 9, 0])
def test_other_bits_are_refused(bits):
    with pytest.raises(UserError, match="2 to 8"):
        packing.choose(np.zeros(3, np.int8), bits)


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="do not fit"):
        packing.pack(np.array([4]), 2)


@settings(max_examples=8, deadline=None)
@given(st.lists(tensors, min_size=1, max_size=4))
def test_any_tensors_come_back_through_openvino(specs):
    openvino = pytest.importorskip("openvino")
    made = {}
    for i, (shape, bits, sparsity, seed) in enumerate(specs):
        values = integers(shape, bits, sparsity, seed)
        made[f"t{i}"] = (values, packing.choose(values, bits))
    core = openvino.Core()
    found = core.compile_model(core.read_model(model_of(made).SerializeToString()), "CPU")([])
    for index, (values, _) in enumerate(made.values()):
        np.testing.assert_array_equal(found[index].reshape(values.shape), values)
