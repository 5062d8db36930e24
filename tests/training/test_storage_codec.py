from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, deque

import numpy as np
import pytest
import torch
from faulty_os import outcome
from hypothesis import given, settings
from hypothesis import strategies as st

from flatcompress.errors import UserError
from flatcompress.store.codec import decode, encode, unshared

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool]
tensors = st.builds(
    lambda dtype, shape, seed: torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 99),
)
arrays = st.builds(
    lambda dtype, n: np.arange(n).astype(dtype), st.sampled_from("?bBhHiIqQefdFD"), st.integers(0, 4)
) | st.sampled_from([np.float32(0.1), np.float64("nan"), np.uint32(7), np.zeros((2, 0, 3))])
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.complex_numbers()
    | st.sampled_from([torch.float32, torch.device("cpu"), torch.Size([1, 2]), 2**53, -(2**64), 2**900])
    | tensors
    | arrays
)
keys = st.text(max_size=4) | st.integers() | st.just("$") | st.tuples(st.integers(), st.text(max_size=2))
states = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.lists(inner, max_size=3).map(lambda v: deque(v, maxlen=5))
        | st.dictionaries(keys, inner, max_size=3).map(OrderedDict)
    ),
    max_leaves=8,
)


def same(a, b) -> bool:
    """Equal in type and in every bit (NaN equals NaN, -0.0 differs from 0.0)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a.items(), b.items()))
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, complex):
        return same((a.real, a.imag), (b.real, b.imag))
    return a == b


def through_json(value):
    skeleton, taken = encode(value)
    return decode(json.loads(json.dumps(skeleton, allow_nan=False)), taken)


@given(states)
def test_any_nested_state_comes_back_in_type_and_bits(value):
    assert same(value, through_json(value))


def test_an_integer_of_five_thousand_digits_comes_back():
    assert through_json(10**5000) == 10**5000


def test_counters_and_sets_come_back():
    value = {"milestones": Counter({30: 1, 60: 2}), "frozen": {"a", "b"}, "deque": deque([1.5], maxlen=3)}
    back = through_json(value)
    assert back == value and type(back["milestones"]) is Counter and back["deque"].maxlen == 3


def test_one_tensor_met_twice_stays_one_and_views_come_apart():
    base = torch.arange(10.0)
    back = through_json({"a": base, "b": base, "slice": base[2:4], "t": torch.ones(2, 3).t()})
    assert back["a"] is back["b"]
    assert back["slice"].tolist() == [2.0, 3.0] and back["slice"].untyped_storage().nbytes() == 8
    assert back["t"].shape == (3, 2)


def test_short_lived_arrays_do_not_alias():
    value = [np.full(64, i) for i in range(50)]  # each makes a temporary tensor; a reused id would alias two
    assert same(value, through_json(value))


def test_tied_weights_and_views_are_cloned():
    weight = torch.randn(4, 4)
    stored = unshared({"a": weight, "b": weight, "c": weight[0], "e1": torch.empty(0), "e2": torch.empty(0)})
    pointers = [t.untyped_storage().data_ptr() for t in stored.values() if t.numel()]
    assert len(set(pointers)) == 3 and torch.equal(stored["a"], stored["b"])


@pytest.mark.parametrize(
    "value",
    [object(), lambda: 0, {"deep": [object()]}, np.array([object()]), torch.eye(2).to_sparse(), bytearray(b"x"), print,
     torch.empty(2, device="meta")],
)  # fmt: skip
def test_what_cannot_be_stored_is_refused_by_name(value):
    with pytest.raises(TypeError, match="cannot be stored"):
        encode(value)


def test_endless_nesting_is_refused():
    loop: list = []
    loop.append(loop)
    with pytest.raises(TypeError, match="nested"):
        encode(loop)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    | st.fixed_dictionaries(
        {
            "$": st.sampled_from(
                ["int", "float", "tensor", "numpy", "ndarray", "bytes", "dtype", "device", "size", "complex", "tuple",
                 "dict", "counter", "ordered", "deque", "set", "eval"]
            ) | inner,
            "v": inner | st.just("t0")
            | st.fixed_dictionaries(
                {"dtype": st.sampled_from(["int8", "object", "<M8[s]"]), "shape": inner, "data": st.just("t0")}
            ),
        }
    ),
    max_leaves=10,
)  # fmt: skip


@settings(max_examples=400)
@given(json_values)
def test_a_hostile_skeleton_decodes_or_is_a_user_error(skeleton):
    error = outcome(UserError, decode, skeleton, {"t0": torch.zeros(8, dtype=torch.uint8)})
    assert error is None or "state" in error
