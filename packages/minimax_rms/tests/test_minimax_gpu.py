"""The kernels against float64, in the ways a server calls them; and what fails.

All ranks run in this process on one GPU. What needs processes is in test_minimax_processes.py.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from minimax_arithmetic import (
    DTYPES,
    assert_rounded,
    assert_same_bits,
    differing,
    random_rows,
)
from minimax_cases import (
    EPS,
    LAYOUTS,
    NRANKS,
    TUNINGS,
    Problem,
    all_widths,
    m2_widths,
    make_problem,
    num_elements,
    place,
)
from minimax_forged_peers import EMPTY_WORD, as_int64, slot_of
from minimax_local_ranks import (
    EMPTY,
    GUARD,
    POISON,
    LocalRanks,
    assert_nan,
    check,
    check_alive,
    warm_up,
)
from rank_processes import environment
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("at_once"),
]

TOKENS = (7, 0, 33, 1, 200, 2)
MANY_TOKENS = (1000, 7, 999)
THOUSANDS_OF_TOKENS = (8192 + 77, 1, 3000, 2999, 0, 7, 4096, 130)
ROUNDED = 2.0**-18  # where all roundings go one way

all_nranks = pytest.mark.parametrize("nranks", NRANKS)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
all_tunings = pytest.mark.parametrize("tuning", [None, *TUNINGS], ids=str)
both_ops = pytest.mark.parametrize("num_parts", [1, 2], ids=["rows", "qk"])


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


@all_dtypes
@all_tunings
@all_nranks
def test_results(
    generator: torch.Generator, nranks: int, tuning: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    """Of all widths, in batches that grow and shrink from call to call."""
    with LocalRanks(nranks) as ranks:
        tried = set()
        for widths in all_widths(nranks, dtype):
            for num_tokens in TOKENS:
                problem = make_problem(nranks, num_tokens, widths, dtype, generator)
                if tuning is None and not ranks.fits(problem.row_bytes, num_tokens):
                    continue
                tried.add((widths, num_tokens))
                check(ranks, problem, tuning)
        least = len(TOKENS) if tuning is not None or nranks == 1 else 3
        assert len(tried) >= least * len(all_widths(nranks, dtype))
        assert not any(ranks.failures())
        assert nranks == 1 or ranks.guards_are_intact()


@all_dtypes
@pytest.mark.parametrize("tuning", [(1, 2, 512), (4, 2, 128)], ids=str)
@pytest.mark.parametrize("nranks", [1, 2, 3, 8, 16])
def test_many_tokens(
    generator: torch.Generator, nranks: int, tuning: tuple[int, ...], dtype: torch.dtype
) -> None:
    with LocalRanks(nranks) as ranks:
        for num_tokens in MANY_TOKENS:
            widths = m2_widths(nranks, dtype)
            check(ranks, make_problem(nranks, num_tokens, widths, dtype, generator), tuning)
        assert not any(ranks.failures())


@pytest.mark.parametrize(
    "tuning", [(1, 33, 256), (2, 200, 64), (2, 100, 128), (4, 132, 128), (8, 60, 256)], ids=str
)
@pytest.mark.parametrize("nranks", [1, 2])
def test_thousands_of_tokens(
    generator: torch.Generator, nranks: int, tuning: tuple[int, ...]
) -> None:
    """In batches that grow and shrink from call to call."""
    with LocalRanks(nranks, max_tokens=max(THOUSANDS_OF_TOKENS)) as ranks:
        for num_tokens in THOUSANDS_OF_TOKENS:
            widths = m2_widths(max(nranks, 2), torch.bfloat16)
            problem = make_problem(nranks, num_tokens, widths, torch.bfloat16, generator)
            check(ranks, problem, tuning)
        assert not any(ranks.failures())
        assert nranks == 1 or ranks.guards_are_intact()


@pytest.mark.parametrize("capacity", [2049, 3001, 5000])
@pytest.mark.parametrize("nranks", [2, 3, 5, 8, 16])
def test_large_calls_have_a_place_for_each_token(
    generator: torch.Generator, nranks: int, capacity: int
) -> None:
    """Their words do not lie in the order of tokens; no two may meet, in calls of any size."""
    with LocalRanks(nranks, max_tokens=capacity) as ranks:
        most = ranks.capacity
        assert most >= capacity
        for num_tokens in (most, most, 2049, 2048, most - 1, 1, most):
            problem = make_problem(nranks, num_tokens, (64, 32), torch.bfloat16, generator)
            check(ranks, problem, (1, 4, 128))
        assert not any(ranks.failures())
        assert ranks.guards_are_intact()
        for rank in range(nranks):
            for call in (0, 1):
                assert (slot_of(ranks, rank, call) == as_int64(EMPTY_WORD)).all()


def replay(
    ranks: LocalRanks,
    problems: Sequence[Problem],
    late: int,
    tuning: Sequence[int] | None = None,
) -> list[list[tuple[Tensor, ...]]]:
    """Each rank's outputs of all problems, one call right after the other; one rank comes late."""
    outputs: list[list[tuple[Tensor, ...]]] = []
    graphs = ranks.capture(
        lambda rank: outputs.append([ranks.call(rank, problem, tuning) for problem in problems])
    )
    for by_problem in outputs:
        for parts in by_problem:
            for part in parts:
                part.fill_(POISON)
    torch.cuda.synchronize()
    for rank in sorted(range(ranks.nranks), key=lambda rank: rank == late):
        if rank == late:
            time.sleep(0.02)  # for the others' blocks to take what room they may
        with torch.cuda.stream(ranks.streams[rank]):
            graphs[rank].replay()
    torch.cuda.synchronize()
    return outputs


@both_ops
@pytest.mark.parametrize("nranks", [2, 3, 8, 16])
def test_ranks_that_share_a_gpu_find_room(
    generator: torch.Generator, nranks: int, num_parts: int
) -> None:
    """Calls are cut so that all ranks' blocks are there at once, and the next calls' behind."""
    dtype = torch.bfloat16
    with LocalRanks(nranks, is_registered=True) as ranks:
        for widths, tokens in (
            (m2_widths(nranks, dtype), (1000, 7, 999)),
            ((450 * 8, 7 * 8), (600, 7, 599)),
            ((10_000, 8), (300, 7, 299)),
        ):
            problems = [
                make_problem(nranks, count, widths[:num_parts], dtype, generator)
                for count in tokens
            ]
            outputs = replay(ranks, problems, late=nranks - 1)
            for index, problem in enumerate(problems):
                for rank, exact_parts in enumerate(problem.exact()):
                    for part, exact in zip(outputs[rank][index], exact_parts, strict=True):
                        assert_rounded(part, exact, f"{problem}, rank {rank}, {ranks.failures()}")
        assert not any(ranks.failures())


@all_dtypes
@all_nranks
def test_whole_rows(generator: torch.Generator, nranks: int, dtype: torch.dtype) -> None:
    """The operator without q and k."""
    vector = 16 // dtype.itemsize
    with LocalRanks(nranks) as ranks:
        for width in (m2_widths(nranks, dtype)[0], vector, 5 * vector, 77 * vector):
            tried = 0
            for num_tokens in TOKENS:
                problem = make_problem(nranks, num_tokens, (width,), dtype, generator)
                if ranks.fits(problem.row_bytes, num_tokens):
                    check(ranks, problem)
                    tried += 1
            assert tried >= 3
        assert not any(ranks.failures())


@all_dtypes
@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
def test_widths_at_the_edges_of_registers(
    generator: torch.Generator, tuning: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Each number of vectors of a thread that kernels may be made for, just full and one more.

    Also in the proportion that MiniMax-M2's q and k have.
    """
    lanes = 32 * tuning[0]
    with LocalRanks(2) as ranks:
        for vectors_of_thread in (1, 2, 4, 7, 8, 14):
            full = vectors_of_thread * lanes
            for q, k in (
                *((full - 1, 1), (full // 7 * 6, full - full // 7 * 6)),
                *((full, 1), (1, full)),
            ):
                widths = (num_elements(q, dtype), num_elements(k, dtype))
                # Fewer than there are teams, and mostly more.
                for num_tokens in (2, 10):
                    problem = make_problem(2, num_tokens, widths, dtype, generator)
                    check(ranks, problem, tuning)
        assert not any(ranks.failures())


@all_dtypes
@pytest.mark.parametrize("nranks", [1, 2, 3])
def test_rows_that_registers_do_not_hold(
    generator: torch.Generator, nranks: int, dtype: torch.dtype
) -> None:
    vector = 16 // dtype.itemsize
    with LocalRanks(nranks) as ranks:
        barely = (1500 * vector, 700 * vector)
        for widths in (barely, (40_000, 8 * vector), (8 * vector, 40_000), (40_000, 0)):
            for num_tokens, tuning in ((1, None), (5, (1, 2, 512)), (5, (8, 2, 256))):
                problem = make_problem(nranks, num_tokens, widths, dtype, generator)
                check(ranks, problem, tuning)
            problem = make_problem(nranks, 2, widths[:1], dtype, generator)
            check(ranks, problem)
        assert not any(ranks.failures())


@all_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("nranks", [1, 2, 3])
def test_layouts(generator: torch.Generator, nranks: int, layout: str, dtype: torch.dtype) -> None:
    """Rows in larger ones, past the begin of their memory, and one row for all tokens."""
    vector = 16 // dtype.itemsize
    with LocalRanks(nranks) as ranks:
        for widths in ((77 * vector, 5 * vector), (3 * vector,), m2_widths(8, dtype)):
            for num_tokens in (0, 1, 2, 9):
                check(ranks, make_problem(nranks, num_tokens, widths, dtype, generator, layout))
        # Not alike on all ranks.
        problem = make_problem(nranks, 4, (5 * vector, vector), dtype, generator)
        placed = [
            place(x, LAYOUTS[(rank + LAYOUTS.index(layout)) % 3])
            for rank, x in enumerate(problem.inputs)
        ]
        check(ranks, dataclasses.replace(problem, inputs=placed))
        assert not any(ranks.failures())


@pytest.mark.parametrize("nranks", [2, 3, 5])
def test_ranks_need_not_be_tuned_alike(generator: torch.Generator, nranks: int) -> None:
    problem = make_problem(nranks, 33, m2_widths(8, torch.bfloat16), torch.bfloat16, generator)
    with LocalRanks(nranks) as ranks:
        for tuning in TUNINGS:
            expected = check(ranks, problem, tuning)
        for shift in range(len(TUNINGS)):
            ranks.reserve(problem)
            outputs: list[tuple[Tensor, ...]] = []

            def call(rank: int, shift: int = shift, outputs: list[object] = outputs) -> None:
                tuning = TUNINGS[(rank + shift) % len(TUNINGS)]
                outputs.append(ranks.call(rank, problem, tuning))

            ranks.launch(call)
            for parts, expected_parts in zip(outputs, expected, strict=True):
                for part, expected_part in zip(parts, expected_parts, strict=True):
                    assert_same_bits(part, expected_part, f"shift {shift}")
        assert not any(ranks.failures())


@all_dtypes
@pytest.mark.parametrize("nranks", [1, 2, 5, 16])
def test_result_does_not_depend_on_tuning_or_batch(
    generator: torch.Generator, nranks: int, dtype: torch.dtype
) -> None:
    """To the bit: nor on the place in the batch and in memory, nor on what the other tokens are."""
    for widths in all_widths(nranks, dtype):
        whole = make_problem(nranks, 50, widths, dtype, generator)
        order = torch.randperm(50, generator=generator, device="cuda")
        with LocalRanks(nranks) as ranks:
            expected = check(ranks, whole, TUNINGS[0])
            for tuning in (None, *TUNINGS):
                for tokens, layout in (
                    (order, "dense"),
                    (order[:7], "strided"),
                    (order[:1], "offset"),
                ):
                    inputs = [place(x[tokens], layout) for x in whole.inputs]
                    problem = dataclasses.replace(whole, inputs=inputs)
                    if tuning is None and not ranks.fits(problem.row_bytes, len(tokens)):
                        continue
                    outputs = ranks.run(problem, tuning)
                    for rank, (parts, expected_parts) in enumerate(
                        zip(outputs, expected, strict=True)
                    ):
                        for part, expected_part in zip(parts, expected_parts, strict=True):
                            what = f"{problem}, rank {rank}, tuning {tuning}"
                            assert_same_bits(part, expected_part[tokens], what)
            assert not any(ranks.failures())


@all_dtypes
@pytest.mark.parametrize("nranks", [1, 2, 5])
def test_q_has_the_bits_of_whole_rows(
    generator: torch.Generator, nranks: int, dtype: torch.dtype
) -> None:
    """The operator without k, on the same rows."""
    vector = 16 // dtype.itemsize
    with LocalRanks(nranks) as ranks:
        for widths in (m2_widths(8, dtype), (77 * vector, 5 * vector)):
            both = make_problem(nranks, 9, widths, dtype, generator)
            q_alone = Problem(
                [both.parts(rank)[0] for rank in range(nranks)],
                [weights[:1] for weights in both.weights],
                widths[:1],
            )
            for (q, _), (alone,) in zip(check(ranks, both), check(ranks, q_alone), strict=True):
                assert_same_bits(alone, q, f"{widths}")
        assert not any(ranks.failures())


@both_ops
@pytest.mark.parametrize("nranks", [2, 3, 5, 8, 16])
def test_all_ranks_have_the_same_sums(
    generator: torch.Generator, nranks: int, num_parts: int
) -> None:
    """A one with the weight one becomes what a rank scales its row with."""
    widths = (640, 128)[:num_parts]
    problem = make_problem(nranks, 16, widths, torch.float32, generator)
    begins = (0, 640)[:num_parts]
    for x, weights in zip(problem.inputs, problem.weights, strict=True):
        for begin, weight in zip(begins, weights, strict=True):
            x[:, begin] = 1
            weight[0] = 1
    with LocalRanks(nranks) as ranks:
        outputs = check(ranks, problem, TUNINGS[-1] if num_parts == 2 else None)
        for part in range(num_parts):
            for rank in range(nranks):
                assert_same_bits(
                    outputs[rank][part][:, 0], outputs[0][part][:, 0], f"part {part}, rank {rank}"
                )


@both_ops
@all_dtypes
@pytest.mark.parametrize("nranks", [2, 3, 8, 16])
def test_same_slices_have_the_same_results(
    generator: torch.Generator, nranks: int, dtype: torch.dtype, num_parts: int
) -> None:
    widths = (96, 32)[:num_parts]
    one = make_problem(1, 8, widths, dtype, generator)
    problem = dataclasses.replace(one, inputs=one.inputs * nranks, weights=one.weights * nranks)
    with LocalRanks(nranks) as ranks:
        outputs = check(ranks, problem)
        for rank in range(nranks):
            for part in range(num_parts):
                assert_same_bits(outputs[rank][part], outputs[0][part], f"rank {rank}")


@both_ops
@pytest.mark.parametrize("is_reversed", [False, True])
def test_sums_are_added_in_rank_order(num_parts: int, is_reversed: bool) -> None:
    """A one and fifteen times 2^-24 add up to one, in float32, if the one is the first."""
    nranks, width = 16, 4
    terms = [1.0, *[2.0**-12] * (nranks - 1)]  # squared
    if is_reversed:
        terms.reverse()
    inputs, weights = [], []
    for term in terms:
        # Of the other part, and of what follows it.
        x = torch.ones(1, width * (3 if num_parts == 2 else 1), device="cuda")
        x[:, :width] = 0
        x[:, 0] = term
        inputs.append(x)
        weights.append((torch.ones(width, device="cuda"),) * num_parts)
    problem = Problem(inputs, weights, (width,) * num_parts, eps=0.0)
    total = torch.zeros((), dtype=torch.float32)
    for term in terms:
        total += term**2
    assert total == (1 + 2.0**-20 if is_reversed else 1)
    expected = (total.double() / (width * nranks)) ** -0.5
    with LocalRanks(nranks) as ranks:
        outputs = ranks.run(problem)
        for rank, term in enumerate(terms):
            scale = outputs[rank][0][0, 0].double().cpu() / term
            assert abs(scale / expected - 1) < 2.0**-22.5, f"rank {rank}"
        assert not any(ranks.failures())


@all_dtypes
@pytest.mark.parametrize("nranks", [1, 2, 5])
def test_values_at_the_edges(generator: torch.Generator, nranks: int, dtype: torch.dtype) -> None:
    """Zeros, subnormals, and the largest values whose squares float32 can add up."""
    vector = 16 // dtype.itemsize
    widths = (77 * vector, 5 * vector)
    finfo = torch.finfo(dtype)
    values = [0.0, -0.0, finfo.smallest_normal / 4, finfo.smallest_normal, 1e-3, 1.0, -1.0]
    values.append(65504.0 if dtype == torch.float16 else 1e15)
    problem = make_problem(nranks, len(values), widths, dtype, generator)
    for x in problem.inputs:
        for token, value in enumerate(values):
            x[token, : sum(widths)] = value
    with LocalRanks(nranks) as ranks:
        for tuning in (None, *TUNINGS):
            outputs = check(ranks, problem, tuning, slack=ROUNDED)
            for parts in outputs:
                for part in parts:
                    assert (part[:2] == 0).all()
                    assert part.isfinite().all()
        # One element that is not zero, on one rank: its place is each in turn.
        for x in problem.inputs:
            x[:, : sum(widths)] = 0
        for token in range(len(values)):
            problem.inputs[token % nranks][token, (token * 53) % sum(widths)] = 3.0
        check(ranks, problem)
        # Of mixed signs: subnormals and zeros among the usual values.
        problem = make_problem(nranks, 9, widths, dtype, generator)
        for x in problem.inputs:
            x[:, ::3] = finfo.smallest_normal * finfo.eps
            x[:, 1::5] = -0.0
        check(ranks, problem)
        assert not any(ranks.failures())


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 0.5, 100.0])
def test_eps(generator: torch.Generator, eps: float) -> None:
    problem = make_problem(2, 5, (640, 128), torch.bfloat16, generator)
    with LocalRanks(2) as ranks:
        check(ranks, dataclasses.replace(problem, eps=eps))
        assert not any(ranks.failures())


@all_dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("nranks", [1, 2, 5])
def test_value_that_is_not_finite(
    generator: torch.Generator, nranks: int, value: float, dtype: torch.dtype
) -> None:
    """It shows in the token and part that has it, on all ranks, and nowhere else."""
    vector = 16 // dtype.itemsize
    widths = (20 * vector, 5 * vector)
    clean = make_problem(nranks, 12, widths, dtype, generator)
    with LocalRanks(nranks) as ranks:
        expected = check(ranks, clean)
        for element in (0, widths[0] - 1, widths[0], sum(widths) - 1):
            inputs = [x.clone() for x in clean.inputs]
            inputs[-1][5, element] = value
            outputs = check(ranks, dataclasses.replace(clean, inputs=inputs))
            struck = 0 if element < widths[0] else 1
            for parts, expected_parts in zip(outputs, expected, strict=True):
                for index, (part, expected_part) in enumerate(
                    zip(parts, expected_parts, strict=True)
                ):
                    wrong = differing(part, expected_part)
                    assert wrong[5].any() == (index == struck)
                    wrong[5] = False
                    assert not wrong.any()
        assert not any(ranks.failures())


class Chain:
    """Calls each of which reads what the last has written: whole rows, and q of rows of qkv."""

    def __init__(
        self, nranks: int, tokens: int, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        q, k = 640, 128
        widths = [(q + 2 * k,), (q, k), (q,), (q - 2 * k, k), (q - 2 * k,)] + [(q - 2 * k,)] * 5
        self.layers = [make_problem(nranks, tokens, w, dtype, generator) for w in widths]
        self.first = self.layers[0].inputs

    def run(self, ranks: LocalRanks, rank: int) -> list[tuple[Tensor, ...]]:
        """One rank's outputs of all layers."""
        results = []
        x = self.first[rank]
        for layer in self.layers:
            inputs = [x] * ranks.nranks
            results.append(ranks.call(rank, dataclasses.replace(layer, inputs=inputs)))
            x = results[-1][0]
        return results

    def run_with_pauses(self, ranks: LocalRanks) -> list[list[tuple[Tensor, ...]]]:
        """All ranks' outputs, each layer checked before the next begins."""
        results: list[list[tuple[Tensor, ...]]] = [[] for _ in range(ranks.nranks)]
        inputs = self.first
        for layer in self.layers:
            outputs = check(ranks, dataclasses.replace(layer, inputs=inputs))
            torch.cuda.synchronize()
            for result, parts in zip(results, outputs, strict=True):
                result.append(parts)
            inputs = [parts[0] for parts in outputs]
        return results

    def reserve(self, ranks: LocalRanks) -> None:
        """Memory for all outputs at once, full of NaN."""
        torch.cuda.synchronize()
        for stream in ranks.streams:
            with torch.cuda.stream(stream):
                blocks = [
                    torch.full(
                        (layer.num_tokens, width), torch.nan, dtype=layer.dtype, device="cuda"
                    )
                    for layer in self.layers
                    for width in layer.widths
                ]
                del blocks
        torch.cuda.synchronize()


@pytest.mark.parametrize("use_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize("nranks", [1, 2, 3])
def test_chain_of_dependent_launches(
    generator: torch.Generator, nranks: int, tokens: int, use_graph: bool
) -> None:
    """Layers back to back have the bits that they have with pauses between them.

    A programmatic launch must wait for what the last one writes. Replays have inputs of their own.
    """
    chain = Chain(nranks, tokens, torch.bfloat16, generator)
    with LocalRanks(nranks) as ranks:
        chain.run_with_pauses(ranks)
        results: list[list[tuple[Tensor, ...]]] = []
        graphs = None
        if use_graph:
            graphs = ranks.capture(lambda rank: results.append(chain.run(ranks, rank)))
        for round_ in range(6):
            for x in chain.first:
                x.copy_(random_rows(*x.shape, x.dtype, generator))
            expected = chain.run_with_pauses(ranks)
            if graphs is None:
                results.clear()
                chain.reserve(ranks)
                ranks.launch(lambda rank: results.append(chain.run(ranks, rank)))
            else:
                for result in results:
                    for parts in result:
                        for part in parts:
                            part.fill_(torch.nan)
                ranks.replay(graphs)
            torch.cuda.synchronize()
            assert not any(ranks.failures())
            for rank in range(nranks):
                for layer, parts in enumerate(results[rank]):
                    for part, expected_part in zip(parts, expected[rank][layer], strict=True):
                        what = f"round {round_}, layer {layer}, rank {rank}"
                        assert_same_bits(part, expected_part, what)


@both_ops
@all_nranks
def test_cuda_graph(generator: torch.Generator, nranks: int, num_parts: int) -> None:
    """Replays see the inputs that are there when they run; eager calls come between them."""
    vector = 8
    shapes = [(1, (77 * vector, 5 * vector)), (3, (640, 128)), (2, (vector, vector))]
    problems = [
        make_problem(nranks, tokens, widths[:num_parts], torch.bfloat16, generator)
        for tokens, widths in shapes
    ]
    outputs: list[list[tuple[Tensor, ...]]] = []
    with LocalRanks(nranks) as ranks:
        graphs = ranks.capture(
            lambda rank: outputs.append([ranks.call(rank, problem) for problem in problems])
        )
        for replay in range(10):
            for index, problem in enumerate(problems):
                for rank, x in enumerate(problem.inputs):
                    x.copy_(random_rows(*x.shape, x.dtype, generator))
                    for part in outputs[rank][index]:
                        part.fill_(torch.nan)
            ranks.replay(graphs)
            for index, problem in enumerate(problems):
                for rank, exact_parts in enumerate(problem.exact()):
                    for part, exact in zip(outputs[rank][index], exact_parts, strict=True):
                        assert_rounded(part, exact, f"replay {replay}, {problem}, rank {rank}")
            for _ in range(replay % 3):  # so that replays begin with either slot
                check_alive(ranks, generator)
        assert not any(ranks.failures())


@both_ops
@pytest.mark.parametrize("error_mode", ["global", "thread_local", "relaxed"])
def test_first_call_is_captured(
    generator: torch.Generator, error_mode: str, num_parts: int
) -> None:
    """The host has not met the workspace before, and may do nothing that ends the capture."""
    problem = make_problem(2, 9, (640, 128)[:num_parts], torch.bfloat16, generator)
    with LocalRanks(2) as others:  # the kernels are loaded, and known to work
        warm_up(others, problem)
    outputs: list[tuple[Tensor, ...]] = []
    with LocalRanks(2, is_known=False) as ranks:
        graphs = ranks.capture(
            lambda rank: outputs.append(ranks.call(rank, problem)), error_mode=error_mode
        )
        for replay in range(3):
            for x in problem.inputs:
                x.copy_(random_rows(*x.shape, x.dtype, generator))
            for parts in outputs:
                for part in parts:
                    part.fill_(torch.nan)
            ranks.replay(graphs)
            for rank, exact_parts in enumerate(problem.exact()):
                for part, exact in zip(outputs[rank], exact_parts, strict=True):
                    assert_rounded(part, exact, f"replay {replay}, rank {rank}")
        check_alive(ranks, generator)


def test_many_replays(generator: torch.Generator) -> None:
    """Thousands of calls in a row, whose counts of each rank must not drift apart."""
    nranks = 3
    problem = make_problem(nranks, 4, (640, 128), torch.bfloat16, generator)
    outputs: list[list[tuple[Tensor, ...]]] = []
    with LocalRanks(nranks) as ranks:
        expected = check(ranks, problem)
        graphs = ranks.capture(
            lambda rank: outputs.append([ranks.call(rank, problem) for _ in range(20)])
        )
        for _ in range(100):
            ranks.replay(graphs)
        torch.cuda.synchronize()
        assert not any(ranks.failures())
        for rank in range(nranks):
            for parts in outputs[rank]:
                for part, expected_part in zip(parts, expected[rank], strict=True):
                    assert_same_bits(part, expected_part)


def test_inputs_are_free_after_the_call(generator: torch.Generator) -> None:
    """A call is ordered after what its stream had, and what follows may overwrite the input.

    The last rank is late, so that the others' calls wait.
    """
    nranks = 3
    problem = make_problem(nranks, 9, (640, 128), torch.bfloat16, generator)
    late = dataclasses.replace(problem, inputs=[torch.zeros_like(x) for x in problem.inputs])
    copies: list[list[Tensor]] = [
        [torch.full((9, w), torch.nan, dtype=torch.bfloat16, device="cuda") for w in (640, 128)]
        for _ in range(nranks)
    ]
    with LocalRanks(nranks) as ranks:
        expected = warm_up(ranks, problem)
        ranks.reserve(problem)
        torch.cuda.synchronize()

        def run(rank: int) -> None:
            torch.cuda._sleep(20_000_000 if rank == nranks - 1 else 100_000)
            late.inputs[rank].copy_(problem.inputs[rank])
            outputs = ranks.call(rank, late)
            late.inputs[rank].fill_(torch.nan)
            for copy, output in zip(copies[rank], outputs, strict=True):
                copy.copy_(output)
                output.fill_(torch.nan)

        ranks.launch(run)
        torch.cuda.synchronize()
        assert not any(ranks.failures())
        for rank in range(nranks):
            for copy, expected_part in zip(copies[rank], expected[rank], strict=True):
                assert_same_bits(copy, expected_part)


def test_two_streams_take_turns(generator: torch.Generator) -> None:
    """Eager calls of one workspace on two streams run in the order they were made.

    The first stream is held up: without an order the second one's calls would be the first.
    """
    nranks, rounds = 2, 30
    problems = [
        make_problem(nranks, 1 + call % 5, (640, 128), torch.float16, generator)
        for call in range(rounds)
    ]
    with LocalRanks(nranks) as ranks:
        warm_up(ranks, *problems[:5])
        others = [torch.cuda.Stream() for _ in range(nranks)]
        for stream in (*ranks.streams, *others):  # memory for all outputs
            with torch.cuda.stream(stream):
                blocks = [torch.empty(5, 640, device="cuda") for _ in range(2 * rounds)]
                del blocks
        torch.cuda.synchronize()
        outputs: list[list[tuple[Tensor, ...]]] = [[] for _ in problems]
        for call, problem in enumerate(problems):
            for rank in range(nranks):
                stream = (ranks.streams, others)[call % 2][rank]
                with torch.cuda.stream(stream):
                    if call % 6 == 2 * rank:
                        torch.cuda._sleep(1_000_000)
                    outputs[call].append(ranks.call(rank, problem))
        torch.cuda.synchronize()
        assert not any(ranks.failures())
        for call, problem in enumerate(problems):
            for parts, exact_parts in zip(outputs[call], problem.exact(), strict=True):
                for part, exact in zip(parts, exact_parts, strict=True):
                    assert_rounded(part, exact, f"call {call}")


@pytest.mark.parametrize("in_thread", [False, True], ids=["same_thread", "other_thread"])
@pytest.mark.parametrize("state", ["new", "idle", "busy"])
def test_eager_calls_while_a_stream_captures(
    generator: torch.Generator, state: str, in_thread: bool
) -> None:
    """A capture, in the global mode, goes on while the workspace has calls on other streams.

    They are its first ones; or follow one on a stream that is idle, or busy.
    """
    nranks = 2
    problem, first, eager, more = (
        make_problem(nranks, tokens, (640, 128), torch.float16, generator)
        for tokens in (5, 1, 3, 4)
    )
    with LocalRanks(nranks) as ranks:
        warm_up(ranks, problem, first, eager, more)
        torch.cuda._sleep(1)
    with LocalRanks(nranks) as ranks, ThreadPoolExecutor(1) as thread:
        firsts, others = ([torch.cuda.Stream() for _ in range(nranks)] for _ in range(2))
        for stream in (*firsts, *others):  # memory for all outputs
            with torch.cuda.stream(stream):
                blocks = [torch.empty(5, 640, device="cuda") for _ in range(20)]
                del blocks
        torch.cuda.synchronize()
        done: list[tuple[Problem, int, tuple[Tensor, ...]]] = []
        captured: list[tuple[Tensor, ...]] = []

        def first_calls() -> None:
            for rank in range(nranks):
                with torch.cuda.stream(firsts[rank]):
                    torch.cuda._sleep(50_000_000)
                    done.append((first, rank, ranks.call(rank, first)))

        def calls() -> None:
            if state == "busy":
                first_calls()
            for called in (eager, more):
                for rank in range(nranks):
                    with torch.cuda.stream(others[rank]):
                        done.append((called, rank, ranks.call(rank, called)))

        def capture(rank: int) -> None:
            captured.append(ranks.call(rank, problem))
            if in_thread:
                thread.submit(calls).result()
            else:
                calls()

        if state == "idle":
            first_calls()
        graphs = ranks.capture(capture)
        torch.cuda.synchronize()
        assert not any(ranks.failures())
        for called, rank, parts in done:
            for part, exact in zip(parts, called.exact()[rank], strict=True):
                assert_rounded(part, exact, f"{called}, rank {rank}")
        for _ in range(2):
            for parts in captured:
                for part in parts:
                    part.fill_(POISON)
            ranks.replay(graphs)
            for parts, exact_parts in zip(captured, problem.exact(), strict=True):
                for part, exact in zip(parts, exact_parts, strict=True):
                    assert_rounded(part, exact, "replay")
        assert not any(ranks.failures())


def test_two_threads_take_turns(generator: torch.Generator) -> None:
    """Calls of two host threads, each on a stream of its own, which is first left open."""
    nranks, rounds = 2, 10
    problem = make_problem(nranks, 3, (640, 128), torch.bfloat16, generator)
    with LocalRanks(nranks) as ranks:
        expected = check(ranks, problem)
        streams = [[torch.cuda.Stream() for _ in range(2)] for _ in range(nranks)]
        for stream in (s for pair in streams for s in pair):
            with torch.cuda.stream(stream):
                blocks = [torch.empty(3, 640, device="cuda") for _ in range(2 * rounds)]
                del blocks
        torch.cuda.synchronize()

        def run(rank: int, thread: int) -> list[tuple[Tensor, ...]]:
            with torch.cuda.stream(streams[rank][thread]):
                return [ranks.call(rank, problem) for _ in range(rounds)]

        with ThreadPoolExecutor(2 * nranks) as threads:
            calls = [(r, threads.submit(run, r, t)) for r in range(nranks) for t in range(2)]
            results = [(rank, call.result()) for rank, call in calls]
        torch.cuda.synchronize()
        assert not any(ranks.failures())
        for rank, outputs in results:
            for parts in outputs:
                for part, expected_part in zip(parts, expected[rank], strict=True):
                    assert_same_bits(part, expected_part)


def test_no_tokens_are_no_call(generator: torch.Generator) -> None:
    with LocalRanks(2) as ranks:
        for widths in ((640, 128), (640,)):
            problem = make_problem(2, 0, widths, torch.bfloat16, generator)
            [outputs] = ranks.run(problem, ranks=[0])
            assert [part.shape for part in outputs] == [(0, width) for width in widths]
        check_alive(ranks, generator)


# Capacity.


@both_ops
@pytest.mark.parametrize("is_registered", [False, True])
@pytest.mark.parametrize("nranks", [2, 3, 16])
def test_at_capacity(
    generator: torch.Generator, nranks: int, is_registered: bool, num_parts: int
) -> None:
    """The largest call, twice so that both halves of the buffer are used to their ends."""
    least = torch.ops.minimax_rms._comm_size(nranks, 1)
    capacity = torch.ops.minimax_rms._max_tokens(nranks, least)
    tuning = (1, 2, 128) if num_parts == 2 else None
    widths = (64, 32)[:num_parts]
    options = {"comm_size": least, "max_tokens": capacity, "is_registered": is_registered}
    with LocalRanks(nranks, **options) as ranks:
        assert capacity == ranks.capacity
        if not ranks.fits(64 * 2, capacity) and tuning is None:
            pytest.skip(f"grids of {capacity} tokens on {nranks} ranks do not fit this GPU")
        for _ in range(4):
            problem = make_problem(nranks, capacity, widths, torch.bfloat16, generator)
            check(ranks, problem, tuning)
        assert not any(ranks.failures())
        assert ranks.guards_are_intact()


@both_ops
@pytest.mark.parametrize("nranks", [2, 3])
@pytest.mark.parametrize("beyond", [1, 1000])
def test_beyond_the_capacity(
    generator: torch.Generator, beyond: int, nranks: int, num_parts: int
) -> None:
    """Of a workspace that the host knows nothing of: NaN, nothing written, and then an error."""
    least = torch.ops.minimax_rms._comm_size(nranks, 1)
    widths = (64, 32)[:num_parts]
    tuning = (1, 2, 128) if num_parts == 2 else None
    of_what = " of q and k" if num_parts == 2 else ""
    with LocalRanks(nranks, comm_size=least) as ranks:
        small = make_problem(nranks, 5, widths, torch.bfloat16, generator)
        check(ranks, small, tuning)
        tokens = ranks.capacity + beyond
        outputs = ranks.run(make_problem(nranks, tokens, widths, torch.bfloat16, generator), tuning)
        torch.cuda.synchronize()
        assert_nan(outputs)
        assert ranks.guards_are_intact()
        failures = ranks.failures()
        exceeds = (
            rf"call 2 of {tokens} tokens{of_what} exceeds the capacity of the workspace, "
            rf"{ranks.capacity} tokens \(this is rank \d of {nranks}\)"
        )
        gave_up = r"rank \d gave up in call 2, since the call exceeds its capacity"
        for failure in failures:
            assert re.search(f"{exceeds}|{gave_up}", failure), failures
        assert any(re.search(exceeds, failure) for failure in failures)
        for rank in range(nranks):
            with pytest.raises(RuntimeError, match=r"this workspace can only be closed now"):
                ranks.call(rank, small)


@both_ops
@pytest.mark.parametrize("beside", [GUARD, EMPTY], ids=["anything", "empty_buffers"])
@pytest.mark.parametrize("comm_size", [0, 8, 16, 64, 248, 252])
def test_no_room_for_a_header(
    generator: torch.Generator, comm_size: int, beside: int, num_parts: int
) -> None:
    """Less than ranks need to talk at all: NaN, not a byte written, and then an error.

    Whatever is in the memory beside the buffers, which is as empty as that of a new workspace where
    there is another one.
    """
    nranks = 3
    widths = (64, 32)[:num_parts]
    problem = make_problem(nranks, 5, widths, torch.bfloat16, generator)
    with LocalRanks(nranks) as usual:
        warm_up(usual, problem)
    with LocalRanks(nranks, comm_size=comm_size, guard=beside) as ranks:
        assert ranks.capacity == 0
        before = [ranks.buffer(rank).clone() for rank in range(nranks)]
        replayed: list[tuple[Tensor, ...]] = []
        graphs = ranks.capture(lambda rank: replayed.append(ranks.call(rank, problem)))

        begin = time.monotonic()
        outputs = ranks.run(problem)
        torch.cuda.synchronize()
        assert_nan(outputs)
        failures = ranks.failures()
        for rank in range(nranks):
            message = r"exceeds the capacity of the workspace"
            assert re.search(message, failures[rank]), failures
            with pytest.raises(RuntimeError, match=message):
                ranks.call(rank, problem)
        for _ in range(2):
            for parts in replayed:
                for part in parts:
                    part.zero_()
            ranks.replay(graphs)
            torch.cuda.synchronize()
            assert_nan(replayed)
        assert time.monotonic() - begin < 5

        assert ranks.guards_are_intact()
        for rank in range(nranks):
            assert torch.equal(ranks.buffer(rank), before[rank])


@pytest.mark.parametrize("comm_size", [256, 264, 320])
def test_no_room_for_a_token(generator: torch.Generator, comm_size: int) -> None:
    """Of a header and nothing, or next to nothing, else."""
    problem = make_problem(3, 1, (64, 32), torch.bfloat16, generator)
    with LocalRanks(3, comm_size=comm_size) as ranks:
        assert ranks.capacity == 0
        outputs = ranks.run(problem)
        torch.cuda.synchronize()
        assert_nan(outputs)
        failures = ranks.failures()
        assert all("capacity" in failure for failure in failures), failures
        assert ranks.guards_are_intact()


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("tuning", [(1, 1, 32), (8, 2, 256)], ids=str)
def test_failure_leaves_the_call_before_it(
    generator: torch.Generator, tuning: tuple[int, ...], late: int
) -> None:
    """Though the next one's blocks are there, and a peer fails in it, before this one is over."""
    least = torch.ops.minimax_rms._comm_size(2, 1)
    for _ in range(10):
        with LocalRanks(2, comm_size=least) as ranks:
            tokens = [20, ranks.capacity + 1]
            problems = [make_problem(2, n, (640, 128), torch.bfloat16, generator) for n in tokens]
            warm_up(ranks, problems[0], tuning=tuning)
            outputs = replay(ranks, problems, late, tuning)
            for rank, exact_parts in enumerate(problems[0].exact()):
                for part, exact in zip(outputs[rank][0], exact_parts, strict=True):
                    assert_rounded(part, exact, f"rank {rank}, {ranks.failures()}")
                assert_nan([outputs[rank][1]])
                assert "capacity" in ranks.failure(rank)


@both_ops
def test_beyond_a_registered_capacity(generator: torch.Generator, num_parts: int) -> None:
    """The host says no: no rank sees a call."""
    widths = (64, 32)[:num_parts]
    with LocalRanks(2, max_tokens=50, is_registered=True) as ranks:
        problem = make_problem(2, 51, widths, torch.bfloat16, generator)
        for rank in range(2):
            with pytest.raises(
                RuntimeError, match=r"at most max_tokens = 50 tokens in this workspace, got 51"
            ):
                ranks.call(rank, problem)
        check(ranks, make_problem(2, 50, widths, torch.bfloat16, generator))
        check_alive(ranks, generator)


# What fails.


@pytest.mark.parametrize("tuning", [None, (1, 3, 96)], ids=str)
@pytest.mark.parametrize("hasty", [0, 1])
def test_two_replays_at_once_fail(
    generator: torch.Generator, hasty: int, tuning: tuple[int, ...] | None
) -> None:
    """What no host code sees: both graphs' kernels are there, and neither can be the next call."""
    other_rank = 1 - hasty
    problem = make_problem(2, 5, (640, 128), torch.bfloat16, generator)
    with LocalRanks(2) as ranks:
        warm_up(ranks, problem, tuning=tuning)
        outputs: list[tuple[Tensor, ...]] = []
        first, second = (
            ranks.capture(lambda rank: outputs.append(ranks.call(rank, problem, tuning)))
            for _ in range(2)
        )
        other = torch.cuda.Stream()
        torch.cuda.synchronize()
        begin = time.monotonic()
        # The peer stays away, so that the first replay cannot be over when the second begins.
        with torch.cuda.stream(ranks.streams[hasty]):
            first[hasty].replay()
        with torch.cuda.stream(other):
            second[hasty].replay()
        torch.cuda.synchronize()
        assert time.monotonic() - begin < 5, ranks.failures()
        message = (
            rf"two calls ran at once on rank {hasty} of 2: order the calls of a workspace, graph "
            r"replays included, on one stream or by events; this workspace can only be closed"
        )
        assert re.search(message, ranks.failure(hasty)), ranks.failures()
        with pytest.raises(RuntimeError, match=message):
            ranks.call(hasty, problem, tuning)
        # The peer learns of it in its next call, not by a timeout.
        with torch.cuda.stream(ranks.streams[other_rank]):
            first[other_rank].replay()
        gave_up = rf"rank {hasty} gave up in call \d+, since two calls ran at once on a rank"
        assert re.search(gave_up, ranks.failure(other_rank)), ranks.failures()
        assert time.monotonic() - begin < 10
        assert_nan(outputs[other_rank : other_rank + 1])


def test_closed_peer(generator: torch.Generator) -> None:
    """A call that a peer will not make any more fails at once."""
    problem = make_problem(2, 5, (640, 128), torch.float16, generator)
    with LocalRanks(2) as ranks:
        warm_up(ranks, problem)
        ranks.ops._announce_close(ranks.addresses, 1)
        begin = time.monotonic()
        outputs = ranks.run(problem, ranks=[0])
        torch.cuda.synchronize()
        message = r"rank 1 had closed before call 2 \(this is rank 0 of 2\)"
        assert re.search(message, ranks.failure(0)), ranks.failures()
        assert time.monotonic() - begin < 5
        assert_nan(outputs)


# Tokens and parts of what each rank normalizes.
DISAGREEMENTS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "tokens": ((5, 1), (7, 1)),
    "tokens_of_qk": ((5, 2), (1, 2)),
    "operator": ((5, 1), (5, 2)),
    "many": ((2, 2), (40, 2)),
}


@pytest.mark.parametrize("nranks", [2, 3])
@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_disagreement(generator: torch.Generator, case: str, nranks: int) -> None:
    """The last rank calls for something else: an error that names both, before the timeout."""
    usual, odd = (
        make_problem(nranks, tokens, (640, 128)[:parts], torch.bfloat16, generator)
        for tokens, parts in DISAGREEMENTS[case]
    )
    last = nranks - 1
    with LocalRanks(nranks) as ranks:
        warm_up(ranks, usual, odd)
        ranks.reserve(usual)
        ranks.reserve(odd)
        torch.cuda.synchronize()
        begin = time.monotonic()
        outputs: list[tuple[Tensor, ...]] = []
        ranks.launch(lambda rank: outputs.append(ranks.call(rank, odd if rank == last else usual)))
        torch.cuda.synchronize()
        assert time.monotonic() - begin < 5
        failures = ranks.failures()

        def text(problem: Problem) -> str:
            count = f"{problem.num_tokens} token{'s' * (problem.num_tokens != 1)}"
            return count + (" of q and k" if len(problem.widths) == 2 else "")

        for rank, failure in enumerate(failures):
            own, peer = (usual, odd) if rank != last else (odd, usual)
            disagree = (
                rf"ranks disagree in call 3: rank {rank} normalizes {text(own)}, "
                rf"rank {last if rank != last else '[01]'} {text(peer)}; this workspace can only"
            )
            gave_up = r"rank \d gave up in call 3, since ranks disagreed on the call"
            assert re.search(rf"minimax_rms::\w+: ({disagree}|{gave_up})", failure), failures
        assert any("ranks disagree in" in failure for failure in failures)
        assert_nan(outputs)
        assert ranks.guards_are_intact()


@pytest.mark.parametrize("what", ["widths", "dtype", "eps"])
def test_disagreement_of_as_many_tokens(generator: torch.Generator, what: str) -> None:
    """Sums of other rows would go unnoticed."""
    usual = make_problem(2, 5, (640, 128), torch.bfloat16, generator)
    odd = {
        "widths": make_problem(2, 5, (640, 256), torch.bfloat16, generator),
        "dtype": make_problem(2, 5, (640, 128), torch.float16, generator),
        "eps": dataclasses.replace(usual, eps=1e-3),
    }[what]
    with LocalRanks(2) as ranks:
        warm_up(ranks, usual, odd)
        ranks.reserve(usual)
        ranks.reserve(odd)
        torch.cuda.synchronize()
        outputs: list[tuple[Tensor, ...]] = []
        ranks.launch(lambda rank: outputs.append(ranks.call(rank, odd if rank == 1 else usual)))
        torch.cuda.synchronize()
        failures = ranks.failures()
        for rank, failure in enumerate(failures):
            disagree = (
                rf"ranks disagree in call 3: rank {rank} normalizes 5 tokens of q and k, "
                rf"rank {1 - rank} 5 tokens of q and k of other row sizes, dtype or eps; "
            )
            gave_up = r"rank \d gave up in call 3, since ranks disagreed on the call"
            assert re.search(rf"minimax_rms::\w+: ({disagree}|{gave_up})", failure), failures
        assert any("ranks disagree in" in failure for failure in failures)
        assert_nan(outputs)
        assert ranks.guards_are_intact()


@pytest.mark.parametrize("is_registered", [False, True])
def test_rank_that_never_calls(generator: torch.Generator, is_registered: bool) -> None:
    nranks = 3
    problem = make_problem(nranks, 9, (640, 128), torch.bfloat16, generator)
    with LocalRanks(nranks, timeout=2.0, is_registered=is_registered) as ranks:
        for _ in range(3):
            check(ranks, problem)
        # Kernels of what runs meanwhile, loaded.
        elsewhere = torch.zeros(1000, device="cuda")
        elsewhere.add_(1)
        replayed: list[tuple[Tensor, ...]] = []
        graphs = ranks.capture(lambda rank: replayed.append(ranks.call(rank, problem)))
        side = torch.cuda.Stream()
        ranks.reserve(problem)
        torch.cuda.synchronize()

        begin = time.monotonic()
        outputs = []
        ended = []
        for rank in (0, 1):
            with torch.cuda.stream(ranks.streams[rank]):
                outputs.append(ranks.call(rank, problem))
                ended.append(ranks.streams[rank].record_event())
        with torch.cuda.stream(side):
            elsewhere.add_(1)
        side.synchronize()
        assert not ended[0].query(), "the call ended without the third rank"
        assert time.monotonic() - begin < 1
        torch.cuda.synchronize()
        assert 1.9 < time.monotonic() - begin < 4

        missing = "rank 2 did not take part"
        in_time = rf"minimax_rms::\w+: {missing} in call 4 within 2 s \(this is rank [01] of 3"
        gave_up = rf"minimax_rms::\w+: rank [01] gave up in call 4, since {missing}"
        failures = ranks.failures()
        assert any(re.search(in_time, failure) for failure in failures[:2]), failures
        assert_nan(outputs)
        for rank in (0, 1):
            assert re.search(f"{in_time}|{gave_up}", failures[rank]), failures
            assert ranks.missing_ranks(rank) == [2]
            for _ in range(2):
                with pytest.raises(RuntimeError, match=rf"{missing}.*can only be closed now"):
                    ranks.call(rank, problem)

        # The rank that comes too late finds that it was given up on, without a wait of its own.
        assert failures[2] == ""
        begin = time.monotonic()
        with torch.cuda.stream(ranks.streams[2]):
            outputs.append(ranks.call(2, problem))
        late = ranks.failure(2)
        assert time.monotonic() - begin < 1
        assert re.search(r"rank [01] gave up in call 4.*\(this is rank 2 of 3\)", late), late
        assert_nan(outputs)

        # Nor does a graph that was captured before lie, or wait.
        for parts in replayed:
            for part in parts:
                part.zero_()
        begin = time.monotonic()
        ranks.replay(graphs)
        torch.cuda.synchronize()
        assert time.monotonic() - begin < 1
        assert_nan(replayed)
        assert ranks.guards_are_intact()

        elsewhere.add_(1)
        assert elsewhere.eq(3).all()
    with LocalRanks(nranks) as ranks:
        check(ranks, problem)
        check_alive(ranks, generator)


def test_failure_in_a_replay(generator: torch.Generator) -> None:
    """The host finds out at its next call or check; later replays neither lie nor wait."""
    timeout = 1.0
    problem = make_problem(2, 9, (640, 128), torch.bfloat16, generator)
    with LocalRanks(2, timeout=timeout) as ranks:
        replayed: list[tuple[Tensor, ...]] = []
        graphs = ranks.capture(lambda rank: replayed.append(ranks.call(rank, problem)))

        def seconds_of_replay(rank: int) -> float:
            for part in replayed[rank]:
                part.zero_()
            torch.cuda.synchronize()
            begin = time.monotonic()
            with torch.cuda.stream(ranks.streams[rank]):
                graphs[rank].replay()
            torch.cuda.synchronize()
            return time.monotonic() - begin

        for _ in range(2):
            ranks.replay(graphs)
        for parts, exact_parts in zip(replayed, problem.exact(), strict=True):
            for part, exact in zip(parts, exact_parts, strict=True):
                assert_rounded(part, exact)
        assert not any(ranks.failures())

        assert 0.9 * timeout < seconds_of_replay(0) < timeout + 2
        assert_nan(replayed[:1])
        missing = r"rank 1 did not take part in call 3 within 1 s \(this is rank 0 of 2\)"
        with pytest.raises(RuntimeError, match=missing):
            ranks.ops._check(ranks.workspaces[0])
        assert ranks.missing_ranks(0) == [1]
        for _ in range(3):
            assert seconds_of_replay(0) < 0.5 * timeout
            assert_nan(replayed[:1])
        with pytest.raises(RuntimeError, match=missing):
            ranks.call(0, problem)

        # The rank that was missed finds out likewise.
        for _ in range(2):
            assert seconds_of_replay(1) < 0.5 * timeout
            assert_nan(replayed[1:])
        vain = r"rank 0 gave up in call 3, having waited in vain for this rank, 1"
        with pytest.raises(RuntimeError, match=vain):
            ranks.ops._check(ranks.workspaces[1])
        assert ranks.guards_are_intact()


@pytest.mark.parametrize("use_graph", [False, True], ids=["eager", "graph"])
def test_failure_of_a_copied_workspace(generator: torch.Generator, use_graph: bool) -> None:
    """Several tensors name the same buffers: what fails through one, has failed through all.

    The host learns of it through a copy once a call through that has met it.
    """
    problem = make_problem(2, 9, (640,), torch.bfloat16, generator)
    with LocalRanks(2, timeout=0.5) as ranks:
        copies = [workspace.clone() for workspace in ranks.workspaces]

        def call(rank: int, workspace: Tensor) -> tuple[Tensor, ...]:
            x, [weight] = problem.inputs[rank], problem.weights[rank]
            return (ranks.ops.minimax_allreduce_rms(x, weight, workspace, rank, 2, EPS),)

        try:
            # The host's first call of each copy is captured: it does not wait for a peer.
            replayed: list[tuple[Tensor, ...]] = []
            graphs = ranks.capture(lambda rank: replayed.append(call(rank, copies[rank])))
            expected = check(ranks, problem)
            ranks.reserve(problem)
            outputs: list[tuple[Tensor, ...]] = []
            ranks.launch(lambda rank: outputs.append(call(rank, copies[rank])))
            ranks.replay(graphs)
            torch.cuda.synchronize()
            for each in (outputs, replayed):
                for rank in range(2):
                    assert_same_bits(each[rank][0], expected[rank][0])
            for copy in copies:
                ranks.ops._check(copy)

            ranks.run(problem, ranks=[0])
            assert "rank 1 did not take part in call 4" in ranks.failure(0)
            told = (
                r"rank 1 did not take part in call 4\b",
                r"rank 0 gave up in call 4, having waited in vain for this rank, 1",
            )
            for rank in range(2):
                begin = time.monotonic()
                if use_graph:
                    replayed[rank][0].zero_()
                    with torch.cuda.stream(ranks.streams[rank]):
                        graphs[rank].replay()
                    outputs = replayed[rank : rank + 1]
                else:
                    outputs = [call(rank, copies[rank])]
                torch.cuda.synchronize()
                assert time.monotonic() - begin < 2
                assert_nan(outputs)
                with pytest.raises(RuntimeError, match=told[rank]):
                    ranks.ops._check(copies[rank])
                with pytest.raises(RuntimeError, match=told[rank]):
                    call(rank, copies[rank])
            assert ranks.guards_are_intact()
        finally:
            torch.cuda.synchronize()
            for copy in copies:
                ranks.ops._forget(copy)


def test_several_missing_ranks_are_all_named(generator: torch.Generator) -> None:
    problem = make_problem(4, 2, (640,), torch.float32, generator)
    with LocalRanks(4) as ranks:
        check(ranks, problem)
        ranks.set_timeout(0.5)
        outputs = ranks.run(problem, ranks=[2])
        assert re.search(
            r"ranks 0, 1, 3 did not take part in call 2 within 0\.5 s \(this is rank 2 of 4\)",
            ranks.failure(2),
        )
        assert ranks.missing_ranks(2) == [0, 1, 3]
        assert_nan(outputs)


def test_late_rank_within_the_timeout(generator: torch.Generator) -> None:
    problem = make_problem(2, 40, (640, 128), torch.bfloat16, generator)
    with LocalRanks(2) as ranks:
        expected = check(ranks, problem)
        ranks.reserve(problem)
        torch.cuda.synchronize()
        outputs = []
        for rank in (0, 1):
            with torch.cuda.stream(ranks.streams[rank]):
                outputs.append(ranks.call(rank, problem))
            if rank == 0:
                time.sleep(1)
                assert not ranks.streams[0].query(), "the call ended without its peer"
        assert not any(ranks.failures())
        for parts, expected_parts in zip(outputs, expected, strict=True):
            for part, expected_part in zip(parts, expected_parts, strict=True):
                assert_same_bits(part, expected_part)


def test_workspaces_do_not_disturb_each_other(generator: torch.Generator) -> None:
    """One fails while another of the same process and device works."""
    problem = make_problem(2, 5, (640, 128), torch.float32, generator)
    with LocalRanks(2, timeout=0.5) as failing, LocalRanks(2) as working:
        check(failing, problem)
        check(working, problem)
        failing.run(problem, ranks=[0])
        assert failing.failure(0)
        check_alive(working, generator)


def test_memory_of_a_failed_workspace_serves_another(generator: torch.Generator) -> None:
    """A caller's workspace goes without a word to the host, and the next may lie where it lay."""
    problem = make_problem(2, 5, (640, 128), torch.bfloat16, generator)
    with LocalRanks(2, timeout=0.5) as ranks:
        check(ranks, problem)
        ranks.run(problem, ranks=[0])
        assert "did not take part" in ranks.failure(0)
        with torch.cuda.stream(ranks.streams[1]):
            ranks.call(1, problem)
        assert "gave up" in ranks.failure(1)
        ranks.renew()
        for _ in range(3):
            check(ranks, problem)
        assert not any(ranks.failures())


def test_another_rank_of_a_registered_workspace(generator: torch.Generator) -> None:
    problem = make_problem(2, 5, (640,), torch.bfloat16, generator)
    with LocalRanks(2, is_registered=True) as ranks:
        with pytest.raises(RuntimeError, match=r"rank and nranks must be those of the workspace"):
            ranks.ops.minimax_allreduce_rms(
                problem.inputs[0], problem.weights[0][0], ranks.workspaces[0], 1, 2, EPS
            )
        check_alive(ranks, generator)


def bad_arguments() -> dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]]:
    """What is changed of a call's tensors, and the start of what is said of it."""
    return {
        "weight_on_cpu": (
            lambda tensors: {"norm_weight": tensors["norm_weight"].cpu()},
            r"norm_weight must be on the device of input",
        ),
        "workspace_on_cpu": (
            lambda tensors: {"workspace": tensors["workspace"].cpu()},
            r"workspace must be on the device of input",
        ),
        "short_workspace": (
            lambda tensors: {"workspace": tensors["workspace"][:7].clone()},
            r"workspace must have shape",
        ),
        "unaligned_rows": (
            lambda tensors: {"input": torch.zeros(5, 641, device="cuda").bfloat16()[:, 1:]},
            r"input must ",
        ),
    }


@pytest.mark.parametrize("case", bad_arguments())
def test_bad_arguments(generator: torch.Generator, case: str) -> None:
    """Refused before anything is launched: the peers do not see a call."""
    change, message = bad_arguments()[case]
    problem = make_problem(2, 5, (640,), torch.bfloat16, generator)
    with LocalRanks(2) as ranks:
        tensors = {
            "input": problem.inputs[0],
            "norm_weight": problem.weights[0][0],
            "workspace": ranks.workspaces[0],
        }
        tensors |= change(tensors)
        with pytest.raises(RuntimeError, match=rf"minimax_rms::minimax_allreduce_rms: {message}"):
            ranks.ops.minimax_allreduce_rms(*tensors.values(), 0, 2, EPS)
        check_alive(ranks, generator)


def bad_registrations() -> dict[str, tuple[Callable[[Tensor], tuple[object, ...]], str]]:
    """The arguments for a workspace of rank 0 of 2, and what is said of them."""
    return {
        "rank": (
            lambda w: (w, 2, 2, 8, 132, 1.0),
            r"rank must be in \[0, nranks\) with nranks = 2",
        ),
        "nranks": (lambda w: (w, 0, 17, 8, 132, 1.0), r"nranks must be in \[1, 16\], got 17"),
        "no_tokens": (lambda w: (w, 0, 2, 0, 132, 1.0), r"max_tokens must be positive, got 0"),
        "tokens": (lambda w: (w, 0, 2, -1, 132, 1.0), r"max_tokens must be positive, got -1"),
        "multiprocessors": (
            lambda w: (w, 0, 2, 8, 0, 1.0),
            r"num_multiprocessors must be in \[1, 65536\], got 0",
        ),
        "no_timeout": (lambda w: (w, 0, 2, 8, 132, 0.0), r"seconds must be in \(0, 1e9\), got 0"),
        "nan": (lambda w: (w, 0, 2, 8, 132, torch.nan), r"seconds must be in \(0, 1e9\), got nan"),
        "short": (
            lambda w: (w[:7].clone(), 0, 2, 8, 132, 1.0),
            r"workspace must have shape \[3 \* nranks \+ 2\] or more with nranks = 2, got \[7\]",
        ),
        "dtype": (lambda w: (w.int(), 0, 2, 8, 132, 1.0), r"workspace must be torch\.int64"),
    }


@pytest.mark.parametrize("case", bad_registrations())
@pytest.mark.parametrize("is_registered", [False, True])
def test_bad_registration(generator: torch.Generator, is_registered: bool, case: str) -> None:
    """It leaves what the host knows as it was."""
    arguments_of, message = bad_registrations()[case]
    with LocalRanks(2, max_tokens=50, is_registered=is_registered) as ranks:
        with pytest.raises(RuntimeError, match=rf"^minimax_rms::_register: {message}"):
            ranks.ops._register(*arguments_of(ranks.workspaces[0]))
        check_alive(ranks, generator)
        if is_registered:
            problem = make_problem(2, 51, (64,), torch.bfloat16, generator)
            with pytest.raises(RuntimeError, match=r"at most max_tokens = 50 tokens"):
                ranks.call(0, problem)


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", "1e9", "5 s"])
def test_bad_timeout_variable(generator: torch.Generator, value: str) -> None:
    """It is looked at when the host meets a workspace that has not been given a timeout."""
    problem = make_problem(2, 5, (640,), torch.bfloat16, generator)
    message = (
        r"^minimax_rms::minimax_allreduce_rms: MINIMAX_RMS_TIMEOUT must be a positive number of "
        rf"seconds below 1e9, got {value}$"
    )
    with LocalRanks(2, is_known=False) as ranks:
        with environment({"MINIMAX_RMS_TIMEOUT": value}):
            for _ in range(2):
                with pytest.raises(RuntimeError, match=message):
                    ranks.call(0, problem)
            ranks.register(ranks.max_tokens, 20.0)
            check(ranks, problem)
        check_alive(ranks, generator)


@pytest.mark.parametrize(
    "tuning",
    [
        *((3, 1, 96), (0, 1, 32), (16, 1, 512), (1, 0, 32), (1, 1, 0), (1, 1, 33), (1, 1, 544)),
        *((2, 1, 32), (2, 1, 96), (2, 1, 256), (4, 1, 256), (8, 1, 128), (8, 1, 512)),
    ],
    ids=str,
)
def test_bad_tuning(generator: torch.Generator, tuning: tuple[int, ...]) -> None:
    problem = make_problem(2, 5, (640, 128), torch.bfloat16, generator)
    with LocalRanks(2) as ranks:
        with pytest.raises(RuntimeError, match=r"minimax_rms::_minimax_allreduce_rms_qk_as: "):
            ranks.call(0, problem, tuning)
        check_alive(ranks, generator)


@pytest.mark.multi_gpu
def test_tensors_on_another_device(generator: torch.Generator) -> None:
    """One rank alone, on a device that is not the current one; and a workspace on another."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    problem = make_problem(1, 5, (640,), torch.bfloat16, generator)
    x, weight = (tensor.to("cuda:1") for tensor in (problem.inputs[0], problem.weights[0][0]))
    ops = torch.ops.minimax_rms
    out = ops.minimax_allreduce_rms(x, weight, torch.empty(0, dtype=torch.int64), 0, 1, EPS)
    assert out.device == x.device
    assert torch.cuda.current_device() == 0
    assert_rounded(out.to("cuda:0"), problem.exact()[0][0])
    with LocalRanks(2) as ranks:
        with pytest.raises(RuntimeError, match=r"workspace must be on the device of input"):
            ops.minimax_allreduce_rms(x, weight, ranks.workspaces[0], 0, 2, EPS)
        check_alive(ranks, generator)


def test_calls_allocate_their_outputs_alone(generator: torch.Generator) -> None:
    problem = make_problem(2, 9, (640, 128), torch.bfloat16, generator)
    with LocalRanks(2) as ranks:
        check(ranks, problem)
        ranks.reserve(problem)
        torch.cuda.synchronize()
        count = torch.cuda.memory_stats()["allocation.all.allocated"]
        free, _ = torch.cuda.mem_get_info()
        outputs: list[tuple[Tensor, ...]] = []
        for _ in range(5):
            ranks.launch(lambda rank: outputs.append(ranks.call(rank, problem)))
        torch.cuda.synchronize()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] - count == 5 * 2 * 2
        assert torch.cuda.mem_get_info()[0] == free


def test_operator_checks(generator: torch.Generator) -> None:
    """torch's own checks of an operator, with a single rank."""
    ops = torch.ops.minimax_rms
    workspace = torch.empty(0, dtype=torch.int64, device="cuda")
    problem = make_problem(1, 5, (640, 128), torch.bfloat16, generator)
    problem.inputs[0].nan_to_num_()  # opcheck compares results and knows no equal NaNs
    [x], [(weight_q, weight_k)] = problem.inputs, problem.weights
    args = (x, weight_q, weight_k, workspace, 640, 128, 0, 1, EPS)
    torch.library.opcheck(ops.minimax_allreduce_rms_qk.default, args)
    torch.library.opcheck(ops._minimax_allreduce_rms_qk_as.default, (*args, 8, 1, 256))
    args = (x[:, :640], weight_q, workspace, 0, 1, EPS)
    torch.library.opcheck(ops.minimax_allreduce_rms.default, args)


# Sizes.


def test_more_than_2_31_elements(generator: torch.Generator) -> None:
    """Rows whose copies are 300 to the batch: each has the bits of the first."""
    copies, tokens, widths = 301, 1000, (6144, 512)
    small = make_problem(1, tokens, widths, torch.bfloat16, generator)
    row = sum(widths) + widths[1]
    num_elements = copies * tokens * row
    assert num_elements > 1 << 31
    if torch.cuda.mem_get_info()[0] < 2.3 * num_elements * 2:
        pytest.skip("needs 10 GB of device memory")
    with LocalRanks(1) as ranks:
        [expected] = check(ranks, small)
        x = torch.empty(copies, tokens, row, dtype=torch.bfloat16, device="cuda")
        x.copy_(small.inputs[0])
        large = dataclasses.replace(small, inputs=[x.view(-1, row)])
        for tuning in (None, (8, 200, 256)):
            outputs = ranks.call(0, large, tuning)
            for part, expected_part in zip(outputs, expected, strict=True):
                for block in part.view(copies, tokens, -1):
                    assert torch.equal(block, expected_part)
            del outputs


@pytest.mark.parametrize("nranks", [1, 2])
def test_rows_far_apart(generator: torch.Generator, nranks: int) -> None:
    """Five rows, 2^30 bytes from one to the next."""
    stride = (1 << 30) // 2 + 8
    if torch.cuda.mem_get_info()[0] < 5 * (stride + 1024) * 2:
        pytest.skip("needs 6 GB of device memory")
    problem = make_problem(nranks, 5, (640, 128), torch.bfloat16, generator)
    storage = torch.empty(4 * stride + nranks * 1024, dtype=torch.bfloat16, device="cuda")
    inputs = []
    for rank, x in enumerate(problem.inputs):
        view = storage[rank * 1024 :].as_strided(x.shape, (stride, 1))
        view.copy_(x)
        inputs.append(view)
    with LocalRanks(nranks) as ranks:
        check(ranks, dataclasses.replace(problem, inputs=inputs))
        assert not any(ranks.failures())


def test_handle_on_the_gpu_is_refused() -> None:
    """The host reads it."""
    handle = torch.zeros(64, dtype=torch.uint8, device="cuda:0")
    message = r"^minimax_rms::_open: handle must be on the CPU, got cuda:0"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.minimax_rms._open(handle)
