"""Times the operators on one GPU and writes the figures as JSON.

bench.py --output DIR writes DIR/<gpu>.json and prints a table. Everything a timed call wrote is
compared with the reference; a difference ends the run with an error. --without-compiled leaves out
the peer built by torch.compile, which takes most of the time.

Ratios are a peer's time over ours, so above 1 is faster than the peer.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import deepseek_mla
import torch
from bench_timing import Timing, summarize
from deepseek_mla import reference
from deepseek_mla._library import LIBRARY_PATH
from gpu_machine import driver_version, host_cpu
from torch import Tensor

METHOD = (
    "CUDA events around a pass of CUDA-graph replays, 20 calls a graph, over the calls in it: time "
    "per call back to back, where programmatic launches overlap, not the latency of a lone call. "
    "The calls of a pass rotate through distinct inputs, outputs and cache slots of at least "
    "192 MiB, or 2000 sets where these are smaller, and the L2 is flushed before each pass. Random "
    "data, slots in random order, positions random over 65536 rows of the table. Outputs are "
    "poisoned before, and all of them are compared with the reference after, to the bit."
)

DEVICE = torch.device("cuda")
EPS = 1e-6
BLOCK_SIZE = 64
MAX_POSITION = 65536
CALLS_PER_GRAPH = 20
MAX_CALLS = 2000
# A compiled call is several graph nodes. With the L2 flushed, each set is cold anyhow.
MAX_COMPILED_CALLS = 400
ROTATION_BYTES = 192 << 20
FLUSH_BYTES = 512 << 20
REPETITIONS = 15
WARM_UPS = 2
CEILING_COPY_BYTES = 4 << 30
CEILING_COPIES = 5
TINY_COPY_BYTES = 4096
COMPILED_TOLERANCE = 2.0**-6

QUANT_INSERT = "fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert"
KV_ROPE_INSERT = "fused_deepseek_v4_kv_rope_insert"
KV_NORM_INSERT = "fused_deepseek_v4_kv_norm_rope_quant_insert"
FULL_BF16_INSERT = "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert"
FULL_FP8_INSERT = "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert"

# Bytes that an insert writes to the cache for one token.
RECORD_BYTES = {"v4": 584, "v4.1": 528, "bfloat16": 1024, "float8_e4m3fn": 512}
ROW_BYTES = 1024  # 512 values of 16 bits: a KV row, or one head of a query
INDEX_BYTES = 256 + 8 + 8  # a row of the cosine table, a slot and a position


@dataclass(frozen=True)
class Case:
    """One call: an operator, its sizes and its formats."""

    op: str
    tokens: int
    heads: int = 0
    heads_padded: int = 0
    dtype: str = "bfloat16"
    cache: str = "v4"
    interleaved: bool = False

    @property
    def query_bytes(self) -> int:
        """Bytes of Q read and written: 16-bit in, and 16-bit (padded) or FP8 out."""
        if self.op == FULL_FP8_INSERT:
            return self.tokens * self.heads * (ROW_BYTES + ROW_BYTES // 2)
        return self.tokens * ROW_BYTES * (self.heads + self.heads_padded)

    @property
    def bytes(self) -> int:
        """Bytes that a call has to move.

        Every byte of Q and of the cache record once, the KV row, and what says where both go. What
        all tokens of a call share, such as a norm weight or a scale, is not counted.
        """
        insert = self.tokens * (ROW_BYTES + RECORD_BYTES[self.cache] + INDEX_BYTES)
        return self.query_bytes + insert

    @property
    def copy_bytes(self) -> int:
        """Length of the plain copy this is compared with: half of what Q's reads and writes take.

        That is ``q_out.copy_(q)`` where both have the same size. Without Q, half of all bytes.
        """
        return (self.query_bytes or self.bytes) // 2 // 16 * 16


TOKENS = tuple(2**i for i in range(15))
# Not one token: what Inductor of torch 2.11 generates for it, Triton does not compile.
COMPILED_TOKENS = (16, 128, 1024, 8192)
OTHER_TOKENS = (1, 128, 1024, 8192)


def all_cases() -> list[Case]:
    """The main operator at every size, then the other operators and formats at fewer."""
    main = [
        Case(QUANT_INSERT, tokens, heads, padded)
        for heads, padded in ((64, 64), (16, 64), (128, 128))
        for tokens in TOKENS
    ]
    with_query = partial(Case, heads=64, heads_padded=64)
    others = [
        case
        for tokens in OTHER_TOKENS
        for case in (
            with_query(QUANT_INSERT, tokens, dtype="float16"),
            with_query(QUANT_INSERT, tokens, cache="v4.1"),
            with_query(QUANT_INSERT, tokens, interleaved=True),
            with_query(FULL_BF16_INSERT, tokens, cache="bfloat16"),
            with_query(FULL_FP8_INSERT, tokens, cache="float8_e4m3fn"),
            *(Case(KV_ROPE_INSERT, tokens, cache=cache) for cache in RECORD_BYTES),
            Case(KV_NORM_INSERT, tokens),
        )
    ]
    return main + others


def has_compiled_peer(case: Case) -> bool:
    """Tell whether a case is compared with PyTorch code under torch.compile."""
    return case == Case(QUANT_INSERT, case.tokens, 64, 64) and case.tokens in COMPILED_TOKENS


def rotation(bytes_per_call: int) -> tuple[int, int]:
    """Return how many distinct sets of tensors and how many calls one pass has."""
    sets = math.ceil(ROTATION_BYTES / bytes_per_call)
    if sets <= CALLS_PER_GRAPH:
        return max(sets, 2), CALLS_PER_GRAPH
    sets = min(math.ceil(sets / CALLS_PER_GRAPH) * CALLS_PER_GRAPH, MAX_CALLS)
    return sets, sets


def case_record(
    case: Case, timing: Timing, peers: dict[str, Timing | None], copy_tb_per_s: float
) -> dict[str, Any]:
    """Return the JSON of one case. A peer that could not be measured is null."""
    floor_us = case.bytes / copy_tb_per_s * 1e-6
    sets, calls = rotation(case.bytes)
    return {
        **asdict(case),
        **asdict(timing),
        "bytes": case.bytes,
        "tb_per_s": round(case.bytes / timing.us * 1e-6, 4),
        "floor_us": round(floor_us, 4),
        "floor_ratio": round(floor_us / timing.us, 4),
        "sets": sets,
        "calls_per_pass": calls,
        "peers": {
            name: peer and {**asdict(peer), "ratio": round(peer.us / timing.us, 4)}
            for name, peer in peers.items()
        },
    }


def ceilings_record(copy: Timing, node: Timing) -> dict[str, Any]:
    """Return the JSON of what the device can do at best."""
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
    compiled_note: str | None,
) -> dict[str, Any]:
    """Return the whole JSON. ``compiled_note`` says why the compiled peer is missing, if it is."""
    return {
        "package": "deepseek_mla",
        "version": deepseek_mla.__version__,
        "library_sha256": hashlib.sha256(LIBRARY_PATH.read_bytes()).hexdigest(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **environment,
        "method": METHOD,
        "ceilings": ceilings,
        "compiled_note": compiled_note,
        "cases": cases,
        "host": {name: asdict(timing) for name, timing in host.items()},
    }


class Workload:
    """All tensors that the calls of one case rotate through.

    The sets follow each other in each tensor, rows ``[i * tokens, (i + 1) * tokens)`` belonging to
    set i, and share one cache, of which each writes its own slots.
    """

    def __init__(self, case: Case, sets: int, table: Tensor) -> None:
        self.case = case
        self.sets = sets
        self.table = table
        rows = case.tokens * sets
        dtype = getattr(torch, case.dtype)
        new = partial(torch.empty, device=DEVICE)
        self.kv = random_rows((rows, 512), dtype)
        self.q = random_rows((rows, case.heads, 512), dtype)
        self.norm_weight = torch.randn(512, dtype=dtype, device=DEVICE)
        self.kv_scale = torch.full((1,), 0.25, device=DEVICE)
        self.q_scale_inv = torch.full((1,), 16.0, device=DEVICE)

        num_blocks = math.ceil(rows / BLOCK_SIZE)
        self.slots = torch.randperm(num_blocks * BLOCK_SIZE, device=DEVICE)[:rows]
        self.positions = torch.randint(MAX_POSITION, (rows,), device=DEVICE)
        # Tensors of their own, which are aligned as a caller's are.
        self.set_slots = [part.clone() for part in self.slots.split(case.tokens)]
        self.set_positions = [part.clone() for part in self.positions.split(case.tokens)]

        packed = case.cache in ("v4", "v4.1")
        record = RECORD_BYTES[case.cache] if packed else 512
        cache_dtype = torch.uint8 if packed else getattr(torch, case.cache)
        self.cache = new((num_blocks, BLOCK_SIZE, record), dtype=cache_dtype)
        # Written beside the cache; Q itself where the operator works in place.
        self.q_out: Tensor | None = None
        if case.op == QUANT_INSERT:
            self.q_out = new((rows, case.heads_padded, 512), dtype=dtype)
        elif case.op == FULL_BF16_INSERT:
            self.q_out = self.q.clone()
        elif case.op == FULL_FP8_INSERT:
            self.q_out = new((rows, case.heads, 512), dtype=torch.float8_e4m3fn)
        self.poison()

    def poison(self) -> None:
        """Fill what the calls write with bytes that read as NaN; Q in place with Q."""
        as_bytes(self.cache).fill_(0xFF)
        if self.case.op == FULL_BF16_INSERT:
            assert self.q_out is not None
            self.q_out.copy_(self.q)
        elif self.q_out is not None:
            as_bytes(self.q_out).fill_(0xFF)

    def call(self, i: int) -> None:
        """Call the operator on set i."""
        rows = slice(i * self.case.tokens, (i + 1) * self.case.tokens)
        self._run(
            deepseek_mla,
            rows,
            self.set_slots[i],
            self.set_positions[i],
            self.cache,
            None if self.q_out is None else self.q_out[rows],
        )

    def check(self, context: str) -> None:
        """Compare all that the calls wrote, and may not have written, with the reference.

        Raises:
            RuntimeError: a byte differs.
        """
        if self.case.op == FULL_BF16_INSERT:
            # The timed calls have rotated Q over and over.
            self.poison()
            for i in range(self.sets):
                self.call(i)
        cache, q_out = self.expected()
        for name, got, want in (("k_cache", self.cache, cache), ("Q", self.q_out, q_out)):
            if got is not None and want is not None and not same_bytes(got, want):
                raise RuntimeError(f"{context}: {name} differs from the reference")

    def expected(self) -> tuple[Tensor, Tensor | None]:
        """Return cache and Q as the reference leaves them after all sets."""
        cache = torch.empty_like(self.cache)
        as_bytes(cache).fill_(0xFF)
        q_out = None
        if self.case.op == FULL_BF16_INSERT:
            q_out = self.q.clone()
        elif self.q_out is not None:
            q_out = torch.empty_like(self.q_out)
        self._run(reference, slice(None), self.slots, self.positions, cache, q_out)
        return cache, q_out

    def _run(
        self,
        module: ModuleType,
        rows: slice,
        slots: Tensor,
        positions: Tensor,
        cache: Tensor,
        q_out: Tensor | None,
    ) -> None:
        """Call the case's function of the package or of its reference."""
        case = self.case
        function: Callable[..., Any] = getattr(module, case.op)
        kv = self.kv[rows]
        where = (cache, slots, positions, self.table)
        if case.op == QUANT_INSERT:
            flags = (True, case.cache == "v4.1", True, case.interleaved)
            sizes = (case.heads_padded, EPS, BLOCK_SIZE)
            function(self.q[rows], kv, *where, *sizes, *flags, q_out=q_out)
        elif case.op == KV_ROPE_INSERT:
            function(kv, *where, BLOCK_SIZE, self.kv_scale, case.cache == "v4.1")
        elif case.op == KV_NORM_INSERT:
            function(kv, self.norm_weight, *where, EPS, BLOCK_SIZE)
        elif case.op == FULL_BF16_INSERT:
            function(q_out, kv, *where, EPS, BLOCK_SIZE)
        else:
            scales = (self.kv_scale, self.q_scale_inv)
            function(self.q[rows], kv, q_out, *where, *scales, EPS, BLOCK_SIZE)


def random_rows(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal values, each row of 512 times a random power of two from 2^-4 to 2^4."""
    values = torch.randn(shape, dtype=dtype, device=DEVICE)
    exponents = torch.randint(-4, 5, (*shape[:-1], 1), device=DEVICE)
    return values.mul_(torch.exp2(exponents.to(dtype)))


def random_table() -> Tensor:
    """A cosine table ``[MAX_POSITION, 64]`` of random angles."""
    angles = torch.rand((MAX_POSITION, 32), device=DEVICE) * (2 * math.pi)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def as_bytes(tensor: Tensor) -> Tensor:
    """View a dense tensor as bytes."""
    return tensor.view(torch.uint8)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Compare two dense tensors of one shape byte by byte, whatever NaNs they hold."""
    parts = zip(as_bytes(a).split(4096), as_bytes(b).split(4096), strict=True)
    return all(torch.equal(x, y) for x, y in parts)


def time_calls(call: Callable[[int], object], sets: int, calls: int) -> Timing:
    """Time `call(i % sets)` for i in range(calls), in graphs of 20 calls, L2 flushed before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flushed = flush_buffer()
    with torch.cuda.stream(stream):
        # Kernels are loaded at their first launch, which a capture does not allow.
        call(0)
        stream.synchronize()
        pool = torch.cuda.graph_pool_handle()
        graphs = []
        for first in range(0, calls, CALLS_PER_GRAPH):
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=pool)
            for i in range(first, min(first + CALLS_PER_GRAPH, calls)):
                call(i % sets)
            graph.capture_end()
            graphs.append(graph)
        times = []
        for repetition in range(-WARM_UPS, REPETITIONS):
            flushed.sum()
            begin.record(stream)
            for graph in graphs:
                graph.replay()
            end.record(stream)
            stream.synchronize()
            if repetition >= 0:
                times.append(begin.elapsed_time(end) * 1000 / calls)
    return summarize(times)


@cache
def flush_buffer() -> Tensor:
    """Memory to read so that the L2 holds nothing of what was used before."""
    return torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device=DEVICE)


@cache
def time_copy(nbytes: int) -> Timing:
    """Time a plain copy of `nbytes`, in and out, and check it.

    The faster of ``copy_``, which in a graph is a memory copy of the driver's choice, and of an
    elementwise kernel, which is faster from some 400 MiB on.
    """
    sets, calls = rotation(2 * nbytes)
    source = torch.empty((sets, nbytes // 4), dtype=torch.int32, device=DEVICE).random_()
    target = torch.empty_like(source)
    timings = []
    for copy in (
        lambda i: target[i].copy_(source[i]),
        lambda i: torch.bitwise_or(source[i], 0, out=target[i]),
    ):
        target.zero_()
        timings.append(time_calls(copy, sets, calls))
        if not same_bytes(source, target):
            raise RuntimeError(f"a copy of {nbytes} bytes differs from its source")
    return min(timings, key=lambda timing: timing.us)


def time_ceiling_copy() -> Timing:
    """Time large copies one after the other, without a graph: the most that memory moves."""
    source = torch.empty(CEILING_COPY_BYTES // 4, dtype=torch.int32, device=DEVICE).random_()
    target = torch.empty_like(source)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for repetition in range(-WARM_UPS, REPETITIONS):
        begin.record()
        for _ in range(CEILING_COPIES):
            target.copy_(source)
        end.record()
        end.synchronize()
        if repetition >= 0:
            times.append(begin.elapsed_time(end) * 1000 / CEILING_COPIES)
    return summarize(times)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of the last 64 of 512 dimensions in interleaved pairs.

    Without a concatenation, which would cost the compiled code one more pass over Q.
    """
    swapped = x.unflatten(-1, (256, 2)).flip(-1).flatten(-2)
    sign = torch.arange(64, device=x.device) % 2 * 2 - 1
    cos = torch.nn.functional.pad(cos.repeat_interleave(2, -1), (448, 0), value=1.0)
    sin = torch.nn.functional.pad(sin.repeat_interleave(2, -1) * sign, (448, 0))
    return x * cos + swapped * sin


def unfused_insert(
    q: Tensor,
    kv: Tensor,
    flat_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    table: Tensor,
    q_out: Tensor,
) -> None:
    """The main operator with V4 records in PyTorch ops, for torch.compile to fuse.

    Args:
        flat_cache: all bytes of the cache, in one dimension.
        q_out: as many heads as `q`.
    """
    cos, sin = table[positions].split(32, dim=1)
    x = q.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    q_out.copy_(rotate(x, cos.unsqueeze(1), sin.unsqueeze(1)))

    row = rotate(kv.float(), cos, sin).to(kv.dtype)
    runs = row[:, :448].float().unflatten(1, (7, 64))
    absmax = runs.abs().amax(-1).clamp_min(1e-4)
    # ceil(log2(absmax / 448)), exactly.
    exponent = ((absmax.view(torch.int32) + 0x1FFFFF) >> 23) - 135
    inverse = ((127 - exponent) << 23).view(torch.float32).unsqueeze(-1)
    quantized = (runs * inverse).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    bits = row[:, 448:].view(torch.int16)
    shifts = torch.arange(0, 16, 8, dtype=torch.int16, device=kv.device)
    rope = ((bits.unsqueeze(-1) >> shifts) & 255).to(torch.uint8)
    scales = torch.nn.functional.pad((exponent + 127).to(torch.uint8), (0, 1))

    start = slots // BLOCK_SIZE * (BLOCK_SIZE * 584)
    offset = slots % BLOCK_SIZE
    data_at = (start + offset * 576).unsqueeze(1) + torch.arange(576, device=kv.device)
    scale_at = (start + BLOCK_SIZE * 576 + offset * 8).unsqueeze(1)
    scales_at = scale_at + torch.arange(8, device=kv.device)
    flat_cache[data_at] = torch.cat((quantized.flatten(1), rope.flatten(1)), dim=1)
    flat_cache[scales_at] = scales


def unfused_arguments(workload: Workload, i: int) -> tuple[Tensor, ...]:
    """Arguments of :func:`unfused_insert` for set i."""
    rows = slice(i * workload.case.tokens, (i + 1) * workload.case.tokens)
    assert workload.q_out is not None
    return (
        workload.q[rows],
        workload.kv[rows],
        workload.cache.view(-1),
        workload.set_slots[i],
        workload.set_positions[i],
        workload.table,
        workload.q_out[rows],
    )


def time_compiled(workload: Workload, compiled: Callable[..., None]) -> Timing:
    """Time the compiled peer on a workload, and check it within its rounding."""
    workload.poison()
    sets = min(workload.sets, MAX_COMPILED_CALLS)
    arguments = [unfused_arguments(workload, i) for i in range(sets)]
    timing = time_calls(lambda i: compiled(*arguments[i]), sets, max(sets, CALLS_PER_GRAPH))

    cache, expected_q = workload.expected()
    assert workload.q_out is not None
    assert expected_q is not None
    rows = sets * workload.case.tokens
    read = partial(
        deepseek_mla.dequantize_cache, slots=workload.slots[:rows], cache_block_size=BLOCK_SIZE
    )
    check_close("compiled peer, KV", read(workload.cache), read(cache))
    pairs = zip(workload.q_out[:rows].split(1024), expected_q[:rows].split(1024), strict=True)
    for got, want in pairs:
        check_close("compiled peer, Q", got.float(), want.float())
    return timing


def check_close(context: str, got: Tensor, want: Tensor) -> None:
    """Raise RuntimeError unless all values agree within the tolerance, relative and absolute."""
    error = (got - want).abs() / (1 + want.abs())
    # A NaN is not less than anything.
    if not bool((error <= COMPILED_TOLERANCE).all()):
        raise RuntimeError(f"{context}: off by {error.max().item():.3g} from the reference")


def compile_peer(table: Tensor) -> tuple[Callable[..., None] | None, str | None]:
    """Return the compiled peer, or None and the reason why there is none."""
    case = Case(QUANT_INSERT, COMPILED_TOKENS[0], 64, 64)
    # As many sets as will be timed: shapes are compiled in, that of the cache too.
    workload = Workload(case, rotation(case.bytes)[0], table)
    compiled = torch.compile(unfused_insert, dynamic=False, fullgraph=True)
    try:
        compiled(*unfused_arguments(workload, 0))
    # Whatever is missing (a C compiler, Triton, a type on this device), it shows here.
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        return None, f"torch.compile failed: {type(error).__name__}: {reason[0]}"
    return compiled, None


def time_enqueue(
    calls: dict[str, Callable[[], object]], chunks: int = 50, calls_per_chunk: int = 100
) -> dict[str, Timing]:
    """Time the host's side of calls, in chunks that the launch queue has room for.

    The calls take turns, so that a host that gets faster or slower does so for all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for chunk in range(-chunks // 2, chunks):
        for name, call in calls.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(calls_per_chunk):
                call()
            if chunk >= 0:
                times[name].append((time.perf_counter() - begin) / calls_per_chunk * 1e6)
    torch.cuda.synchronize()
    return {name: summarize(us) for name, us in times.items()}


def time_host(table: Tensor) -> dict[str, Timing]:
    """Time the host's side of calls with one token of 64 heads, and of one of torch's own."""
    workload = Workload(Case(QUANT_INSERT, 1, 64, 64), 1, table)
    arguments = (
        workload.q,
        workload.kv,
        workload.cache,
        workload.slots,
        workload.positions,
        table,
        64,
        EPS,
        BLOCK_SIZE,
    )
    q_out = workload.q_out
    function = deepseek_mla.fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert
    operator = torch.ops.deepseek_mla.fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert
    calls: dict[str, Callable[[], object]] = {
        "function": partial(function, *arguments),
        "function, q_out given": partial(function, *arguments, q_out=q_out),
        "torch.ops": partial(operator, *arguments),
        "torch.ops, q_out given": partial(operator.out, *arguments, q_out=q_out),
        "torch.add(a, b, out=c)": partial(
            torch.add, workload.q, workload.q, out=torch.empty_like(workload.q)
        ),
    }
    gc.disable()
    try:
        timings = time_enqueue(calls)
    finally:
        gc.enable()
    workload.poison()
    calls["function, q_out given"]()
    workload.check("host overhead")
    return timings


def describe_environment() -> dict[str, Any]:
    """What the figures were measured on."""
    properties = torch.cuda.get_device_properties(DEVICE)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "driver": driver_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cpu": host_cpu(),
    }


def result_name(gpu: str) -> str:
    """Name of the result's file: `NVIDIA H200` gives `nvidia_h200.json`."""
    return f"{gpu.lower().replace(' ', '_')}.json"


def describe_case(case: Case) -> str:
    """One line's worth of what a case is."""
    op = case.op.removeprefix("fused_deepseek_v4_")
    formats = f"{case.dtype}, {case.cache}{', interleaved' if case.interleaved else ''}"
    return f"{op:44} {formats:26} {case.heads:3}/{case.heads_padded:3} heads {case.tokens:5} tokens"


def describe_record(record: dict[str, Any]) -> str:
    """One line's worth of how fast a case is."""
    line = f"{record['us']:8.2f} us ({record['us_min']:.2f} to {record['us_max']:.2f})"
    line += f" {record['tb_per_s']:5.2f} TB/s, {record['floor_ratio']:.2f} of copy bandwidth"
    for name, peer in record["peers"].items():
        line += f"; {name} {'none' if peer is None else format(peer['us'], '.2f') + ' us'}"
    return line


def measure(with_compiled: bool) -> dict[str, Any]:
    """Measure everything and return the JSON."""
    environment = describe_environment()
    torch.manual_seed(0)
    table = random_table()
    ceilings = ceilings_record(time_ceiling_copy(), time_copy(TINY_COPY_BYTES))
    print(f"device copy {ceilings['copy_tb_per_s']:.2f} TB/s, node {ceilings['node_us']:.2f} us")
    # Before torch.compile starts processes of its own, which compete for the host.
    host = time_host(table)
    for name, timing in host.items():
        print(f"host time of {name}: {timing.us:.2f} us")

    compiled, compiled_note = (
        compile_peer(table) if with_compiled else (None, "left out by --without-compiled")
    )
    if compiled_note:
        print(f"no compiled peer: {compiled_note}")

    records = []
    for case in all_cases():
        sets, calls = rotation(case.bytes)
        workload = Workload(case, sets, table)
        timing = time_calls(workload.call, sets, calls)
        workload.check(describe_case(case))
        peers: dict[str, Timing | None] = {"copy": time_copy(case.copy_bytes)}
        if has_compiled_peer(case):
            peers["compiled"] = time_compiled(workload, compiled) if compiled else None
        del workload
        torch.cuda.empty_cache()
        records.append(case_record(case, timing, peers, ceilings["copy_tb_per_s"]))
        print(describe_case(case), describe_record(records[-1]), flush=True)
    return report_record(environment, ceilings, records, host, compiled_note)


def main() -> int:
    """Measure, and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--without-compiled", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.py needs a CUDA device", file=sys.stderr)
        return 1
    begin = time.monotonic()
    result = measure(with_compiled=not arguments.without_compiled)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / result_name(result["gpu"])
    path.write_text(json.dumps(result, indent=1) + "\n")
    peak = torch.cuda.max_memory_allocated() / 1e9
    print(f"{path}: {time.monotonic() - begin:.0f} s, {peak:.1f} GB of device memory at most")
    return 0


if __name__ == "__main__":
    sys.exit(main())
