"""The reference against independent arithmetic: float64, and NumPy's float32 step by step."""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from all_reduce_cases import DTYPES, assert_same_bits, random_inputs, special_words
from custom_ar import reference


def in_numpy(inputs: list[torch.Tensor]) -> torch.Tensor:
    """The float32 sums of NumPy, in the order of the list, rounded to the dtype by torch."""
    total = inputs[0].float().numpy().copy()
    with np.errstate(all="ignore"):
        for tensor in inputs[1:]:
            total = np.add(total, tensor.float().numpy(), dtype=np.float32)
    return torch.from_numpy(total).to(inputs[0].dtype)


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world_size", range(1, 9))
def test_equals_numpy(generator: torch.Generator, world_size: int, dtype: torch.dtype) -> None:
    inputs = random_inputs(world_size, 5000, dtype, generator)
    before = [tensor.clone() for tensor in inputs]
    assert_same_bits([reference.all_reduce(inputs)], in_numpy(inputs))
    for tensor, copy in zip(inputs, before, strict=True):
        assert_same_bits([tensor], copy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype: torch.dtype) -> None:
    """Every pair of NaNs, infinities, zeros, subnormals and extremes."""
    values = special_words("cpu").view(dtype)
    first = values.repeat_interleave(len(values))
    second = values.repeat(len(values))
    result = reference.all_reduce([first, second])
    assert_same_bits([result], in_numpy([first, second]))
    is_negative_zero = (first == 0) & first.signbit() & (second == 0) & second.signbit()
    assert is_negative_zero.any()
    assert result[is_negative_zero].signbit().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_two_16_bit_values_are_rounded_once(generator: torch.Generator, dtype: torch.dtype) -> None:
    """Against exact rational sums: the nearest value of the type, ties to even."""
    inputs = random_inputs(2, 300, dtype, generator)
    result = reference.all_reduce(inputs)
    for a, b, got in zip(*(t.tolist() for t in (*inputs, result)), strict=True):
        exact = Fraction(a) + Fraction(b)
        value = torch.tensor(got, dtype=dtype)
        error = abs(Fraction(got) - exact)
        for direction in (torch.inf, -torch.inf):
            neighbour = torch.nextafter(value, torch.tensor(direction, dtype=dtype)).item()
            assert error <= abs(Fraction(neighbour) - exact), (a, b, got)


def test_order_is_that_of_the_ranks() -> None:
    values = (1.0, 2.0**-24, 2.0**-24)
    inputs = [torch.tensor([value]) for value in values]
    assert reference.all_reduce(inputs).item() == 1.0
    assert reference.all_reduce(inputs[::-1]).item() == 1.0 + 2.0**-23


def test_sums_do_not_overflow_on_the_way() -> None:
    """In float16 60000 + 60000 is infinite; the sum of all is not."""
    inputs = [torch.tensor([value], dtype=torch.float16) for value in (60000, 60000, -60000)]
    assert reference.all_reduce(inputs).item() == torch.tensor(60000.0).half().item()


def test_keeps_shape_and_strides(generator: torch.Generator) -> None:
    inputs = [tensor.t() for tensor in random_inputs(3, (4, 5), torch.float16, generator)]
    result = reference.all_reduce(inputs)
    assert result.shape == (5, 4)
    assert result.stride() == inputs[0].stride()
    assert not result.requires_grad
    assert reference.all_reduce([torch.empty(0), torch.empty(0)]).shape == (0,)


def test_one_rank_gets_a_copy() -> None:
    x = torch.ones(3, requires_grad=True)
    result = reference.all_reduce([x])
    assert result.data_ptr() != x.data_ptr()
    assert not result.requires_grad


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "all_reduce: inputs must have a tensor for each rank, got none"),
        (
            [torch.ones(3), torch.ones(4)],
            "all_reduce: inputs[1] must be [3] of torch.float32 as inputs[0] is, got [4] of "
            "torch.float32",
        ),
        (
            [torch.ones(3), torch.ones(3).half()],
            "all_reduce: inputs[1] must be [3] of torch.float32 as inputs[0] is, got [3] of "
            "torch.float16",
        ),
    ],
    ids=["none", "shape", "dtype"],
)
def test_bad_inputs(inputs: list[torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        reference.all_reduce(inputs)
