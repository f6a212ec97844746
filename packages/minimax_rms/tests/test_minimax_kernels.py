"""The kernels against float64, with all ranks on one GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import pytest
import torch
from minimax_arithmetic import DTYPES, assert_rounded, exact, random_rows, random_weight
from minimax_streams import WorkspaceStreams
from rank_streams import why_not_at_once
from torch import Tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

EPS = 1e-6
# Of each team size, with few enough blocks that those of 16 ranks fit.
TUNINGS = [(1, 2, 64), (1, 1, 256), (2, 3, 64), (4, 4, 128), (8, 3, 256)]


@pytest.fixture(scope="module")
def at_once() -> None:
    reason = why_not_at_once(16)
    if reason:
        pytest.skip(reason)


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


@pytest.fixture
def make(at_once: None) -> Iterator[object]:
    made: list[WorkspaceStreams] = []

    def make_streams(*args: object, **kwargs: object) -> WorkspaceStreams:
        made.append(WorkspaceStreams(*args, **kwargs))  # type: ignore[arg-type]
        return made[-1]

    yield make_streams
    torch.cuda.synchronize()
    try:
        assert all(streams.guards_are_whole() for streams in made)
    finally:
        for streams in made:
            streams.close()


def make_inputs(
    nranks: int, tokens: int, sizes: tuple[int, int], dtype: torch.dtype, g: torch.Generator
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    q_size, kv_size = sizes
    width = q_size + 2 * kv_size
    qkvs = [random_rows(tokens, width, dtype, g) for _ in range(nranks)]
    weights = [
        (random_weight(q_size, dtype, g), random_weight(kv_size, dtype, g)) for _ in range(nranks)
    ]
    return qkvs, weights


def expected_qk(
    qkvs: Sequence[Tensor], weights: Sequence[tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    q_size, kv_size = weights[0][0].numel(), weights[0][1].numel()
    q = exact([x[:, :q_size] for x in qkvs], [w[0] for w in weights], EPS)
    k = exact([x[:, q_size : q_size + kv_size] for x in qkvs], [w[1] for w in weights], EPS)
    return list(zip(q, k, strict=True))


def check_qk(
    results: Sequence[tuple[Tensor, Tensor]],
    expected: Sequence[tuple[Tensor, Tensor]],
    what: object,
) -> None:
    for rank, (result, right) in enumerate(zip(results, expected, strict=True)):
        for name, x, y in zip("qk", result, right, strict=True):
            assert_rounded(x, y, (what, f"rank {rank}", name))


def sizes_of(nranks: int, dtype: torch.dtype) -> tuple[int, int]:
    """MiniMax-M2's, of each rank, in whole vectors."""
    vector = 16 // dtype.itemsize
    return 6144 // nranks // vector * vector, 1024 // nranks // vector * vector


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nranks", [2, 3, 4, 5, 8, 16])
def test_ranks_and_tunings(
    make, generator: torch.Generator, nranks: int, dtype: torch.dtype
) -> None:
    streams = make(nranks)
    sizes = sizes_of(nranks, dtype)
    for tuning in TUNINGS:
        for tokens in (1, 33, 2, 70):
            qkvs, weights = make_inputs(nranks, tokens, sizes, dtype, generator)
            expected = expected_qk(qkvs, weights)
            check_qk(streams.all_qk(qkvs, weights, tuning), expected, (tuning, tokens))
    assert [streams.failure(rank) for rank in range(nranks)] == [""] * nranks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vectors", [(1, 1), (5, 0), (77, 9), (1, 300), (1500, 700), (9000, 31)])
def test_widths(
    make, generator: torch.Generator, vectors: tuple[int, int], dtype: torch.dtype
) -> None:
    streams = make(2)
    sizes = (vectors[0] * 16 // dtype.itemsize, vectors[1] * 16 // dtype.itemsize)
    for tuning in TUNINGS:
        qkvs, weights = make_inputs(2, 21, sizes, dtype, generator)
        expected = expected_qk(qkvs, weights)
        check_qk(streams.all_qk(qkvs, weights, tuning), expected, tuning)


def test_many_tokens_growing_and_shrinking(make, generator: torch.Generator) -> None:
    streams = make(2, max_tokens=3000)
    sizes = sizes_of(2, torch.bfloat16)
    for tokens in (3000, 1, 1000, 2999, 0, 7, 2048, 130):
        qkvs, weights = make_inputs(2, tokens, sizes, torch.bfloat16, generator)
        expected = expected_qk(qkvs, weights)
        check_qk(streams.all_qk(qkvs, weights, (2, 200, 64)), expected, tokens)


def test_result_does_not_depend_on_tuning_batch_or_place(make, generator: torch.Generator) -> None:
    streams = make(2)
    for sizes in (sizes_of(2, torch.bfloat16), (488, 72), (8, 1000)):
        qkvs, weights = make_inputs(2, 50, sizes, torch.bfloat16, generator)
        whole = streams.all_qk(qkvs, weights, TUNINGS[0])
        for tuning in TUNINGS[1:]:
            for results, expected in zip(streams.all_qk(qkvs, weights, tuning), whole, strict=True):
                assert all(map(torch.equal, results, expected)), (sizes, tuning)
        alone = streams.all_qk([x[17:18] for x in qkvs], weights, TUNINGS[2])
        for results, expected in zip(alone, whole, strict=True):
            assert all(torch.equal(x, y[17:18]) for x, y in zip(results, expected, strict=True))


def test_all_ranks_use_the_same_bits(make, generator: torch.Generator) -> None:
    """Ranks whose weights and slices are alike, but for one rank's, get the same sums."""
    streams = make(5)
    qkvs, weights = make_inputs(5, 64, (480, 80), torch.float32, generator)
    same = [qkvs[0], qkvs[1], qkvs[0], qkvs[0], qkvs[0]]
    results = streams.all_qk(same, [weights[0]] * 5)
    for rank in (2, 3, 4):
        assert torch.equal(results[rank][0], results[0][0])
        assert torch.equal(results[rank][1], results[0][1])


def test_public_operators(make, generator: torch.Generator) -> None:
    streams = make(2)
    ops = torch.ops.minimax_rms
    for dtype in DTYPES:
        qkvs, weights = make_inputs(2, 9, (512, 64), dtype, generator)
        results: dict[int, tuple[Tensor, Tensor]] = {}
        ones: dict[int, Tensor] = {}

        def call(
            rank: int,
            qkvs: Sequence[Tensor] = qkvs,
            weights: Sequence[tuple[Tensor, Tensor]] = weights,
            results: dict[int, tuple[Tensor, Tensor]] = results,
            ones: dict[int, Tensor] = ones,
        ) -> None:
            workspace = streams.workspaces[rank]
            results[rank] = ops.minimax_allreduce_rms_qk(
                qkvs[rank], *weights[rank], workspace, 512, 64, rank, 2, EPS
            )
            ones[rank] = ops.minimax_allreduce_rms(
                qkvs[rank][:, :512], weights[rank][0], workspace, rank, 2, EPS
            )

        streams.launch(call)
        expected = expected_qk(qkvs, weights)
        check_qk([results[0], results[1]], expected, dtype)
        for rank in range(2):
            assert torch.equal(ones[rank], results[rank][0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_rank_alone(generator: torch.Generator, dtype: torch.dtype) -> None:
    ops = torch.ops.minimax_rms
    none = torch.empty(0, dtype=torch.int64, device="cuda")
    for tokens, sizes in ((0, (64, 8)), (1, (6144, 1024)), (3000, (6144, 1024)), (70, (48008, 8))):
        (qkv,), (weights,) = make_inputs(1, tokens, sizes, dtype, generator)
        q, k = ops.minimax_allreduce_rms_qk(qkv, *weights, none, *sizes, 0, 1, EPS)
        check_qk([(q, k)], expected_qk([qkv], [weights]), (tokens, sizes))


def test_past_2_to_31_elements(generator: torch.Generator) -> None:
    tokens, width = 300_001, 7168
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free device memory")
    x = torch.randn(tokens, width, dtype=torch.bfloat16, device="cuda", generator=generator)
    weight = random_weight(width, torch.bfloat16, generator)
    none = torch.empty(0, dtype=torch.int64, device="cuda")
    out = torch.ops.minimax_rms.minimax_allreduce_rms(x, weight, none, 0, 1, EPS)
    for rows in (slice(0, 64), slice(tokens - 64, tokens)):
        assert_rounded(out[rows], exact([x[rows]], [weight], EPS)[0])
    # Half a bit of a bfloat16 off, so that a row that was never written would show.
    assert bool((out.view(-1, width)[::97].float().square().mean(dim=1) > 0.1).all())


def test_strided_rows(make, generator: torch.Generator) -> None:
    streams = make(2)
    for dtype in DTYPES:
        vector = 16 // dtype.itemsize
        qkvs, weights = make_inputs(2, 40, (20 * vector, 3 * vector), dtype, generator)
        expected = expected_qk(qkvs, weights)
        strided = []
        for x in qkvs:
            wide = torch.full((40, x.size(1) + 5 * vector), torch.nan, dtype=dtype, device="cuda")
            wide[:, 2 * vector : 2 * vector + x.size(1)] = x
            strided.append(wide[:, 2 * vector : 2 * vector + x.size(1)])
        check_qk(streams.all_qk(strided, weights), expected, dtype)
        repeated = [x[:1].expand(40, -1) for x in qkvs]
        check_qk(streams.all_qk(repeated, weights), expected_qk(repeated, weights), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values(make, generator: torch.Generator, dtype: torch.dtype) -> None:
    streams = make(2)
    sizes = (512, 64)
    qkvs, weights = make_inputs(2, 12, sizes, dtype, generator)
    info = torch.finfo(dtype)
    for x in qkvs:
        x[1] = 0.0
        x[2] = -0.0
        x[3] = info.smallest_normal / 4 if dtype != torch.float16 else 2.0**-24
        x[4] = 65504.0 if dtype == torch.float16 else 1e15
    before = expected_qk([x.clone() for x in qkvs], weights)
    check_qk(streams.all_qk(qkvs, weights), before, "finite")

    # They show in their token and part only, on all ranks.
    qkvs[0][6, 3] = torch.nan
    qkvs[1][7, 100] = torch.inf
    qkvs[1][9, sizes[0] + 5] = torch.nan
    for rank, (q, k) in enumerate(streams.all_qk(qkvs, weights, (4, 4, 128))):
        assert bool(q[6].isnan().all())
        assert bool(q[7].isnan()[100]) == (rank == 1)
        assert bool((q[7].isnan() | (q[7] == 0)).all())
        assert bool(k[9].isnan().all())
        rows = [row for row in range(12) if row not in (6, 7)]
        assert_rounded(q[rows], before[rank][0][rows], "q beside them")
        rows = [row for row in range(12) if row != 9]
        assert_rounded(k[rows], before[rank][1][rows], "k beside them")


def test_layers_back_to_back_in_graphs(make, generator: torch.Generator) -> None:
    """Each layer's output is the next one's input, with nothing between; replayed often."""
    streams = make(2)
    layers, tokens, width = 6, 24, 1024
    weights = [
        [random_weight(width, torch.bfloat16, generator) for _ in range(2)] for _ in range(layers)
    ]
    static = [random_rows(tokens, width, torch.bfloat16, generator) for _ in range(2)]
    chains: list[list[Tensor]] = [[], []]

    def chain(rank: int) -> None:
        chains[rank] = [static[rank]]
        for layer in range(layers):
            chains[rank].append(
                streams.ops.minimax_allreduce_rms(
                    chains[rank][-1], weights[layer][rank], streams.workspaces[rank], rank, 2, EPS
                )
            )

    torch.cuda.synchronize()
    streams.launch(chain)
    torch.cuda.synchronize()
    graphs = streams.capture(chain)
    for replay in range(40):
        for rank in range(2):
            static[rank].copy_(random_rows(tokens, width, torch.bfloat16, generator))
        torch.cuda.synchronize()
        streams.replay(graphs)
        torch.cuda.synchronize()
        for layer in range(layers):
            inputs = [chains[rank][layer] for rank in range(2)]
            expected = exact(inputs, weights[layer], EPS)
            for rank in range(2):
                assert_rounded(chains[rank][layer + 1], expected[rank], (replay, layer, rank))


def test_capacity(make, generator: torch.Generator) -> None:
    streams = make(2, max_tokens=100)
    capacity = streams.ops._max_tokens(2, streams.comm_size)
    assert capacity >= 100
    qkvs, weights = make_inputs(2, capacity, (64, 8), torch.bfloat16, generator)
    check_qk(streams.all_qk(qkvs, weights), expected_qk(qkvs, weights), "all of it")
    qkvs, weights = make_inputs(2, capacity + 1, (64, 8), torch.bfloat16, generator)
    for q, k in streams.all_qk(qkvs, weights):
        assert bool(q.isnan().all())
        assert bool(k.isnan().all())
    assert streams.guards_are_whole()
    for rank in range(2):
        message = (
            f"call 2 of {capacity + 1} tokens of q and k exceeds the capacity of the workspace, "
            f"{capacity} tokens"
        )
        text = streams.failure(rank)
        assert message in text or "since the call exceeds its capacity" in text
        with pytest.raises(RuntimeError, match="capacity"):
            streams.qk(rank, qkvs[rank][:1], weights[rank])


def test_registered_capacity_raises_at_once(make, generator: torch.Generator) -> None:
    streams = make(2, max_tokens=100, timeout=20.0)
    qkvs, weights = make_inputs(2, 101, (64, 8), torch.bfloat16, generator)
    message = r"a call may have at most max_tokens = 100 tokens in this workspace, got 101"
    with pytest.raises(RuntimeError, match=message):
        streams.qk(0, qkvs[0], weights[0])
    fewer = [x[:100] for x in qkvs]
    check_qk(streams.all_qk(fewer, weights), expected_qk(fewer, weights), "after the refusal")


def test_absent_rank_is_named_in_bounded_time(make, generator: torch.Generator) -> None:
    streams = make(3, timeout=0.5)
    qkvs, weights = make_inputs(3, 20, (64, 8), torch.bfloat16, generator)
    streams.all_qk(qkvs, weights)
    torch.cuda.synchronize()
    begin = time.monotonic()
    results = streams.all_qk(qkvs, weights, ranks=[0, 2])
    torch.cuda.synchronize()
    assert time.monotonic() - begin < 5.0
    for q, k in results:
        assert bool(q.isnan().all())
        assert bool(k.isnan().all())
    for rank in (0, 2):
        text = streams.failure(rank)
        assert "rank 1 did not take part" in text, text
        with pytest.raises(RuntimeError, match=r"rank 1 did not take part.*can only be closed now"):
            streams.qk(rank, qkvs[rank], weights[rank])


def test_disagreement_is_found(make, generator: torch.Generator) -> None:
    for other in ("tokens", "operator"):
        streams = make(2, timeout=5.0)
        qkvs, weights = make_inputs(2, 7, (64, 8), torch.bfloat16, generator)
        results: dict[int, Tensor] = {}

        def call(
            rank: int,
            other: str = other,
            streams: WorkspaceStreams = streams,
            qkvs: Sequence[Tensor] = qkvs,
            weights: Sequence[tuple[Tensor, Tensor]] = weights,
            results: dict[int, Tensor] = results,
        ) -> None:
            if rank == 0 or other == "tokens":
                rows = qkvs[rank] if rank == 0 else qkvs[rank][:5]
                results[rank] = streams.qk(rank, rows, weights[rank])[0]
            else:
                results[rank] = streams.ops.minimax_allreduce_rms(
                    qkvs[rank], qkvs[rank][0].clone(), streams.workspaces[rank], rank, 2, EPS
                )

        streams.launch(call)
        torch.cuda.synchronize()
        texts = [streams.failure(rank) for rank in range(2)]
        assert all(text for text in texts)
        assert any("ranks disagree in call 1" in text for text in texts), texts
        expected = "5 tokens" if other == "tokens" else "7 tokens"
        assert any(expected in text for text in texts), texts
        assert all(bool(result.isnan().all()) for result in results.values())


def test_several_streams_of_a_rank_are_ordered(make, generator: torch.Generator) -> None:
    streams = make(2)
    others = [torch.cuda.Stream() for _ in range(2)]
    qkvs, weights = make_inputs(2, 60, (512, 64), torch.bfloat16, generator)
    expected = expected_qk(qkvs, weights)
    torch.cuda.synchronize()
    for turn in range(20):
        on = streams.streams if turn % 2 else others
        results = []
        for rank in range(2):
            with torch.cuda.stream(on[rank]):
                torch.cuda._sleep(20_000 * (turn % 3))
                results.append(streams.qk(rank, qkvs[rank], weights[rank], (4, 4, 128)))
        torch.cuda.synchronize()
        check_qk(results, expected, turn)
