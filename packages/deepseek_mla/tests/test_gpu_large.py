"""Offsets beyond 31 and 32 bits: caches above 2 and 4 GiB, batches of 131,072 tokens."""

from __future__ import annotations

import itertools

import deepseek_mla
import mla_calls
import pytest
import torch
from deepseek_mla import reference
from mla_calls import make_call

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GIB = 1 << 30
POISON = 0xA5


def need_memory(size: int) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < size:
        pytest.skip(f"needs {size / GIB:.1f} GiB of free GPU memory, there are {free / GIB:.1f}")


def is_poison(storage: torch.Tensor) -> bool:
    return all(bool((part == POISON).all()) for part in storage.split(GIB // 2))


@pytest.mark.parametrize("gib", [2.2, 4.2])
@pytest.mark.parametrize(
    ("op", "kind"),
    [
        (mla_calls.QUANT_INSERT, "v4"),
        (mla_calls.QUANT_INSERT, "v41"),
        (mla_calls.KV_ROPE_INSERT, "bf16"),
        (mla_calls.KV_NORM_INSERT, "v4"),
        (mla_calls.FULL_BF16_INSERT, "bf16"),
        (mla_calls.FULL_FP8_INSERT, "fp8"),
    ],
)
def test_slots_at_the_end_of_a_large_cache(seed: int, op: str, kind: str, gib: float) -> None:
    """The last blocks hold what a small cache gets, and no other byte changes."""
    need_memory(int((gib + 1.5) * GIB))
    generator = torch.Generator("cuda").manual_seed(seed)
    small = make_call(op, generator, num_tokens=100, kind=kind, block_size=16)
    small_cache = small.args["k_cache"]
    large = small.clone()
    block_bytes = small_cache.stride(0) * small_cache.element_size()
    blocks = int(gib * GIB) // block_bytes
    storage = torch.full((blocks * block_bytes,), POISON, dtype=torch.uint8, device="cuda")
    cache = storage.view(small_cache.dtype).as_strided(
        (blocks, *small_cache.shape[1:]), small_cache.stride()
    )
    shift = (blocks - small_cache.shape[0]) * 16
    slots = small.args["slot_mapping"]
    inside = (slots >= 0) & (slots < small_cache.shape[0] * 16)
    large.args["slot_mapping"] = torch.where(inside, slots + shift, slots.clamp(max=-1))
    large.args["k_cache"] = cache
    mla_calls.whole_storage(small_cache).fill_(POISON)
    small.run(reference)
    large.run(deepseek_mla)
    tail = cache[-small_cache.shape[0] :].contiguous().view(torch.uint8)
    assert torch.equal(tail, small_cache.contiguous().view(torch.uint8))
    assert not bool((tail == POISON).all())
    used = tail.numel()
    assert is_poison(storage[: storage.numel() - used])


@pytest.mark.parametrize(
    ("op", "num_tokens", "with_q_out"),
    [
        *itertools.product(mla_calls.Q_OPS, (24_576, 131_072), (True,)),
        (mla_calls.QUANT_INSERT, 24_576, False),
    ],
)
def test_many_tokens_at_128_heads(seed: int, op: str, num_tokens: int, with_q_out: bool) -> None:
    """All KV, and Q of sampled tokens, the last among them, against the reference.

    ``with_q_out`` matters to the operator that takes ``q_out``, which else allocates its result.
    """
    q_bytes = num_tokens * 128 * 512 * 2
    outputs = {mla_calls.QUANT_INSERT: 1.0, mla_calls.FULL_FP8_INSERT: 0.5}.get(op, 0.0)
    need_memory(int(q_bytes * (1 + outputs)) + 4 * GIB)
    generator = torch.Generator("cuda").manual_seed(seed)
    call = make_call(op, generator, num_tokens=num_tokens, num_heads=1, block_size=64)
    q_name = "q_in" if op == mla_calls.QUANT_INSERT else "q"
    q = torch.empty(num_tokens, 128, 512, dtype=torch.bfloat16, device="cuda")
    for part in q.split(4096):
        part.normal_(generator=generator)
    call.args[q_name] = q
    if op == mla_calls.QUANT_INSERT:
        call.args["q_head_padded"] = 128
    if op == mla_calls.QUANT_INSERT and with_q_out:
        call.args["q_out"] = torch.full_like(q, torch.nan)
    if op == mla_calls.FULL_FP8_INSERT:
        call.args["q_fp8"] = torch.empty(q.shape, dtype=torch.float8_e4m3fn, device="cuda")
    samples = torch.randint(num_tokens, (256,), generator=generator, device="cuda")
    samples = torch.cat((samples, torch.tensor([0, num_tokens - 1], device="cuda")))
    per_token = {q_name, "kv", "q_out", "q_fp8", "position_ids", "slot_mapping"}
    sampled_args = {
        name: value.view(torch.uint8)[samples].view(value.dtype)
        if name == "q_fp8"
        else value[samples]
        if name in per_token
        else value
        for name, value in call.args.items()
    }
    # Q of the sampled tokens, without an insert; then all KV, with hardly any Q.
    sampled = mla_calls.Call(op, sampled_args, call.kv_dtype, call.kind)
    sampled.args["slot_mapping"] = sampled.args["slot_mapping"][:0]
    sampled.run(reference)
    cache = mla_calls.clone_with_storage(call.args["k_cache"], "cuda")
    reference.fused_deepseek_v4_kv_rope_insert(
        call.args["kv"],
        cache,
        call.args["slot_mapping"],
        call.args["position_ids"],
        call.args["cos_sin_cache"],
        64,
        call.args.get("fp8_scale"),
        False,
    )
    call.run(deepseek_mla)

    def output(side: mla_calls.Call) -> torch.Tensor:
        in_place = "q_fp8" if op == mla_calls.FULL_FP8_INSERT else "q"
        rows = side.args[in_place] if side.result is None else side.result
        return rows.view(torch.uint8)

    assert torch.equal(output(call)[samples], output(sampled))
    assert torch.equal(
        mla_calls.whole_storage(call.args["k_cache"]), mla_calls.whole_storage(cache)
    )
