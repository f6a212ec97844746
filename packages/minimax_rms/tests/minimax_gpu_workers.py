"""What the rank processes of the GPU tests run; in a module, so that they can import it."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import minimax_rms
import torch
import torch.distributed as dist
from minimax_arithmetic import (
    DTYPES,
    assert_rounded,
    assert_same_bits,
    differing,
    random_rows,
)
from minimax_cases import EPS, Problem, m2_widths, make_problem
from minimax_local_ranks import POISON
from rank_processes import Rank, die_in, left_behind
from rank_reports import error_of, logged
from torch import Tensor

TIMEOUT = 30.0
MAX_TOKENS = 1024


def open_workspace(rank: Rank, **options: Any) -> minimax_rms.Workspace:
    options = {"max_tokens": MAX_TOKENS, "timeout": TIMEOUT, **options}
    workspace = minimax_rms.Workspace(rank.group, device=rank.device, **options)
    assert workspace.fallback_reason is None, workspace.fallback_reason
    assert workspace.tensor is not None
    return workspace


def generator_of(rank: Rank, seed: int) -> torch.Generator:
    """The same on all ranks, so that each can make the inputs of all."""
    return torch.Generator(rank.device).manual_seed(seed)


def call(workspace: minimax_rms.Workspace, problem: Problem) -> tuple[Tensor, ...]:
    x, weights = problem.inputs[workspace.rank], problem.weights[workspace.rank]
    if len(weights) == 1:
        return (workspace.allreduce_rms(x, weights[0], problem.eps),)
    return workspace.allreduce_rms_qk(x, *weights, problem.eps)


def call_raw(workspace: Tensor, rank: Rank, problem: Problem) -> tuple[Tensor, ...]:
    """The same through the operators."""
    x, weights = problem.inputs[rank.rank], problem.weights[rank.rank]
    ranks = (rank.rank, rank.world_size, problem.eps)
    if len(weights) == 1:
        return (minimax_rms.ops.minimax_allreduce_rms(x, weights[0], workspace, *ranks),)
    return minimax_rms.ops.minimax_allreduce_rms_qk(x, *weights, workspace, *problem.widths, *ranks)


def assert_right(
    outputs: Sequence[Tensor], problem: Problem, rank: Rank, what: object = ""
) -> None:
    for part, exact in zip(outputs, problem.exact()[rank.rank], strict=True):
        assert_rounded(part, exact, f"{problem}, rank {rank.rank}; {what}")


def problems_of(
    rank: Rank,
    generator: torch.Generator,
    tokens: Sequence[int],
    dtypes: Sequence[torch.dtype] = DTYPES,
    layout: str = "dense",
) -> Iterator[Problem]:
    for dtype in dtypes:
        widths = m2_widths(rank.world_size, dtype)
        for num_tokens in tokens:
            for parts in (widths, widths[:1]):
                yield make_problem(rank.world_size, num_tokens, parts, dtype, generator, layout)


def eager(
    rank: Rank,
    seed: int,
    tokens: Sequence[int],
    max_tokens: int = MAX_TOKENS,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> None:
    generator = generator_of(rank, seed)
    with open_workspace(rank, max_tokens=max_tokens) as workspace:
        assert (workspace.rank, workspace.nranks) == (rank.rank, rank.world_size)
        assert (workspace.max_tokens, workspace.timeout) == (max_tokens, TIMEOUT)
        for problem in problems_of(rank, generator, tokens, dtypes):
            assert_right(call(workspace, problem), problem, rank)
        for problem in problems_of(rank, generator, [3], [torch.bfloat16], "strided"):
            assert_right(call(workspace, problem), problem, rank, "strided")
            assert_right(call_raw(workspace.tensor, rank, problem), problem, rank, "raw operator")
        for problem in problems_of(rank, generator, [max_tokens + 1], [torch.float16]):
            kind, text = error_of(call, workspace, problem)
            assert kind == "RuntimeError"
            assert f"at most max_tokens = {max_tokens} tokens" in text, text
        workspace.check()
        assert workspace.missing_ranks == []
        assert not workspace.closed
    assert workspace.closed
    assert workspace.tensor is None


class ExistingCaller:
    """Builds a workspace as a caller does that has no class for it, and knows the operators."""

    def __init__(self, rank: Rank, comm_size: int) -> None:
        self.ops = torch.ops.minimax_rms
        self.rank = rank
        own, handle = self.ops._allocate(3 * comm_size)
        handles: list[Any] = [None] * rank.world_size
        dist.all_gather_object(handles, handle, group=rank.group)
        self.buffers = [
            own if peer == rank.rank else self.ops._open(peer_handle)
            for peer, peer_handle in enumerate(handles)
        ]
        self.flags = torch.zeros(3, dtype=torch.int32, device=rank.device)
        self.layout = torch.tensor([0, comm_size], dtype=torch.int64, device=rank.device)
        entries = [0] * (2 * rank.world_size) + self.buffers
        entries += [self.flags.data_ptr(), self.layout.data_ptr()]
        self.workspace = torch.tensor(entries, dtype=torch.int64, device=rank.device)
        torch.cuda.synchronize()
        dist.barrier(rank.group)

    def close(self) -> None:
        torch.cuda.synchronize()
        dist.barrier(self.rank.group)
        self.ops._forget(self.workspace)
        for peer, address in enumerate(self.buffers):
            if peer != self.rank.rank:
                self.ops._free(address)
        dist.barrier(self.rank.group)
        self.ops._free(self.buffers[self.rank.rank])


def existing_caller(rank: Rank, seed: int) -> None:
    generator = generator_of(rank, seed)
    for comm_size in (8 * rank.world_size * 1024, 16 * rank.world_size * 4096):
        caller = ExistingCaller(rank, comm_size)
        for problem in problems_of(rank, generator, [1, 33, 1024, 5]):
            assert_right(call_raw(caller.workspace, rank, problem), problem, rank)
        problem = make_problem(rank.world_size, 5, (64, 32), torch.bfloat16, generator)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call_raw(caller.workspace, rank, problem)
        for _ in range(3):
            refill(problem, generator)
            graph.replay()
            assert_right(outputs, problem, rank, "replay")
        caller.close()


def refill(problem: Problem, generator: torch.Generator) -> None:
    for x in problem.inputs:
        x.copy_(random_rows(*x.shape, x.dtype, generator))


def graphs(rank: Rank, seed: int, rounds: int) -> None:
    """Captured in a pool of their own, replayed with new inputs, discarded and captured again.

    Rank 0 captures graphs that no one replays, which asks nothing of the other ranks.
    """
    generator = generator_of(rank, seed)
    nranks = rank.world_size
    with open_workspace(rank) as workspace:
        pool = torch.cuda.graph_pool_handle()
        qkv = make_problem(nranks, 9, (256, 64), torch.bfloat16, generator)
        rows = make_problem(nranks, 9, (256,), torch.bfloat16, generator)
        for round_ in range(rounds):
            if rank.rank == 0:
                unused = torch.cuda.CUDAGraph()
                with torch.cuda.graph(unused, pool=pool):
                    call(workspace, qkv)
                del unused
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                q, k = call(workspace, qkv)
                # Of the pool, and what the last call wrote.
                chained = dataclasses.replace(rows, inputs=[q] * nranks)
                [out] = call(workspace, chained)
            for replay in range(3):
                refill(qkv, generator)
                graph.replay()
                what = f"round {round_}, replay {replay}"
                assert_right((q, k), qkv, rank, what)
                # What a peer's q was, it has to tell.
                gathered: list[Any] = [None] * nranks
                dist.all_gather_object(gathered, q.cpu(), group=rank.group)
                inputs = [peer.to(rank.device) for peer in gathered]
                chained = dataclasses.replace(rows, inputs=inputs)
                assert_right((out,), chained, rank, what)
                eager_call = make_problem(nranks, 3, (64, 32), torch.float16, generator)
                assert_right(call(workspace, eager_call), eager_call, rank, what)
            del graph, q, k, out, chained
            gc.collect()
            torch.cuda.empty_cache()
        workspace.check()


def compiled(rank: Rank, seed: int) -> None:
    generator = generator_of(rank, seed)
    with open_workspace(rank) as workspace:
        problem = make_problem(rank.world_size, 9, (256, 64), torch.bfloat16, generator)
        weights = problem.weights[rank.rank]

        def step(x: Tensor) -> tuple[Tensor, Tensor]:
            q, k = workspace.allreduce_rms_qk(x * 2, *weights, EPS)
            return q + 1, k

        compiled_step = torch.compile(step, fullgraph=True)
        for _ in range(3):
            refill(problem, generator)
            own = problem.inputs[rank.rank]
            q, k = workspace.allreduce_rms_qk(own * 2, *weights, EPS)
            got = compiled_step(own)
            assert_same_bits(got[0], q + 1)
            assert_same_bits(got[1], k)
        workspace.check()


def same_as_fallback(rank: Rank, seed: int) -> None:
    """The process group's way, on the same rows: within one rounding of each other."""
    generator = generator_of(rank, seed)
    with open_workspace(rank) as workspace, without_kernels(rank) as other:
        for problem in problems_of(rank, generator, [1, 33], [torch.bfloat16, torch.float32]):
            assert_right(call(workspace, problem), problem, rank, "kernels")
            assert_right(call(other, problem), problem, rank, "fallback")


@contextlib.contextmanager
def without_kernels(rank: Rank) -> Iterator[minimax_rms.Workspace]:
    reason = "said so"
    with mock.patch.object(minimax_rms.workspace, "_obstacle", return_value=reason):
        workspace = minimax_rms.Workspace(rank.group, MAX_TOKENS, rank.device, timeout=TIMEOUT)
    assert workspace.fallback_reason == reason
    assert workspace.tensor is None
    with workspace:
        yield workspace


def open_and_close(rank: Rank, rounds: int) -> dict[str, int]:
    """What the rounds left behind: device bytes, open files, mappings of memory."""
    x = torch.full((5, 64), rank.rank + 1.0, device=rank.device)
    weight = torch.ones(64, device=rank.device)

    def run(count: int) -> None:
        for _ in range(count):
            with open_workspace(rank, max_tokens=5) as workspace:
                out = workspace.allreduce_rms(x, weight)
        assert out.isfinite().all()
        dist.barrier(rank.group)
        workspace.close()  # frees what a peer still mapped

    return left_behind(rank, run, rounds)


def late_close(rank: Rank) -> None:
    """Rank 0 closes while the others are open: what they may write to stays until they have closed.

    Here they make one more call, which writes to it.
    """
    workspace = open_workspace(rank, max_tokens=5)
    buffers = workspace._memory._buffers
    x = torch.ones(5, 64, device=rank.device)
    weight = torch.ones(64, device=rank.device)
    workspace.allreduce_rms(x, weight)
    torch.cuda.synchronize()
    dist.barrier(rank.group)
    if rank.rank == 0:
        begin = time.monotonic()
        workspace.close()
        assert time.monotonic() - begin < 2
        assert buffers._own is not None
    dist.barrier(rank.group)
    if rank.rank != 0:
        out = workspace.allreduce_rms(x, weight)
        torch.cuda.synchronize()
        assert out.isnan().all()
        kind, text = error_of(workspace.check)
        assert kind == "RuntimeError"
        assert "rank 0 had closed" in text or "gave up" in text
    dist.barrier(rank.group)
    workspace.close()
    if rank.rank == 0:
        assert buffers._own is not None
    dist.barrier(rank.group)
    workspace.close()
    assert buffers._own is None


def failure_at_the_end(rank: Rank, absent: int, timeout: float) -> list[tuple[str, str]]:
    """The last call before close() fails: what is logged."""
    with logged("minimax_rms") as lines:
        workspace = open_workspace(rank, max_tokens=5, timeout=timeout)
        x = torch.ones(5, 64, device=rank.device)
        weight = torch.ones(64, device=rank.device)
        workspace.allreduce_rms(x, weight)
        torch.cuda.synchronize()
        lines.clear()  # of ranks that share a GPU
        dist.barrier(rank.group)
        if rank.rank != absent:
            workspace.allreduce_rms(x, weight)
            workspace.close()
            assert workspace.missing_ranks == [absent]
        dist.barrier(rank.group)
        workspace.close()
        return list(lines)


def out_of_memory(rank: Rank) -> None:
    """A result that finds no room raises before anything is sent, on each rank that lacks it."""
    x = torch.ones(16, 1 << 20, device=rank.device)
    weight = torch.ones(1 << 20, device=rank.device)
    with open_workspace(rank) as workspace:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(rank.device).total_memory
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
        try:
            for begin, result in (
                ("minimax_allreduce_rms", lambda: workspace.allreduce_rms(x, weight)),
                (
                    "minimax_allreduce_rms",
                    lambda: minimax_rms.ops.minimax_allreduce_rms(
                        x, weight, workspace.tensor, rank.rank, rank.world_size, EPS
                    ),
                ),
                (
                    "minimax_allreduce_rms_qk",
                    lambda: workspace.allreduce_rms_qk(x, weight[: 1 << 19], weight[: 1 << 18]),
                ),
            ):
                kind, text = error_of(result)
                assert kind == "OutOfMemoryError"
                assert text.startswith(f"minimax_rms::{begin}: cannot allocate a result of [16, ")
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert workspace.allreduce_rms(x, weight, 0.0).sub(1).abs().max() < 1e-5
        workspace.check()


def late_rank(rank: Rank, seed: int, late: int, seconds: float) -> float:
    """One rank comes late, within the timeout; returns what the call took."""
    generator = generator_of(rank, seed)
    problem = make_problem(rank.world_size, 9, (256, 64), torch.bfloat16, generator)
    with open_workspace(rank) as workspace:
        assert_right(call(workspace, problem), problem, rank)
        torch.cuda.synchronize()
        dist.barrier(rank.group)
        if rank.rank == late:
            time.sleep(seconds)
        begin = time.monotonic()
        outputs = call(workspace, problem)
        torch.cuda.synchronize()
        waited = time.monotonic() - begin
        assert_right(outputs, problem, rank)
        workspace.check()
    return waited


def absent_rank(rank: Rank, seed: int, absent: int, timeout: float) -> dict[str, Any]:
    """One rank skips a call and makes the next too late."""
    generator = generator_of(rank, seed)
    problem = make_problem(rank.world_size, 9, (256, 64), torch.bfloat16, generator)
    workspace = open_workspace(rank, timeout=timeout)
    assert_right(call(workspace, problem), problem, rank)
    torch.cuda.synchronize()
    dist.barrier(rank.group)
    if rank.rank == absent:
        time.sleep(timeout + 3)
    begin = time.monotonic()
    outputs = call(workspace, problem)
    torch.cuda.synchronize()
    waited = time.monotonic() - begin
    errors = [error_of(workspace.check), error_of(call, workspace, problem)]
    for part in outputs:
        assert part.isnan().all()
    missing = workspace.missing_ranks
    workspace.close()
    assert workspace.missing_ranks == missing
    with open_workspace(rank) as successor:
        assert_right(call(successor, problem), problem, rank)
    return {"waited": waited, "errors": errors, "missing": missing}


def call_until_failure(
    workspace: minimax_rms.Workspace, problem: Problem, expected: Sequence[Tensor], limit: float
) -> dict[str, Any]:
    """Call until an error; how many calls were right, how long the last took, and what it said."""
    calls = 0
    begin = last = time.monotonic()
    while time.monotonic() - begin < limit:
        outputs: list[tuple[Tensor, ...]] = []
        try:
            for _ in range(4):
                outputs.append(call(workspace, problem))
            torch.cuda.synchronize()
            workspace.check()
        except RuntimeError as error:
            waited = time.monotonic() - last
            torch.cuda.synchronize()
            for parts in outputs:  # of calls that were under way
                for part, expected_part in zip(parts, expected, strict=True):
                    assert (part.isnan() | ~differing(part, expected_part)).all()
            return {"calls": calls, "waited": waited, "message": str(error)}
        for parts in outputs:
            for part, expected_part in zip(parts, expected, strict=True):
                assert_same_bits(part, expected_part)
                part.fill_(POISON)  # for the next call that gets this memory
        last = time.monotonic()
        calls += len(outputs)
    raise AssertionError(f"{calls} calls in {limit} s, and no error")


def survive_a_kill(rank: Rank, seed: int, victim: int, timeout: float) -> dict[str, Any]:
    """One rank is killed while it calls; the others find out and go on without it."""
    generator = generator_of(rank, seed)
    workspace = open_workspace(rank, timeout=timeout)
    problem = make_problem(rank.world_size, 33, (256, 64), torch.bfloat16, generator)
    expected = call(workspace, problem)
    assert_right(expected, problem, rank)
    torch.cuda.synchronize()
    dist.barrier(rank.group)
    if rank.rank == victim:
        die_in(random.Random(seed).uniform(0.5, 1.5))
    result = call_until_failure(workspace, problem, expected, 60)
    result["missing"] = workspace.missing_ranks
    workspace.close()

    survivors = rank.regroup([r for r in range(rank.world_size) if r != victim])
    with open_workspace(survivors) as successor:
        for problem in problems_of(survivors, generator, [1, 20], [torch.float32]):
            assert_right(call(successor, problem), problem, survivors)
        successor.check()
    return result


def bad_writes(rank: Rank, seed: int, liar: int, how: str) -> list[str | None]:
    """What rank ``liar`` writes to its peers is ``lost`` or ``wrong``; two reasons to fall back.

    The first is that of the workspace that was made meanwhile, the second that of the next one.
    """
    ops, module = torch.ops.minimax_rms, minimax_rms.workspace
    rms = module._rms

    def open_scratch(handle: Tensor) -> int:
        """A peer's memory as memory of this rank's own."""
        address: int = ops._allocate(16 << 20)[0]
        return address

    def rms_of_others(x: Tensor, *args: Any) -> Tensor:
        """Rows with other sums, in one token of those of the probe."""
        x = x.clone()
        x[x.shape[0] // 2] += 1
        result: Tensor = rms(x, *args)
        return result

    with contextlib.ExitStack() as stack:
        # So that it takes less time to find out.
        stack.enter_context(mock.patch.object(module, "PROBE_SECONDS", 3.0))
        if rank.rank == liar and how == "lost":
            stack.enter_context(mock.patch.object(ops, "_open", open_scratch))
        if rank.rank == liar and how == "wrong":
            stack.enter_context(mock.patch.object(module, "_rms", rms_of_others))
        workspace = minimax_rms.Workspace(rank.group, MAX_TOKENS, rank.device, timeout=TIMEOUT)
    reasons = [workspace.fallback_reason]
    generator = generator_of(rank, seed)
    with workspace:
        assert workspace.tensor is None
        for problem in problems_of(rank, generator, [5]):
            assert_right(call(workspace, problem), problem, rank)
    with open_workspace(rank) as successor:
        reasons.append(successor.fallback_reason)
    return reasons


# With a GPU for each rank.


def sweep(rank: Rank, seed: int, max_tokens: int) -> None:
    """All sizes up to ``max_tokens`` in all dtypes, eagerly and in one graph that has them all."""
    generator = generator_of(rank, seed)
    tokens = [1, 2, 3, 16, 31, 128, 129, 300, 512, 1000, 2048, 2113, 4096, max_tokens]
    with open_workspace(rank, max_tokens=max_tokens) as workspace:
        for dtype in DTYPES:
            widths = m2_widths(rank.world_size, dtype)
            kept = []
            for index, num_tokens in enumerate(tokens):
                parts = widths if index % 3 else widths[:1]
                problem = make_problem(rank.world_size, num_tokens, parts, dtype, generator)
                outputs = call(workspace, problem)
                assert_right(outputs, problem, rank, "eager")
                # A peer's rows are of no more use.
                own = [problem.inputs[rank.rank]] * rank.world_size
                kept.append((dataclasses.replace(problem, inputs=own), outputs))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                replayed = [call(workspace, problem) for problem, _ in kept]
            for replay in range(2):
                for parts in replayed:
                    for part in parts:
                        part.fill_(torch.nan)
                graph.replay()
                for (problem, outputs), parts in zip(kept, replayed, strict=True):
                    for part, expected in zip(parts, outputs, strict=True):
                        assert_same_bits(part, expected, f"{problem}, replay {replay}")
            workspace.check()


def alternating_devices(rank: Rank, seed: int) -> None:
    """The tensors decide the device and the stream, whichever device is current."""
    generator = generator_of(rank, seed)
    with open_workspace(rank) as workspace:
        torch.cuda.synchronize()
        for step in range(12):
            widths = (640, 128)[: 1 + step % 2]
            problem = make_problem(rank.world_size, 33, widths, torch.bfloat16, generator)
            current = (rank.rank + step % 2) % torch.cuda.device_count()
            stream = torch.cuda.Stream(rank.device)
            stream.wait_stream(torch.cuda.current_stream(rank.device))
            # Makes the stream current on its own device, and then another device current.
            with torch.cuda.stream(stream), torch.cuda.device(current):
                outputs = call(workspace, problem)
                assert torch.cuda.current_device() == current
            stream.synchronize()
            assert all(part.device == rank.device for part in outputs)
            assert_right(outputs, problem, rank, f"step {step}")
        workspace.check()


def two_workspaces(rank: Rank, seed: int) -> None:
    """Side by side on two streams of each rank, in no order to each other."""
    generator = generator_of(rank, seed)
    problem = make_problem(rank.world_size, 33, (640, 128), torch.bfloat16, generator)
    with open_workspace(rank) as first, open_workspace(rank) as second:
        expected = call(first, problem)
        assert_right(expected, problem, rank)
        assert_right(call(second, problem), problem, rank)
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream(rank.device) for _ in range(2)]
        outputs = []
        for _ in range(50):
            for stream, workspace in zip(streams, (first, second), strict=True):
                with torch.cuda.stream(stream):
                    outputs.append(call(workspace, problem))
        torch.cuda.synchronize()
        for parts in outputs:
            for part, expected_part in zip(parts, expected, strict=True):
                assert_same_bits(part, expected_part)
        first.check()
        second.check()


def calls_on_two_streams(
    rank: Rank, seed: int, num_tokens: int, *, opposite: bool, rounds: int
) -> None:
    """Of two workspaces, on every other rank in the opposite order if asked for."""
    generator = generator_of(rank, seed)
    options = {"max_tokens": num_tokens, "timeout": 10.0}
    with open_workspace(rank, **options) as first, open_workspace(rank, **options) as second:
        order = [1, 0] if opposite and rank.rank % 2 == 1 else [0, 1]
        streams = [torch.cuda.Stream() for _ in order]
        for problem in problems_of(rank, generator, [num_tokens]):
            torch.cuda.synchronize()
            dist.barrier(rank.group)
            outputs = []
            for _ in range(rounds):
                for index in order:
                    with torch.cuda.stream(streams[index]):
                        outputs.append(call((first, second)[index], problem))
            torch.cuda.synchronize()
            first.check()
            second.check()
            for output in outputs:
                assert_right(output, problem, rank)
