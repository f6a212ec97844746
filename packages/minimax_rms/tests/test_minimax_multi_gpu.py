"""A process and a GPU for each rank. What each rank does is in minimax_gpu_workers.py."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import minimax_gpu_workers as workers
import minimax_rms
import pytest
import torch
from gpu_machine import environment_with
from rank_processes import RankProcesses, cuda_devices, spawn_ranks

EXAMPLE = Path(__file__).parents[1] / "examples" / "two_processes.py"
MAX_WORLD_SIZE = 16

pytestmark = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

WORLD_SIZES = range(2, max(min(torch.cuda.device_count(), MAX_WORLD_SIZE), 2) + 1)


@pytest.fixture(scope="module", params=WORLD_SIZES, ids=lambda n: f"{n}_gpus")
def processes(request: pytest.FixtureRequest) -> Iterator[RankProcesses]:
    """Ranks whose group takes CPU tensors to gloo and CUDA tensors to NCCL."""
    # Streams that wait for peers have hardware queues of their own.
    env = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    backend = "cpu:gloo,cuda:nccl"
    with RankProcesses(request.param, cuda_devices(), env=env, backend=backend) as processes:
        yield processes


def run_all(processes: RankProcesses, *args: object) -> None:
    if processes.is_broken:
        pytest.fail("an earlier test ended these processes")
    processes.run(*args)  # type: ignore[arg-type]


def test_sizes(processes: RankProcesses, seed: int) -> None:
    run_all(processes, workers.sweep, seed, 8192)


def test_alternating_devices(processes: RankProcesses, seed: int) -> None:
    run_all(processes, workers.alternating_devices, seed)


def test_graphs(processes: RankProcesses, seed: int) -> None:
    run_all(processes, workers.graphs, seed, 4)


def test_two_workspaces(processes: RankProcesses, seed: int) -> None:
    run_all(processes, workers.two_workspaces, seed)


def test_large_calls_on_two_streams(processes: RankProcesses, seed: int) -> None:
    """Of two workspaces, whose kernels each fill the GPU."""
    calls = functools.partial(workers.calls_on_two_streams, opposite=False, rounds=4)
    run_all(processes, calls, seed, 16384)


def test_first_calls_in_opposite_orders(seed: int) -> None:
    """Small, of two workspaces, in new processes that have loaded no kernel yet."""
    calls = functools.partial(workers.calls_on_two_streams, opposite=True, rounds=1)
    spawn_ranks(2, calls, seed, 20, devices=cuda_devices())


def test_same_as_fallback(processes: RankProcesses, seed: int) -> None:
    run_all(processes, workers.same_as_fallback, seed)


def test_example() -> None:
    run = subprocess.run(
        [sys.executable, EXAMPLE],
        env=environment_with(minimax_rms),
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    for rank in range(2):
        line = next(line for line in run.stdout.splitlines() if f"rank {rank} on cuda:" in line)
        assert "(by the kernels)" in line
