"""Calls of all ranks with what they must give in float64, for the tests of the kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from minimax_arithmetic import exact, random_rows, random_weight
from torch import Tensor

NRANKS = (1, 2, 3, 4, 5, 8, 16)
EPS = 1e-6
VECTOR_BYTES = 16
# MiniMax-M2, elements over all ranks: 48 heads of q and 8 of k, of 128 each.
M2_WIDTHS = (6144, 1024)

# Warps of a token, blocks and threads of a block: small grids, since those of all ranks share the
# GPU. Blocks with one team and with several, one block that does all, and more than tokens.
TUNINGS = (
    (1, 1, 32),
    (1, 3, 96),
    (1, 2, 512),
    (2, 3, 64),
    (2, 2, 128),
    (4, 2, 128),
    (8, 2, 256),
)

# Vectors of q and of k.
ODD_VECTORS = ((1, 1), (5, 0), (5, 3), (77, 5), (1, 300), (450, 7))

LAYOUTS = ("dense", "strided", "offset", "one_row")


def num_elements(num_vectors: int, dtype: torch.dtype) -> int:
    return num_vectors * VECTOR_BYTES // dtype.itemsize


def m2_widths(nranks: int, dtype: torch.dtype) -> tuple[int, int]:
    """A rank's share in elements, rounded down to whole vectors."""
    vector = num_elements(1, dtype)
    q, k = (width // nranks // vector * vector for width in M2_WIDTHS)
    return q, k


def all_widths(nranks: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    odd = [(num_elements(q, dtype), num_elements(k, dtype)) for q, k in ODD_VECTORS]
    return [m2_widths(nranks, dtype), *odd]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call of all ranks: of q and k with two widths, of whole rows with one."""

    inputs: list[Tensor]  # of each rank, [T, W]
    weights: list[tuple[Tensor, ...]]  # of each rank
    widths: tuple[int, ...]  # elements on a rank
    eps: float = EPS

    @property
    def nranks(self) -> int:
        return len(self.inputs)

    @property
    def num_tokens(self) -> int:
        return self.inputs[0].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs[0].dtype

    @property
    def row_bytes(self) -> int:
        return sum(self.widths) * self.dtype.itemsize

    def parts(self, rank: int) -> list[Tensor]:
        """What the rank normalizes: q and k, or the rows."""
        width = sum(self.widths)
        return list(self.inputs[rank][:, :width].split(list(self.widths), dim=1))

    def exact(self) -> list[list[Tensor]]:
        """In float64, by rank and then by part."""
        by_part = [
            exact(inputs, weights, self.eps)
            for inputs, weights in zip(
                zip(*map(self.parts, range(self.nranks)), strict=True),
                zip(*self.weights, strict=True),
                strict=True,
            )
        ]
        return [list(parts) for parts in zip(*by_part, strict=True)]

    def __str__(self) -> str:
        return (
            f"{self.nranks} ranks, {self.num_tokens} tokens of {self.widths} elements of "
            f"{self.dtype}, strides {self.inputs[0].stride()}"
        )


def place(values: Tensor, layout: str) -> Tensor:
    """The same rows in memory whose other elements are NaN."""
    num_tokens, width = values.shape
    vector = VECTOR_BYTES // values.element_size()
    if layout == "dense":
        return values.contiguous()
    if layout == "one_row":
        return values[:1].expand(num_tokens, width)
    row, first = (
        (width + 3 * vector, 0) if layout == "strided" else (width + 8 * vector, 5 * vector)
    )
    storage = values.new_full((num_tokens + 2, row), torch.nan)
    view = storage[1 : num_tokens + 1, first : first + width]
    view.copy_(values)
    return view


def make_problem(
    nranks: int,
    num_tokens: int,
    widths: Sequence[int],
    dtype: torch.dtype,
    generator: torch.Generator,
    layout: str = "dense",
) -> Problem:
    """What follows k in a row is NaN: it is not for the kernel to look at."""
    width = sum(widths)
    v_width = widths[1] if len(widths) > 1 else 0
    rows = random_rows(nranks * num_tokens, width, dtype, generator)
    v = rows.new_full((1, v_width), torch.nan).expand(nranks * num_tokens, -1)
    # An allocation for each rank, as on GPUs of their own.
    inputs = [
        place(x.clone(), layout)
        for x in torch.cat([rows, v], dim=1).view(nranks, num_tokens, width + v_width)
    ]
    weight = random_weight(nranks * width, dtype, generator).view(nranks, width)
    weights = [tuple(w.clone() for w in own.split(list(widths))) for own in weight]
    return Problem(inputs, weights, tuple(widths))
