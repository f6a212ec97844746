"""A process for each rank, over gloo, on the GPUs there are: IPC, and ranks that fail.

Processes that share a GPU take turns on it, so a call takes milliseconds. What each rank does is in
all_reduce_workers.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import all_reduce_workers as workers
import communicator_workers
import custom_ar_smoke as smoke
import peer_group_workers as shared
import pytest
import torch
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
    run_pair(workers.eager, seed, [1, 8, 4095, 1 << 18], 1 << 20)


def test_graphs(run_pair: Run, seed: int) -> None:
    run_pair(workers.graphs, seed, 4)


def test_existing_caller(run_pair: Run, seed: int) -> None:
    run_pair(workers.existing_caller, seed)


def test_buffers_of_different_sizes(run_pair: Run, seed: int) -> None:
    run_pair(workers.buffers_of_different_sizes, seed)


def test_late_close(run_pair: Run) -> None:
    run_pair(workers.late_close)


def test_closing_in_any_order(run_pair: Run) -> None:
    for seconds in run_pair(workers.close_in_any_order):
        assert seconds < 2


def test_failure_at_the_end(run_pair: Run) -> None:
    present, absent = run_pair(workers.failure_at_the_end, 1, 2.0)
    [(level, text)] = present
    assert level == "WARNING"
    assert re.match(
        r"custom_ar: rank 0: close: custom_ar::all_reduce: rank 1 did not take part in call \d+",
        text,
    )
    assert absent == []


def test_out_of_memory(run_pair: Run) -> None:
    run_pair(workers.out_of_memory)


def test_operator_checks(run_pair: Run, seed: int) -> None:
    run_pair(workers.operator_checks, seed)


def test_compile(run_pair: Run, seed: int) -> None:
    run_pair(workers.compiled, seed)


GRAPHS = {"mode": "reduce-overhead"}


@pytest.mark.parametrize("how", [{}, {"dynamic": True}, GRAPHS], ids=str)
def test_compiled_calls_keep_their_order(run_pair: Run, how: dict[str, Any]) -> None:
    """Of the rank that compiles; and its calls can be in CUDA graphs."""
    # So many of each size, since graphs replay from the third on.
    sizes = (3, 3, 3, 3, 5, 5, 5, 5)
    _, compiled = run_pair(shared.compiled_order, communicator_workers.Kind, how, sizes)
    if how == GRAPHS:
        assert compiled["skipped"] == 0
        assert compiled["graphs"] >= 3


@pytest.mark.parametrize("how", [None, {}], ids=str)
def test_no_gradient_is_recorded(run_pair: Run, how: dict[str, Any] | None) -> None:
    run_pair(communicator_workers.no_gradients, how)


def test_absent_rank(run_pair: Run, seed: int) -> None:
    present, absent = run_pair(workers.absent_rank, seed, 1, 2.0)
    assert 1.9 < present["waited"] < 4
    assert len(present["messages"]) == 2
    for message in present["messages"]:
        assert message.startswith("custom_ar::all_reduce: rank 1 did not take part in call ")
        assert "within 2 s (this is rank 0 of 2)" in message
    assert present["missing"] == [1]
    assert absent["waited"] < 1.5
    assert len(absent["messages"]) == 2
    for message in absent["messages"]:
        assert message.startswith("custom_ar::all_reduce: rank 0 gave up in call ")


def test_opening_and_closing_leaks_nothing(run_pair: Run) -> None:
    for left in run_pair(workers.open_and_close, 1000, timeout=240):
        assert left["device bytes"] <= 4 << 20
        assert left["files"] <= 4
        assert left["mappings"] < 100


def test_lost_writes(run_pair: Run) -> None:
    """Found when the communicator is made, on the rank that sees them and on the one that does not.

    Its all-reduces are the process group's, and the next communicator works.
    """
    for reason, next_reason in run_pair(workers.lost_writes, 1):
        assert reason
        assert next_reason is None


@pytest.mark.parametrize("world_size", [3, 5, 8])
def test_more_ranks(seed: int, world_size: int) -> None:
    spawn_ranks(
        *(world_size, workers.eager, seed, [1, 1001, 30_000], 1 << 17), devices=cuda_devices()
    )


def test_expandable_segments(seed: int) -> None:
    env = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    spawn_ranks(2, workers.expandable_segments, seed, devices=cuda_devices(), env=env)


def test_killed_rank(seed: int) -> None:
    """Each survivor names it in time, and they go on without it."""
    check_survivors(workers.survive_a_kill, seed)
