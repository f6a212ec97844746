"""One rank, whose peers' words are written by hand: what comes late or never, and any sums."""

from __future__ import annotations

import dataclasses
import re
import time

import pytest
import torch
from minimax_arithmetic import assert_rounded, assert_same_bits, scaled
from minimax_cases import EPS, TUNINGS, Problem, make_problem, num_elements
from minimax_forged_peers import (
    BEGUN,
    CLOSED,
    COMPLETED,
    ForgedPeers,
    as_words,
    descriptor,
    descriptor_index,
    header_word,
    pretend_calls,
    slot_of,
    sums_of,
    words_of,
)
from minimax_local_ranks import LocalRanks, assert_nan, check, warm_up
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("at_once"),
]

both_ops = pytest.mark.parametrize("num_parts", [1, 2], ids=["rows", "qk"])
FIRST = 1  # a workspace's first call


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


def exact_of(problem: Problem, sums: Tensor, rank: int) -> list[Tensor]:
    """The rank's outputs in float64, where its peers send ``sums``: added in rank order."""
    totals = torch.zeros_like(sums[0])
    for own in sums:
        totals += own
    return [
        scaled(part, weight, totals[:, index, None].double() / (width * problem.nranks), EPS)
        for index, (part, weight, width) in enumerate(
            zip(problem.parts(rank), problem.weights[rank], problem.widths, strict=True)
        )
    ]


def test_forged_peers_are_like_real_ones(generator: torch.Generator) -> None:
    """To the bit, with sums that float32 has: else what follows shows nothing."""
    problem = make_problem(3, 20, (640, 128), torch.bfloat16, generator)
    for x in problem.inputs:
        x.fill_(0)
        signs = torch.randint(-3, 4, (20, 2), generator=generator, device="cuda")
        x[:, 5], x[:, 650] = torch.exp2(signs).bfloat16().unbind(1)
    with LocalRanks(3) as ranks, LocalRanks(3) as lone:
        for call in (FIRST, FIRST + 1, FIRST + 2):
            expected = check(ranks, problem)
            for rank in range(3):
                forged = ForgedPeers(lone, rank)
                forged.announce(problem, call)
                forged.send(sums_of(problem), call)
                torch.cuda.synchronize()
                [outputs] = lone.run(problem, ranks=[rank])
                for part, expected_part in zip(outputs, expected[rank], strict=True):
                    assert_same_bits(part, expected_part, f"call {call}, rank {rank}")
            assert not any(lone.failures())


@both_ops
@pytest.mark.parametrize("call", [FIRST, FIRST + 1])
def test_what_a_rank_sends(generator: torch.Generator, call: int, num_parts: int) -> None:
    """To each peer its sums, where that peer looks for them, and nothing else."""
    nranks, rank, num_tokens = 5, 3, 20
    widths = (64, 32)[:num_parts]
    problem = make_problem(nranks, num_tokens, widths, torch.float32, generator)
    tokens = torch.arange(num_tokens, device="cuda")
    for part, values in zip(problem.parts(rank), (tokens + 1.0, torch.exp2(-tokens)), strict=False):
        part.zero_()
        part[:, 7] = values  # of which the square is exact
    with LocalRanks(nranks) as ranks:
        if call > FIRST:
            check(ranks, problem)
        forged = ForgedPeers(ranks, rank)
        forged.announce(problem, call)
        forged.send(sums_of(problem), call)
        expected = []
        for peer in forged.peers:
            kept = words_of(ranks, peer).clone()
            slot_of(ranks, peer, call)[:num_tokens, rank] = as_words(sums_of(problem)[rank])
            words = words_of(ranks, peer)
            words[descriptor_index(call, rank)].fill_(descriptor(problem, call))
            expected.append(words.clone())
            words.copy_(kept)
        torch.cuda.synchronize()
        [outputs] = ranks.run(problem, ranks=[rank])
        for part, exact_part in zip(outputs, problem.exact()[rank], strict=True):
            assert_rounded(part, exact_part)
        assert ranks.failure(rank) == ""
        for peer, words in zip(forged.peers, expected, strict=True):
            assert torch.equal(words_of(ranks, peer), words), f"sent to rank {peer}"
        assert forged.inbox_is_empty()
        assert ranks.guards_are_intact()


@pytest.mark.parametrize(
    ("num_parts", "tuning"), [(1, None), (2, None), *((2, tuning) for tuning in TUNINGS)], ids=str
)
@pytest.mark.parametrize("rank", [0, 2])
def test_any_sums(
    generator: torch.Generator, rank: int, num_parts: int, tuning: tuple[int, ...] | None
) -> None:
    """Zeros, subnormals, what overflows, infinities and any NaN: in their token and part alone."""
    nranks = 4
    largest = torch.finfo(torch.float32).max
    special = [0.0, 2.0**-149, 2.0**-130, 2.0**-126, 2.0**120, largest, torch.inf, torch.nan]
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    values = torch.cat([torch.tensor(special), nans]).cuda()
    num_tokens = 3 * len(values) + 5
    problem = make_problem(nranks, num_tokens, (640, 128)[:num_parts], torch.float32, generator)
    sums = sums_of(problem)
    peers = [peer for peer in range(nranks) if peer != rank]
    # From one peer in q, from another in k, and from all in both.
    count = len(values)
    sums[peers[0], :count, 0] = values
    if num_parts == 2:
        sums[peers[-1], count : 2 * count, 1] = values
    for part in range(num_parts):
        sums[peers, 2 * count : 3 * count, part] = values
    with LocalRanks(nranks) as ranks:
        warm_up(ranks, problem, tuning=tuning)
        forged = ForgedPeers(ranks, rank)
        forged.announce(problem, FIRST + 1)
        forged.send(sums, FIRST + 1)
        torch.cuda.synchronize()
        [outputs] = ranks.run(problem, tuning, ranks=[rank])
        for part, exact_part in zip(outputs, exact_of(problem, sums, rank), strict=True):
            assert_rounded(part, exact_part)
        assert ranks.failure(rank) == ""
        assert forged.inbox_is_empty()
        assert ranks.guards_are_intact()


def test_subnormal_sums(generator: torch.Generator) -> None:
    """Of all ranks: they are added and scaled with as they are, and not taken for zeros."""
    nranks, width = 4, 4
    problem = make_problem(nranks, 1, (width,), torch.float32, generator)
    for x in problem.inputs:
        x.copy_(torch.tensor([[2.0**-70, 0, 0, 0]]))
    problem = dataclasses.replace(
        problem, weights=[(torch.ones(width, device="cuda"),)] * nranks, eps=0.0
    )
    with LocalRanks(nranks) as ranks:
        forged = ForgedPeers(ranks)
        forged.announce(problem, FIRST)
        forged.send(sums_of(problem), FIRST)
        torch.cuda.synchronize()
        [(out,)] = ranks.run(problem, ranks=[0])
        # sqrt(16 elements / 4 squares)
        assert out.tolist() == [[2.0, 0.0, 0.0, 0.0]]
        assert ranks.failure(0) == ""


@pytest.mark.parametrize("tuning", [None, (1, 1, 32), (1, 3, 96), (8, 2, 256)], ids=str)
def test_words_come_one_by_one(generator: torch.Generator, tuning: tuple[int, ...] | None) -> None:
    """The last tokens' first, and only then what call they are of: a rank waits for all."""
    problem = make_problem(3, 20, (640, 128), torch.bfloat16, generator)
    sums = sums_of(problem)
    with LocalRanks(3) as ranks:
        warm_up(ranks, problem, tuning=tuning)
        forged = ForgedPeers(ranks)
        side = torch.cuda.Stream()
        for call, is_slow in ((FIRST + 1, False), (FIRST + 2, True)):
            # The first time loads what is needed while a kernel waits the second time.
            ranks.reserve(problem)
            torch.cuda.synchronize()
            if is_slow:
                with torch.cuda.stream(ranks.streams[0]):
                    outputs = ranks.call(0, problem, tuning)
                    ended = ranks.streams[0].record_event()
            with torch.cuda.stream(side):
                for token in reversed(range(problem.num_tokens)):
                    for peer in forged.peers:
                        forged.send(sums, call, slice(token, token + 1), [peer])
                        if is_slow:
                            time.sleep(0.002)
                side.synchronize()
                if is_slow:
                    time.sleep(0.05)
                    assert not ended.query(), "the call ended before its peers had begun"
                forged.announce(problem, call)
            side.synchronize()
            if not is_slow:
                [outputs] = ranks.run(problem, tuning, ranks=[0])
            torch.cuda.synchronize()
            for part, exact_part in zip(outputs, problem.exact()[0], strict=True):
                assert_rounded(part, exact_part, f"call {call}")
            assert ranks.failure(0) == ""
            assert forged.inbox_is_empty()


def test_peer_closes_while_another_is_awaited(generator: torch.Generator) -> None:
    """It announces the call and closes at once, as many blocks look at these words in turn.

    Some see the closing just after they found no announcement: that ends no wait for the other.
    """
    closing, late = 1, 2
    problem = make_problem(3, 600, (640, 128), torch.bfloat16, generator)
    sums = sums_of(problem)
    with LocalRanks(3) as ranks:
        warm_up(ranks, problem)
        forged = ForgedPeers(ranks)
        words = words_of(ranks, 0)
        side = torch.cuda.Stream()
        # The first time loads what is needed while a kernel waits later.
        for call in range(FIRST + 1, FIRST + 21):
            is_awaited = call > FIRST + 1
            where = torch.tensor([descriptor_index(call, closing), CLOSED + closing], device="cuda")
            values = torch.tensor([descriptor(problem, call), header_word(1)], device="cuda")
            words[CLOSED + closing] = header_word(0)
            forged.send(sums, call, peers=[closing])
            forged.announce(problem, call, [late])
            ranks.reserve(problem)
            torch.cuda.synchronize()
            if is_awaited:
                with torch.cuda.stream(ranks.streams[0]):
                    outputs = ranks.call(0, problem)
                time.sleep(0.005)
            with torch.cuda.stream(side):
                words.index_copy_(0, where, values)
                side.synchronize()
                time.sleep(0.005)
                forged.send(sums, call, peers=[late])
            side.synchronize()
            if not is_awaited:
                [outputs] = ranks.run(problem, ranks=[0])
            torch.cuda.synchronize()
            assert ranks.failure(0) == ""
            for part, exact_part in zip(outputs, problem.exact()[0], strict=True):
                assert_rounded(part, exact_part, f"call {call}")


@pytest.mark.parametrize("sent", [0, 1, 12, 19])
@pytest.mark.parametrize(
    ("vectors", "tuning"),
    [
        *(((80, 16), tuning) for tuning in ((1, 1, 32), (1, 3, 96), (2, 3, 64), (4, 2, 128))),
        ((80, 16), (8, 2, 256)),
        # Teams that share a block, in turns that one of them may fail in sooner.
        *(((80, 16), tuning) for tuning in ((1, 2, 128), (2, 3, 128))),
        ((384, 64), (2, 2, 128)),
        # Teams that have no room to load their next row while they wait, and rows of which they
        # hold a part.
        ((300, 30), (1, 3, 96)),
        ((5000, 8), (8, 2, 256)),
    ],
    ids=str,
)
def test_peer_that_stops_in_the_middle(
    generator: torch.Generator, vectors: tuple[int, int], tuning: tuple[int, ...], sent: int
) -> None:
    """It makes the call, and its first tokens come: those are right, and the rest NaN.

    A team takes several tokens in turn, so it fails in a later turn than its first.
    """
    timeout, num_tokens, silent = 0.3, 20, 2
    dtype = torch.bfloat16
    widths = [num_elements(count, dtype) for count in vectors]
    problem = make_problem(3, num_tokens, widths, dtype, generator)
    with LocalRanks(3, timeout=timeout) as ranks:
        warm_up(ranks, problem, tuning=tuning)
        call = FIRST + 1
        sums = sums_of(problem)
        forged = ForgedPeers(ranks)
        forged.announce(problem, call)
        forged.send(sums, call, peers=[1])
        forged.send(sums, call, slice(0, sent), [silent])
        torch.cuda.synchronize()
        begin = time.monotonic()
        [outputs] = ranks.run(problem, tuning, ranks=[0])
        torch.cuda.synchronize()
        assert 0.9 * timeout < time.monotonic() - begin < timeout + 2
        for part, exact_part in zip(outputs, problem.exact()[0], strict=True):
            assert_rounded(part[:sent], exact_part[:sent], "what had come")
            assert part[sent:].isnan().all()
        message = (
            rf"rank {silent} did not take part in call {call} within 0\.3 s \(this is rank 0 of "
            r"3\); this workspace can only be closed now"
        )
        assert re.search(message, ranks.failure(0)), ranks.failure(0)
        assert ranks.missing_ranks(0) == [silent]
        with pytest.raises(RuntimeError, match=message):
            ranks.call(0, problem, tuning)
        # The peers learn which rank it was, that rank among them.
        for rank in (1, 2):
            outputs = ranks.call(rank, problem, tuning)
            failure = ranks.failure(rank)
            cause = (
                rf"since rank {silent} did not take part"
                if rank != silent
                else rf"having waited in vain for this rank, {silent}"
            )
            assert re.search(rf"rank 0 gave up in call {call}, {cause}", failure), failure
            assert_nan([outputs])
        assert ranks.guards_are_intact()


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("sent", [None, 100])
def test_blocks_that_begin_late(generator: torch.Generator, sent: int | None, turns: int) -> None:
    """More than find room at a time: the last begin when others are done, or when all is lost."""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    blocks = 5 * multiprocessors  # of two teams; registers have room for four on each
    num_tokens = turns * 2 * blocks
    problem = make_problem(2, num_tokens, (3072, 512), torch.bfloat16, generator)
    with LocalRanks(2, max_tokens=num_tokens, timeout=0.3) as ranks:
        sums = sums_of(problem)
        forged = ForgedPeers(ranks)
        forged.announce(problem, FIRST)
        forged.send(sums, FIRST, slice(0, sent))
        torch.cuda.synchronize()
        [outputs] = ranks.run(problem, (2, blocks, 128), ranks=[0])
        torch.cuda.synchronize()
        for part, exact_part in zip(outputs, problem.exact()[0], strict=True):
            assert_rounded(part[:sent], exact_part[:sent], "what had come")
            assert sent is None or part[sent:].isnan().all()
        if sent is None:
            assert ranks.failure(0) == ""
        else:
            assert f"rank 1 did not take part in call {FIRST} within" in ranks.failure(0)
        assert forged.inbox_is_empty()
        # Each block has been counted as begun, and as done.
        for word in (BEGUN, COMPLETED):
            assert words_of(ranks, 0)[word] == header_word(FIRST << 32)
        assert ranks.guards_are_intact()


@both_ops
def test_nothing_is_sent_after_a_failure(generator: torch.Generator, num_parts: int) -> None:
    """Nor by the call that was already there when the one before it failed.

    A peer that is late would take it for an earlier call's.
    """
    problem = make_problem(2, 20, (640, 128)[:num_parts], torch.bfloat16, generator)
    with LocalRanks(2, timeout=0.3) as ranks:
        warm_up(ranks, problem)
        failing, following = FIRST + 1, FIRST + 2
        outputs: list[list[tuple[Tensor, ...]]] = []
        graphs = ranks.capture(
            lambda rank: outputs.append([ranks.call(rank, problem) for _ in range(2)])
        )
        torch.cuda.synchronize()
        graphs[0].replay()
        torch.cuda.synchronize()
        assert f"rank 1 did not take part in call {failing} " in ranks.failure(0)
        assert_nan(outputs[0])
        sent = slot_of(ranks, 1, failing)[: problem.num_tokens, 0]
        empty = slot_of(ranks, 1, failing)[problem.num_tokens, 0]
        assert (sent != empty).all()
        assert (slot_of(ranks, 1, following) == empty).all()
        announced = words_of(ranks, 1)[[descriptor_index(call, 0) for call in (failing, following)]]
        # Where the following call's would be is that of the call before.
        calls = (failing, failing - 1)
        assert announced.tolist() == [descriptor(problem, call) for call in calls]


def test_each_silent_peer_is_named(generator: torch.Generator) -> None:
    """Of those that make the call; but only the others, if there is one that does not."""
    problem = make_problem(5, 4, (640,), torch.float16, generator)
    sums = sums_of(problem)
    for announced, sending, named in (
        ([0, 1, 3, 4], [1], "ranks 0, 3, 4"),
        ([0, 1, 4], [1, 4], "rank 3"),
        ([], [0, 1, 3], "ranks 0, 1, 3, 4"),
    ):
        with LocalRanks(5, timeout=0.2) as ranks:
            warm_up(ranks, problem)
            forged = ForgedPeers(ranks, 2)
            forged.announce(problem, FIRST + 1, announced)
            forged.send(sums, FIRST + 1, peers=sending)
            torch.cuda.synchronize()
            outputs = ranks.run(problem, ranks=[2])
            text = rf"{named} did not take part in call 2 within 0\.2 s \(this is rank 2 of 5\)"
            assert re.search(text, ranks.failure(2)), ranks.failure(2)
            assert_nan(outputs)


@pytest.mark.parametrize("stale", ["announced", "empty"])
def test_words_without_a_call_are_not_taken(generator: torch.Generator, stale: str) -> None:
    """All sums are there, but the peer has announced nothing, or an earlier call."""
    problem = make_problem(2, 4, (640, 128), torch.bfloat16, generator)
    with LocalRanks(2, timeout=0.3) as ranks:
        calls = 2 if stale == "announced" else 0
        for _ in range(calls):
            warm_up(ranks, problem)
        forged = ForgedPeers(ranks)
        forged.send(sums_of(problem), calls + 1)
        torch.cuda.synchronize()
        outputs = ranks.run(problem, ranks=[0])
        text = rf"rank 1 did not take part in call {calls + 1} within"
        assert re.search(text, ranks.failure(0)), ranks.failure(0)
        assert_nan(outputs)


@pytest.mark.parametrize("exponent", [24, 32])
def test_more_calls_than_numbers(generator: torch.Generator, exponent: int) -> None:
    """Calls are numbered in 32 bits, of which 24 are announced: both begin again at zero."""
    problem = make_problem(3, 9, (640, 128), torch.bfloat16, generator)
    with LocalRanks(3) as ranks:
        pretend_calls(ranks, 2**exponent - 4)
        for tuning in (None, *TUNINGS):
            check(ranks, problem, tuning)
        assert not any(ranks.failures())
        ranks.set_timeout(0.3)
        ranks.run(problem, ranks=[0, 1])
        number = (2**exponent - 4 + len(TUNINGS) + 2) % 2**32
        assert f"rank 2 did not take part in call {number} " in ranks.failure(0) + ranks.failure(1)
