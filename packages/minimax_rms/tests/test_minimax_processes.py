"""A process for each rank, over gloo, on the GPUs there are: IPC, and ranks that fail.

Processes that share a GPU take turns on it, so a call takes milliseconds. What each rank does is in
minimax_gpu_workers.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import minimax_gpu_workers as workers
import minimax_smoke as smoke
import minimax_workers
import peer_group_workers as shared
import pytest
import torch
from minimax_arithmetic import DTYPES
from rank_processes import Run, check_survivors, cuda_devices, runner, spawn_ranks
from torch_defaults import GPU_DEFAULTS, check_owner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def run_pair() -> Iterator[Run]:
    yield from runner(2, cuda_devices())


@pytest.mark.parametrize("name", GPU_DEFAULTS)
def test_defaults_of_the_process(run_pair: Run, name: str) -> None:
    run_pair(check_owner, name, smoke.make, smoke.check)


def test_two_ranks(run_pair: Run, seed: int) -> None:
    run_pair(workers.eager, seed, [0, 1, 5, 200, 1024, 3])


def test_graphs(run_pair: Run, seed: int) -> None:
    run_pair(workers.graphs, seed, 4)


def test_existing_caller(run_pair: Run, seed: int) -> None:
    run_pair(workers.existing_caller, seed)


def test_late_close(run_pair: Run) -> None:
    run_pair(workers.late_close)


def test_failure_at_the_end(run_pair: Run) -> None:
    present, absent = run_pair(workers.failure_at_the_end, 1, 2.0)
    [(level, text)] = present
    assert level == "WARNING"
    assert re.match(
        r"minimax_rms: rank 0: close: minimax_rms::check: rank 1 did not take part in call \d+",
        text,
    )
    assert absent == []


def test_out_of_memory(run_pair: Run) -> None:
    run_pair(workers.out_of_memory)


def test_compile(run_pair: Run, seed: int) -> None:
    run_pair(workers.compiled, seed)


GRAPHS = {"mode": "reduce-overhead"}


@pytest.mark.parametrize("how", [{}, {"dynamic": True}, GRAPHS], ids=str)
def test_compiled_calls_keep_their_order(run_pair: Run, how: dict[str, Any]) -> None:
    """Of the rank that compiles; and its calls can be in CUDA graphs."""
    # So many of each size, since graphs replay from the third on.
    sizes = (3, 3, 3, 3, 5, 5, 5, 5)
    _, compiled = run_pair(shared.compiled_order, minimax_workers.Kind, how, sizes)
    if how == GRAPHS:
        assert compiled["skipped"] == 0
        assert compiled["graphs"] >= 3


@pytest.mark.parametrize("how", [None, {}], ids=str)
def test_no_gradient_is_recorded(run_pair: Run, how: dict[str, Any] | None) -> None:
    run_pair(minimax_workers.no_gradients, how)


def test_same_as_fallback(run_pair: Run, seed: int) -> None:
    run_pair(workers.same_as_fallback, seed)


def test_late_rank(run_pair: Run, seed: int) -> None:
    for late in range(2):
        waited = run_pair(workers.late_rank, seed, late, 1.5)
        assert 1 < waited[1 - late] < 5
        assert waited[late] < 1.5


def test_absent_rank(run_pair: Run, seed: int) -> None:
    present, absent = run_pair(workers.absent_rank, seed, 1, 2.0)
    assert 1.9 < present["waited"] < 4
    for kind, text in present["errors"]:
        assert kind == "RuntimeError"
        assert "rank 1 did not take part in call " in text
        assert "within 2 s (this is rank 0 of 2)" in text
    assert present["missing"] == [1]
    assert absent["waited"] < 1.5
    for kind, text in absent["errors"]:
        assert kind == "RuntimeError"
        assert "rank 0 gave up in call " in text


def test_opening_and_closing_leaks_nothing(run_pair: Run) -> None:
    for left in run_pair(workers.open_and_close, 100):
        assert left["device bytes"] <= 4 << 20
        assert left["files"] <= 4
        assert left["mappings"] < 50


@pytest.mark.parametrize("liar", [0, 1])
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (
            "lost",
            r"rank \d could not verify its peers' writes: .*rank \d (gave up|did not take part) in",
        ),
        (
            "wrong",
            r"rank \d could not verify its peers' writes: sums of what the peers wrote are wrong",
        ),
    ],
    ids=["lost", "wrong"],
)
def test_bad_writes(run_pair: Run, seed: int, how: str, reason: str, liar: int) -> None:
    """Found when the workspace is made, on the rank that sees them and on the one that does not.

    Its calls go through the process group, and the next workspace works.
    """
    results = run_pair(workers.bad_writes, seed, liar, how)
    assert results[0] == results[1]
    for found, next_reason in results:
        assert re.match(reason, found), found
        assert next_reason is None


@pytest.mark.parametrize("world_size", [3, 16])
def test_more_ranks(seed: int, world_size: int) -> None:
    """Few calls: each takes as many turns as there are processes on a GPU."""
    tokens = [1, 7, 33] if world_size < 8 else [5]
    dtypes = DTYPES if world_size < 8 else [torch.bfloat16]
    spawn_ranks(
        *(world_size, workers.eager, seed, tokens, workers.MAX_TOKENS, dtypes),
        devices=cuda_devices(),
    )


def test_killed_rank(seed: int) -> None:
    """Each survivor names it in time, and they go on without it."""
    check_survivors(workers.survive_a_kill, seed)
