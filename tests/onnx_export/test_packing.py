from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from flatcompress.errors import UserError
from flatcompress.onnx_export.emit.builder import GraphBuilder
from flatcompress.onnx_export.pack import digits, packing, unpack

ort.set_default_logger_severity(3)


def integers(shape: tuple[int, ...], bits: int, sparsity: float, seed: int) -> np.ndarray:
    """Random weights on the signed grid, with a share of zeros."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), shape)
    return np.where(rng.random(shape) < sparsity, 0, values).astype(np.int8)


def model_of(tensors: dict[str, tuple[np.ndarray, packing.Encoding]]) -> onnx.ModelProto:
    """A model without inputs whose outputs are the unpacked tensors."""
    builder = GraphBuilder()
    made = unpack.Unpacker(builder).write(tensors)
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


@settings(max_examples=20, deadline=None)
@example((3, 4), 4, 1.0, 0)
@given(shapes, st.integers(2, 8), st.floats(0, 1), st.integers(0, 999))
def test_every_encoding_that_applies_is_lossless(shape, bits, sparsity, seed):
    values = integers(shape, bits, sparsity, seed)
    found = packing.Statistics.of(values, bits)
    low, high = found.low, found.high
    spans = [(-128, 127), (low, max(high, low + 1)), (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)]
    encodings = {packing.Encoding("dense", first, last - first + 1) for first, last in spans}
    kinds = [("mask", 0), *(("groups", m) for m in packing.MASK_GROUPS)]  # of zeros alone too: beside other layers
    encodings |= {packing.Encoding(kind, a, max(2, b - a), m=m) for kind, m in kinds for a, b in spans}
    encodings |= set(found.candidates())
    for encoding in sorted(encodings, key=str):
        assert found.fits(encoding)
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


@pytest.mark.parametrize("radix", [2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 127, 128])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_a_stream_gives_back_its_digits_in_the_bytes_it_says(radix, count):
    codes = np.random.default_rng(radix).integers(0, radix, count)
    builder = GraphBuilder()
    table = np.arange(radix, dtype=np.int32).reshape(-1, 1)
    name = unpack.Unpacker(builder).exactly(codes, table, [count])
    model = builder.model([], [helper.make_tensor_value_info(name, TensorProto.INT32, [count])])
    for run in (through_onnxruntime, through_reference):
        np.testing.assert_array_equal(run(model)[0], codes)
    words = sum(len(t.raw_data) for t in builder.constants.values() if t.data_type == TensorProto.UINT8)
    assert words == digits.stored_bytes(count, radix)
    assert words <= count * digits.bits(radix) / 8 + 32


@pytest.mark.parametrize("radix", range(2, 129))
def test_a_digit_takes_little_more_than_its_information(radix):
    assert np.log2(radix) <= digits.bits(radix) <= np.ceil(np.log2(radix))


def test_a_value_outside_its_grid_gets_what_it_needs():
    values = np.array([-7, 8, -8], np.int8)  # a sign flip of a 4-bit channel that held -8
    assert packing.choose(values, 4) == packing.Encoding("dense", -8, 17)
    shifted = np.array([-7, 8], np.int8)
    assert packing.choose(shifted, 4) == packing.Encoding("dense", -7, 16)
    for tensor in (values, shifted):
        model = model_of({"t0": (tensor, packing.choose(tensor, 4))})
        np.testing.assert_array_equal(through_onnxruntime(model)[0], tensor)


def test_a_narrow_range_takes_fewer_bits_where_that_pays():
    ternary = np.random.default_rng(0).integers(-1, 2, (64, 64)).astype(np.int8)
    assert packing.choose(ternary, 2) == packing.Encoding("dense", -1, 3)
    assert packing.choose(ternary, 8).radix == 3
    assert packing.choose(ternary[:4], 2) == packing.Encoding("dense", -2, 4)


def test_an_encoding_that_saves_less_than_its_sub_graph_is_given_up():
    ternary = np.random.default_rng(0).integers(-1, 2, (64, 64)).astype(np.int8)
    full = np.random.default_rng(1).integers(-2, 2, (512, 64)).astype(np.int8)
    alone = packing.choose_together({"a": packing.Statistics.of(ternary, 2)})
    both = {"a": packing.Statistics.of(ternary, 2), "b": packing.Statistics.of(full, 2)}
    assert alone["a"].radix == 3
    assert {encoding.radix for encoding in packing.choose_together(both).values()} == {4}


def test_two_of_four_is_stored_as_sets_of_positions():
    rng = np.random.default_rng(0)
    values = rng.integers(1, 8, (64, 16, 4, 3))
    groups = values.reshape(64, 4, 4, 4, 3)
    groups[np.argsort(rng.random(groups.shape), axis=2) >= 2] = 0
    encoding = packing.choose(values.astype(np.int8), 4)
    assert (encoding.kind, encoding.n, encoding.m, encoding.channels_last) == ("nm", 2, 4, True)
    assert packing.best_bytes(values.astype(np.int8), 4) <= values.size * (2 + 2.7 / 4) / 8


@pytest.mark.parametrize(("sparsity", "kind"), [(0.0, "dense"), (0.5, "mask"), (0.8, "groups")])
def test_the_smallest_encoding_wins(sparsity, kind):
    assert packing.choose(integers((64, 64, 3, 3), 4, sparsity, 0), 4).kind == kind


def test_one_of_four_is_stored_as_indices():
    values = np.zeros((128, 256), np.int8)
    values[:, ::4] = np.random.default_rng(0).integers(1, 8, (128, 64))
    encoding = packing.choose(values, 4)
    assert (encoding.kind, encoding.n, encoding.m) == ("nm", 1, 4) or encoding.m > 4
    assert packing.choose(values.reshape(128, 256, 1, 1), 4).kind == "nm"


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8])
def test_stored_size_is_within_a_tenth_of_the_information_limit(bits, sparsity):
    values = integers((64, 32, 3, 3), bits, sparsity, bits)
    model = model_of({"t0": (values, packing.choose(values, bits))})
    assert model.ByteSize() <= 1.10 * packing.theoretical_bytes(values, bits) + 2000


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
