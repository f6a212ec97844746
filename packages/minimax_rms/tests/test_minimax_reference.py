"""The reference against independent arithmetic in float64."""

from __future__ import annotations

import re

import pytest
import torch
from minimax_arithmetic import DTYPES, assert_rounded, exact, random_rows, random_weight
from minimax_rms import reference

MANY_RANKS = (1, 2, 3, 4, 8, 16)


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nranks", MANY_RANKS)
def test_one_norm(generator: torch.Generator, nranks: int, dtype: torch.dtype) -> None:
    for num_tokens, width, eps in ((1, 8, 1e-6), (7, 24, 0.0), (33, 768, 1e-5)):
        inputs = [random_rows(num_tokens, width, dtype, generator) for _ in range(nranks)]
        weights = [random_weight(width, dtype, generator) for _ in range(nranks)]
        before = [x.clone() for x in inputs]
        results = reference.minimax_allreduce_rms(inputs, weights, eps)
        for result, expected in zip(results, exact(inputs, weights, eps), strict=True):
            assert result.dtype == dtype
            assert result.is_contiguous()
            assert_rounded(result, expected, (num_tokens, width, eps))
        assert all(torch.equal(x, copy) for x, copy in zip(inputs, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nranks", MANY_RANKS)
def test_q_and_k(generator: torch.Generator, nranks: int, dtype: torch.dtype) -> None:
    for num_tokens, q_size, kv_size in ((1, 8, 8), (9, 384, 64), (5, 16, 40)):
        width = q_size + 2 * kv_size
        rows = [random_rows(num_tokens, width, dtype, generator) for _ in range(nranks)]
        weights_q = [random_weight(q_size, dtype, generator) for _ in range(nranks)]
        weights_k = [random_weight(kv_size, dtype, generator) for _ in range(nranks)]
        results = reference.minimax_allreduce_rms_qk(rows, weights_q, weights_k, 1e-6)
        expected_q = exact([x[:, :q_size] for x in rows], weights_q, 1e-6)
        expected_k = exact([x[:, q_size : q_size + kv_size] for x in rows], weights_k, 1e-6)
        assert len(results) == nranks
        for rank, (q, k) in enumerate(results):
            assert q.dtype == k.dtype == dtype
            assert q.is_contiguous()
            assert k.is_contiguous()
            assert_rounded(q, expected_q[rank], "q")
            assert_rounded(k, expected_k[rank], "k")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows(generator: torch.Generator, dtype: torch.dtype) -> None:
    rows = random_rows(6, 64, dtype, generator)
    weight = random_weight(16, dtype, generator)
    x = rows[::2, 16:32]
    [result] = reference.minimax_allreduce_rms([x], [weight], 1e-6)
    [expected] = reference.minimax_allreduce_rms([x.contiguous()], [weight], 1e-6)
    assert torch.equal(result, expected)
    assert result.stride() == (16, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_at_the_edges(dtype: torch.dtype) -> None:
    """Zeros, subnormals and the largest, with and without eps; a NaN stays in its token."""
    info = torch.finfo(dtype)
    # In float32 the squares of larger ones overflow, as the kernels' do.
    largest = info.max if dtype == torch.float16 else 2.0**60
    values = torch.tensor([0.0, -0.0, info.tiny / 4 if dtype == torch.float16 else 2.0**-60])
    values = torch.cat([values, torch.tensor([largest, -largest, 1.0])])
    rows = values.to(dtype)[:, None].repeat(1, 16)
    rows[1, 3] = 0.25
    weights = [torch.ones(16, dtype=dtype)] * 2
    inputs = [rows, rows.flip(1)]
    for eps in (1e-6, 1.0):
        results = reference.minimax_allreduce_rms(inputs, weights, eps)
        for result, expected in zip(results, exact(inputs, weights, eps), strict=True):
            assert_rounded(result, expected, eps)
    assert reference.minimax_allreduce_rms(inputs, weights, 0.0)[0][0].isnan().all()

    for bad in (float("nan"), float("inf")):
        spoiled = [rows.clone(), inputs[1]]
        spoiled[0][2, 5] = bad
        clean = reference.minimax_allreduce_rms(inputs, weights, 1e-6)
        results = reference.minimax_allreduce_rms(spoiled, weights, 1e-6)
        assert results[0][2, 5].isnan()
        assert (results[1][2].isnan() if bad != bad else results[1][2] == 0).all()
        others = [0, 1, 3, 4, 5]
        for result, wanted in zip(results, clean, strict=True):
            assert torch.equal(result[others], wanted[others])


def test_order_is_that_of_the_ranks() -> None:
    sums = [torch.tensor([value]) for value in (1.0, 2.0**-24, 2.0**-24)]
    assert reference.total_of_ranks(sums).item() == 1.0
    assert reference.total_of_ranks(sums[::-1]).item() == 1.0 + 2.0**-23
    assert [value.item() for value in sums] == [1.0, 2.0**-24, 2.0**-24]


def test_no_tokens_and_no_k() -> None:
    [(q, k)] = reference.minimax_allreduce_rms_qk(
        [torch.ones(0, 16)], [torch.ones(8)], [torch.ones(4)], 1e-6
    )
    assert (q.shape, k.shape) == ((0, 8), (0, 4))
    [(q, k)] = reference.minimax_allreduce_rms_qk(
        [torch.ones(3, 8)], [torch.ones(8)], [torch.ones(0)], 0.0
    )
    assert torch.equal(q, torch.ones(3, 8))
    assert k.shape == (3, 0)


def test_no_gradient_is_recorded() -> None:
    x, weight = torch.ones(2, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    assert not reference.minimax_allreduce_rms([x], [weight], 1e-6)[0].requires_grad


X, W = torch.ones(2, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("inputs", "weights", "message"),
    [
        ([], [], "inputs must have a tensor for each rank, got none"),
        ([X], [], "norm_weights must have a tensor for each rank, got none"),
        ([X, X], [W], "norm_weights must have a tensor for each of 2 ranks, got 1"),
        (
            [X, X[:1]],
            [W, W],
            "inputs[1] must be [2, 8] of torch.float32 as inputs[0] is, got [1, 8] of "
            "torch.float32",
        ),
        (
            [X, X],
            [W, W.half()],
            "norm_weights[1] must be [8] of torch.float32 as norm_weights[0] is, got [8] of "
            "torch.float16",
        ),
    ],
    ids=["no input", "no weight", "count", "shape", "dtype"],
)
def test_bad_inputs(inputs: list[torch.Tensor], weights: list[torch.Tensor], message: str) -> None:
    expected = re.escape(f"minimax_allreduce_rms: {message}")
    with pytest.raises(ValueError, match=f"^{expected}$"):
        reference.minimax_allreduce_rms(inputs, weights, 1e-6)
