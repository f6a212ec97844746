"""What bad arguments get: an error that names operator, argument, expectation and what came.

The checks are one C++ function an operator for all devices, reached here through CPU tensors.
Tensors on different devices need a GPU to be tried: test_gpu.py does.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import deepseek_mla
import mla_calls
import pytest
import torch
from mla_calls import (
    FULL_BF16_INSERT,
    FULL_FP8_INSERT,
    KV_NORM_INSERT,
    KV_ROPE_INSERT,
    OPS,
    Q_OPS,
    QUANT_INSERT,
    make_call,
)

# The sizes that the expectations below name.
T, H, BLOCK_SIZE = 17, 3, 16


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def gapped(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    return torch.empty(0, dtype=dtype).new_zeros(60000).as_strided(shape, strides)


def misaligned(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Dense, and starting one element after a 16-byte boundary."""
    size = torch.Size(shape).numel()
    return torch.zeros(size + 64, dtype=dtype)[1 : size + 1].view(shape)


def repeated(
    shape: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Zeros of ``shape`` expanded to ``sizes``: any size, hardly any memory."""
    return torch.zeros(shape, dtype=dtype).expand(sizes)


def q_name(op: str) -> str:
    return "q_in" if op == QUANT_INSERT else "q"


PACKED_OPS = (QUANT_INSERT, KV_ROPE_INSERT, KV_NORM_INSERT)
CONTIGUOUS = r"be contiguous"
DENSE_ROWS = r"be contiguous from dimension \d on"
ALIGNED = "be aligned to 16 bytes"
ROW_STRIDE = r"have a stride of dimension \d that is a multiple of 16 bytes"
E4M3_ALIGNED = "be aligned to 8 bytes"
E4M3_ROW_STRIDE = r"have a stride of dimension \d that is a multiple of 8 bytes"
NO_OVERLAP = "not overlap itself"

# (operator, argument, bad value, what the message says it must, and what it says it got)
Case = tuple[str, str, Callable[[], Any], str, str]
CASES: list[Case] = []


def case(op: str, argument: str, value: Callable[[], Any], expected: str, got: str) -> None:
    CASES.append((op, argument, value, expected, got))


f32, i32, i64, u8 = torch.float32, torch.int32, torch.int64, torch.uint8
fp16, fp8 = torch.float16, torch.float8_e4m3fn
SIXTEEN_BIT = "be torch.bfloat16 or torch.float16"
MAX_POS = r"have shape \[max_pos, 64\]"

for op in OPS:
    rows = r"have shape \[N, 512\]"
    case(op, "kv", lambda: zeros(T, 512, dtype=f32), SIXTEEN_BIT, "torch.float32")
    case(op, "kv", lambda: zeros(T), rows, r"\[17\]")
    case(op, "kv", lambda: zeros(T, 511), rows, r"\[17, 511\]")
    case(op, "kv", lambda: gapped((T, 512), (1024, 2)), DENSE_ROWS, r"strides \[1024, 2\]")
    case(op, "kv", lambda: gapped((T, 512), (516, 1)), ROW_STRIDE, "1032 bytes")
    case(op, "kv", lambda: misaligned(T, 512), ALIGNED, "2 past")
    many = partial(repeated, (1, 512), (2**31, 512))
    case(op, "kv", many, "have at most 2147483647 rows", "2147483648")
    name = "slot_mapping"
    most = r"have at most kv.size\(0\) = 17 elements"
    case(op, name, lambda: zeros(T, dtype=i32), "be torch.int64", "torch.int32")
    case(op, name, lambda: zeros(T, 1, dtype=i64), r"have shape \[S\]", r"\[17, 1\]")
    case(op, name, lambda: zeros(T + 1, dtype=i64), most, "18")
    case(op, name, lambda: zeros(2 * T, dtype=i64)[::2], CONTIGUOUS, r"strides \[2\]")
    name = "position_ids"
    positions = r"have shape \[N\] with N = kv.size\(0\) = 17"
    case(op, name, lambda: zeros(T, dtype=f32), "be torch.int64 or torch.int32", "torch.float32")
    case(op, name, lambda: zeros(T - 1, dtype=i64), positions, r"\[16\]")
    case(op, name, lambda: zeros(T, 1, dtype=i64), positions, r"\[17, 1\]")
    case(op, name, lambda: zeros(2 * T, dtype=i64)[::2], CONTIGUOUS, r"strides \[2\]")
    name = "cos_sin_cache"
    case(op, name, lambda: zeros(64, 64), "be torch.float32", "torch.bfloat16")
    case(op, name, lambda: zeros(64, 32, dtype=f32), MAX_POS, r"\[64, 32\]")
    case(op, name, lambda: zeros(64, dtype=f32), MAX_POS, r"\[64\]")
    case(op, name, lambda: gapped((64, 64), (68, 1), f32), CONTIGUOUS, r"strides \[68, 1\]")
    case(op, name, lambda: misaligned(64, 64, dtype=f32), ALIGNED, "4 past")
    for size in (0, -1, 2**32):
        block_sizes = r"be in \[1, 4294967295\]"
        case(op, "cache_block_size", lambda size=size: size, block_sizes, str(size))
    case(
        op,
        "k_cache",
        lambda: zeros(512, dtype=u8),
        "(have shape|be torch)",
        r"(\[512\]|torch.uint8)",
    )

for op in Q_OPS:
    name = q_name(op)
    heads = r"have shape \[N, H, 512\]"
    q_dtype = SIXTEEN_BIT if op == QUANT_INSERT else "have the dtype of kv, torch.bfloat16"
    case(op, name, lambda: zeros(T, H, 512, dtype=f32), q_dtype, "torch.float32")
    case(op, name, lambda: zeros(T, 512), heads, r"\[17, 512\]")
    case(op, name, lambda: zeros(T, H, 256), heads, r"\[17, 3, 256\]")
    case(op, name, lambda: gapped((T, H, 512), (1540, 512, 1)), ROW_STRIDE, "3080 bytes")
    case(op, name, lambda: gapped((T, H, 512), (1560, 516, 1)), ROW_STRIDE, "1032 bytes")
    case(op, name, lambda: gapped((T, H, 512), (3072, 1024, 2)), DENSE_ROWS, r"\[3072, 1024, 2\]")
    case(op, name, lambda: misaligned(T, H, 512), ALIGNED, "2 past")
    tokens = rf"{heads} with N = kv.size\(0\) = 17"
    if op == QUANT_INSERT:
        rows = r"have shape \[N, 512\] with N = q_in.size\(0\) = 17"
        case(op, "kv", lambda: zeros(T - 1, 512), rows, r"\[16, 512\]")
    else:
        case(op, name, lambda: zeros(T - 1, H, 512), tokens, r"\[16, 3, 512\]")
    same_dtype = "have the dtype of kv, torch.bfloat16"
    case(op, name, lambda: zeros(T, H, 512, dtype=fp16), same_dtype, "torch.float16")
    many = partial(repeated, (1, 1, 512), (T, 4194304, 512))
    case(op, name, many, "have at most 4194303 heads", "4194304")

# What is written may not be written twice.
query_outputs = (
    (QUANT_INSERT, "q_out", torch.bfloat16),
    (FULL_BF16_INSERT, "q", torch.bfloat16),
    (FULL_FP8_INSERT, "q_fp8", fp8),
)
for op, name, dtype in query_outputs:
    shape = (T, H, 512)
    for strides in ((0, 512, 1), (1536, 0, 1), (1024, 512, 1), (1536, 256, 1)):
        got = rf"strides \[{strides[0]}, {strides[1]}, 1\] for shape \[17, 3, 512\]"
        value = partial(gapped, shape, strides, dtype)
        case(op, name, value, NO_OVERLAP, got)
full_caches = (
    (KV_ROPE_INSERT, torch.bfloat16),
    (KV_ROPE_INSERT, fp8),
    (FULL_BF16_INSERT, torch.bfloat16),
    (FULL_FP8_INSERT, fp8),
)
slots = "hold at most 4294967295 slots"
blocks_of_16 = "268435456 blocks of 16"
name = "k_cache"
for op, dtype in full_caches:
    shape = (4, 16, 512)
    for strides in ((0, 512, 1), (8192, 0, 1), (8192 - 512, 512, 1)):
        got = rf"strides \[{strides[0]}, {strides[1]}, 1\] for shape \[4, 16, 512\]"
        value = partial(gapped, shape, strides, dtype)
        case(op, name, value, NO_OVERLAP, got)
    value = partial(repeated, (1, 16, 512), (2**28, 16, 512), dtype)
    case(op, name, value, slots, blocks_of_16)
for op in PACKED_OPS:
    for stride in (0, 9336):
        got = rf"strides \[{stride}, 1\] for shape \[4, 9344\]"
        value = partial(gapped, (4, 9344), (stride, 1), u8)
        case(op, name, value, NO_OVERLAP, got)
    value = partial(repeated, (1, 9344), (2**28, 9344), u8)
    case(op, name, value, slots, blocks_of_16)
    value = partial(repeated, (1, 16, 584), (2**28, 16, 584), u8)
    case(op, name, value, slots, blocks_of_16)

for op in PACKED_OPS:
    name = "k_cache"
    shape = r"have shape \[num_blocks, cache_block_size, 584\]"
    sized = rf"{shape} with cache_block_size = the argument = 16"
    either = r"have shape \[num_blocks, bytes\] or \[num_blocks, cache_block_size, 584\]"
    room = r"have at least cache_block_size \* 584 = 9344 bytes a block"
    case(op, name, lambda: zeros(4, 16, 583, dtype=u8), sized, r"\[4, 16, 583\]")
    case(op, name, lambda: zeros(4, 8, 584, dtype=u8), sized, r"\[4, 8, 584\]")
    case(op, name, lambda: zeros(9344, dtype=u8), either, r"\[9344\]")
    case(op, name, lambda: zeros(4, 9343, dtype=u8), room, r"shape \[4, 9343\]")
    strides = (584 * 17, 592, 1)
    case(op, name, lambda s=strides: gapped((2, 16, 584), s, u8), DENSE_ROWS, r"\[9928, 592, 1\]")
    case(op, name, lambda: gapped((2, 9344), (18688, 2), u8), DENSE_ROWS, r"\[18688, 2\]")
    eight = "have a stride of dimension 0 that is a multiple of 8 bytes"
    case(op, name, lambda: gapped((2, 9344), (9348, 1), u8), eight, "9348 bytes")
    case(op, name, lambda: misaligned(4, 9344, dtype=u8), "be aligned to 8 bytes", "1 past")
for op in (QUANT_INSERT, KV_NORM_INSERT):
    case(op, "k_cache", lambda: zeros(4, 9344), "be torch.uint8", "torch.bfloat16")

op, name = KV_ROPE_INSERT, "k_cache"
formats = "be torch.uint8 or torch.bfloat16 or torch.float8_e4m3fn"
case(op, name, lambda: zeros(4, 16, 512, dtype=f32), formats, "torch.float32")
case(op, name, lambda: zeros(4, 16, 512, dtype=fp16), formats, "torch.float16")
case(op, name, lambda: zeros(4, 16, 511), r"have shape \[num_blocks, .*, 512\]", r"\[4, 16, 511\]")
name = "fp8_scale"
present = "be a tensor where k_cache is torch.float8_e4m3fn"
case(op, name, lambda: None, present, "None")
case(op, name, lambda: zeros(2, dtype=f32), "have one element", r"shape \[2\]")
case(op, name, lambda: zeros(1), "be torch.float32", "torch.bfloat16")
no_v41 = "be False unless k_cache is torch.uint8"
case(op, "kv_mxfp8", lambda: True, no_v41, "torch.float8_e4m3fn")

op, name = KV_NORM_INSERT, "norm_weight"
weights = "be torch.bfloat16 or torch.float32"
case(op, name, lambda: zeros(512, dtype=fp16), weights, "torch.float16")
case(op, name, lambda: zeros(511), r"have shape \[512\]", r"\[511\]")
case(op, name, lambda: zeros(1, 512), r"have shape \[512\]", r"\[1, 512\]")
case(op, name, lambda: zeros(1024)[::2], CONTIGUOUS, r"strides \[2\]")
case(op, name, lambda: misaligned(512), ALIGNED, "2 past")

op, name = QUANT_INSERT, "q_head_padded"
padded = r"be 0 or in \[q_in.size\(1\) = 3, \d+\]"
for heads_padded in (2, -1, 2**40):
    case(op, name, lambda n=heads_padded: n, padded, str(heads_padded))
name = "q_out"
shape = r"have shape \[N, P, 512\] with N = kv.size\(0\) = 17, P = q_head_padded = 3"
case(op, name, lambda: zeros(T, H + 1, 512), shape, r"\[17, 4, 512\]")
case(op, name, lambda: zeros(T - 1, H, 512), shape, r"\[16, 3, 512\]")
same_dtype = "have the dtype of kv, torch.bfloat16"
case(op, name, lambda: zeros(T, H, 512, dtype=fp16), same_dtype, "torch.float16")
case(op, name, lambda: gapped((T, H, 512), (1540, 512, 1)), ROW_STRIDE, "3080 bytes")
case(op, name, lambda: misaligned(T, H, 512), ALIGNED, "2 past")

op, name = FULL_BF16_INSERT, "k_cache"
unquantized = r"have shape \[num_blocks, cache_block_size, 512\]"
case(op, name, lambda: zeros(4, 16, 512, dtype=fp16), "be torch.bfloat16", "torch.float16")
case(op, name, lambda: zeros(4, 16, 512, dtype=u8), "be torch.bfloat16", "torch.uint8")
case(op, name, lambda: zeros(4, 8, 512), unquantized, r"\[4, 8, 512\]")
case(op, name, lambda: zeros(4, 8192), unquantized, r"\[4, 8192\]")
case(op, name, lambda: gapped((2, 16, 512), (8256, 516, 1)), ROW_STRIDE, "1032 bytes")
case(op, name, lambda: gapped((2, 16, 512), (8196, 512, 1)), ROW_STRIDE, "16392 bytes")
case(op, name, lambda: misaligned(4, 16, 512), ALIGNED, "2 past")

op = FULL_FP8_INSERT
case(op, "k_cache", lambda: zeros(4, 16, 512), "be torch.float8_e4m3fn", "torch.bfloat16")
case(op, "k_cache", lambda: zeros(4, 16, 576, dtype=fp8), unquantized, r"\[4, 16, 576\]")
case(op, "q_fp8", lambda: zeros(T, H, 512), "be torch.float8_e4m3fn", "torch.bfloat16")
like_q = r"have shape \[N, H, 512\] with N = .*17.*H = .*3"
case(op, "q_fp8", lambda: zeros(T, H + 1, 512, dtype=fp8), like_q, r"\[17, 4, 512\]")
case(op, "q_fp8", lambda: misaligned(T, H, 512, dtype=fp8), E4M3_ALIGNED, "1 past")
case(op, "q_fp8", lambda: gapped((T, H, 512), (1540, 512, 1), fp8), E4M3_ROW_STRIDE, "1540 bytes")
case(op, "q_fp8", lambda: gapped((T, H, 512), (1560, 516, 1), fp8), E4M3_ROW_STRIDE, "516 bytes")
dense_q = r"\[3072, 1024, 2\]"
case(op, "q_fp8", lambda: gapped((T, H, 512), (3072, 1024, 2), fp8), DENSE_ROWS, dense_q)
for op in (KV_ROPE_INSERT, FULL_FP8_INSERT):
    name = "k_cache"
    case(op, name, lambda: misaligned(4, 16, 512, dtype=fp8), E4M3_ALIGNED, "1 past")
    case(op, name, lambda: gapped((2, 16, 512), (8196, 512, 1), fp8), E4M3_ROW_STRIDE, "8196 bytes")
    case(op, name, lambda: gapped((2, 16, 512), (8256, 516, 1), fp8), E4M3_ROW_STRIDE, "516 bytes")
    value = partial(gapped, (2, 16, 512), (16384, 1024, 2), fp8)
    case(op, name, value, DENSE_ROWS, r"strides \[16384, 1024, 2\]")
op = FULL_FP8_INSERT
for scale in ("fp8_scale", "q_fp8_scale_inv"):
    case(op, scale, lambda: zeros(2, dtype=f32), "have one element", r"shape \[2\]")
    case(op, scale, lambda: zeros(1, dtype=fp16), "be torch.float32", "torch.float16")


def case_id(case: Case) -> str:
    op, argument, _, expected, got = case
    return f"{op.removeprefix('fused_deepseek_v4_')}-{argument}-{expected}-{got}"


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_message(seed: int, case: Case) -> None:
    op, argument, make_value, expected, got = case
    call = make_call(
        op,
        torch.Generator().manual_seed(seed),
        num_tokens=T,
        num_heads=H,
        block_size=BLOCK_SIZE,
        kind="fp8" if argument in ("fp8_scale", "kv_mxfp8") and op == KV_ROPE_INSERT else None,
        with_q_out=argument == "q_out",
    )
    call.args[argument] = make_value()
    before = call.clone()
    pattern = rf"^deepseek_mla::{op}: {argument} must {expected}.*, got .*{got}"
    with pytest.raises(RuntimeError, match=pattern):
        call.run(deepseek_mla)
    for tensor_name, tensor in call.args.items():
        if isinstance(tensor, torch.Tensor):
            storages = [mla_calls.whole_storage(t) for t in (tensor, before.args[tensor_name])]
            assert torch.equal(*storages)


@pytest.mark.parametrize("name", ["q_in", "q_out"])
def test_interleaved_rows_must_be_contiguous(seed: int, name: str) -> None:
    call = make_call(
        QUANT_INSERT,
        torch.Generator().manual_seed(seed),
        num_tokens=T,
        num_heads=H,
        is_q_interleaved=True,
        with_q_out=True,
    )
    for q in ("q_in", "q_out"):
        call.args[q] = zeros(T, H, 512)
    call.args[name] = gapped((T, H, 512), (1600, 512, 1))
    with pytest.raises(RuntimeError, match=rf"{QUANT_INSERT}.*: {name} must be contiguous.*, got"):
        call.run(deepseek_mla)


def test_v41_blocks_must_have_room(seed: int) -> None:
    call = make_call(QUANT_INSERT, torch.Generator().manual_seed(seed), kind="v41")
    call.args["k_cache"] = zeros(4, BLOCK_SIZE * 528 - 1, dtype=torch.uint8)
    message = rf"{QUANT_INSERT}: k_cache must have .* = 8448 bytes a block, got shape \[4, 8447\]"
    with pytest.raises(RuntimeError, match=message):
        call.run(deepseek_mla)


@pytest.mark.parametrize("op", [QUANT_INSERT, KV_ROPE_INSERT])
@pytest.mark.parametrize("shape", [(4, BLOCK_SIZE, 584), (4, BLOCK_SIZE, 527), (4, 8, 528)])
def test_v41_records_must_have_528_bytes(seed: int, shape: tuple[int, ...], op: str) -> None:
    call = make_call(op, torch.Generator().manual_seed(seed), kind="v41")
    call.args["k_cache"] = zeros(*shape, dtype=torch.uint8)
    expected = r"must have shape \[num_blocks, cache_block_size, 528\] with .* = 16"
    message = rf"{op}: k_cache {expected}, got {re.escape(str(list(shape)))}"
    with pytest.raises(RuntimeError, match=message):
        call.run(deepseek_mla)


def test_query_rows_must_fit_a_grid(seed: int) -> None:
    """Only padding gets there: the rows of the other operators would take terabytes."""
    call = make_call(QUANT_INSERT, torch.Generator().manual_seed(seed), num_tokens=512)
    call.args["q_head_padded"] = 4194303
    message = r"tokens \* \(heads \+ 1\) must be at most 2147483647, got 2147483648"
    with pytest.raises(RuntimeError, match=rf"^deepseek_mla::{QUANT_INSERT}: {message}"):
        call.run(deepseek_mla)


@pytest.fixture
def limited_memory() -> Iterator[None]:
    """No new memory once 1 TiB of addresses are taken, whatever the kernel would promise."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = 1 << 40
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.usefixtures("limited_memory")
def test_result_too_large(seed: int) -> None:
    call = make_call(QUANT_INSERT, torch.Generator().manual_seed(seed), num_heads=H)
    num_tokens, heads_padded = 70000, 30000
    call.args["q_in"] = repeated((1, H, 512), (num_tokens, H, 512))
    call.args["kv"] = repeated((1, 512), (num_tokens, 512))
    call.args["position_ids"] = zeros(num_tokens, dtype=torch.int64)
    call.args["q_head_padded"] = heads_padded
    cache = call.args["k_cache"].clone()
    message = (
        rf"^deepseek_mla::{QUANT_INSERT}: cannot allocate the result, "
        r"\[70000, 30000, 512\] torch\.bfloat16 \(\S+ GiB\) on cpu"
    )
    with pytest.raises(torch.OutOfMemoryError, match=message):
        call.run(deepseek_mla)
    assert torch.equal(call.args["k_cache"], cache)


@pytest.mark.parametrize("op", OPS)
def test_bad_argument_of_an_empty_batch(seed: int, op: str) -> None:
    """No tokens is no error; a wrong dtype still is."""
    call = make_call(op, torch.Generator().manual_seed(seed), num_tokens=0)
    call.args["slot_mapping"] = zeros(0, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=rf"{op}: slot_mapping must .*int64.*, got .*int32"):
        call.run(deepseek_mla)


def test_ignored_scale(seed: int) -> None:
    """A scale given for a cache that has none is not looked at."""
    call = make_call(KV_ROPE_INSERT, torch.Generator().manual_seed(seed), kind="bf16")
    expected = call.reference_of()
    call.args["fp8_scale"] = zeros(3)
    expected.args["fp8_scale"] = zeros(3)
    mla_calls.assert_same_bits(call.run(deepseek_mla), expected)
