"""Runs all ranks of a test in this process on one GPU, through the raw operators."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import minimax_rms  # noqa: F401  defines torch.ops.minimax_rms
import torch
from minimax_arithmetic import SLACK, assert_rounded, outside
from minimax_cases import EPS, Problem, make_problem
from rank_processes import environment
from rank_streams import RankStreams
from torch import Tensor

GUARD_BYTES = 4096
GUARD = -0x5A5A5A5B
EMPTY = -(1 << 31)  # the bits of -0.0f, which communication buffers are full of
POISON = -12288.0  # what memory of outputs is full of: no result, and no NaN


class LocalRanks(RankStreams):
    """A workspace for each rank, as existing callers build it: of torch tensors, not registered.

    ``fits`` tells which grids find room at the same time, as the operators choose them for ranks
    that have a GPU each.
    """

    _REGISTERS = 1 << 16  # of a multiprocessor

    def __init__(
        self,
        nranks: int,
        *,
        max_tokens: int = 1024,
        comm_size: int | None = None,
        timeout: float = 20.0,
        is_registered: bool = False,
        is_known: bool = True,
        guard_bytes: int = GUARD_BYTES,
        guard: int = GUARD,
        missing_bytes: int = 0,
    ) -> None:
        """Make the workspaces.

        Args:
            is_known: the host has what it makes of a workspace at its first call; else that is
                made while a peer may wait, and waits as long as ``MINIMAX_RMS_TIMEOUT`` says.
            guard: the 32 bits that are repeated around the communication buffers.
            missing_bytes: what the last rank's communication buffer lacks.
        """
        super().__init__(nranks)
        self.ops = torch.ops.minimax_rms
        properties = torch.cuda.get_device_properties(self.device)
        self._multiprocessors = properties.multi_processor_count
        self.nranks = nranks
        self.max_tokens = max_tokens
        if comm_size is None:
            comm_size = self.ops._comm_size(nranks, max_tokens)
        self.comm_size = comm_size
        self.capacity: int = self.ops._max_tokens(nranks, comm_size)
        self.workspaces = [torch.empty(0, dtype=torch.int64, device=self.device)]
        if nranks == 1:
            return
        self._guard_bytes, self._guard = guard_bytes, guard
        sizes = [3 * comm_size] * nranks
        sizes[-1] -= missing_bytes
        self._buffers = [
            torch.full(
                ((size + 2 * guard_bytes) // 4,), guard, dtype=torch.int32, device=self.device
            )
            for size in sizes
        ]
        self._layouts = [torch.tensor([0, comm_size], device=self.device) for _ in range(nranks)]
        self._counters = [
            torch.zeros(3, dtype=torch.int32, device=self.device) for _ in range(nranks)
        ]
        addresses = [buffer.data_ptr() + guard_bytes for buffer in self._buffers]
        self.addresses = addresses
        self.workspaces = [
            torch.tensor(
                [-1] * (2 * nranks) + addresses + [counters.data_ptr(), layout.data_ptr()],
                device=self.device,
            )
            for counters, layout in zip(self._counters, self._layouts, strict=True)
        ]
        self.empty_buffers()
        torch.cuda.synchronize()
        if is_registered:
            self.register(max_tokens, timeout)
        elif is_known:
            self._make_known(timeout)

    def buffer(self, rank: int) -> Tensor:
        """The rank's communication buffer, in halves of words."""
        buffer = self._buffers[rank]
        guard = self._guard_bytes // 4
        return buffer[guard : buffer.numel() - guard]

    def empty_buffers(self) -> None:
        """Make the communication buffers as those of a new workspace are."""
        for rank in range(self.nranks):
            self.buffer(rank).fill_(EMPTY)

    def guards_are_intact(self) -> bool:
        """Whether nothing around the communication buffers was written."""
        size = self._guard_bytes // 4
        assert size > 0
        torch.cuda.synchronize()
        return all(
            bool((guard == self._guard).all())
            for buffer in self._buffers
            for guard in (buffer[:size], buffer[-size:])
        )

    def _make_known(self, timeout: float) -> None:
        """Let the host make what it makes at a workspace's first call: not while a peer waits.

        By a call that is captured and never runs, so that nothing is called on the device.
        """
        keeper = _load_first_kernel()
        x, weight = torch.zeros(2, 1, 4, device=self.device).unbind()
        with environment({"MINIMAX_RMS_TIMEOUT": repr(timeout)}):
            self.capture(
                lambda rank: self.ops.minimax_allreduce_rms(
                    x, weight[0], self.workspaces[rank], rank, self.nranks, EPS
                ),
                error_mode="relaxed",
                keeper=keeper,
            )

    def renew(self) -> None:
        """Make new workspaces in the memory of these, of which the host is not told.

        It finds out at the first call, and then waits for the device. So each rank has one before
        any peer does: of more rows than there is memory for, which is never launched.
        """
        self.empty_buffers()
        torch.cuda.synchronize()
        x, weight = torch.zeros(2, 1, 1 << 18, device=self.device).unbind()
        for rank, workspace in enumerate(self.workspaces):
            try:
                self.ops.minimax_allreduce_rms(
                    x.expand(1 << 23, -1), weight[0], workspace, rank, self.nranks, EPS
                )
            except RuntimeError as error:
                if "cannot allocate" not in str(error):
                    raise

    def register(self, max_tokens: int, timeout: float) -> None:
        """Let the host know the workspaces as those of ranks that share a GPU."""
        multiprocessors = max(self._multiprocessors // (2 * self.nranks), 1)
        for rank, workspace in enumerate(self.workspaces):
            self.ops._register(
                workspace, rank, self.nranks, max_tokens, multiprocessors, timeout, True
            )

    def set_timeout(self, seconds: float) -> None:
        for workspace in self.workspaces:
            self.ops._set_timeout(workspace, seconds)

    def fits(self, row_bytes: int, num_tokens: int) -> bool:
        """Whether all ranks' grids find room at once, and a second one of each behind it."""
        if num_tokens == 0 or self.nranks == 1:
            return True
        _, num_blocks, threads = self.ops._choose_tuning(
            row_bytes, self.nranks, num_tokens, self._multiprocessors
        )
        # A thread has no more than 128 registers.
        per_multiprocessor = self._REGISTERS // (128 * threads)
        return bool(2 * self.nranks * num_blocks <= per_multiprocessor * self._multiprocessors)

    def call(
        self, rank: int, problem: Problem, tuning: Sequence[int] | None = None
    ) -> tuple[Tensor, ...]:
        """One rank's call on the current stream. Only calls of q and k take a tuning."""
        x, weights = problem.inputs[rank], problem.weights[rank]
        ranks = (rank, self.nranks, problem.eps)
        if len(weights) == 1:
            assert tuning is None
            out: Tensor = self.ops.minimax_allreduce_rms(
                x, weights[0], self.workspaces[rank], *ranks
            )
            return (out,)
        args = (x, *weights, self.workspaces[rank], *problem.widths, *ranks)
        if tuning is None:
            q, k = self.ops.minimax_allreduce_rms_qk(*args)
        else:
            q, k = self.ops._minimax_allreduce_rms_qk_as(*args, *tuning)
        return q, k

    def reserve(self, problem: Problem) -> None:
        """Leave to each rank's stream memory for its outputs, full of POISON.

        The operators allocate them, and to ask the driver for memory may wait for a rank's kernel.
        """
        current = torch.cuda.current_stream()
        for stream in self.streams:
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                blocks = [
                    torch.full(
                        (problem.num_tokens, width),
                        POISON,
                        dtype=problem.dtype,
                        device=self.device,
                    )
                    for width in problem.widths
                ]
                del blocks

    def run(
        self,
        problem: Problem,
        tuning: Sequence[int] | None = None,
        ranks: Sequence[int] | None = None,
    ) -> list[tuple[Tensor, ...]]:
        """All ranks' outputs, or those of ``ranks``; waits for nothing on the host."""
        self.reserve(problem)
        outputs: list[tuple[Tensor, ...]] = []
        self.launch(lambda rank: outputs.append(self.call(rank, problem, tuning)), ranks)
        current = torch.cuda.current_stream()
        for parts in outputs:
            for part in parts:
                # Freed while the current stream may still read it.
                part.record_stream(current)
        return outputs

    def failure(self, rank: int) -> str:
        """What the rank's next call would raise, empty if nothing."""
        torch.cuda.synchronize()
        if self.nranks == 1:
            return ""
        try:
            self.ops._check(self.workspaces[rank])
        except RuntimeError as error:
            return str(error)
        return ""

    def failures(self) -> list[str]:
        return [self.failure(rank) for rank in range(self.nranks)]

    def missing_ranks(self, rank: int) -> list[int]:
        return list(self.ops._missing_ranks(self.workspaces[rank]))

    def close(self) -> None:
        torch.cuda.synchronize()
        for workspace in self.workspaces if self.nranks > 1 else []:
            self.ops._forget(workspace)

    def __enter__(self) -> LocalRanks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@functools.cache
def _load_first_kernel() -> torch.cuda.CUDAGraph:
    """The one that ``_make_known`` captures: it is loaded outside of a capture.

    Returns a graph that keeps a memory pool for those captures: each graph's own would stay.
    """
    rows = torch.zeros(2, 1, 4, device="cuda").unbind()
    weight = torch.ones(4, device="cuda")
    problem = Problem(list(rows), [(weight,)] * 2, (4,))
    with LocalRanks(2, is_registered=True) as ranks:
        ranks.run(problem)
        assert not any(ranks.failures())
        rows[0].add(1)
        [_, keeper] = ranks.capture(lambda rank: rows[rank].add(1))
    return keeper


def check(
    ranks: LocalRanks,
    problem: Problem,
    tuning: Sequence[int] | None = None,
    slack: float = SLACK,
) -> list[tuple[Tensor, ...]]:
    """One call of all ranks, against float64; returns the outputs."""
    outputs = ranks.run(problem, tuning)
    exact = problem.exact()
    wrong = []
    for parts, exact_parts in zip(
        zip(*outputs, strict=True), zip(*exact, strict=True), strict=True
    ):
        for part in parts:
            assert (part.dtype, part.shape) == (problem.dtype, exact_parts[0].shape)
            assert part.is_contiguous()
        wrong.append(outside(torch.stack(parts), torch.stack(exact_parts), slack).any())
    if torch.stack(wrong).any():
        what = f"{problem}, tuning {tuning}, failures {ranks.failures()}"
        for rank, (own, exact_own) in enumerate(zip(outputs, exact, strict=True)):
            for name, part, exact_part in zip("qk", own, exact_own, strict=False):
                assert_rounded(part, exact_part, f"{name} of rank {rank}; {what}", slack)
    return outputs


def check_alive(ranks: LocalRanks, generator: torch.Generator) -> None:
    check(ranks, make_problem(ranks.nranks, 3, (64, 32), torch.bfloat16, generator))
    assert not any(ranks.failures())


def warm_up(
    ranks: LocalRanks, *problems: Problem, tuning: Sequence[int] | None = None
) -> list[tuple[Tensor, ...]]:
    """Load the kernels of a test whose calls do not end as they should.

    The first launch of a kernel may wait for those that run, and these for it. Returns the outputs
    of the last problem.
    """
    for problem in problems:
        outputs = check(ranks, problem, tuning)
    torch.cuda.synchronize()
    return outputs


def assert_nan(outputs: Sequence[tuple[Tensor, ...]]) -> None:
    assert outputs
    for parts in outputs:
        for part in parts:
            assert part.isnan().all()
