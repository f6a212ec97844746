"""Times RMSNorms across the GPUs of one host and writes the figures as JSON.

bench.py --output DIR starts a process for each GPU, or for --gpus of them, writes
DIR/<gpu>_x<GPUs>.json and prints a table. Everything that a timed call of minimax_rms wrote is
compared with a reference in float64; a difference ends the run with an error. --quick times fewer
cases; --without-compiled leaves out the peer built by torch.compile, which takes most of the time.

The peer is timed in the same run and in the same way: PyTorch's operators around an all-reduce by
NCCL, as they are and under torch.compile. Ratios are a peer's time over ours, so above 1 is faster
than the peer.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import minimax_rms
import torch
import torch.distributed as dist
from bench_ranks import (
    CALLS_PER_GRAPH,
    REPETITIONS,
    TINY_COPY_BYTES,
    Timing,
    World,
    as_bytes,
    describe_environment,
    describe_error,
    describe_package,
    rotation,
    start_ranks,
    time_copy,
    time_enqueue,
    time_node,
    time_passes,
    torch_dtype,
    write_result,
)
from minimax_rms._library import LIBRARY_PATH
from torch import Tensor

METHOD = (
    "CUDA events around a pass of CUDA-graph replays, 20 calls a graph, over the calls in it: time "
    "per call back to back on one stream, where programmatic launches overlap. A small NCCL "
    "all-reduce before each pass lets the ranks start together, and the device is busy while the "
    "graphs are queued. Median over the passes on each rank; the slowest rank's is given. The "
    "calls rotate through 20 distinct inputs and outputs, or about as many as fill 192 MiB: up to "
    "some hundred tokens all of them stay in the L2, but no call finds there what the last one "
    "used. Random data; rows of q and k are views of rows that hold v too. Outputs are poisoned "
    "before and compared after with a reference in float64, within one rounding. NCCL + PyTorch: "
    "mean squares of q and of k in fp32, stacked, one all-reduce, rsqrt and products in fp32; "
    "compiled: the same with what is before and what is behind the all-reduce under torch.compile. "
    "HBM floor: q and k read and written once, over the bandwidth of a large copy on the device, "
    "reads and writes counted. Copy: as many bytes copied on the device, without an exchange, in "
    "the same kind of graph. Host time: Python calls with one token in chunks of 100 without "
    "waiting for the device, the kinds of call taking turns."
)

QK = "minimax_allreduce_rms_qk"
SINGLE = "minimax_allreduce_rms"
# MiniMax-M2, elements over all ranks: 48 heads of q and 8 of k, of 128 each.
Q_WIDTH = 6144
KV_WIDTH = 1024
EPS = 1e-6

CEILING_COPY_BYTES = 1 << 30
MAX_TOKENS = 8192
# What sums and products in float32 may add to the rounding of the result.
SLACK = 2.0**-18
# No more cases are compiled once this much time has gone to it.
COMPILE_SECONDS = 30

TOKENS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
OTHER_TOKENS = (128, 2048)
SINGLE_TOKENS = (1, 128, 2048)
QUICK_TOKENS = (1, 128, 2048)
# Not one token: what Inductor of torch 2.11 generates for it, Triton may not compile.
COMPILED_TOKENS = (16, 128, 512, 2048, 8192)

NCCL = "NCCL + PyTorch"
COMPILED = "NCCL + PyTorch, compiled"
# Peers that no case has, and why.
LEFT_OUT = {"vLLM's kernels": "not installed where this ran"}


def share(width: int, ranks: int) -> int:
    """Return a rank's share of a width in elements, rounded down to what the kernels take."""
    return width // ranks // 8 * 8


@dataclass(frozen=True)
class Case:
    """One kind of call, on rows as each of `ranks` ranks has them."""

    op: str
    tokens: int
    dtype: str
    ranks: int

    @property
    def q_size(self) -> int:
        """Elements of q in a row, or of the row if that is all."""
        return share(Q_WIDTH, self.ranks)

    @property
    def kv_size(self) -> int:
        """Elements of k in a row, and of v."""
        return share(KV_WIDTH, self.ranks)

    @property
    def widths(self) -> tuple[int, ...]:
        """Elements of what is normalized in a row, one after the other."""
        return (self.q_size, self.kv_size) if self.op == QK else (self.q_size,)

    @property
    def row_width(self) -> int:
        """Elements of a row of the input, whose end may not be read."""
        return self.q_size + 2 * self.kv_size if self.op == QK else self.q_size

    @property
    def bytes(self) -> int:
        """Bytes that a call has to move on each rank: what is normalized, in and out."""
        return 2 * self.tokens * sum(self.widths) * torch_dtype(self.dtype).itemsize

    @property
    def sets(self) -> int:
        """Inputs and outputs that the calls of a pass rotate through."""
        return rotation(self.bytes)

    @property
    def calls(self) -> int:
        """Calls of one pass; a multiple of the sets that they rotate through."""
        return CALLS_PER_GRAPH * (5 if self.bytes <= 4 << 20 else 1)


# Takes an input and weights, and returns as many outputs as there are weights.
Norm = Callable[..., tuple[Tensor, ...]]


def all_cases(ranks: int, quick: bool = False) -> list[Case]:
    """q and k in bfloat16 at every size, then other formats and the single op at fewer."""
    if quick:
        return [Case(QK, tokens, "bfloat16", ranks) for tokens in QUICK_TOKENS]
    return [
        *(Case(QK, tokens, "bfloat16", ranks) for tokens in TOKENS),
        *(Case(QK, n, dtype, ranks) for dtype in ("float16", "float32") for n in OTHER_TOKENS),
        *(Case(SINGLE, tokens, "bfloat16", ranks) for tokens in SINGLE_TOKENS),
    ]


def has_compiled_peer(case: Case) -> bool:
    """Tell whether a case is compared with PyTorch code under torch.compile too."""
    return (case.op, case.dtype) == (QK, "bfloat16") and case.tokens in COMPILED_TOKENS


def case_record(
    case: Case,
    timing: Timing,
    copy: Timing,
    peers: dict[str, Timing | str],
    copy_tb_per_s: float,
) -> dict[str, Any]:
    """Return the JSON of one case. A peer that could not be measured is null, with the reason."""
    floor_us = case.bytes / copy_tb_per_s * 1e-6

    def with_ratio(other: Timing) -> dict[str, Any]:
        return {**asdict(other), "ratio": round(other.us / timing.us, 4)}

    return {
        **asdict(case),
        "widths": list(case.widths),
        **asdict(timing),
        "bytes": case.bytes,
        "tb_per_s": round(case.bytes / timing.us * 1e-6, 4),
        "floor_us": round(floor_us, 4),
        "floor_ratio": round(floor_us / timing.us, 4),
        "sets": case.sets,
        "calls_per_pass": case.calls,
        "copy": with_ratio(copy),
        "peers": {
            name: None if isinstance(peer, str) else with_ratio(peer)
            for name, peer in peers.items()
        },
        "peer_notes": {name: peer for name, peer in peers.items() if isinstance(peer, str)},
    }


def ceilings_record(copy: Timing, node: Timing) -> dict[str, Any]:
    """Return the JSON of what each device can do at best, all of them at once."""
    return {
        "copy_bytes": 2 * CEILING_COPY_BYTES,
        "copy_us": copy.us,
        "copy_tb_per_s": round(2 * CEILING_COPY_BYTES / copy.us * 1e-6, 4),
        "node_copy_bytes": 2 * TINY_COPY_BYTES,
        "node_us": node.us,
    }


def report_record(
    environment: dict[str, Any],
    ceilings: dict[str, Any],
    cases: list[dict[str, Any]],
    host: dict[str, Timing],
) -> dict[str, Any]:
    """Return the whole JSON."""
    return {
        **describe_package(minimax_rms, LIBRARY_PATH),
        **environment,
        "method": METHOD,
        "ceilings": ceilings,
        "left_out": LEFT_OUT,
        "cases": cases,
        "host": {name: asdict(timing) for name, timing in host.items()},
    }


class Workload:
    """Random inputs and weights of one case, and what the outputs of any norm have to be."""

    def __init__(self, world: World, case: Case) -> None:
        self.world = world
        self.case = case
        new = partial(torch.randn, dtype=torch_dtype(case.dtype), device=world.device)
        # Each row times a power of two, so that a row with another one's sum shows.
        shape = (case.sets, case.tokens, 1)
        scales = torch.exp2(torch.randint(-4, 5, shape, device=world.device))
        rows = new((case.sets, case.tokens, case.row_width)).mul_(scales)
        self.inputs = rows.unbind()
        self.weights = [new(width) for width in case.widths]
        # Of the latest call on each set.
        self.outputs: list[tuple[Tensor, ...]] = [()] * case.sets
        # Sums of squares over all ranks: float64 [sets, parts, tokens, 1].
        self.sums = torch.stack(
            [
                torch.stack([part.double().square().sum(-1, keepdim=True) for part in parts])
                for parts in map(self.parts, self.inputs)
            ]
        )
        dist.all_reduce(self.sums)

    def parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return what is normalized of an input, as views."""
        widths = self.case.widths
        parts: tuple[Tensor, ...] = rows[:, : sum(widths)].split(widths, dim=1)
        return parts

    def run(self, norm: Norm, i: int) -> None:
        """Normalize set i."""
        self.outputs[i] = norm(self.inputs[i], *self.weights)

    def time(self, norm: Norm, repetitions: int = REPETITIONS) -> list[float]:
        """Return the microseconds of a call on this rank, of each pass."""

        # Once the graph has its outputs. Before each pass it would leave them in the L2.
        @cache
        def poison() -> None:
            for outputs in self.outputs:
                for output in outputs:
                    as_bytes(output).fill_(0xFF)

        return time_passes(
            self.world,
            partial(self.run, norm),
            self.case.sets,
            self.case.calls,
            restore=poison,
            repetitions=repetitions,
        )

    def error(self, sets: Sequence[int] | None = None) -> str | None:
        """Say how the outputs on this rank differ from the reference; None if they do not.

        Args:
            sets: which to look at; None for all.
        """
        dtype = torch.finfo(torch_dtype(self.case.dtype))
        for i in range(self.case.sets) if sets is None else sets:
            parts = zip(self.outputs[i], self.parts(self.inputs[i]), self.weights, strict=True)
            for part, (output, x, weight) in enumerate(parts):
                mean = self.sums[i, part] / (x.shape[1] * self.world.size)
                expected = x.double() * torch.rsqrt(mean + EPS) * weight.double()
                difference = (output.double() - expected).abs_()
                # Half a unit in the last place, also where values are subnormal.
                allowed = expected.abs_().mul_(dtype.eps / 2 + SLACK)
                allowed.add_(dtype.smallest_normal * dtype.eps)
                # A NaN is not less than anything.
                if not bool((difference <= allowed).all()):
                    return (
                        f"off by {difference.max().item():.3g} from the reference in "
                        f"{'qk'[part] if self.case.op == QK else 'x'} of set {i}"
                    )
        return None


def our_norm(world: World, case: Case, workspace: minimax_rms.Workspace) -> Norm:
    """Return the package's operator, called as by an engine."""
    ops = torch.ops.minimax_rms
    tensor = workspace.tensor

    def norm_qk(rows: Tensor, weight_q: Tensor, weight_k: Tensor) -> tuple[Tensor, ...]:
        sizes = (case.q_size, case.kv_size, world.rank, world.size)
        outputs: tuple[Tensor, ...] = ops.minimax_allreduce_rms_qk(
            rows, weight_q, weight_k, tensor, *sizes, EPS
        )
        return outputs

    def norm(rows: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (ops.minimax_allreduce_rms(rows, weight, tensor, world.rank, world.size, EPS),)

    return norm_qk if case.op == QK else norm


def mean_squares(parts: Sequence[Tensor]) -> Tensor:
    """Return the mean square of each row of each part: float32 [parts, tokens, 1]."""
    return torch.stack([part.float().square().mean(-1, keepdim=True) for part in parts])


def scale(parts: Sequence[Tensor], weights: Sequence[Tensor], means: Tensor) -> tuple[Tensor, ...]:
    """Return the parts normalized, of the weights' dtype."""
    factors = torch.rsqrt(means + EPS)
    return tuple(
        (part.float() * factor * weight).to(weight.dtype)
        for part, factor, weight in zip(parts, factors, weights, strict=True)
    )


def nccl_norm(workload: Workload, rows: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Normalize with PyTorch's operators around an all-reduce by NCCL."""
    parts = [part.float() for part in workload.parts(rows)]
    means = mean_squares(parts)
    dist.all_reduce(means, dist.ReduceOp.AVG)
    return scale(parts, weights, means)


class CompiledPeer:
    """The same with both sides of the all-reduce compiled, as long as there is time for it."""

    def __init__(self, world: World, wanted: bool) -> None:
        self.world = world
        self.seconds = 0.0
        self.reason = None if wanted else "left out by an option"
        self.error: str | None = None

    def compile(self, workload: Workload) -> Norm | str:
        """Return the peer, compiled for a workload, or why there is none, alike on all ranks."""
        if self.reason is None and max(self.world.gather(self.seconds)) > COMPILE_SECONDS:
            self.reason = f"left out after {COMPILE_SECONDS} s of compiling"
        if self.reason is not None:
            return self.reason
        begin = time.monotonic()
        error = None
        parts, weights = workload.parts(workload.inputs[0]), workload.weights
        try:
            import torch._inductor.config

            # A pool of compilers for each rank starts for longer than these few kernels take.
            torch._inductor.config.compile_threads = 1
            before = torch.compile(mean_squares, dynamic=False, fullgraph=True)
            behind = torch.compile(scale, dynamic=False, fullgraph=True)
            # Without an all-reduce: a rank that fails keeps no other waiting.
            behind(parts, weights, before(parts))
            torch.cuda.synchronize()
        # Whatever is missing (a C compiler, Triton, a type on this device), it shows here.
        except Exception as caught:
            error = f"torch.compile failed: {describe_error(caught)}"
        self.seconds += time.monotonic() - begin
        if reason := self.world.first_error(error):
            return reason

        def norm(rows: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
            parts = workload.parts(rows)
            means = before(parts)
            dist.all_reduce(means, dist.ReduceOp.AVG)
            # A list, as when it was compiled.
            outputs: tuple[Tensor, ...] = behind(parts, list(weights), means)
            return outputs

        return norm


def time_ours(
    world: World, workload: Workload, case: Case, workspace: minimax_rms.Workspace
) -> Timing:
    """Time minimax_rms on a workload, and compare all that it wrote with the reference.

    Raises:
        RuntimeError: a call has failed, or an output is not the reference's on some rank.
    """
    us = workload.time(our_norm(world, case, workspace))
    workspace.check()
    if error := world.first_error(workload.error()):
        raise RuntimeError(f"{describe_case(case)}: {error}")
    return world.slowest(us)


def time_peer(world: World, workload: Workload, norm: Norm | str) -> Timing | str:
    """Time a peer on a workload and check its result, or say why it was not measured."""
    if isinstance(norm, str):
        return norm
    error = None
    try:
        workload.run(norm, 0)
        torch.cuda.synchronize()
    except Exception as caught:
        error = describe_error(caught)
    if reason := world.first_error(error):
        return reason
    us = workload.time(norm)
    return world.first_error(workload.error()) or world.slowest(us)


def time_host(world: World, workspace: minimax_rms.Workspace) -> dict[str, Timing]:
    """Time the host's side of eager calls with one token, and of one of torch's own."""
    case = Case(QK, 1, "bfloat16", world.size)
    workload = Workload(world, case)
    rows, (weight_q, weight_k) = workload.inputs[0], workload.weights
    # The operator itself, without a function around it.
    operator = torch.ops.minimax_rms.minimax_allreduce_rms_qk
    sizes = (case.q_size, case.kv_size, world.rank, world.size)
    ours = {
        "Workspace.allreduce_rms_qk": partial(
            workspace.allreduce_rms_qk, rows, weight_q, weight_k, EPS
        ),
        f"torch.ops.minimax_rms.{QK}": partial(
            operator, rows, weight_q, weight_k, workspace.tensor, *sizes, EPS
        ),
    }
    calls: dict[str, Callable[[], object]] = {
        **ours,
        NCCL: partial(nccl_norm, workload, rows, weight_q, weight_k),
        "torch.add(a, b, out=c)": partial(torch.add, rows, rows, out=torch.empty_like(rows)),
    }
    times = time_enqueue(calls)
    for name, call in ours.items():
        workload.outputs[0] = call()
        if error := world.first_error(workload.error([0])):
            raise RuntimeError(f"host time of {name}: {error}")
    return {name: world.slowest(us) for name, us in times.items()}


def describe_case(case: Case) -> str:
    """One line's worth of what a case is."""
    parts = "q and k" if case.op == QK else "single"
    return f"{parts:7} {case.dtype:8} {case.tokens:5} tokens"


def describe_record(record: dict[str, Any]) -> str:
    """One line's worth of how fast a case is."""
    line = f"{record['us']:8.2f} us ({record['us_min']:.2f} to {record['us_max']:.2f})"
    line += f", HBM floor {record['floor_us']:.2f} us ({record['floor_ratio']:.2f})"
    line += f", copy {record['copy']['us']:.2f} us"
    for name, peer in record["peers"].items():
        line += f"; {name} "
        line += f"{peer['us']:.2f} us ({peer['ratio']:.2f}x)" if peer else "none"
    return line


def measure_case(
    world: World, case: Case, workspace: minimax_rms.Workspace, compiled: CompiledPeer
) -> tuple[Timing, Timing, dict[str, Timing | str]]:
    """Time one case, a copy of as many bytes, and its peers."""
    workload = Workload(world, case)
    timing = time_ours(world, workload, case, workspace)
    peers = {NCCL: time_peer(world, workload, partial(nccl_norm, workload))}
    if has_compiled_peer(case):
        peers[COMPILED] = time_peer(world, workload, compiled.compile(workload))
    del workload
    return timing, time_copy(world, case.bytes // 2, case.sets, case.calls), peers


def measure(world: World, quick: bool, with_compiled: bool) -> dict[str, Any]:
    """Measure everything and return the JSON, the same on every rank."""
    say = partial(print, flush=True) if world.rank == 0 else lambda *_: None
    environment = describe_environment(world)
    torch.manual_seed(world.rank)
    copy = time_copy(world, CEILING_COPY_BYTES, 1, CALLS_PER_GRAPH)
    torch.cuda.empty_cache()
    ceilings = ceilings_record(copy, time_node(world))
    say(
        f"{world.size} x {environment['gpu']}: device copy {ceilings['copy_tb_per_s']:.2f} TB/s, "
        f"node {ceilings['node_us']:.2f} us"
    )
    compiled = CompiledPeer(world, with_compiled)
    with minimax_rms.Workspace(world.group, MAX_TOKENS, world.device) as workspace:
        if workspace.fallback_reason is not None:
            raise RuntimeError(f"calls would go to torch.distributed: {workspace.fallback_reason}")
        host = time_host(world, workspace)
        for name, timing in host.items():
            say(f"host time of {name}: {timing.us:.2f} us")
        records = []
        for case in all_cases(world.size, quick):
            timings = measure_case(world, case, workspace, compiled)
            torch.cuda.empty_cache()
            records.append(case_record(case, *timings, ceilings["copy_tb_per_s"]))
            say(describe_case(case), describe_record(records[-1]))
            for name, reason in records[-1]["peer_notes"].items():
                say(f"    {name}: {reason}")
    return report_record(environment, ceilings, records, host)


def run_rank(
    rank: int, world_size: int, port: int, output: Path, quick: bool, with_compiled: bool
) -> None:
    """Measure as one of the ranks; the first writes the JSON."""
    begin = time.monotonic()
    world = World(rank, world_size, port)
    result = measure(world, quick, with_compiled)
    if rank == 0:
        write_result(output, result, time.monotonic() - begin)
    # Else what torch.compile leaves in cycles may abort the process as it ends.
    del world
    gc.collect()
    dist.destroy_process_group()


def main() -> int:
    """Measure, and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        *("--gpus", "--world-size"), type=int, metavar="N", help="how many GPUs; else all"
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--without-compiled", action="store_true")
    arguments = parser.parse_args()
    return start_ranks(
        run_rank,
        arguments.gpus,
        arguments.output,
        arguments.quick,
        not (arguments.without_compiled or arguments.quick),
        most=16,
    )


if __name__ == "__main__":
    sys.exit(main())
