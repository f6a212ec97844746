"""What the rank processes of the tests run; in a module, so that they can import it."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterable, Sequence
from typing import Any

import custom_ar
import pytest
import torch
import torch.distributed as dist
from all_reduce_cases import DTYPES, assert_same_bits, differing, random_inputs
from custom_ar import reference
from rank_processes import Rank, die_in, left_behind
from rank_reports import logged
from torch import Tensor

TIMEOUT = 30.0


def open_communicator(rank: Rank, **options: Any) -> custom_ar.Communicator:
    options = {"max_size": 1 << 20, "timeout": TIMEOUT, **options}
    communicator = custom_ar.Communicator(rank.group, rank.device, **options)
    assert communicator.fallback_reason is None
    return communicator


def generator_of(rank: Rank, seed: int) -> torch.Generator:
    """The same on all ranks, so that each can make the inputs of all."""
    return torch.Generator(rank.device).manual_seed(seed)


def refill(inputs: Iterable[Tensor], generator: torch.Generator) -> None:
    for inp in inputs:
        inp.copy_(torch.randn(inp.shape, generator=generator, device=inp.device))


def check_calls(
    rank: Rank,
    communicator: custom_ar.Communicator,
    generator: torch.Generator,
    lengths: Sequence[int],
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> None:
    for dtype in dtypes:
        for length in lengths:
            inputs = random_inputs(rank.world_size, length, dtype, generator)
            expected = reference.all_reduce(inputs)
            own = inputs[rank.rank]
            assert communicator.supports(own)
            before = own.clone()
            what = f"{length} elements of {dtype} on rank {rank.rank}"
            assert_same_bits([communicator.all_reduce(own)], expected, what)
            out = torch.full_like(own, torch.nan)
            assert communicator.all_reduce(own, out=out) is out
            assert_same_bits([out], expected, what)
            assert_same_bits([own], before, what)
            assert communicator.all_reduce(own, out=own) is own
            assert_same_bits([own], expected, f"{what} in place")


def eager(rank: Rank, seed: int, lengths: Sequence[int], max_size: int) -> None:
    with open_communicator(rank, max_size=max_size) as communicator:
        assert (communicator.rank, communicator.world_size) == (rank.rank, rank.world_size)
        assert communicator.max_size == max_size
        assert communicator.timeout == TIMEOUT
        check_calls(rank, communicator, generator_of(rank, seed), lengths)
        communicator.check()
        assert list(communicator.missing_ranks) == []
        assert not communicator.closed
    assert communicator.closed


def graphs(rank: Rank, seed: int, rounds: int) -> None:
    """Captured in a pool of their own, replayed with new inputs, discarded and captured again.

    Rank 0 captures graphs that no one replays, which asks nothing of the other ranks.
    """
    generator = generator_of(rank, seed)
    with open_communicator(rank) as communicator:
        pool = torch.cuda.graph_pool_handle()
        inputs = random_inputs(rank.world_size, 3000, torch.bfloat16, generator)
        own = inputs[rank.rank]
        for round_ in range(rounds):
            if rank.rank == 0:
                unused = torch.cuda.CUDAGraph()
                with torch.cuda.graph(unused, pool=pool):
                    communicator.all_reduce(own * 3)
                del unused
            graph = torch.cuda.CUDAGraph()
            with communicator.capture(), torch.cuda.graph(graph, pool=pool):
                first = communicator.all_reduce(own * 2)  # an input in the pool
                second = communicator.all_reduce(first)
                communicator.all_reduce(second, out=second)
            for replay in range(2):
                refill(inputs, generator)
                graph.replay()
                expected = reference.all_reduce([inp * 2 for inp in inputs])
                assert_same_bits([first], expected, f"round {round_}, replay {replay}")
                for _ in range(2):
                    expected = reference.all_reduce([expected] * rank.world_size)
                assert_same_bits([second], expected, f"round {round_}, replay {replay}")
                check_calls(rank, communicator, generator, [77], [torch.float16])
            del graph, first, second
            gc.collect()
            torch.cuda.empty_cache()
            # What had the addresses of the discarded graph is something else now.
            junk = [torch.full((3000,), torch.nan, device=rank.device) for _ in range(8)]
            del junk
        communicator.check()


def expandable_segments(rank: Rank, seed: int) -> None:
    """Inputs of memory that has no IPC handle."""
    inputs = random_inputs(rank.world_size, 3 << 20, torch.bfloat16, generator_of(rank, seed))
    segments = torch.cuda.memory_snapshot()
    assert any(segment["is_expandable"] for segment in segments)
    del inputs
    eager(rank, seed, [1, 4097], 1 << 20)
    graphs(rank, seed, rounds=1)


def compiled(rank: Rank, seed: int) -> None:
    generator = generator_of(rank, seed)
    with open_communicator(rank) as communicator:

        def step(x: Tensor) -> Tensor:
            return communicator.all_reduce(x * 2) + 1

        compiled_step = torch.compile(step, fullgraph=True)
        for _ in range(3):
            inputs = random_inputs(rank.world_size, 3000, torch.bfloat16, generator)
            expected = reference.all_reduce([inp * 2 for inp in inputs]) + 1
            got = compiled_step(inputs[rank.rank])
            assert_same_bits([got], expected)
        communicator.check()


class ExistingCaller:
    """Drives the operators in the order of a caller that has its own communicator class."""

    def __init__(self, rank: Rank, max_size: int, more: int = 0) -> None:
        """``more``: bytes of the own buffer that only this rank has."""
        self.ops = torch.ops.custom_ar
        self.rank = rank
        self.max_size = max_size
        self.metas = self.share(self.ops.meta_size() + max_size + more)
        self.buffers = self.share(max_size)
        rank_data = torch.empty(8 << 20, dtype=torch.uint8, device=rank.device)
        self.fa = self.ops.init_custom_ar(self.metas, rank_data, rank.rank, True)
        self.ops.register_buffer(self.fa, self.buffers)
        self.ops._set_timeout(self.fa, TIMEOUT)

    def share(self, num_bytes: int) -> list[int]:
        """Every rank's buffer as this process sees it."""
        own, handle = self.ops.allocate_shared_buffer_and_handle(num_bytes)
        handles: list[Any] = [None] * self.rank.world_size
        dist.all_gather_object(handles, handle, group=self.rank.group)
        return [
            own if peer == self.rank.rank else self.ops.open_mem_handle(peer_handle)
            for peer, peer_handle in enumerate(handles)
        ]

    def all_reduce(self, inp: Tensor) -> Tensor:
        out = torch.empty_like(inp)
        if torch.cuda.is_current_stream_capturing():
            self.ops.all_reduce(self.fa, inp, out, 0, 0)
        else:
            own_buffer = self.buffers[self.rank.rank]
            self.ops.all_reduce(self.fa, inp, out, own_buffer, self.max_size)
        return out

    def register_graphs(self) -> None:
        world_size = self.rank.world_size
        metas: list[list[Any]] = [[None, None] for _ in range(world_size)]
        metas[self.rank.rank] = list(self.ops.get_graph_buffer_ipc_meta(self.fa))
        for source, meta in enumerate(metas):
            dist.broadcast_object_list(meta, src=source, group=self.rank.group, device="cpu")
        handles, offsets = ([meta[i] for meta in metas] for i in range(2))
        self.ops.register_graph_buffers(self.fa, handles, offsets)

    def close(self) -> None:
        self.ops.dispose(self.fa)
        # Nobody frees what a peer still maps.
        dist.barrier(self.rank.group)
        for pointers in (self.metas, self.buffers):
            self.ops.free_shared_buffer(pointers[self.rank.rank])


def existing_caller(rank: Rank, seed: int) -> None:
    generator = generator_of(rank, seed)
    for _ in range(2):
        caller = ExistingCaller(rank, 1 << 20)
        for dtype in DTYPES:
            for length in (8, 4096):
                inputs = random_inputs(rank.world_size, length, dtype, generator)
                expected = reference.all_reduce(inputs)
                assert_same_bits([caller.all_reduce(inputs[rank.rank])], expected)
        inputs = random_inputs(rank.world_size, 4096, torch.bfloat16, generator)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = caller.all_reduce(inputs[rank.rank])
        caller.register_graphs()
        for _ in range(2):
            refill(inputs, generator)
            graph.replay()
            assert_same_bits([out], reference.all_reduce(inputs))
        torch.cuda.synchronize()
        dist.barrier(rank.group)
        caller.close()


def buffers_of_different_sizes(rank: Rank, seed: int) -> None:
    """By less, or by more, than what allocations are rounded to; in either slot, and in pieces."""
    generator = generator_of(rank, seed)
    for more in (4096, 5 << 20):
        caller = ExistingCaller(rank, 1 << 16, more * rank.rank)
        for length in (1000, 1000, 7 << 20):
            inputs = random_inputs(rank.world_size, length, torch.bfloat16, generator)
            # Longer than the caller's own buffer, which is for what it registers.
            got = torch.full_like(inputs[rank.rank], torch.nan)
            caller.ops.all_reduce(caller.fa, inputs[rank.rank], got, 0, 0)
            assert_same_bits([got], reference.all_reduce(inputs), f"{length} elements, {more} more")
        torch.cuda.synchronize()
        dist.barrier(rank.group)
        caller.close()


def late_close(rank: Rank) -> None:
    """Rank 0 closes while the others are open: what they may write to stays until they have closed.

    Here they make one more call, which writes to it.
    """
    communicator = open_communicator(rank)
    buffers = communicator._memory._buffers
    own = torch.ones(1000, device=rank.device)
    communicator.all_reduce(own)
    torch.cuda.synchronize()
    dist.barrier(rank.group)
    if rank.rank == 0:
        begin = time.monotonic()
        communicator.close()
        assert time.monotonic() - begin < 2
        assert buffers._own is not None
    dist.barrier(rank.group)
    if rank.rank != 0:
        out = communicator.all_reduce(own)
        torch.cuda.synchronize()
        assert out.isnan().all()
        with pytest.raises(RuntimeError, match=r"rank 0 had closed|gave up"):
            communicator.check()
    dist.barrier(rank.group)
    communicator.close()
    if rank.rank == 0:
        assert buffers._own is not None
    dist.barrier(rank.group)
    communicator.close()
    assert buffers._own is None


def close_in_any_order(rank: Rank) -> float:
    """Two communicators, closed in another order on odd ranks; how long that took."""
    communicators = [open_communicator(rank) for _ in range(2)]
    own = torch.ones(1000, device=rank.device)
    for communicator in communicators:
        communicator.all_reduce(own)
    torch.cuda.synchronize()
    dist.barrier(rank.group)
    begin = time.monotonic()
    for communicator in communicators if rank.rank % 2 == 0 else reversed(communicators):
        communicator.close()
    seconds = time.monotonic() - begin
    dist.barrier(rank.group)
    communicators[0].close()
    return seconds


def failure_at_the_end(rank: Rank, absent: int, timeout: float) -> list[tuple[str, str]]:
    """The last call before close() fails: what is logged."""
    with logged("custom_ar") as lines:
        communicator = open_communicator(rank, timeout=timeout)
        own = torch.ones(1000, device=rank.device)
        communicator.all_reduce(own)
        torch.cuda.synchronize()
        lines.clear()  # of ranks that share a GPU
        dist.barrier(rank.group)
        if rank.rank != absent:
            communicator.all_reduce(own)
            communicator.close()
            assert communicator.missing_ranks == [absent]
        dist.barrier(rank.group)
        communicator.close()
        return list(lines)


def out_of_memory(rank: Rank) -> None:
    """A result that finds no room raises before anything is sent, on each rank that lacks it."""
    own = torch.ones(16 << 20, device=rank.device)
    with open_communicator(rank, max_size=own.nbytes) as communicator:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(rank.device).total_memory
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
        try:
            with pytest.raises(
                torch.OutOfMemoryError,
                match=r"^custom_ar::all_reduce: cannot allocate the result, 67108864 bytes on cuda",
            ):
                communicator.all_reduce(own)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert (communicator.all_reduce(own) == rank.world_size).all()
        communicator.check()


def operator_checks(rank: Rank, seed: int) -> None:
    """torch's own checks of an operator; each rank makes the same calls."""
    inputs = random_inputs(rank.world_size, 64, torch.float32, generator_of(rank, seed))
    own = inputs[rank.rank]
    caller = ExistingCaller(rank, 1 << 20)
    ops = torch.ops.custom_ar
    fa, out = caller.fa, torch.zeros_like(own)
    torch.library.opcheck(ops.all_reduce.default, (fa, own, out, 0, 0))
    torch.library.opcheck(ops._all_reduce_as.default, (fa, own, out, 1, 2, 64, 1))
    torch.cuda.synchronize()
    dist.barrier(rank.group)
    caller.close()
    with open_communicator(rank) as communicator:
        named = (communicator._order, communicator._id)
        torch.library.opcheck(ops.functional_all_reduce.default, (own, *named))
        out = torch.empty_like(own)
        torch.library.opcheck(ops.functional_all_reduce_out.default, (own, *named, out))


def open_and_close(rank: Rank, rounds: int) -> dict[str, int]:
    """What the rounds left behind: device bytes, open files, mappings of memory."""
    own = torch.full((1000,), rank.rank + 1.0, device=rank.device)

    def run(count: int) -> None:
        for _ in range(count):
            with open_communicator(rank, max_size=1 << 16) as communicator:
                out = communicator.all_reduce(own)
        world_size = rank.world_size
        assert (out == world_size * (world_size + 1) // 2).all()
        dist.barrier(rank.group)
        communicator.close()  # frees what a peer still mapped

    return left_behind(rank, run, rounds)


def absent_rank(rank: Rank, seed: int, absent: int, timeout: float) -> dict[str, Any]:
    """One rank skips a call and makes the next too late."""
    generator = generator_of(rank, seed)
    communicator = open_communicator(rank, timeout=timeout)
    check_calls(rank, communicator, generator, [1000], [torch.bfloat16])
    own = torch.ones(1000, device=rank.device)
    torch.cuda.synchronize()
    dist.barrier(rank.group)
    if rank.rank == absent:
        time.sleep(timeout + 3)
    begin = time.monotonic()
    out = communicator.all_reduce(own)
    torch.cuda.synchronize()
    waited = time.monotonic() - begin
    messages = []
    for attempt in (communicator.check, lambda: communicator.all_reduce(own)):
        try:
            attempt()
        except RuntimeError as error:
            messages.append(str(error))
    assert out.isnan().all()
    assert (own == 1).all()
    missing = list(communicator.missing_ranks)
    communicator.close()
    with open_communicator(rank) as successor:
        check_calls(rank, successor, generator, [1000], [torch.bfloat16])
    return {"waited": waited, "messages": messages, "missing": missing}


def call_until_failure(
    communicator: custom_ar.Communicator, own: Tensor, expected: Tensor, limit: float
) -> dict[str, Any]:
    """Call until an error; how many calls were right, how long the last took, and what it said."""
    calls = 0
    begin = last = time.monotonic()
    while time.monotonic() - begin < limit:
        outputs = []
        try:
            for _ in range(4):
                outputs.append(communicator.all_reduce(own))
            torch.cuda.synchronize()
            communicator.check()
        except RuntimeError as error:
            waited = time.monotonic() - last
            torch.cuda.synchronize()
            for out in outputs:  # of calls that were under way
                assert (out.isnan() | ~differing(out, expected)).all()
            return {"calls": calls, "waited": waited, "message": str(error)}
        assert_same_bits(outputs, expected)
        last = time.monotonic()
        calls += len(outputs)
    raise AssertionError(f"{calls} calls in {limit} s, and no error")


def survive_a_kill(rank: Rank, seed: int, victim: int, timeout: float) -> dict[str, Any]:
    """One rank is killed while it calls; the others find out and go on without it."""
    generator = generator_of(rank, seed)
    communicator = open_communicator(rank, timeout=timeout)
    inputs = random_inputs(rank.world_size, 5000, torch.bfloat16, generator)
    expected = reference.all_reduce(inputs)
    communicator.all_reduce(inputs[rank.rank])
    torch.cuda.synchronize()
    dist.barrier(rank.group)
    if rank.rank == victim:
        die_in(random.Random(seed).uniform(0.5, 1.5))
    result = call_until_failure(communicator, inputs[rank.rank], expected, 60)
    result["missing"] = list(communicator.missing_ranks)
    communicator.close()

    survivors = rank.regroup([r for r in range(rank.world_size) if r != victim])
    with open_communicator(survivors) as successor:
        check_calls(survivors, successor, generator, [1, 3000], [torch.float32, torch.bfloat16])
        successor.check()
    return result


def lost_writes(rank: Rank, liar: int) -> list[str | None]:
    """On rank ``liar`` a peer's memory opens as memory of its own: what it writes never arrives."""
    ops = torch.ops.custom_ar
    real = ops.open_mem_handle
    if rank.rank == liar:

        def open_scratch(mem_handle: Tensor) -> int:
            return ops.allocate_shared_buffer_and_handle(64 << 20)[0]

        open_scratch.default = open_scratch  # type: ignore[attr-defined]
        ops.open_mem_handle = open_scratch
    try:
        communicator = custom_ar.Communicator(
            rank.group, rank.device, max_size=1 << 16, timeout=TIMEOUT
        )
    finally:
        ops.open_mem_handle = real
    reasons = [communicator.fallback_reason]
    with communicator:
        for dtype in DTYPES:
            own = torch.full((1000,), rank.rank + 1.0, dtype=dtype, device=rank.device)
            out = communicator.all_reduce(own)
            world_size = rank.world_size
            assert out.dtype == dtype
            assert (out == world_size * (world_size + 1) // 2).all()
            assert (own == rank.rank + 1).all()
            assert not communicator.supports(own)
    with open_communicator(rank) as successor:
        reasons.append(successor.fallback_reason)
    return reasons


def sweep(rank: Rank, seed: int, max_size: int) -> None:
    """All sizes up to ``max_size`` in all dtypes, eagerly and in one graph that has them all."""
    generator = generator_of(rank, seed)
    with open_communicator(rank, max_size=max_size) as communicator:
        for dtype in DTYPES:
            lengths = set()
            for exponent in range(1, max_size.bit_length()):
                length = max(2**exponent // dtype.itemsize, 1)
                lengths |= {length, length + 1 if exponent % 2 else max(length - 1, 1)}
            lengths = {n for n in lengths if n * dtype.itemsize <= max_size}
            statics = []
            for length in sorted(lengths):
                inputs = random_inputs(rank.world_size, length, dtype, generator)
                expected = reference.all_reduce(inputs)
                own = inputs[rank.rank].clone()
                del inputs
                what = f"{length} elements of {dtype} on rank {rank.rank} of {rank.world_size}"
                assert_same_bits([communicator.all_reduce(own)], expected, what)
                statics.append((own, torch.full_like(own, torch.nan), expected, what))
            graph = torch.cuda.CUDAGraph()
            with communicator.capture(), torch.cuda.graph(graph):
                for own, out, _, _ in statics:
                    communicator.all_reduce(own, out=out)
            for _ in range(2):
                graph.replay()
                for own, out, expected, what in statics:
                    assert_same_bits([out], expected, f"{what}, replayed")
                    # All ranks shift their inputs, and the next sums are these, shifted.
                    own.copy_(own.roll(1))
                    expected.copy_(expected.roll(1))
                    out.fill_(torch.nan)
            communicator.check()


def alternating_devices(rank: Rank, seed: int) -> None:
    """The tensors decide the device and the stream, whichever device is current."""
    generator = generator_of(rank, seed)
    with open_communicator(rank) as communicator:
        torch.cuda.synchronize()
        for step in range(12):
            inputs = random_inputs(rank.world_size, 4097, torch.bfloat16, generator)
            expected = reference.all_reduce(inputs)
            current = (rank.rank + step % 2) % torch.cuda.device_count()
            stream = torch.cuda.Stream(rank.device)
            stream.wait_stream(torch.cuda.current_stream(rank.device))
            # Makes the stream current on its own device, and then another device current.
            with torch.cuda.stream(stream), torch.cuda.device(current):
                out = communicator.all_reduce(inputs[rank.rank])
                assert torch.cuda.current_device() == current
            stream.synchronize()
            assert out.device == rank.device
            assert_same_bits([out], expected, f"step {step}")
        communicator.check()


def backend_fallback(rank: Rank) -> None:
    """What is larger than max_size goes to the group's backend, which has the sum all the same."""
    total = rank.world_size * (rank.world_size + 1) // 2
    with open_communicator(rank, max_size=1 << 16) as communicator:
        for dtype in (*DTYPES, torch.float64, torch.int32):
            for num_bytes in (1 << 16, (1 << 16) + 16, 4 << 20):
                own = torch.full(
                    (num_bytes // dtype.itemsize,), rank.rank + 1, dtype=dtype, device=rank.device
                )
                is_ours = dtype in DTYPES and num_bytes <= 1 << 16
                assert communicator.supports(own) == is_ours
                out = communicator.all_reduce(own)
                assert (out == total).all()
                assert (own == rank.rank + 1).all()
                assert communicator.all_reduce(own, out=own) is own
                assert (own == total).all()
        gaps = torch.full((64, 64), rank.rank + 1.0, device=rank.device)[:, ::2]
        assert not communicator.supports(gaps)
        assert (communicator.all_reduce(gaps) == total).all()
        communicator.check()


def large_calls_on_two_streams(rank: Rank, seed: int) -> None:
    """Of two communicators, whose kernels each fill the GPU."""
    generator = generator_of(rank, seed)
    length = (32 << 20) // torch.bfloat16.itemsize
    options = {"max_size": 32 << 20, "timeout": 10.0}
    with (
        open_communicator(rank, **options) as first,
        open_communicator(rank, **options) as second,
    ):
        communicators = (first, second)
        inputs = [random_inputs(rank.world_size, length, torch.bfloat16, generator) for _ in "ab"]
        expected = [reference.all_reduce(values) for values in inputs]
        outputs = [[torch.full_like(e, torch.nan) for e in expected] for _ in range(4)]
        streams = [torch.cuda.Stream() for _ in communicators]
        torch.cuda.synchronize()
        dist.barrier(rank.group)
        for outs in outputs:
            for communicator, stream, values, out in zip(
                communicators, streams, inputs, outs, strict=True
            ):
                with torch.cuda.stream(stream):
                    communicator.all_reduce(values[rank.rank], out=out)
        torch.cuda.synchronize()
        for communicator in communicators:
            communicator.check()
        for outs in outputs:
            for out, total in zip(outs, expected, strict=True):
                assert_same_bits([out], total)


def first_calls_in_opposite_orders(rank: Rank, seed: int) -> None:
    """Of two communicators on two streams, small, in each dtype: no kernel is loaded in a call."""
    generator = generator_of(rank, seed)
    options = {"timeout": 10.0}
    with (
        open_communicator(rank, **options) as first,
        open_communicator(rank, **options) as second,
    ):
        order = [0, 1] if rank.rank % 2 == 0 else [1, 0]
        streams = [torch.cuda.Stream() for _ in order]
        for dtype in DTYPES:
            inputs = random_inputs(rank.world_size, 1000, dtype, generator)
            expected = reference.all_reduce(inputs)
            outputs = [torch.full_like(expected, torch.nan) for _ in order]
            torch.cuda.synchronize()
            dist.barrier(rank.group)
            for index in order:
                with torch.cuda.stream(streams[index]):
                    (first, second)[index].all_reduce(inputs[rank.rank], out=outputs[index])
            torch.cuda.synchronize()
            first.check()
            second.check()
            assert_same_bits(outputs, expected)
