"""What the RMSNorms have to give, in float64 and without the package's code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# What float32 may add to the rounding of a result, relative: from the sum of squares (half of its
# error), the square root and the products.
SLACK = 2.0**-20


def scaled(x: Tensor, weight: Tensor, mean_square: Tensor, eps: float) -> Tensor:
    """Rows in float64 whose mean square over all ranks is given, as [..., T, 1]."""
    scale = 1 / torch.sqrt(mean_square.double() + eps)
    return x.double() * scale * weight.double()


def exact(inputs: Sequence[Tensor], weights: Sequence[Tensor], eps: float) -> list[Tensor]:
    """The result of each rank in float64."""
    x = torch.stack(list(inputs)).double()
    squares = x.square().sum(dim=2, keepdim=True).sum(dim=0)
    mean_square = squares / (x.shape[2] * x.shape[0])
    return list(scaled(x, torch.stack(list(weights))[:, None], mean_square, eps).unbind())


def bounds(exact: Tensor, dtype: torch.dtype, slack: float = SLACK) -> tuple[Tensor, Tensor]:
    """The least and the greatest result that float32 may give for float64 values.

    They differ where a rounding tie of ``dtype`` is near. NaN where ``exact`` is.
    """
    # What is below float32's normal numbers loses more in a product of three.
    margin = exact.abs() * slack + 2.0**-146
    return (exact - margin).to(dtype), (exact + margin).to(dtype)


def outside(actual: Tensor, exact: Tensor, slack: float = SLACK) -> Tensor:
    """Where ``actual`` is not ``exact`` rounded once, but for what float32 may add."""
    assert actual.shape == exact.shape
    least, greatest = bounds(exact, actual.dtype, slack)
    inside = (actual >= least) & (actual <= greatest)
    # An infinity's margin is one, too.
    same = (exact.isinf() & (actual == exact)) | (exact.isnan() & actual.isnan())
    return ~(inside | same)


def assert_rounded(actual: Tensor, exact: Tensor, what: object = "", slack: float = SLACK) -> None:
    wrong = outside(actual, exact, slack)
    if wrong.any():
        place = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{what}: element {place} is {actual[place].item()!r}, exactly "
            f"{exact[place].item()!r}; {int(wrong.sum())} of {wrong.numel()} elements of "
            f"{actual.dtype} are wrong"
        )


def as_bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def differing(actual: Tensor, expected: Tensor) -> Tensor:
    """Where bits differ, but for the payload of a NaN."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    same_bits = as_bits(actual) == as_bits(expected)
    return ~(same_bits | (actual.isnan() & expected.isnan()))


def assert_same_bits(actual: Tensor, expected: Tensor, what: object = "") -> None:
    wrong = differing(actual, expected)
    if wrong.any():
        place = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{what}: element {place} is {actual[place].item()!r}, not {expected[place].item()!r}; "
            f"{int(wrong.sum())} of {wrong.numel()} elements of {actual.dtype} differ"
        )


def random_rows(
    num_tokens: int, width: int, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Normal values over some ten powers of two, each row times another one.

    So another row's sum shows.
    """
    options = {"generator": generator, "device": generator.device}
    exponents = torch.randint(-5, 5, (num_tokens, width), **options)
    exponents += torch.randint(-6, 4, (num_tokens, 1), **options)
    return torch.ldexp(torch.randn(num_tokens, width, **options), exponents).to(dtype)


def random_weight(width: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(width, generator=generator, device=generator.device).to(dtype)
