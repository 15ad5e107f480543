import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_unlearn.store.state_tree import flatten_state, unflatten_state

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
STATES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.integers() | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


def there_and_back(state):
    tensors = {}
    tree = json.loads(json.dumps(flatten_state(state, "state", tensors), allow_nan=False))
    return unflatten_state(tree, tensors)


@given(STATES)
def test_plain_data_comes_back_with_its_types(state):
    back = there_and_back(state)
    assert back == state
    assert repr(back) == repr(state)  # tuples stay tuples, 1 does not become "1", 0.0 stays a float


def test_nan():
    assert np.isnan(there_and_back([float("nan")])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8])
def test_tensors_come_back_bit_for_bit(dtype):
    state = {1: torch.tensor([[0, 1, 2]]).to(dtype), "1": torch.tensor(7).to(dtype), "t": torch.ones(2, 3).mT.to(dtype)}
    back = there_and_back(state)
    assert list(back) == [1, "1", "t"]  # the same path does not mean the same tensor
    for key, tensor in state.items():
        assert back[key].dtype == dtype
        assert torch.equal(back[key], tensor)


@pytest.mark.parametrize("dtype", ["uint32", "int8", "float32"])
def test_arrays_come_back(dtype):
    state = np.array([0, 1, 255], dtype) if dtype != "int8" else np.array([-1, 127], dtype)
    back = there_and_back({"key": state})["key"]
    assert back.dtype == state.dtype
    assert np.array_equal(back, state)


@pytest.mark.parametrize("state", [object(), {"a": {"b": print}}, [b"bytes"], {(1, 2): 3}, {1.5: 2}])
def test_anything_else_is_refused_with_its_place(state):
    with pytest.raises(TypeError, match="state"):
        flatten_state(state, "state", {})


@pytest.mark.parametrize("tree", [{"dict": 1}, {"tensor": "missing"}, {"a": 1, "b": 2}, {"unknown": []}, {"float": {}}])
def test_what_is_no_tree(tree):
    with pytest.raises(ValueError, match=r"state|values"):
        unflatten_state(tree, {})
