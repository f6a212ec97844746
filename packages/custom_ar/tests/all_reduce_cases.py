"""Inputs, poisoned outputs and comparison to the bit, for the tests of the kernels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WORLD_SIZES = range(2, 9)

# Around vectors of 16 bytes, warps and blocks, and sizes that fill neither.
LENGTHS = (1, 2, 3, 7, 8, 9, 63, 64, 65, 1000, 4095, 4096, 4097, 12345, 16384)

# Algorithm, number of blocks, threads per block and depth: one block that does all, partial warps,
# and more vectors under way than there are.
TUNINGS = (
    (0, 1, 64, 1),
    (0, 3, 96, 2),
    (0, 7, 512, 4),
    (1, 1, 64, 1),
    (1, 3, 96, 2),
    (1, 7, 512, 4),
)

# Of 32 bits: what a transfer might take for "not yet arrived" or mangle. In 16-bit types each is
# two values.
SPECIAL_WORDS = (
    0x00000000,  # zeros
    0x80000000,  # -0.0
    0x00008000,
    0x80008000,
    0xFFFFFFFF,  # NaN, whose complement is zero
    0xFFFFFFFE,
    0x7FFFFFFF,
    0x0000FFFF,
    0xFFFF0000,
    0xFFFF3F80,
    0x7FC00000,
    0x7F800000,  # infinities of float32 and bfloat16
    0xFF800000,
    0x7F80FF80,
    0x7C007C00,  # of float16
    0xFC00FC00,
    0x00000001,  # subnormals
    0x80000001,
    0x80010001,
    0x007FFFFF,
    0x807FFFFF,
    0x007F007F,
    0x03FF83FF,
    0x7F7FFFFF,  # the largest
    0xFF7FFF7F,
    0x7BFFFBFF,
    0x3F800000,
    0x3F803F80,
    0x3C00BC00,
)

_GUARD = 64  # elements, a multiple of 16 bytes in each type


def as_bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def differing(actual: Tensor, expected: Tensor) -> Tensor:
    """Where bits differ, but for the payload of a NaN."""
    same_bits = as_bits(actual) == as_bits(expected)
    return ~(same_bits | (actual.isnan() & expected.isnan()))


def assert_same_bits(actual: Iterable[Tensor], expected: Tensor, what: object = "") -> None:
    """Every rank's tensor has the bits of ``expected``."""
    actual = list(actual)
    for tensor in actual:
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
    wrong = torch.stack([differing(tensor, expected) for tensor in actual])
    if not wrong.any():
        return
    rank, *place = (int(i) for i in wrong.nonzero()[0])
    got, want = actual[rank][tuple(place)].item(), expected[tuple(place)].item()
    counts = wrong.reshape(len(actual), -1).sum(1).tolist()
    raise AssertionError(
        f"{what}: element {place} of rank {rank} is {got!r}, not {want!r}; wrong by rank: {counts}"
        f" of {expected.numel()} elements of {expected.dtype}"
    )


def special_words(device: torch.device | str) -> Tensor:
    return torch.tensor(SPECIAL_WORDS, dtype=torch.int64, device=device).to(torch.int32)


def random_values(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal values over some 30 powers of two, so that the order of additions shows."""
    options = {"generator": generator, "device": generator.device}
    exponents = torch.randint(-8, 6, shape, **options)
    return torch.ldexp(torch.randn(shape, **options), exponents).to(dtype)


def random_inputs(
    world_size: int, shape: int | Sequence[int], dtype: torch.dtype, generator: torch.Generator
) -> list[Tensor]:
    shape = (shape,) if isinstance(shape, int) else shape
    return [random_values(shape, dtype, generator) for _ in range(world_size)]


class Guarded:
    """NaNs, ``offset`` elements past an aligned address, between NaNs to be left alone."""

    def __init__(
        self, length: int, dtype: torch.dtype, offset: int = 0, device: torch.device | str = "cuda"
    ) -> None:
        self._storage = torch.empty(2 * _GUARD + offset + length, dtype=dtype, device=device)
        self._begin, self._end = _GUARD + offset, _GUARD + offset + length
        self.tensor = self._storage[self._begin : self._end]
        self.poison()

    def poison(self) -> None:
        as_bits(self._storage).fill_(-1)

    def fill(self, values: Tensor) -> Guarded:
        self.tensor.copy_(values)
        return self

    def is_intact(self) -> Tensor:
        """Whether nothing around the tensor was written."""
        bits = as_bits(self._storage)
        return (bits[: self._begin] == -1).all() & (bits[self._end :] == -1).all()
