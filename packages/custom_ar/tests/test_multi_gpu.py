"""A process and a GPU for each rank. What each rank does is in all_reduce_workers.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import all_reduce_workers as workers
import custom_ar
import pytest
import torch
from gpu_machine import environment_with
from rank_processes import RankProcesses, cuda_devices, spawn_ranks

EXAMPLE = Path(__file__).parents[1] / "examples" / "two_processes.py"
MAX_WORLD_SIZE = 8

pytestmark = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

WORLD_SIZES = range(2, max(min(torch.cuda.device_count(), MAX_WORLD_SIZE), 2) + 1)


@pytest.fixture(scope="module", params=WORLD_SIZES, ids=lambda n: f"{n}_gpus")
def processes(request: pytest.FixtureRequest) -> Iterator[RankProcesses]:
    """Ranks whose group takes CPU tensors to gloo and CUDA tensors to NCCL."""
    devices = cuda_devices()
    with RankProcesses(request.param, devices, backend="cpu:gloo,cuda:nccl") as processes:
        yield processes


def run_all(processes: RankProcesses, *args: object) -> None:
    if processes.is_broken:
        pytest.fail("an earlier test ended these processes")
    processes.run(*args)  # type: ignore[arg-type]


def test_sizes(processes: RankProcesses, seed: int) -> None:
    run_all(processes, workers.sweep, seed, 32 << 20)


def test_alternating_devices(processes: RankProcesses, seed: int) -> None:
    run_all(processes, workers.alternating_devices, seed)


def test_graphs(processes: RankProcesses, seed: int) -> None:
    run_all(processes, workers.graphs, seed, 4)


def test_large_calls_on_two_streams(processes: RankProcesses, seed: int) -> None:
    run_all(processes, workers.large_calls_on_two_streams, seed)


def test_first_calls_in_opposite_orders(seed: int) -> None:
    """In new processes, that have loaded no kernel yet."""
    spawn_ranks(2, workers.first_calls_in_opposite_orders, seed, devices=cuda_devices())


def test_above_max_size(processes: RankProcesses) -> None:
    run_all(processes, workers.backend_fallback)


def test_example() -> None:
    run = subprocess.run(
        [sys.executable, EXAMPLE],
        env=environment_with(custom_ar),
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    for rank in range(2):
        assert f"rank {rank} on cuda:{rank}: 3 (by the kernels)" in run.stdout
