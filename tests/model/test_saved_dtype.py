"""Weights as numbers of the dtype that they will be saved in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_families import make_model

from prunus.errors import NonFiniteError
from prunus.model.saved_dtype import round_weights_, rounded, save_in_, saved_dtype

VALUES = torch.tensor([1.0, 1 + 2**-9, 3.14159265, -65519.0, 1e-6])


def test_a_model_is_saved_in_its_own_dtype_unless_somebody_says_otherwise():
    model = make_model("llama").to(torch.bfloat16)
    assert saved_dtype(model) == torch.bfloat16
    save_in_(model, torch.float16)
    assert saved_dtype(model) == torch.float16
    assert model.dtype == torch.bfloat16


def test_rounded_to_float16_as_numpy_rounds():
    expected = torch.from_numpy(VALUES.numpy().astype(np.float16).astype(np.float32))
    found = rounded(VALUES, torch.float16)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_rounded_to_bfloat16_as_the_upper_half_of_the_bits():
    bits = VALUES.numpy().view(np.uint32).astype(np.uint64)
    # To the nearest, ties to even.
    upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    expected = torch.from_numpy(upper.astype(np.uint32).view(np.float32))
    assert torch.equal(rounded(VALUES, torch.bfloat16), expected)


@pytest.mark.parametrize(
    ("held", "saved"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float64),
    ],
)
def test_what_the_dtype_holds_is_not_copied(held, saved):
    values = VALUES.to(held)
    assert rounded(values, saved) is values


def test_values_of_a_file_in_that_dtype_are_not_copied():
    values = VALUES.to(torch.bfloat16).float()
    assert rounded(values, torch.bfloat16) is values


def test_half_precisions_do_not_hold_each_other():
    values = torch.tensor([2.0**-30, 1.5], dtype=torch.bfloat16)
    assert torch.equal(rounded(values, torch.float16), torch.tensor([0.0, 1.5], dtype=torch.bfloat16))


def test_what_float16_cannot_hold():
    with pytest.raises(NonFiniteError, match=r"a weight of 70000 is too large for float16.*`save_dtype=bfloat16`"):
        rounded(torch.tensor([1.0, -70000.0]), torch.float16)


def test_indices_stay():
    numbers = torch.arange(3)
    assert rounded(numbers, torch.float16) is numbers


def test_all_weights_of_a_model():
    model = make_model("llama")
    expected = {name: weight.to(torch.bfloat16).float() for name, weight in model.state_dict().items()}
    save_in_(model, torch.bfloat16)
    round_weights_(model)
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
