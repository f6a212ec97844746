"""Times all-reduces among the GPUs of one host and writes the figures as JSON.

bench.py --output DIR starts a process for each GPU, or for --world-size of them, writes
DIR/<gpu>_x<world size>.json and prints a table. Everything that a timed call of custom_ar wrote is
compared with the reference to the bit; a difference ends the run with an error. --quick times fewer
cases.

Peers are timed in the same run and in the same way: NCCL through torch.distributed, and the
one-shot and two-shot kernels of torch's symmetric memory. Ratios are a peer's time over ours, so
above 1 is faster than the peer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import custom_ar
import torch
import torch.distributed as dist
from bench_ranks import (
    CALLS_PER_GRAPH,
    REPETITIONS,
    TINY_COPY_BYTES,
    WARM_UPS,
    Timing,
    World,
    as_bytes,
    describe_environment,
    describe_error,
    describe_package,
    rotation,
    same_bytes,
    start_ranks,
    summarize,
    time_enqueue,
    time_node,
    time_passes,
    torch_dtype,
    write_result,
)
from custom_ar import reference
from custom_ar._library import LIBRARY_PATH
from torch import Tensor

METHOD = (
    "CUDA events around a pass of CUDA-graph replays, 20 calls a graph, over the calls in it: time "
    "per call back to back on one stream, where programmatic launches overlap. A small NCCL "
    "all-reduce before each pass lets the ranks start together, and the device is busy while the "
    "graphs are queued. Eager calls: events around 100 calls from Python, which the host may "
    "limit. Median over the passes on each rank; the slowest rank's is given. The calls rotate "
    "through 20 distinct inputs and outputs, or about as many as fill 192 MiB. Random data. The "
    "outputs of custom_ar are poisoned before and compared with the reference after, to the bit; "
    "those of peers, within their rounding. NCCL and the two-shot symm_mem kernel work in place, "
    "on inputs that are restored before each pass. Link floor: what each of W ranks has to send, "
    "2 (W - 1) / W of the message, over the bandwidth of a copy to a peer. Host time: Python calls "
    "of 4 KiB in chunks of 100 without waiting for the device, the kinds of call taking turns."
)

EAGER_CALLS = 100
CEILING_COPY_BYTES = 256 << 20
CEILING_COPIES = 10
MAX_SIZE = 32 << 20
# Of the largest sum: some roundings of bfloat16.
PEER_TOLERANCE = 2.0**-5

SIZES = tuple(4096 << i for i in range(14))
OTHER_SIZES = (4 << 10, 256 << 10, 8 << 20)
QUICK_SIZES = (4 << 10, 64 << 10, 1 << 20, 8 << 20)

NCCL = "NCCL"
ONE_SHOT = "symm_mem one-shot"
TWO_SHOT = "symm_mem two-shot"
# Peers that no case has, and why.
LEFT_OUT = {"NCCL, symmetric buffers": "torch registers them through private interfaces only"}


@dataclass(frozen=True)
class Case:
    """One kind of call: a message on each rank, and how it is reduced."""

    dtype: str
    bytes: int
    in_place: bool = False
    eager: bool = False

    @property
    def num_elements(self) -> int:
        """Elements of the message on each rank."""
        return self.bytes // torch_dtype(self.dtype).itemsize

    @property
    def calls(self) -> int:
        """Calls of one pass; a multiple of the sets that they rotate through."""
        if self.eager:
            return EAGER_CALLS
        return CALLS_PER_GRAPH * (5 if self.bytes <= 1 << 20 else 1)

    @property
    def sets(self) -> int:
        """Inputs and outputs that the calls of a pass rotate through."""
        return rotation(2 * self.bytes)


# Reduces its first argument into its second, which may be the first.
AllReduce = Callable[[Tensor, Tensor], object]


@dataclass(frozen=True)
class Contender:
    """An all-reduce of set i, and what it reads and writes: ``[sets, num_elements]`` each.

    In place both are the same tensor.
    """

    inputs: Tensor
    outputs: Tensor
    reduce: AllReduce

    @property
    def is_in_place(self) -> bool:
        """Whether a call overwrites its input."""
        return self.outputs is self.inputs

    def call(self, i: int) -> None:
        """Reduce set i."""
        self.reduce(*self.sets[i])

    @cached_property
    def sets(self) -> list[tuple[Tensor, Tensor]]:
        """Input and output of each set: to index a tensor takes the host as long as a call."""
        return list(zip(self.inputs.unbind(), self.outputs.unbind(), strict=True))


def all_cases(quick: bool = False) -> list[Case]:
    """bfloat16 out of place in graphs at every size, then the other kinds of call at fewer."""
    if quick:
        return [Case("bfloat16", size) for size in QUICK_SIZES]
    return [
        *(Case("bfloat16", size) for size in SIZES),
        *(Case(dtype, size) for dtype in ("float16", "float32") for size in OTHER_SIZES),
        *(Case("bfloat16", size, in_place=True) for size in OTHER_SIZES),
        *(Case("bfloat16", size, eager=True) for size in OTHER_SIZES),
    ]


def link_bytes(bytes_per_message: int, world_size: int) -> float:
    """Return what each rank has to send: reduce-scatter and all-gather; of two ranks all."""
    return 2 * (world_size - 1) / world_size * bytes_per_message


def case_record(
    case: Case,
    world_size: int,
    timing: Timing,
    peers: dict[str, Timing | str],
    link_gb_per_s: float,
) -> dict[str, Any]:
    """Return the JSON of one case. A peer that could not be measured is null, with the reason."""
    floor_us = link_bytes(case.bytes, world_size) / link_gb_per_s * 1e-3
    return {
        **asdict(case),
        **asdict(timing),
        "gb_per_s": round(case.bytes / timing.us * 1e-3, 3),
        "floor_us": round(floor_us, 4),
        "floor_ratio": round(floor_us / timing.us, 4),
        "sets": case.sets,
        "calls_per_pass": case.calls,
        "peers": {
            name: None
            if isinstance(peer, str)
            else {**asdict(peer), "ratio": round(peer.us / timing.us, 4)}
            for name, peer in peers.items()
        },
        "peer_notes": {name: peer for name, peer in peers.items() if isinstance(peer, str)},
    }


def ceilings_record(
    alone: Timing, both: Timing, node: Timing, kernels: dict[str, Timing] | None
) -> dict[str, Any]:
    """Return the JSON of what the link and the device can do at best.

    Args:
        alone: a copy to a peer.
        both: the same while as much is copied the other way.
        node: the shortest node of a graph.
        kernels: kernels of all ranks at once that move as much by storing to a peer ("push") or by
            loading from it ("pull"); None without symmetric memory.
    """
    return {
        "peer_copy_bytes": CEILING_COPY_BYTES,
        "peer_copy_us": alone.us,
        "peer_copy_gb_per_s": round(CEILING_COPY_BYTES / alone.us * 1e-3, 2),
        "peer_copy_both_ways_us": both.us,
        "peer_copy_both_ways_gb_per_s": round(CEILING_COPY_BYTES / both.us * 1e-3, 2),
        "node_copy_bytes": 2 * TINY_COPY_BYTES,
        "node_us": node.us,
        "kernels": kernels
        and {
            name: {"us": timing.us, "gb_per_s": round(CEILING_COPY_BYTES / timing.us * 1e-3, 2)}
            for name, timing in kernels.items()
        },
    }


def report_record(
    environment: dict[str, Any],
    ceilings: dict[str, Any],
    cases: list[dict[str, Any]],
    host: dict[str, Timing],
) -> dict[str, Any]:
    """Return the whole JSON."""
    return {
        **describe_package(custom_ar, LIBRARY_PATH),
        **environment,
        "method": METHOD,
        "ceilings": ceilings,
        "left_out": LEFT_OUT,
        "cases": cases,
        "host": {name: asdict(timing) for name, timing in host.items()},
    }


class Workload:
    """Random inputs of one case, and what their sums have to be."""

    def __init__(self, world: World, case: Case) -> None:
        self.world_size = world.size
        self.sets = case.sets
        shape = (self.sets, case.num_elements)
        values = torch.randn(shape, dtype=torch_dtype(case.dtype), device=world.device)
        # Small enough that sums of sums, in place, stay finite.
        self.inputs = values.div_(world.size)
        self.all_inputs = [torch.empty_like(self.inputs) for _ in range(world.size)]
        dist.all_gather(self.all_inputs, self.inputs)

    def expected(self, contender: Contender, case: Case) -> Tensor:
        """Return what a contender's outputs have to be after a pass."""
        total = reference.all_reduce(self.all_inputs)
        if contender.is_in_place:
            # Each call has reduced the last one's result, which is the same on all ranks.
            for _ in range(case.calls // self.sets - 1):
                total = reference.all_reduce([total] * self.world_size)
        return total

    def prepare(self, contender: Contender) -> None:
        """Give a contender its inputs, and poison its outputs with NaN."""
        contender.inputs.copy_(self.inputs)
        if not contender.is_in_place:
            as_bytes(contender.outputs).fill_(0xFF)

    def time(self, world: World, contender: Contender, case: Case) -> list[float]:
        """Return the microseconds of a call on this rank, of each pass."""

        def restore() -> None:
            if contender.is_in_place:
                contender.inputs.copy_(self.inputs)

        self.prepare(contender)
        return time_passes(world, contender.call, self.sets, case.calls, case.eager, restore)


class SymmetricMemory:
    """One buffer of torch's symmetric memory for all cases, or why there is none."""

    def __init__(self, world: World, num_bytes: int) -> None:
        self.group_name = world.group.group_name
        self.buffer: Tensor | None = None
        error = None
        try:
            import torch.distributed._symmetric_memory as symm_mem

            buffer = symm_mem.empty(num_bytes, dtype=torch.uint8, device=world.device)
            self.handle = symm_mem.rendezvous(buffer, world.group)
            self.buffer = buffer
        except Exception as caught:
            error = describe_error(caught)
        self.error = world.first_error(error)

    def peer_buffer(self, num_elements: int) -> Tensor | None:
        """The next rank's buffer as int32, if there is symmetric memory."""
        if self.error is not None:
            return None
        peer = (self.handle.rank + 1) % self.handle.world_size
        buffer: Tensor = self.handle.get_buffer(peer, (num_elements,), torch.int32)
        return buffer

    def contenders(self, workload: Workload, case: Case) -> dict[str, Contender | str]:
        """Return the two kernels, or for each why it is not measured."""
        if self.error is not None or self.buffer is None:
            reason = f"no symmetric memory: {self.error}"
            return {ONE_SHOT: reason, TWO_SHOT: reason}
        ops = torch.ops.symm_mem
        like = workload.inputs
        inputs = self.buffer.view(like.dtype)[: like.numel()].view(like.shape)

        def one_shot(x: Tensor, out: Tensor) -> None:
            ops.one_shot_all_reduce_out(x, "sum", self.group_name, out)

        def two_shot(x: Tensor, out: Tensor) -> None:
            ops.two_shot_all_reduce_(x, "sum", self.group_name)

        return {
            ONE_SHOT: "does not work in place"
            if case.in_place
            else Contender(inputs, torch.empty_like(like), one_shot),
            TWO_SHOT: Contender(inputs, inputs, two_shot),
        }


class RawCommunicator:
    """The raw operators, called as by a caller that has a communicator class of its own."""

    def __init__(self, world: World, max_size: int, timeout: float | None = None) -> None:
        ops = torch.ops.custom_ar
        own, handle = ops.allocate_shared_buffer_and_handle(ops._buffer_size(world.size, max_size))
        handles = world.gather(handle.tolist())
        buffers = [
            own if rank == world.rank else ops.open_mem_handle(torch.tensor(h, dtype=torch.uint8))
            for rank, h in enumerate(handles)
        ]
        rank_data = torch.empty(8 << 20, dtype=torch.uint8, device=world.device)
        self.world = world
        self.buffer: int = own
        self.fa: int = ops.init_custom_ar(buffers, rank_data, world.rank, True)
        if timeout is not None:
            ops._set_timeout(self.fa, timeout)
        world.gather(None)

    def close(self) -> None:
        """Free what was allocated, once no rank writes to it any more."""
        ops = torch.ops.custom_ar
        ops._announce_close(self.fa)
        self.world.gather(None)
        ops.dispose(self.fa)
        self.world.gather(None)
        ops.free_shared_buffer(self.buffer)


def time_ours(
    world: World, workload: Workload, case: Case, communicator: custom_ar.Communicator
) -> Timing:
    """Time custom_ar on a workload, and compare all that it wrote with the reference.

    Raises:
        RuntimeError: the communicator does not take such a tensor or has failed, or a byte differs
            on some rank.
    """
    if not communicator.supports(workload.inputs[0]):
        raise RuntimeError(f"{describe_case(case)}: the communicator does not support this")
    outputs = torch.empty_like(workload.inputs)
    inputs = outputs if case.in_place else workload.inputs
    contender = Contender(inputs, outputs, lambda x, out: communicator.all_reduce(x, out=out))
    us = workload.time(world, contender, case)
    communicator.check()
    is_right = same_bytes(outputs, workload.expected(contender, case))
    wrong = [rank for rank, right in enumerate(world.gather(is_right)) if not right]
    if wrong:
        raise RuntimeError(f"{describe_case(case)}: differs from the reference on ranks {wrong}")
    return world.slowest(us)


def time_peer(
    world: World, workload: Workload, case: Case, contender: Contender | str
) -> Timing | str:
    """Time a peer on a workload and check its result, or say why it was not measured."""
    if isinstance(contender, str):
        return contender
    error = None
    try:
        workload.prepare(contender)
        contender.call(0)
        torch.cuda.synchronize()
    except Exception as caught:
        error = describe_error(caught)
    if reason := world.first_error(error):
        return reason
    us = workload.time(world, contender, case)
    expected = workload.expected(contender, case).float()
    difference = (contender.outputs.float() - expected).abs()
    # A NaN is not less than anything.
    if not bool((difference <= PEER_TOLERANCE * expected.abs().max()).all()):
        error = f"off by {difference.max().item():.3g} from the reference"
    return world.first_error(error) or world.slowest(us)


def time_peer_copy(both_ways: bool) -> Timing:
    """Time copies from device 0 to device 1, alone or while as much is copied the other way.

    By one process, while the others wait.
    """
    devices = [torch.device("cuda", i) for i in range(2)]
    sources = [
        torch.empty(CEILING_COPY_BYTES // 4, dtype=torch.int32, device=device).random_()
        for device in devices
    ]
    targets = [torch.empty_like(sources[i], device=devices[1 - i]) for i in range(2)]
    # A copy is ordered with the current streams of both devices: each way has streams of its own.
    streams = [[torch.cuda.Stream(device) for device in devices] for _ in range(2)]

    def copy(way: int) -> None:
        with torch.cuda.stream(streams[way][0]), torch.cuda.stream(streams[way][1]):
            targets[way].copy_(sources[way], non_blocking=True)

    for device in devices:
        torch.cuda.synchronize(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for repetition in range(-WARM_UPS, REPETITIONS):
        # One copy the other way before and one after, so that all timed ones have company.
        if both_ways:
            copy(1)
        begin.record(streams[0][0])
        for _ in range(CEILING_COPIES):
            copy(0)
            if both_ways:
                copy(1)
        end.record(streams[0][0])
        if both_ways:
            copy(1)
        for device in devices:
            torch.cuda.synchronize(device)
        if repetition >= 0:
            times.append(begin.elapsed_time(end) * 1000 / CEILING_COPIES)
    for way in range(2 if both_ways else 1):
        if not torch.equal(sources[way].cpu(), targets[way].cpu()):
            raise RuntimeError(f"a copy from device {way} to device {1 - way} differs")
    return summarize(times)


def time_kernels(world: World, symmetric: SymmetricMemory) -> dict[str, Timing] | None:
    """Time kernels that reach into the next rank's memory, on all ranks at once."""
    peer = symmetric.peer_buffer(CEILING_COPY_BYTES // 4)
    if peer is None:
        return None
    own = torch.empty_like(peer).random_()
    kernels: dict[str, Callable[[int], object]] = {
        "push": lambda _: torch.bitwise_not(own, out=peer),
        "pull": lambda _: torch.bitwise_not(peer, out=own),
    }
    return {
        name: world.slowest(time_passes(world, kernel, 1, CALLS_PER_GRAPH, repetitions=5))
        for name, kernel in kernels.items()
    }


def measure_ceilings(world: World, symmetric: SymmetricMemory) -> dict[str, Any]:
    """Measure what the link and the device can do, and return the JSON."""
    copies = [time_peer_copy(both_ways) for both_ways in (False, True)] if world.rank == 0 else None
    torch.cuda.empty_cache()
    alone, both = world.gather(copies)[0]
    kernels = time_kernels(world, symmetric)
    return ceilings_record(alone, both, time_node(world), kernels)


def time_host(world: World, communicator: custom_ar.Communicator) -> dict[str, Timing]:
    """Time the host's side of eager calls of 4 KiB in bfloat16, and of one of torch's own."""
    case = Case("bfloat16", 4 << 10)
    workload = Workload(world, case)
    x = workload.inputs[0].clone()
    out, raw_out = torch.empty_like(x), torch.empty_like(x)
    for tensor in (out, raw_out):
        as_bytes(tensor).fill_(0xFF)
    # Its values do not matter, and zeros stay finite.
    in_place = torch.zeros_like(x)
    raw = RawCommunicator(world, MAX_SIZE)
    calls: dict[str, Callable[[], object]] = {
        "Communicator.all_reduce(x)": partial(communicator.all_reduce, x),
        "Communicator.all_reduce(x, out=out)": partial(communicator.all_reduce, x, out=out),
        "torch.ops.custom_ar.all_reduce": partial(
            torch.ops.custom_ar.all_reduce, raw.fa, x, raw_out, 0, 0
        ),
        "dist.all_reduce(x), NCCL": partial(dist.all_reduce, in_place),
        "torch.add(a, b, out=c)": partial(torch.add, x, x, out=torch.empty_like(x)),
    }
    times = time_enqueue(calls)
    expected = reference.all_reduce(workload.all_inputs)[0]
    if not same_bytes(out, expected) or not same_bytes(raw_out, expected):
        raise RuntimeError("host time: a result differs from the reference")
    timings = {name: world.slowest(us) for name, us in times.items()}
    raw.close()
    return timings


def describe_bytes(count: int) -> str:
    """`256 KiB`."""
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"


def describe_case(case: Case) -> str:
    """One line's worth of what a case is."""
    flags = f"{', in place' if case.in_place else ''}{', eager' if case.eager else ''}"
    return f"{case.dtype}{flags}, {describe_bytes(case.bytes)}"


def describe_record(record: dict[str, Any]) -> str:
    """One line's worth of how fast a case is."""
    line = f"{record['us']:8.2f} us ({record['us_min']:.2f} to {record['us_max']:.2f})"
    line += f", link floor {record['floor_us']:.2f} us ({record['floor_ratio']:.2f})"
    for name, peer in record["peers"].items():
        line += f"; {name} "
        line += f"{peer['us']:.2f} us ({peer['ratio']:.2f}x)" if peer else "none"
    return line


def measure_case(
    world: World, case: Case, communicator: custom_ar.Communicator, symmetric: SymmetricMemory
) -> tuple[Timing, dict[str, Timing | str]]:
    """Time one case and its peers."""
    workload = Workload(world, case)
    timing = time_ours(world, workload, case, communicator)
    copy = torch.empty_like(workload.inputs)
    contenders: dict[str, Contender | str] = {
        NCCL: Contender(copy, copy, lambda x, out: dist.all_reduce(out)),
        **symmetric.contenders(workload, case),
    }
    peers = {
        name: time_peer(world, workload, case, contender) for name, contender in contenders.items()
    }
    return timing, peers


def measure(world: World, quick: bool) -> dict[str, Any]:
    """Measure everything and return the JSON, the same on every rank."""
    say = partial(print, flush=True) if world.rank == 0 else lambda *_: None
    environment = describe_environment(world)
    cases = all_cases(quick)
    torch.manual_seed(world.rank)
    most_bytes = max(CEILING_COPY_BYTES, *(c.sets * c.bytes for c in cases))
    symmetric = SymmetricMemory(world, most_bytes)
    ceilings = measure_ceilings(world, symmetric)
    say(
        f"{world.size} x {environment['gpu']}: a copy to a peer "
        f"{ceilings['peer_copy_gb_per_s']:.0f} GB/s, "
        f"{ceilings['peer_copy_both_ways_gb_per_s']:.0f} GB/s each way at once, "
        f"node {ceilings['node_us']:.2f} us"
    )
    with custom_ar.Communicator(world.group, world.device, MAX_SIZE) as communicator:
        if communicator.fallback_reason is not None:
            raise RuntimeError(f"calls would go to NCCL: {communicator.fallback_reason}")
        host = time_host(world, communicator)
        for name, timing in host.items():
            say(f"host time of {name}: {timing.us:.2f} us")
        records = []
        for case in cases:
            timing, peers = measure_case(world, case, communicator, symmetric)
            torch.cuda.empty_cache()
            link = ceilings["peer_copy_gb_per_s"]
            records.append(case_record(case, world.size, timing, peers, link))
            say(f"{describe_case(case):28}", describe_record(records[-1]))
            for name, reason in records[-1]["peer_notes"].items():
                say(f"    {name}: {reason}")
    return report_record(environment, ceilings, records, host)


def run_rank(rank: int, world_size: int, port: int, output: Path, quick: bool) -> None:
    """Measure as one of the ranks; the first writes the JSON."""
    begin = time.monotonic()
    world = World(rank, world_size, port)
    result = measure(world, quick)
    if rank == 0:
        write_result(output, result, time.monotonic() - begin)
    dist.destroy_process_group()


def main() -> int:
    """Measure, and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--world-size", type=int, metavar="N", help="how many GPUs; else all")
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    arguments = parser.parse_args()
    return start_ranks(run_rank, arguments.world_size, arguments.output, arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
