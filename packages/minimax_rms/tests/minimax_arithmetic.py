"""What the RMSNorms have to give, in float64 and without the package's code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# What float32 may add to the rounding of the result: relative, from the sum of squares (half of its
# error), the square root and the products.
SLACK = 2.0**-18


def exact(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], eps: float, mean_over: int | None = None
) -> list[Tensor]:
    """The result of each rank in float64. ``mean_over``: elements of a row, unless all ranks'."""
    squares = [x.double().square().sum(dim=1, keepdim=True) for x in inputs]
    mean = torch.stack(squares).sum(dim=0) / (mean_over or sum(x.shape[1] for x in inputs))
    scale = 1 / torch.sqrt(mean + eps)
    return [x.double() * scale * w.double() for x, w in zip(inputs, weights, strict=True)]


def assert_rounded(actual: Tensor, expected: Tensor, what: object = "") -> None:
    """``actual`` is ``expected``, float64, rounded once to the dtype of ``actual``.

    But for what float32 adds. NaNs and infinities must be where they are expected.
    """
    assert actual.shape == expected.shape, what
    dtype = torch.finfo(actual.dtype)
    bound = expected.abs() * (dtype.eps / 2 + SLACK) + dtype.smallest_normal * dtype.eps
    # Just below the largest value the result may round to infinity.
    is_huge = expected.abs() > dtype.max * (1 - SLACK)
    close = (actual.double() - expected).abs() <= bound
    same = (actual.double() == expected) | (actual.isnan() & expected.isnan())
    overflown = is_huge & actual.isinf() & (actual.sign() == expected.sign())
    wrong = ~(close | same | overflown)
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are wrong, the first at "
            f"{place}: {actual[place].item()!r}, not {expected[place].item()!r}"
        )


def random_rows(
    num_tokens: int, width: int, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Normal values, each row times a power of two, so that another row's sum shows."""
    options = {"generator": generator, "device": generator.device}
    exponents = torch.randint(-6, 7, (num_tokens, 1), **options)
    return torch.ldexp(torch.randn(num_tokens, width, **options), exponents).to(dtype)


def random_weight(width: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(width, generator=generator, device=generator.device).to(dtype)
