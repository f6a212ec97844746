"""The kernels against the reference, to the bit, in the ways a server calls them; and what fails.

All ranks run in this process on one GPU. What needs processes is in test_processes.py.
"""

from __future__ import annotations

import gc
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import custom_ar
import pytest
import torch
from all_reduce_cases import (
    DTYPES,
    LENGTHS,
    TUNINGS,
    WORLD_SIZES,
    Guarded,
    assert_same_bits,
    differing,
    random_inputs,
    random_values,
    special_words,
)
from custom_ar import reference
from local_ranks import SHARED_GRANULARITY, LocalRanks
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

all_world_sizes = pytest.mark.parametrize("world_size", WORLD_SIZES)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
all_tunings = pytest.mark.parametrize("tuning", [None, *TUNINGS], ids=str)


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


def check(
    ranks: LocalRanks,
    inputs: Sequence[Tensor],
    tuning: Sequence[int] | None = None,
    offsets: tuple[Sequence[int], Sequence[int]] = ((0,), (0,)),
    in_place: bool = False,
) -> None:
    """One all-reduce of flat inputs, whose copies and outputs are ``offsets`` past alignment."""
    length, dtype = inputs[0].numel(), inputs[0].dtype
    expected = reference.all_reduce(list(inputs))
    placed = [
        Guarded(length, dtype, offsets[0][rank % len(offsets[0])]).fill(inp)
        for rank, inp in enumerate(inputs)
    ]
    outputs = placed
    if not in_place:
        outputs = [
            Guarded(length, dtype, offsets[1][rank % len(offsets[1])])
            for rank in range(ranks.world_size)
        ]
    results = [o.tensor for o in outputs]
    ranks.all_reduce([p.tensor for p in placed], results, tuning)
    wrong = [differing(result, expected).any() for result in results]
    wrong += [~guarded.is_intact() for guarded in {*placed, *outputs}]
    if not in_place:
        wrong += [differing(p.tensor, inp).any() for p, inp in zip(placed, inputs, strict=True)]
    if not torch.stack(wrong).any():
        return
    what = f"{ranks.world_size} ranks, tuning {tuning}, {length} elements of {dtype}"
    assert_same_bits(results, expected, f"{what}, failures {ranks.failures()}")
    raise AssertionError(f"{what}: inputs or what lies around the tensors were written")


def check_alive(ranks: LocalRanks, generator: torch.Generator) -> None:
    check(ranks, random_inputs(ranks.world_size, 100, torch.bfloat16, generator))
    assert not any(ranks.failures())


def warm_up(ranks: LocalRanks, generator: torch.Generator, *cases: tuple[torch.dtype, int]) -> None:
    """Load the kernels of a test whose calls do not end as they should.

    The first launch of a kernel may wait for those that run, and these for it.
    """
    for dtype, length in cases:
        check(ranks, random_inputs(ranks.world_size, length, dtype, generator))
    torch.cuda.synchronize()


@all_dtypes
@all_tunings
@all_world_sizes
def test_lengths(
    generator: torch.Generator, world_size: int, tuning: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    with LocalRanks(world_size) as ranks:
        lengths = [n for n in LENGTHS if tuning is not None or ranks.fits(n * dtype.itemsize)]
        assert {n for n in LENGTHS if n * dtype.itemsize <= 16 << 10} <= set(lengths)
        for length in lengths:
            check(ranks, random_inputs(world_size, length, dtype, generator), tuning)
        assert not any(ranks.failures())


@pytest.mark.parametrize("max_blocks", [1, 3, 33])
@pytest.mark.parametrize("world_size", [2, 3])
def test_limited_blocks(generator: torch.Generator, world_size: int, max_blocks: int) -> None:
    """Of messages in one shot and in two, with fewer blocks than they are tuned for and as many."""
    with LocalRanks(world_size, max_size=4 << 20) as ranks:
        for fa in ranks.fas:
            ranks.ops._set_max_blocks(fa, max_blocks)
        algorithms = set()
        for length in (1, 2048, 65_537, 300_000, (2 << 20) - 7, 2 << 20):
            algorithms.add(ranks.ops._choose_tuning(world_size, 2 * length)[0])
            check(ranks, random_inputs(world_size, length, torch.bfloat16, generator))
        assert algorithms == {0, 1}
        assert not any(ranks.failures())


@all_tunings
@all_world_sizes
def test_any_alignment(
    generator: torch.Generator, world_size: int, tuning: tuple[int, ...] | None
) -> None:
    """Of input and output each, and not the same on all ranks."""
    with LocalRanks(world_size) as ranks:
        for dtype in DTYPES:
            for length in (1, 7, 8, 9, 1000, 4001):
                inputs = random_inputs(world_size, length, dtype, generator)
                for offsets in (((1,), (1,)), ((0, 1, 5), (4, 0, 2, 3)), ((3, 8), (0,))):
                    check(ranks, inputs, tuning, offsets)
        assert not any(ranks.failures())


@all_tunings
@all_world_sizes
def test_in_place(
    generator: torch.Generator, world_size: int, tuning: tuple[int, ...] | None
) -> None:
    with LocalRanks(world_size) as ranks:
        for dtype in DTYPES:
            for length in (1, 9, 4096, 4001):
                inputs = random_inputs(world_size, length, dtype, generator)
                check(ranks, inputs, tuning, in_place=True)
                check(ranks, inputs, tuning, ((1, 2, 0), ()), in_place=True)
        assert not any(ranks.failures())


@all_dtypes
@pytest.mark.parametrize("tuning", [None, (0, 3, 96, 2), (1, 3, 96, 2)], ids=str)
@all_world_sizes
def test_several_pieces(
    generator: torch.Generator, world_size: int, tuning: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    """A message that the buffer cannot pass at once, to its last byte and one vector more."""
    elements_per_vector = 16 // dtype.itemsize
    with LocalRanks(world_size, max_size=1024) as ranks:
        for length in (
            1024 // dtype.itemsize,
            1024 // dtype.itemsize + 1,
            2048 // dtype.itemsize - 1,
            2048 // dtype.itemsize + elements_per_vector,
            16000 // dtype.itemsize + 3,
        ):
            inputs = random_inputs(world_size, length, dtype, generator)
            check(ranks, inputs, tuning)
            check(ranks, inputs, tuning, ((1, 0), (0, 3)))
            check(ranks, inputs, tuning, in_place=True)
        assert not any(ranks.failures())


@pytest.mark.parametrize("tuning", [None, (0, 3, 96, 2), (1, 3, 96, 2)], ids=str)
@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_more_calls_than_slots(
    generator: torch.Generator, world_size: int, tuning: tuple[int, ...] | None
) -> None:
    """Calls in a row without waiting for any, of sizes and dtypes that leave other bits behind."""
    lengths = [1, 4096, 17, 2000, 5, 4096, 4095, 333] * 3
    inputs, outputs = [], []
    for index, length in enumerate(lengths):
        inputs.append(random_inputs(world_size, length, DTYPES[index % 3], generator))
        outputs.append([torch.full_like(inp, torch.nan) for inp in inputs[-1]])
    with LocalRanks(world_size) as ranks:

        def run(rank: int) -> None:
            for call_inputs, call_outputs in zip(inputs, outputs, strict=True):
                ranks.call(rank, call_inputs[rank], call_outputs[rank], tuning)

        ranks.launch(run)
        for index, call_inputs in enumerate(inputs):
            assert_same_bits(outputs[index], reference.all_reduce(call_inputs), f"call {index}")
        assert not any(ranks.failures())


def permuted(shape: tuple[int, ...], order: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    def place(values: Tensor) -> Tensor:
        return values[: torch.Size(shape).numel()].view(shape).permute(order)

    return place


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "matrix": lambda values: values[:1000].view(8, 125),
    "transposed": permuted((8, 125), (1, 0)),
    "permuted": permuted((5, 7, 3, 9), (2, 0, 3, 1)),
    "channels_last": permuted((2, 5, 5, 6), (0, 3, 1, 2)),
    "slice": lambda values: values[24:1000].view(8, 122)[3:6],
    "slice_unaligned": lambda values: values[1:1000].view(9, 111)[2:7].t(),
    "scalar": lambda values: values[7],
    "ones": lambda values: values[:30].view(1, 30, 1, 1).permute(3, 1, 0, 2),
    "odd_strides_of_ones": lambda values: values.as_strided((1, 30, 1), (7, 1, 5)),
}


@all_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_layouts(generator: torch.Generator, layout: str, dtype: torch.dtype) -> None:
    place = LAYOUTS[layout]
    with LocalRanks(3) as ranks:
        inputs = [place(values) for values in random_inputs(3, 1024, dtype, generator)]
        storages = [torch.full((1024,), torch.nan, dtype=dtype, device="cuda") for _ in range(3)]
        outputs = [place(storage) for storage in storages]
        assert outputs[0].stride() == inputs[0].stride()
        expected = reference.all_reduce([inp.clone() for inp in inputs])
        for tuning in (None, (1, 3, 96, 2)):
            for storage in storages:
                storage.fill_(torch.nan)
            ranks.all_reduce(inputs, outputs, tuning)
            assert_same_bits(outputs, expected, layout)
            for storage in storages:
                assert int(storage.isnan().sum()) == 1024 - expected.numel()
        assert not any(ranks.failures())


def test_empty_tensors_are_no_call(generator: torch.Generator) -> None:
    with LocalRanks(2) as ranks:
        for shape in ((0,), (3, 0, 5)):
            inp, out = torch.empty(2, *shape, device="cuda").unbind()
            ranks.launch(lambda rank, i=inp, o=out: ranks.call(rank, i, o), ranks=[0])
        check_alive(ranks, generator)


@all_dtypes
@all_tunings
def test_special_values(
    generator: torch.Generator, tuning: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    """Each special word with each other, at each place of a vector."""
    words = special_words("cuda")
    first, second = torch.meshgrid(words, words, indexing="ij")
    for world_size in (2, 3, 8):
        bits = [first.flatten(), second.flatten()]
        for _ in range(world_size - 2):
            order = torch.randperm(len(bits[0]), generator=generator, device="cuda")
            bits.append(bits[0][order])
        with LocalRanks(world_size) as ranks:
            for shift in range(4):
                check(ranks, [b.roll(shift).view(dtype) for b in bits], tuning)
            # Alone they reach the output unchanged, where the sum is not of two zeros.
            values = words.view(dtype)
            zeros = torch.full_like(values, -0.0)
            check(ranks, [values, *[zeros] * (world_size - 1)], tuning)
            assert not any(ranks.failures())


@all_dtypes
@all_world_sizes
def test_any_bits(generator: torch.Generator, world_size: int, dtype: torch.dtype) -> None:
    with LocalRanks(world_size) as ranks:
        for tuning in (None, (0, 3, 96, 2), (1, 3, 96, 2)):
            words = torch.empty(world_size, 4096, dtype=torch.int32, device="cuda")
            words.random_(-(2**31), 2**31, generator=generator)
            check(ranks, [row.view(dtype) for row in words], tuning)
        assert not any(ranks.failures())


@pytest.mark.parametrize("tuning", [None, (0, 3, 96, 2), (1, 3, 96, 2)], ids=str)
@all_world_sizes
def test_cuda_graph(
    generator: torch.Generator, world_size: int, tuning: tuple[int, ...] | None
) -> None:
    """Replays see the inputs that are there when they run; eager calls come between them.

    Captured as the communicator's first calls.
    """
    lengths = (9, 2000, 4097)
    inputs = [random_inputs(world_size, n, torch.bfloat16, generator) for n in lengths]
    outputs = [[torch.empty_like(inp) for inp in call] for call in inputs]
    with LocalRanks(world_size) as ranks:

        def run(rank: int) -> None:
            for call in range(len(lengths)):
                ranks.call(rank, inputs[call][rank], outputs[call][rank], tuning)

        graphs = ranks.capture(run)
        for replay in range(4):
            for call in range(len(lengths)):
                for inp, out in zip(inputs[call], outputs[call], strict=True):
                    inp.copy_(random_values(inp.shape, inp.dtype, generator))
                    out.fill_(torch.nan)
            ranks.replay(graphs)
            for call in range(len(lengths)):
                expected = reference.all_reduce(inputs[call])
                assert_same_bits(outputs[call], expected, f"replay {replay}, call {call}")
            for _ in range(replay):  # so that replays begin with either slot
                check_alive(ranks, generator)
        assert not any(ranks.failures())


@pytest.mark.parametrize("use_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("tuning", [None, (1, 3, 96, 2)], ids=str)
@pytest.mark.parametrize("length", [5, 4096])
def test_chain_of_dependent_launches(
    generator: torch.Generator, length: int, tuning: tuple[int, ...] | None, use_graph: bool
) -> None:
    """Back to back, each launch reads what the last wrote: a programmatic launch must wait for it.

    Out of place and in place in turn.
    """
    world_size, calls = 3, 20
    first = random_inputs(world_size, length, torch.float32, generator)
    buffers = [
        [torch.empty_like(inp) for inp in first],
        [torch.empty_like(inp) for inp in first],
    ]
    expected = first
    for _ in range(calls):
        expected = [reference.all_reduce(expected)] * world_size
    with LocalRanks(world_size) as ranks:

        def chain(rank: int) -> None:
            source, target = buffers[0][rank], buffers[1][rank]
            for _ in range(calls // 2):
                ranks.call(rank, source, target, tuning)
                ranks.call(rank, target, target, tuning)
                source, target = target, source

        graphs = ranks.capture(chain) if use_graph else None
        for _ in range(5):
            for rank in range(world_size):
                buffers[0][rank].copy_(first[rank])
                buffers[1][rank].fill_(torch.nan)
            if graphs is None:
                ranks.launch(chain)
            else:
                ranks.replay(graphs)
            assert_same_bits(buffers[calls // 2 % 2], expected[0])
        assert not any(ranks.failures())


@pytest.mark.parametrize("tuning", [None, (1, 3, 96, 2)], ids=str)
def test_inputs_are_free_after_the_call(
    generator: torch.Generator, tuning: tuple[int, ...] | None
) -> None:
    """A call is ordered after what its stream had, and what follows may overwrite the input.

    The last rank is late, so that the others' calls wait.
    """
    world_size = 3
    values = random_inputs(world_size, 4097, torch.bfloat16, generator)
    inputs = [torch.zeros_like(v) for v in values]
    outputs = [torch.full_like(v, torch.nan) for v in values]
    copies = [torch.full_like(v, torch.nan) for v in values]
    with LocalRanks(world_size) as ranks:
        warm_up(ranks, generator, (torch.bfloat16, 4097))

        def run(rank: int) -> None:
            torch.cuda._sleep(20_000_000 if rank == world_size - 1 else 100_000)
            inputs[rank].copy_(values[rank])
            ranks.call(rank, inputs[rank], outputs[rank], tuning)
            inputs[rank].fill_(torch.nan)
            copies[rank].copy_(outputs[rank])
            outputs[rank].fill_(torch.nan)

        ranks.launch(run)
        assert_same_bits(copies, reference.all_reduce(values))
        assert not any(ranks.failures())


def test_two_streams_take_turns(generator: torch.Generator) -> None:
    """Eager calls of one communicator on two streams run in the order they were made.

    The first stream is held up: without an order the second one's calls would be the first.
    """
    world_size, rounds = 2, 30
    inputs = [random_inputs(world_size, 4096, torch.float16, generator) for _ in range(rounds)]
    outputs = [[torch.full_like(inp, torch.nan) for inp in call] for call in inputs]
    with LocalRanks(world_size) as ranks:
        warm_up(ranks, generator, (torch.float16, 4096))
        others = [torch.cuda.Stream() for _ in range(world_size)]
        torch.cuda.synchronize()
        for call in range(rounds):
            for rank in range(world_size):
                stream = (ranks.streams, others)[call % 2][rank]
                with torch.cuda.stream(stream):
                    if call % 6 == 2 * rank:
                        torch.cuda._sleep(1_000_000)
                    ranks.call(rank, inputs[call][rank], outputs[call][rank])
        torch.cuda.synchronize()
        assert not any(ranks.failures())
        for call in range(rounds):
            expected = reference.all_reduce(inputs[call])
            assert_same_bits(outputs[call], expected, f"call {call}")


@pytest.mark.parametrize("tuning", [None, (1, 3, 96, 2)], ids=str)
@pytest.mark.parametrize("hasty", [0, 1])
def test_two_replays_at_once_fail(
    generator: torch.Generator, hasty: int, tuning: tuple[int, ...] | None
) -> None:
    """What no host code sees: both graphs' kernels are there, and neither can be the next call."""
    world_size, other_rank = 2, 1 - hasty
    inputs = random_inputs(world_size, 4096, torch.bfloat16, generator)
    outputs = [torch.empty_like(inp) for inp in inputs]
    with LocalRanks(world_size, timeout=20.0) as ranks:
        check(ranks, inputs, tuning)
        torch.cuda.synchronize()
        first, second = (
            ranks.capture(lambda rank: ranks.call(rank, inputs[rank], outputs[rank], tuning))
            for _ in range(2)
        )
        other = torch.cuda.Stream()
        begin = time.monotonic()
        # The peer stays away, so that the first replay cannot be over when the second begins.
        with torch.cuda.stream(ranks.streams[hasty]):
            first[hasty].replay()
        with torch.cuda.stream(other):
            second[hasty].replay()
        torch.cuda.synchronize()
        assert time.monotonic() - begin < 5
        message = (
            rf"two calls ran at once on rank {hasty} of 2: order the calls of a communicator, "
            r"graph replays included, on one stream or by events; this communicator can only be "
            r"closed"
        )
        assert re.search(message, ranks.failure(hasty))
        with pytest.raises(RuntimeError, match=message):
            ranks.call(hasty, inputs[hasty], outputs[hasty])
        # The peer learns of it in its next call, not by a timeout.
        with torch.cuda.stream(ranks.streams[other_rank]):
            first[other_rank].replay()
        gave_up = rf"rank {hasty} gave up in call \d+.*this is rank {other_rank} of 2"
        assert re.search(gave_up, ranks.failure(other_rank))
        assert time.monotonic() - begin < 10
        assert outputs[other_rank].isnan().all()


@pytest.mark.parametrize("in_thread", [False, True], ids=["same_thread", "other_thread"])
@pytest.mark.parametrize("state", ["new", "idle", "busy"])
def test_eager_calls_while_a_stream_captures(
    generator: torch.Generator, state: str, in_thread: bool
) -> None:
    """A capture, in the global mode, goes on while the communicator has calls on other streams.

    They are its first ones; or follow one on a stream that is idle, or busy.
    """
    world_size, length = 2, 4096
    inputs, first_inputs, eager_inputs, more_inputs = (
        random_inputs(world_size, length, torch.bfloat16, generator) for _ in range(4)
    )
    outputs = [torch.full_like(inp, torch.nan) for inp in inputs]
    # By the graph that is captured meanwhile.
    first_outputs, eager_outputs, more_outputs = (
        [[torch.full_like(inp, torch.nan) for inp in inputs] for _ in range(world_size)]
        for _ in range(3)
    )
    with LocalRanks(world_size) as ranks:
        warm_up(ranks, generator, (torch.bfloat16, length))
        torch.cuda._sleep(1)
    with LocalRanks(world_size) as ranks, ThreadPoolExecutor(1) as thread:
        firsts, others = ([torch.cuda.Stream() for _ in range(world_size)] for _ in range(2))
        torch.cuda.synchronize()

        def first_calls(graph: int) -> None:
            for rank in range(world_size):
                with torch.cuda.stream(firsts[rank]):
                    torch.cuda._sleep(50_000_000)
                    ranks.call(rank, first_inputs[rank], first_outputs[graph][rank])

        def calls(graph: int) -> None:
            if state == "busy":
                first_calls(graph)
            for inps, outs in ((eager_inputs, eager_outputs), (more_inputs, more_outputs)):
                for rank in range(world_size):
                    with torch.cuda.stream(others[rank]):
                        ranks.call(rank, inps[rank], outs[graph][rank])

        def capture(rank: int) -> None:
            ranks.call(rank, inputs[rank], outputs[rank])
            if in_thread:
                thread.submit(calls, rank).result()
            else:
                calls(rank)
            ranks.call(rank, outputs[rank], outputs[rank])

        if state == "idle":
            first_calls(0)
        graphs = ranks.capture(capture)
        torch.cuda.synchronize()
        assert not any(ranks.failures())
        for graph in range(world_size):
            assert_same_bits(eager_outputs[graph], reference.all_reduce(eager_inputs))
            assert_same_bits(more_outputs[graph], reference.all_reduce(more_inputs))
            if state == "busy":
                assert_same_bits(first_outputs[graph], reference.all_reduce(first_inputs))
        expected = reference.all_reduce([reference.all_reduce(inputs)] * world_size)
        for _ in range(2):
            for out in outputs:
                out.fill_(torch.nan)
            ranks.replay(graphs)
            assert_same_bits(outputs, expected)
        assert not any(ranks.failures())


def test_two_threads_take_turns(generator: torch.Generator) -> None:
    """Calls of two host threads, each on a stream of its own: no piece comes between another's.

    Whose call is first is left open, so both sum the same.
    """
    world_size, rounds = 2, 10
    inputs = random_inputs(world_size, 8003, torch.bfloat16, generator)
    outputs = [
        [[torch.full_like(inp, torch.nan) for _ in range(rounds)] for _ in range(2)]
        for inp in inputs
    ]
    with LocalRanks(world_size, max_size=1024) as ranks:
        check(ranks, inputs)
        streams = [[torch.cuda.Stream() for _ in range(2)] for _ in range(world_size)]
        torch.cuda.synchronize()

        def run(rank: int, thread: int) -> None:
            with torch.cuda.stream(streams[rank][thread]):
                for output in outputs[rank][thread]:
                    ranks.call(rank, inputs[rank], output)

        with ThreadPoolExecutor(2 * world_size) as threads:
            calls = [threads.submit(run, r, t) for r in range(world_size) for t in range(2)]
            for call in calls:
                call.result()
        torch.cuda.synchronize()
        assert not any(ranks.failures())
        expected = reference.all_reduce(inputs)
        for of_rank in outputs:
            for of_thread in of_rank:
                assert_same_bits(of_thread, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("algorithm", [0, 1])
def test_more_than_2_gib(algorithm: int, dtype: torch.dtype) -> None:
    """In pieces, in place; past 2^31 elements of bfloat16 bytes and offsets."""
    length = (1 << 31) // dtype.itemsize + 12345
    if torch.cuda.mem_get_info()[0] < 4 * length * dtype.itemsize:
        pytest.skip("needs four times 2 GiB of device memory")
    with LocalRanks(2, max_size=64 << 20) as ranks:
        # Small integers: their sums are exact.
        pattern = torch.arange(length, device="cuda", dtype=torch.int64).remainder_(97).to(dtype)
        values = [pattern + rank for rank in range(2)]
        torch.cuda.synchronize()
        ranks.all_reduce(values, values, (algorithm, 32, 256, 4))
        torch.cuda.synchronize()
        assert not any(ranks.failures())
        pattern.mul_(2).add_(1)
        for value in values:
            assert torch.equal(value, pattern)


def test_closed_peer(generator: torch.Generator) -> None:
    """A call that a peer will not make any more fails at once."""
    inputs = random_inputs(2, 1000, torch.float16, generator)
    outputs = [torch.zeros_like(inp) for inp in inputs]
    with LocalRanks(2, timeout=20.0) as ranks:
        check(ranks, inputs)
        torch.cuda.synchronize()
        ranks.ops._announce_close(ranks.fas[1])
        begin = time.monotonic()
        ranks.launch(lambda rank: ranks.call(rank, inputs[rank], outputs[rank]), ranks=[0])
        message = r"rank 1 had closed before call 2 \(this is rank 0 of 2\)"
        assert re.search(message, ranks.failure(0)), ranks.failures()
        assert time.monotonic() - begin < 5
        assert outputs[0].isnan().all()


DISAGREEMENTS = {
    "size": ((torch.bfloat16, 1024), (torch.bfloat16, 2048)),
    "last_element": ((torch.float16, 1023), (torch.float16, 1024)),
    "dtype": ((torch.bfloat16, 1024), (torch.float16, 1024)),
    "dtype_of_same_bytes": ((torch.float32, 512), (torch.bfloat16, 1024)),
    "much_larger": ((torch.float32, 3), (torch.float32, 16384)),
}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_disagreement(generator: torch.Generator, case: str, world_size: int) -> None:
    """The last rank reduces something else: an error that names both, long before the timeout."""
    usual, odd = DISAGREEMENTS[case]
    with LocalRanks(world_size, timeout=20.0) as ranks:
        warm_up(ranks, generator, usual, odd)
        cases = [usual] * (world_size - 1) + [odd]
        inputs = [random_values((n,), dtype, generator) for dtype, n in cases]
        outputs = [torch.zeros_like(inp) for inp in inputs]
        torch.cuda.synchronize()
        begin = time.monotonic()
        ranks.all_reduce(inputs, outputs)
        torch.cuda.synchronize()
        assert time.monotonic() - begin < 5
        failures = ranks.failures()

        def texts(case: tuple[torch.dtype, int]) -> str:
            return f"{case[1]} elements of {case[0]}"

        last = world_size - 1
        for rank, failure in enumerate(failures):
            own, peer = (usual, odd) if rank != last else (odd, usual)
            disagree = (
                rf"ranks disagree in call 3: rank {rank} reduces {texts(own)}[^,]*, "
                rf"rank {last if rank != last else '[01]'} {texts(peer)}"
            )
            gave_up = r"rank \d gave up in call 3, since ranks disagreed on the call"
            assert re.search(rf"custom_ar::all_reduce: ({disagree}|{gave_up})", failure), failures
        assert any("ranks disagree" in failure for failure in failures)
        for output in outputs:
            assert output.isnan().all()


def test_disagreement_of_others(generator: torch.Generator) -> None:
    """A rank that comes later is told, and told why."""
    inputs = [random_values((n,), torch.float16, generator) for n in (1024, 1025, 1024)]
    outputs = [torch.zeros_like(inp) for inp in inputs]
    with LocalRanks(3, timeout=20.0) as ranks:
        warm_up(ranks, generator, (torch.float16, 1024))

        def call(rank: int) -> None:
            ranks.call(rank, inputs[rank], outputs[rank])

        ranks.launch(call, ranks=[0, 1])
        torch.cuda.synchronize()
        ranks.launch(call, ranks=[2])
        message = r"rank [01] gave up in call 2, since ranks disagreed on the call"
        assert re.search(message, ranks.failure(2)), ranks.failures()
        assert outputs[2].isnan().all()


@pytest.mark.parametrize("tuning", [None, (1, 3, 96, 2)], ids=str)
def test_rank_that_never_calls(generator: torch.Generator, tuning: tuple[int, ...] | None) -> None:
    world_size, length = 3, 4097
    inputs = random_inputs(world_size, length, torch.bfloat16, generator)
    outputs = [torch.zeros_like(inp) for inp in inputs]
    with LocalRanks(world_size, timeout=2.0) as ranks:
        for _ in range(3):
            check(ranks, inputs, tuning)
        # Kernels of what runs meanwhile, loaded.
        elsewhere = torch.zeros(1000, device="cuda")
        elsewhere.add_(1)
        graphs = ranks.capture(lambda rank: ranks.call(rank, inputs[rank], outputs[rank], tuning))
        side = torch.cuda.Stream()
        torch.cuda.synchronize()

        begin = time.monotonic()
        ended = []
        for rank in (0, 1):
            with torch.cuda.stream(ranks.streams[rank]):
                ranks.call(rank, inputs[rank], outputs[rank], tuning)
                ended.append(ranks.streams[rank].record_event())
        with torch.cuda.stream(side):
            elsewhere.add_(1)
        side.synchronize()
        assert not ended[0].query(), "the call ended without the third rank"
        assert time.monotonic() - begin < 1
        torch.cuda.synchronize()
        assert 1.9 < time.monotonic() - begin < 4

        missing = "rank 2 did not take part"
        in_time = rf"custom_ar::all_reduce: {missing} in call 4 within 2 s \(this is rank [01] of 3"
        gave_up = rf"custom_ar::all_reduce: rank [01] gave up in call 4, since {missing}"
        failures = ranks.failures()
        assert any(re.search(in_time, failure) for failure in failures[:2]), failures
        for rank in (0, 1):
            assert re.search(f"{in_time}|{gave_up}", failures[rank]), failures
            assert ranks.ops._missing_ranks(ranks.fas[rank]) == [2]
            assert outputs[rank].isnan().all()
            for _ in range(2):
                with pytest.raises(RuntimeError, match=f"{missing}.*can only be closed now"):
                    ranks.call(rank, inputs[rank], outputs[rank], tuning)

        # The rank that comes too late finds that it was given up on, without a wait of its own.
        assert failures[2] == ""
        begin = time.monotonic()
        with torch.cuda.stream(ranks.streams[2]):
            ranks.call(2, inputs[2], outputs[2], tuning)
        late = ranks.failure(2)
        assert time.monotonic() - begin < 1
        assert re.search(r"rank [01] gave up in call 4.*\(this is rank 2 of 3\)", late), late
        assert outputs[2].isnan().all()

        # Nor does a graph that was captured before lie, or wait.
        for output in outputs:
            output.zero_()
        begin = time.monotonic()
        ranks.replay(graphs)
        torch.cuda.synchronize()
        assert time.monotonic() - begin < 1
        for output in outputs:
            assert output.isnan().all()

        elsewhere.add_(1)
        assert elsewhere.eq(3).all()
    with LocalRanks(world_size) as ranks:
        check(ranks, inputs, tuning)
        check_alive(ranks, generator)


def test_several_missing_ranks_are_all_named(generator: torch.Generator) -> None:
    inputs = random_inputs(4, 100, torch.float32, generator)
    outputs = [torch.zeros_like(inp) for inp in inputs]
    with LocalRanks(4, timeout=0.5) as ranks:
        check(ranks, inputs)
        ranks.launch(lambda rank: ranks.call(rank, inputs[rank], outputs[rank]), ranks=[2])
        assert re.search(
            r"ranks 0, 1, 3 did not take part in call 2 within 0\.5 s \(this is rank 2 of 4\)",
            ranks.failure(2),
        )
        assert ranks.ops._missing_ranks(ranks.fas[2]) == [0, 1, 3]


def test_late_rank_within_the_timeout(generator: torch.Generator) -> None:
    inputs = random_inputs(2, 4096, torch.bfloat16, generator)
    outputs = [torch.full_like(inp, torch.nan) for inp in inputs]
    with LocalRanks(2) as ranks:
        warm_up(ranks, generator, (torch.bfloat16, 4096))
        for rank in (0, 1):
            with torch.cuda.stream(ranks.streams[rank]):
                ranks.call(rank, inputs[rank], outputs[rank])
            if rank == 0:
                time.sleep(1)
                assert not ranks.streams[0].query(), "the call ended without its peer"
        assert not any(ranks.failures())
        assert_same_bits(outputs, reference.all_reduce(inputs))


def test_communicators_do_not_disturb_each_other(generator: torch.Generator) -> None:
    """One fails while another of the same process and device works."""
    inputs = random_inputs(2, 100, torch.float32, generator)
    outputs = [torch.zeros_like(inp) for inp in inputs]
    with LocalRanks(2, timeout=0.5) as failing, LocalRanks(2) as working:
        check(failing, inputs)
        check(working, inputs)
        failing.launch(lambda rank: failing.call(rank, inputs[rank], outputs[rank]), ranks=[0])
        assert failing.failure(0)
        check_alive(working, generator)


def test_disposed(generator: torch.Generator) -> None:
    ops = torch.ops.custom_ar
    ranks = LocalRanks(2)
    check_alive(ranks, generator)
    inp, out = torch.ones(2, 8, device="cuda").unbind()
    fa = ranks.fas[0]
    ranks.close()
    calls: dict[str, tuple[Any, ...]] = {
        "all_reduce": (inp, out, 0, 0),
        "_all_reduce_as": (inp, out, 0, 1, 64, 1),
        "dispose": (),
        "register_buffer": ([0, 0],),
        "get_graph_buffer_ipc_meta": (),
        "register_graph_buffers": ([[], []], [[], []]),
        "_set_timeout": (1.0,),
        "_set_max_blocks": (1,),
        "_keep_mappings": (),
        "_check": (),
        "_missing_ranks": (),
        "_announce_close": (),
        "_check_unraised": (),
    }
    for op, args in calls.items():
        for unknown in (fa, 0, -1, 2**62):
            name = "all_reduce" if op.startswith("_check") else op  # the op whose calls it checks
            with pytest.raises(RuntimeError, match=f"custom_ar::{name}: fa must be "):
                getattr(ops, op)(unknown, *args)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_calling_order_of_an_existing_caller(generator: torch.Generator, world_size: int) -> None:
    """The operators in the order, and with the arguments, of a caller that knows no other ones."""
    ops = torch.ops.custom_ar
    max_size = 1 << 16
    world = range(world_size)
    first = [ops.allocate_shared_buffer_and_handle(ops.meta_size() + max_size) for _ in world]
    second = [ops.allocate_shared_buffer_and_handle(max_size) for _ in world]
    for _, handle in (*first, *second):
        assert (handle.dtype, handle.shape) == (torch.uint8, (64,))
        assert handle.device.type == "cpu"
    metas, buffers = ([pointer for pointer, _ in side] for side in (first, second))
    rank_data = [torch.empty(8 << 20, dtype=torch.uint8, device="cuda") for _ in world]
    fas = [ops.init_custom_ar(metas, rank_data[rank], rank, True) for rank in world]
    for fa in fas:
        ops.register_buffer(fa, buffers)
        ops._set_timeout(fa, 20.0)

    streams = [torch.cuda.Stream() for _ in world]
    # max_size in the caller's eyes is more than a piece of the message here.
    for dtype in DTYPES:
        for length in (4, 1024, 8192 // dtype.itemsize):
            inputs = random_inputs(world_size, length, dtype, generator)
            outputs = [torch.full_like(inp, torch.nan) for inp in inputs]
            torch.cuda.synchronize()
            for rank in world:
                with torch.cuda.stream(streams[rank]):
                    ops.all_reduce(fas[rank], inputs[rank], outputs[rank], buffers[rank], max_size)
            torch.cuda.synchronize()
            assert_same_bits(outputs, reference.all_reduce(inputs))

    inputs = random_inputs(world_size, 4096, torch.bfloat16, generator)
    outputs = [torch.empty_like(inp) for inp in inputs]
    graphs = [torch.cuda.CUDAGraph() for _ in world]
    for rank in world:
        with torch.cuda.graph(graphs[rank], stream=streams[rank]):
            ops.all_reduce(fas[rank], inputs[rank], outputs[rank], 0, 0)
    registered = [ops.get_graph_buffer_ipc_meta(fa) for fa in fas]
    for fa in fas:
        ops.register_graph_buffers(fa, [meta[0] for meta in registered], [m[1] for m in registered])
    for _ in range(3):
        for inp, out in zip(inputs, outputs, strict=True):
            inp.copy_(random_values(inp.shape, inp.dtype, generator))
            out.fill_(torch.nan)
        torch.cuda.synchronize()
        for rank in world:
            with torch.cuda.stream(streams[rank]):
                graphs[rank].replay()
        torch.cuda.synchronize()
        assert_same_bits(outputs, reference.all_reduce(inputs))

    with pytest.raises(RuntimeError, match="custom_ar::all_reduce: reg_buffer_sz_bytes must "):
        ops.all_reduce(fas[0], inputs[0], outputs[0], buffers[0], 8191)
    for rank in world:
        ops.dispose(fas[rank])
        ops.free_shared_buffer(metas[rank])
        ops.free_shared_buffer(buffers[rank])


def test_handle_on_the_gpu_is_refused() -> None:
    """The host reads it."""
    handle = torch.zeros(64, dtype=torch.uint8, device="cuda:0")
    message = r"^custom_ar::open_mem_handle: mem_handle must be on the CPU, got cuda:0"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.custom_ar.open_mem_handle(handle)


def test_shared_memory_is_of_whole_blocks() -> None:
    """A peer that maps it gets nothing else, since no other allocation is in the same block."""
    ops = torch.ops.custom_ar
    pointers = [ops.allocate_shared_buffer_and_handle(1)[0] for _ in range(4)]
    assert all(pointer % SHARED_GRANULARITY == 0 for pointer in pointers)
    for pointer in pointers:
        ops.free_shared_buffer(pointer)


def test_memory_that_cannot_be_had() -> None:
    message = "custom_ar::allocate_shared_buffer_and_handle: cannot allocate .* out of memory"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        custom_ar.ops.allocate_shared_buffer_and_handle(1 << 50)
    assert torch.ones(3, device="cuda").sum() == 3


@pytest.mark.parametrize("tuning", [None, (1, 3, 96, 2)], ids=str)
def test_buffers_of_different_sizes(
    generator: torch.Generator, tuning: tuple[int, ...] | None
) -> None:
    """The smallest decides what passes in one piece."""
    with LocalRanks(3, max_size=1024) as ranks:
        for fa in ranks.fas:
            ranks.ops.dispose(fa)
        # Rank 1 has more in front of what is there.
        ranks.buffers[1] -= 8192
        rank_data = torch.empty(8, dtype=torch.uint8, device="cuda")
        for rank in range(3):
            ranks.fas[rank] = ranks.ops.init_custom_ar(ranks.buffers, rank_data, rank, True)
            ranks.ops._set_timeout(ranks.fas[rank], 20.0)
        for length in (5, 512, 8000):
            for _ in range(2):  # in either slot
                check(ranks, random_inputs(3, length, torch.bfloat16, generator), tuning)
        assert not any(ranks.failures())


def test_shared_memory_is_zeroed_and_freed_once() -> None:
    ops = torch.ops.custom_ar
    num_bytes = 1 << 20

    def read(pointer: int) -> Tensor:
        interface = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }
        memory = SimpleNamespace(__cuda_array_interface__=interface)
        return torch.as_tensor(memory, device="cuda")

    for _ in range(3):  # the memory of the round before may come again
        pointer, _ = ops.allocate_shared_buffer_and_handle(num_bytes)
        memory = read(pointer)
        assert not memory.any()
        memory.fill_(255)
        torch.cuda.synchronize()
        ops.free_shared_buffer(pointer)
    for freed in (pointer, 0, 64):
        with pytest.raises(RuntimeError, match="custom_ar::free_shared_buffer: ptr must be "):
            ops.free_shared_buffer(freed)


def bad_arguments() -> dict[str, tuple[Callable[[], tuple[Tensor, Tensor, int, int]], str]]:
    """Arguments of all_reduce after fa, and the start of what is said of them."""

    def base() -> Tensor:
        return torch.zeros(64, dtype=torch.bfloat16, device="cuda")

    def strided(*shape_and_stride: tuple[int, ...]) -> Tensor:
        return base().as_strided(*shape_and_stride)

    def overlapping() -> tuple[Tensor, Tensor, int, int]:
        whole = base()
        return whole[:40], whole[8:48], 0, 0

    return {
        "float64": (lambda: (base().double(), base().double(), 0, 0), "inp must be torch.float32"),
        "int32": (lambda: (base().int(), base().int(), 0, 0), "inp must be torch.float32"),
        "dtype_of_out": (
            lambda: (base(), base().float(), 0, 0),
            "out must have the dtype of inp, torch.bfloat16, got torch.float32",
        ),
        "out_on_cpu": (lambda: (base(), base().cpu(), 0, 0), "out must be on the device of inp"),
        "inp_on_cpu": (lambda: (base().cpu(), base(), 0, 0), ""),
        "shape": (lambda: (base(), base().view(8, 8), 0, 0), "out must "),
        "length": (lambda: (base(), base()[:63], 0, 0), "out must "),
        "gaps_in_inp": (
            lambda: (strided((8, 4), (8, 1)), base()[:32].view(8, 4), 0, 0),
            "inp must ",
        ),
        "gaps_in_both": (
            lambda: (strided((8, 4), (8, 1)), strided((8, 4), (8, 1)), 0, 0),
            "inp must ",
        ),
        "expanded": (lambda: (strided((8, 8), (0, 1)), base().view(8, 8), 0, 0), "inp must "),
        "expanded_out": (lambda: (base().view(8, 8), strided((8, 8), (1, 0)), 0, 0), "out must "),
        "other_strides": (lambda: (base().view(8, 8), base().view(8, 8).t(), 0, 0), "out must "),
        "overlap": (overlapping, "out must "),
        "small_buffer": (lambda: (base(), base(), 1 << 20, 127), "reg_buffer_sz_bytes must "),
    }


@pytest.mark.parametrize("case", bad_arguments())
def test_bad_arguments(generator: torch.Generator, case: str) -> None:
    """Refused before anything is launched: the peers do not see a call."""
    make, message = bad_arguments()[case]
    inp, out, reg_buffer, size = make()
    with LocalRanks(2) as ranks:
        for fa in ranks.fas:
            with pytest.raises(RuntimeError, match=f"custom_ar::all_reduce: {message}"):
                ranks.ops.all_reduce(fa, inp, out, reg_buffer, size)
            if reg_buffer == 0:
                with pytest.raises(RuntimeError, match=f"custom_ar::_?all_reduce(_as)?: {message}"):
                    ranks.ops._all_reduce_as(fa, inp, out, 0, 1, 64, 1)
        check_alive(ranks, generator)


@pytest.mark.parametrize(
    "tuning",
    [(2, 1, 64, 1), (-1, 1, 64, 1), (0, 0, 64, 1), (0, 1, 0, 1), (0, 1, 513, 1), (1, 1, 64, 0)],
    ids=str,
)
def test_bad_tuning(generator: torch.Generator, tuning: tuple[int, ...]) -> None:
    inp, out = torch.zeros(2, 64, device="cuda").unbind()
    with LocalRanks(2) as ranks:
        with pytest.raises(RuntimeError, match="custom_ar::_all_reduce_as: "):
            ranks.call(0, inp, out, tuning)
        check_alive(ranks, generator)


@pytest.mark.multi_gpu
def test_tensors_on_another_device(generator: torch.Generator) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    with LocalRanks(2) as ranks:
        inp, out = torch.zeros(2, 64, device="cuda:1").unbind()
        with pytest.raises(RuntimeError, match=r"custom_ar::all_reduce: inp must .*cuda:0"):
            ranks.call(0, inp, out)
        check_alive(ranks, generator)


def test_current_device_is_left_alone(generator: torch.Generator) -> None:
    before = torch.cuda.current_device()
    with LocalRanks(2) as ranks:
        check_alive(ranks, generator)
    assert torch.cuda.current_device() == before


def test_calls_allocate_nothing(generator: torch.Generator) -> None:
    inputs = random_inputs(2, 4096, torch.bfloat16, generator)
    outputs = [torch.empty_like(inp) for inp in inputs]
    with LocalRanks(2) as ranks:
        ranks.all_reduce(inputs, outputs)
        torch.cuda.synchronize()
        allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
        free, _ = torch.cuda.mem_get_info()
        for _ in range(5):
            ranks.all_reduce(inputs, outputs)
        torch.cuda.synchronize()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations
        assert torch.cuda.mem_get_info()[0] == free


def test_opening_and_closing_leaks_nothing(generator: torch.Generator) -> None:
    inputs = random_inputs(2, 100, torch.bfloat16, generator)
    outputs = [torch.empty_like(inp) for inp in inputs]
    expected = reference.all_reduce(inputs)

    def rounds(count: int) -> None:
        for _ in range(count):
            with LocalRanks(2) as ranks:
                ranks.all_reduce(inputs, outputs)

    def usage() -> tuple[int, int, int]:
        gc.collect()
        torch.cuda.synchronize()
        mappings = Path("/proc/self/maps").read_text().count("\n")
        return torch.cuda.mem_get_info()[0], len(os.listdir("/proc/self/fd")), mappings

    rounds(50)
    free, files, mappings = usage()
    rounds(1000)
    free_after, files_after, mappings_after = usage()
    assert_same_bits(outputs, expected)
    # 1,000 buffers of the least size would be 128 MiB; the driver's pools may take one step.
    assert free - free_after <= 4 << 20
    assert files_after == files
    assert mappings_after - mappings < 100


# Of a shared buffer; csrc/shared_buffer.h and peer_call.h have it in full.
HEADER_BYTES = 4096
MAX_RANKS = 8  # descriptors of four calls in a row come first, a word for each rank
CALL_SHIFT, ALGORITHM_SHIFT, TYPE_SHIFT = 40, 38, 36
BFLOAT16 = 2


def words_of(ranks: LocalRanks, rank: int, num_bytes: int) -> Tensor:
    """The first bytes of a rank's shared buffer, as 64-bit words."""
    memory = SimpleNamespace(
        __cuda_array_interface__={
            "shape": (num_bytes // 8,),
            "typestr": "<i8",
            "data": (ranks.buffers[rank], False),
            "version": 3,
        }
    )
    return torch.as_tensor(memory, device="cuda")


@pytest.mark.parametrize("algorithm", [0, 1], ids=["one_shot", "two_shots"])
def test_call_after_a_failed_one_sends_nothing(generator: torch.Generator, algorithm: int) -> None:
    """It had begun before that one failed. A peer may still be in the call before both."""
    length, tuning = 64, (algorithm, 1, 64, 1)
    buffer_bytes = 2 << 20  # in which memory is shared
    slot_bytes = (buffer_bytes - HEADER_BYTES) // 2
    inputs = random_inputs(3, length, torch.bfloat16, generator)
    outputs = [torch.zeros_like(inputs[0]) for _ in range(2)]
    side = torch.cuda.Stream()
    with LocalRanks(3, buffer_bytes=buffer_bytes, timeout=20.0) as ranks:
        check(ranks, inputs, tuning)  # call 1
        torch.cuda.synchronize()
        words = [words_of(ranks, rank, buffer_bytes) for rank in range(3)]
        other = 65 | BFLOAT16 << TYPE_SHIFT | algorithm << ALGORITHM_SHIFT | 2 << CALL_SHIFT
        announced = torch.tensor([other], device="cuda")
        of_rank_2 = words[0][2 * MAX_RANKS + 2 :][:1]  # its descriptor of call 2
        of_rank_2.copy_(of_rank_2.clone())  # the copy kernel, loaded
        before = [w.clone() for w in words]
        torch.cuda.synchronize()

        # Rank 0 alone: calls 2 and 3. Then rank 2 says that its call 2 is another.
        for output in outputs:
            with torch.cuda.stream(ranks.streams[0]):
                ranks.call(0, inputs[0], output, tuning)
        time.sleep(0.1)
        with torch.cuda.stream(side):
            of_rank_2.copy_(announced)
        assert "ranks disagree in call 2" in ranks.failure(0)
        for output in outputs:
            assert output.isnan().all()
        for peer in (1, 2):
            odd_slot = slice((HEADER_BYTES + slot_bytes) // 8, None)
            assert torch.equal(words[peer][odd_slot], before[peer][odd_slot]), "data of call 3"
            # Which a peer that is still in call 1 has yet to read.
            of_call_1 = slice(MAX_RANKS, 2 * MAX_RANKS)
            assert torch.equal(words[peer][of_call_1], before[peer][of_call_1])
            # What call 2 sent shows that this looks at the right places.
            even_slot = slice(HEADER_BYTES // 8, (HEADER_BYTES + slot_bytes) // 8)
            assert not torch.equal(words[peer][even_slot], before[peer][even_slot])
