"""What benchmarks among the GPUs of one host have in common: a process for each, and how to time.

The packages' benchmarks/bench.py and tune.py import this. It needs torch with CUDA and NCCL.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import platform
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from bench_timing import Timing, summarize
from gpu_machine import driver_version, host_cpu
from torch import Tensor
from torch.multiprocessing.spawn import spawn

CALLS_PER_GRAPH = 20
ROTATION_BYTES = 192 << 20
REPETITIONS = 25
WARM_UPS = 3
# Long enough for the host to queue a barrier and a pass, about half a millisecond.
BUSY_CYCLES = 1_000_000
TINY_COPY_BYTES = 4096


def rotation(bytes_per_set: int) -> int:
    """Return how many sets of inputs and outputs a pass has: a divisor of its calls, 2 at least."""
    wanted = ROTATION_BYTES / bytes_per_set
    return next((sets for sets in (2, 4, 5, 10) if sets >= wanted), CALLS_PER_GRAPH)


class World:
    """This process among the ranks: its device, and how it meets the others."""

    def __init__(self, rank: int, size: int, port: int) -> None:
        self.rank = rank
        self.size = size
        self.device = torch.device("cuda", rank)
        torch.cuda.set_device(self.device)
        # One for all calls: those of several streams would be ordered by events from then on.
        self.stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=size,
        )
        group = dist.group.WORLD
        assert group is not None
        self.group: dist.ProcessGroup = group
        self._token = torch.zeros(1, device=self.device)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def slowest(self, us: list[float]) -> Timing:
        """Return the figures of the rank with the greatest median."""
        return summarize(max(self.gather(us), key=statistics.median))

    def align(self, stay_busy: bool) -> None:
        """Queue what lets all devices go on at the same time, and maybe keeps them busy before."""
        if stay_busy:
            torch.cuda._sleep(BUSY_CYCLES)
        dist.all_reduce(self._token)

    def first_error(self, error: str | None) -> str | None:
        """Return the error of the lowest rank that has one: all ranks then do the same."""
        return next((e for e in self.gather(error) if e is not None), None)


def time_passes(
    world: World,
    call: Callable[[int], object],
    sets: int,
    calls: int,
    eager: bool = False,
    restore: Callable[[], object] = lambda: None,
    repetitions: int = REPETITIONS,
) -> list[float]:
    """Return the microseconds of a call on this rank, of each pass of `calls`.

    In CUDA graphs of 20 calls, or eager. `call(i)` gets i modulo `sets`; `restore` runs before each
    pass. All ranks have to call this alike.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Kernels are loaded at their first launch, which a capture does not allow.
    call(0)
    world.stream.synchronize()
    graph = None
    if not eager:
        graph = torch.cuda.CUDAGraph()
        # NCCL has threads that ask for events while this one captures.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for i in range(CALLS_PER_GRAPH):
                call(i % sets)
        finally:
            graph.capture_end()
    times = []
    for repetition in range(-WARM_UPS, repetitions):
        restore()
        world.align(stay_busy=not eager)
        begin.record(world.stream)
        if graph is None:
            for i in range(calls):
                call(i % sets)
        else:
            for _ in range(calls // CALLS_PER_GRAPH):
                graph.replay()
        end.record(world.stream)
        world.stream.synchronize()
        if repetition >= 0:
            times.append(begin.elapsed_time(end) * 1000 / calls)
    return times


def time_copy(world: World, num_bytes: int, sets: int, calls: int) -> Timing:
    """Time copies of `num_bytes` on each device, in graphs: by the driver or by a kernel.

    The faster of ``copy_``, which in a graph is a memory copy of the driver's choice, and of an
    elementwise kernel.
    """
    source = torch.empty((sets, num_bytes // 4), dtype=torch.int32, device=world.device).random_()
    target = torch.empty_like(source)
    copies: list[Callable[[int], object]] = [
        lambda i: target[i].copy_(source[i]),
        lambda i: torch.bitwise_or(source[i], 0, out=target[i]),
    ]
    timings = [world.slowest(time_passes(world, copy, sets, calls)) for copy in copies]
    return min(timings, key=lambda timing: timing.us)


def time_node(world: World) -> Timing:
    """Time the shortest node of a graph: a copy, by the driver or by a kernel."""
    return time_copy(world, TINY_COPY_BYTES, CALLS_PER_GRAPH, 5 * CALLS_PER_GRAPH)


def time_enqueue(
    calls: dict[str, Callable[[], object]], chunks: int = 50, calls_per_chunk: int = 100
) -> dict[str, list[float]]:
    """Time the host's side of calls, in chunks that the launch queue has room for.

    The calls take turns, so that a host that gets faster or slower does so for all of them.

    Returns:
        Microseconds of a call, of each chunk.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.disable()
    try:
        for chunk in range(-chunks // 2, chunks):
            for name, call in calls.items():
                torch.cuda.synchronize()
                begin = time.perf_counter_ns()
                for _ in range(calls_per_chunk):
                    call()
                if chunk >= 0:
                    times[name].append((time.perf_counter_ns() - begin) / calls_per_chunk * 1e-3)
    finally:
        gc.enable()
    torch.cuda.synchronize()
    return times


def torch_dtype(name: str) -> torch.dtype:
    """`bfloat16` as torch's dtype."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def as_bytes(tensor: Tensor) -> Tensor:
    """View a dense tensor as bytes."""
    return tensor.view(torch.uint8)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Compare two dense tensors byte by byte, whatever NaNs they hold."""
    return torch.equal(as_bytes(a), as_bytes(b))


def describe_error(error: Exception) -> str:
    """Return the kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def describe_package(package: ModuleType, library: Path) -> dict[str, Any]:
    """What was measured, and when."""
    return {
        "package": package.__name__,
        "version": package.__version__,
        "library_sha256": hashlib.sha256(library.read_bytes()).hexdigest(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def describe_environment(world: World) -> dict[str, Any]:
    """What the figures were measured on."""
    properties = torch.cuda.get_device_properties(world.device)
    return {
        "gpu": properties.name,
        "world_size": world.size,
        "multiprocessors": properties.multi_processor_count,
        "driver": driver_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        # 0 where the user or the machine keeps NCCL from NVLink multicast.
        "nccl_nvls_enable": os.environ.get("NCCL_NVLS_ENABLE"),
        "python": platform.python_version(),
        "cpu": host_cpu(),
    }


def result_name(gpu: str, world_size: int) -> str:
    """Name of the result's file: two of `NVIDIA H200` give `nvidia_h200_x2.json`."""
    return f"{gpu.lower().replace(' ', '_')}_x{world_size}.json"


def write_result(output: Path, result: dict[str, Any], seconds: float) -> None:
    """Write the JSON of a run of `seconds` into the directory `output`, and say so."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / result_name(result["gpu"], result["world_size"])
    path.write_text(json.dumps(result, indent=1) + "\n")
    peak = torch.cuda.max_memory_allocated() / 1e9
    print(f"{path}: {seconds:.0f} s, {peak:.1f} GB of device memory at most")


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_ranks(
    run: Callable[..., None], world_size: int | None, *arguments: object, most: int = 8
) -> int:
    """Call ``run(rank, world_size, port, *arguments)`` in a process for each GPU.

    Args:
        world_size: how many processes; None for all GPUs.
        most: the most ranks that the package serves.

    Returns:
        An exit status: 1 when there are too few GPUs.
    """
    available = torch.cuda.device_count()
    size = available if world_size is None else world_size
    if not 2 <= size <= min(available, most):
        print(
            f"{Path(sys.argv[0]).name} needs 2 to {most} CUDA devices; asked for {size} of "
            f"{available}",
            file=sys.stderr,
        )
        return 1
    spawn(run, args=(size, free_port(), *arguments), nprocs=size)
    return 0
