"""All-reduces for compute-sanitizer: ``python sanitizer_driver.py [OVERRUN]``.

All ranks run in this process. Each tensor is an allocation of its own that ends with its last
element, which takes ``PYTORCH_NO_CUDA_MEMORY_CACHING=1``. Prints how many calls it made.

With OVERRUN, the name of a tensor argument, it instead makes one call in which that tensor's
allocation on one rank is 16 elements shorter than its shape says. memcheck must report it.

Needs torch and the package; with OVERRUN also NumPy, which torch reads array interfaces with. The
exit code is 3 where kernels of several streams do not run at once: the ranks would wait in vain.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import torch
from all_reduce_cases import DTYPES, as_bits, differing, random_inputs, special_words
from custom_ar import reference
from exact_tensors import exact_copy
from gpu_machine import SERIALISED
from local_ranks import LocalRanks
from rank_streams import why_not_at_once
from torch import Tensor

WORLD_SIZES = (2, 3)
TUNINGS = (None, (0, 1, 64, 1), (0, 3, 96, 2), (1, 1, 64, 1), (1, 3, 96, 4))
LENGTHS = (1, 2, 7, 8, 9, 63, 257, 1000)
MISSING_ELEMENTS = 16


def place(values: Tensor, offset: int = 0, missing: int = 0) -> Tensor:
    """A CUDA copy that ends with its allocation, ``offset`` elements after its begin.

    The allocation lacks the last ``missing`` elements.
    """
    return exact_copy(torch.cat([values.new_zeros(offset), values]), missing)[offset:]


def poison_like(values: Tensor) -> Tensor:
    poison = torch.empty_like(values)
    as_bits(poison).fill_(-1)
    return poison


def run(
    ranks: LocalRanks,
    values: list[Tensor],
    tuning: tuple[int, ...] | None,
    offsets: tuple[int, int] = (0, 0),
    in_place: bool = False,
    overrun: str | None = None,
) -> None:
    """One all-reduce of CPU tensors, whose last rank is the one that lacks memory."""
    missing = [0] * (ranks.world_size - 1) + [MISSING_ELEMENTS]
    inputs = [
        place(v, (offsets[0] + rank) % 8 if offsets[0] else 0, m if overrun == "inp" else 0)
        for rank, (v, m) in enumerate(zip(values, missing, strict=True))
    ]
    outputs = inputs
    if not in_place:
        outputs = [
            place(poison_like(v), offsets[1], m if overrun == "out" else 0)
            for v, m in zip(values, missing, strict=True)
        ]
    torch.cuda.synchronize()
    ranks.all_reduce(inputs, outputs, tuning)
    torch.cuda.synchronize()
    expected = reference.all_reduce(values)
    for rank, output in enumerate(outputs):
        if differing(output.cpu(), expected).any():
            sys.exit(f"rank {rank} is wrong: tuning {tuning}, {values[0].shape}, {values[0].dtype}")


def run_all(generator: torch.Generator) -> Iterator[None]:
    for world_size in WORLD_SIZES:
        with LocalRanks(world_size, max_size=4096, timeout=120) as ranks:
            for dtype in DTYPES:
                for tuning in TUNINGS:
                    for length in LENGTHS:
                        values = random_inputs(world_size, length, dtype, generator)
                        yield run(ranks, values, tuning)
                    values = random_inputs(world_size, 77, dtype, generator)
                    yield run(ranks, values, tuning, offsets=(1, 3))
                    yield run(ranks, values, tuning, in_place=True)
                    yield run(ranks, values, tuning, offsets=(1, 0), in_place=True)
                words = special_words("cpu").view(dtype)
                yield run(ranks, [words] * world_size, None)
        # In pieces.
        with LocalRanks(world_size, max_size=512, timeout=120) as ranks:
            for tuning in (None, (0, 3, 96, 2), (1, 3, 96, 2)):
                for length in (256, 1283):
                    values = random_inputs(world_size, length, torch.bfloat16, generator)
                    yield run(ranks, values, tuning)
        # A rank that does not come.
        for tuning in (None, (1, 3, 96, 2)):
            with LocalRanks(world_size, timeout=1) as ranks:
                values = random_inputs(world_size, 777, torch.float16, generator)
                run(ranks, values, tuning)
                inputs = [place(v) for v in values]
                outputs = [place(v) for v in values]
                ranks.launch(
                    lambda rank, i=inputs, o=outputs, t=tuning, r=ranks: r.call(
                        rank, i[rank], o[rank], t
                    ),
                    ranks=range(world_size - 1),
                )
                if "did not take part" not in ranks.failure(0):
                    sys.exit(f"a rank did not come, and there was no error: {ranks.failures()}")
                if not outputs[0].cpu().isnan().all():
                    sys.exit("a rank did not come, and the output is not NaN")
                yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrun", nargs="?", choices=("inp", "out"))
    overrun = parser.parse_args().overrun
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
        # torch would cut tensors out of larger allocations, where memcheck sees no overrun.
        sys.exit("sanitizer_driver.py: PYTORCH_NO_CUDA_MEMORY_CACHING must be 1")
    if reason := why_not_at_once(max(WORLD_SIZES)):
        print(reason)
        sys.exit(SERIALISED)
    generator = torch.Generator().manual_seed(2026)
    if overrun is not None:
        values = random_inputs(2, 1000, torch.bfloat16, generator)
        with LocalRanks(2, timeout=5) as ranks:
            run(ranks, values, None, overrun=overrun)
        count = 1
    else:
        count = sum(1 for _ in run_all(generator))
    torch.cuda.synchronize()
    print(f"{count} calls")


if __name__ == "__main__":
    main()
