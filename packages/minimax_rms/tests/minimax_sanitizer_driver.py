"""RMSNorms for compute-sanitizer: ``python minimax_sanitizer_driver.py [OVERRUN]``.

All ranks run in this process. Each tensor is an allocation of its own that ends with its last
element, which takes ``PYTORCH_NO_CUDA_MEMORY_CACHING=1``. Prints how many calls it made.

With OVERRUN it instead makes one call in which one rank's input, norm_weight or communication
buffer is shorter than it is said to be. memcheck must report it.

Needs torch and the package; with OVERRUN also NumPy, which torch reads array interfaces with. The
exit code is 3 where kernels of several streams do not run at once: the ranks would wait in vain.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import torch
from exact_tensors import exact_copy
from gpu_machine import SERIALISED
from minimax_arithmetic import DTYPES, outside
from minimax_cases import TUNINGS, Problem, make_problem
from minimax_local_ranks import LocalRanks
from rank_streams import SLEEP_CYCLES, why_not_at_once
from torch import Tensor

NRANKS = (1, 2, 3)
# Tokens, and vectors of q and k.
SHAPES = ((1, (1, 1)), (5, (77, 5)), (2, (450, 7)), (33, (5, 3)), (3, (64, 0)))
WIDE = (2, (2600, 30))
# Tokens, and by warps of a team rows of q and k that fill its registers.
FULL = (7, {1: (192, 32), 2: (384, 64), 4: (768, 128), 8: (768, 256)})
MISSING_ELEMENTS = 16
MISSING_BUFFER_BYTES = 512


def exact_rows(values: Tensor, missing: int = 0) -> Tensor:
    """A CUDA copy of the same strides, in an allocation from its first to its last element.

    The allocation lacks the last ``missing`` elements.
    """
    last = sum((n - 1) * stride for n, stride in zip(values.shape, values.stride(), strict=True))
    elements = values.as_strided((last + 1,), (1,), values.storage_offset())
    return exact_copy(elements.contiguous(), missing).as_strided(values.shape, values.stride())


def on_device(problem: Problem, overrun: str | None = None) -> Problem:
    """The last rank is the one that lacks memory."""
    missing = [0] * (problem.nranks - 1) + [MISSING_ELEMENTS]
    return dataclasses.replace(
        problem,
        inputs=[
            exact_rows(x, m if overrun == "input" else 0)
            for x, m in zip(problem.inputs, missing, strict=True)
        ],
        weights=[
            tuple(exact_copy(weight, m if overrun == "norm_weight" else 0) for weight in weights)
            for weights, m in zip(problem.weights, missing, strict=True)
        ],
    )


def allocations_wait() -> bool:
    """Whether an allocation waits for the kernels that run, as it may under a tool."""
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES)
    _ = torch.empty(1000, device="cuda")
    waited = side.query()
    torch.cuda.synchronize()
    return waited


class Driver:
    def __init__(self) -> None:
        # The operators allocate their outputs: where that waits for a peer's kernel, all of it is
        # done in captures before any kernel runs.
        self.must_capture = allocations_wait()

    def call_all(
        self, ranks: LocalRanks, problem: Problem, tuning: Sequence[int] | None, present: int
    ) -> list[tuple[Tensor, ...]]:
        """The calls of the first ``present`` ranks, over when this returns."""
        outputs: list[tuple[Tensor, ...]] = []

        def call(rank: int) -> None:
            outputs.append(ranks.call(rank, problem, tuning))

        torch.cuda.synchronize()
        if self.must_capture:
            graphs = ranks.capture(call, error_mode="relaxed")
            ranks.launch(lambda rank: graphs[rank].replay(), range(present))
        else:
            ranks.launch(call, range(present))
        torch.cuda.synchronize()
        return outputs[:present]

    def run(
        self,
        ranks: LocalRanks,
        problem: Problem,
        tuning: Sequence[int] | None = None,
        overrun: str | None = None,
    ) -> None:
        """One call of all ranks with CPU tensors."""
        outputs = self.call_all(ranks, on_device(problem, overrun), tuning, ranks.nranks)
        for rank, (parts, exact_parts) in enumerate(zip(outputs, problem.exact(), strict=True)):
            for part, exact in zip(parts, exact_parts, strict=True):
                if outside(part.cpu(), exact).any():
                    sys.exit(f"rank {rank} is wrong: {problem}, tuning {tuning}")

    def run_all(self, generator: torch.Generator) -> Iterator[None]:
        def problem_of(
            nranks: int,
            tokens: int,
            vectors: Sequence[int],
            dtype: torch.dtype,
            layout: str = "dense",
        ) -> Problem:
            widths = [count * 16 // dtype.itemsize for count in vectors]
            return make_problem(nranks, tokens, widths, dtype, generator, layout)

        count = 0
        for nranks in NRANKS:
            options = {"max_tokens": 64, "timeout": 120, "is_registered": True, "guard_bytes": 0}
            with LocalRanks(nranks, **options) as ranks:
                for tuning in (None, *TUNINGS):
                    for tokens, vectors in SHAPES:
                        dtype = DTYPES[count % len(DTYPES)]
                        count += 1
                        yield self.run(ranks, problem_of(nranks, tokens, vectors, dtype), tuning)
                for tuning in TUNINGS:
                    dtype = DTYPES[count % len(DTYPES)]
                    count += 1
                    problem = problem_of(nranks, FULL[0], FULL[1][tuning[0]], dtype)
                    yield self.run(ranks, problem, tuning)
                for dtype in DTYPES:
                    for tokens, vectors in (*SHAPES, WIDE):
                        yield self.run(ranks, problem_of(nranks, tokens, vectors[:1], dtype))
                    yield self.run(ranks, problem_of(nranks, *WIDE, dtype), TUNINGS[-1])
                    for layout in ("strided", "offset"):
                        yield self.run(ranks, problem_of(nranks, 5, (77, 5), dtype, layout))
            if nranks == 1:
                continue
            # At the capacity, in both halves of the buffer; and beyond it.
            comm_size = torch.ops.minimax_rms._comm_size(nranks, 1)
            with LocalRanks(nranks, comm_size=comm_size, **options) as ranks:
                for _ in range(2):
                    problem = problem_of(nranks, ranks.capacity, (2, 1), torch.bfloat16)
                    yield self.run(ranks, problem, (1, 2, 128))
                self.fail(ranks, problem_of(nranks, 300, (2, 1), torch.bfloat16), nranks)
                yield
            # Buffers that do not even hold what ranks tell each other beside sums.
            for comm_size in (8, 248):
                with LocalRanks(nranks, comm_size=comm_size, **options) as ranks:
                    self.fail(ranks, problem_of(nranks, 5, (77, 5), torch.bfloat16), nranks)
                    yield
            # A rank that does not come.
            with LocalRanks(nranks, **{**options, "timeout": 1}) as ranks:
                problem = problem_of(nranks, 33, (77, 5), torch.float16)
                yield self.run(ranks, problem, (1, 3, 96))
                self.fail(ranks, problem, nranks - 1)
                yield

    def fail(self, ranks: LocalRanks, problem: Problem, present: int) -> None:
        """A call that must not succeed, of the first ``present`` ranks."""
        if ranks.capacity < problem.num_tokens:
            # The host would not let it pass.
            ranks.register(1 << 20, 120.0)
        outputs = self.call_all(ranks, on_device(problem), (1, 3, 96), present)
        assert outputs
        if not ranks.failure(0):
            sys.exit(f"a call should have failed: {problem}")
        if not all(part.cpu().isnan().all() for parts in outputs for part in parts):
            sys.exit(f"a call failed, and its output is not NaN: {problem}")


def run_overrun(driver: Driver, overrun: str, generator: torch.Generator) -> None:
    missing = MISSING_BUFFER_BYTES if overrun == "buffer" else 0
    comm_size = torch.ops.minimax_rms._comm_size(2, 1)
    with LocalRanks(
        2,
        comm_size=comm_size,
        timeout=5,
        is_registered=True,
        guard_bytes=0,
        missing_bytes=missing,
    ) as ranks:
        # The first call uses the upper half of the buffer.
        problem = make_problem(2, ranks.capacity, (64, 32), torch.bfloat16, generator)
        if overrun != "buffer":
            problem = make_problem(2, 5, (1000,), torch.bfloat16, generator)
        driver.run(ranks, problem, (1, 2, 128) if overrun == "buffer" else None, overrun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrun", nargs="?", choices=("input", "norm_weight", "buffer"))
    overrun = parser.parse_args().overrun
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
        # torch would cut tensors out of larger allocations, where memcheck sees no overrun.
        sys.exit("minimax_sanitizer_driver.py: PYTORCH_NO_CUDA_MEMORY_CACHING must be 1")
    if reason := why_not_at_once(max(NRANKS)):
        print(reason)
        sys.exit(SERIALISED)
    generator = torch.Generator().manual_seed(2026)
    driver = Driver()
    if overrun is not None:
        run_overrun(driver, overrun, generator)
        count = 1
    else:
        count = sum(1 for _ in driver.run_all(generator))
    torch.cuda.synchronize()
    print(f"{count} calls")


if __name__ == "__main__":
    main()
