"""A call of each operator; as a script, on the CPU.

Needs nothing but torch. No tensor here depends on torch's default device and dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import deepseek_mla
import torch
from torch import Tensor

NUM_TOKENS, NUM_HEADS, BLOCK_SIZE = 5, 2, 4


def arguments(device: torch.device) -> dict[str, Tensor]:
    """What the operators take, but for caches and what is a number."""

    def values(*shape: int) -> Tensor:
        index = torch.arange(math.prod(shape), dtype=torch.int64, device=device)
        return ((index * 37 % 101 - 50).to(torch.float32) / 16).to(torch.bfloat16).view(shape)

    index = torch.arange(NUM_TOKENS, dtype=torch.int64, device=device)
    angles = torch.arange(64 * 32, dtype=torch.int64, device=device).view(64, 32).to(torch.float32)
    return {
        "q": values(NUM_TOKENS, NUM_HEADS, 512),
        "kv": values(NUM_TOKENS, 512),
        "weight": values(512),
        "slots": (index * 3 + 2) % (2 * BLOCK_SIZE),
        "positions": index * 7,
        "table": torch.cat((angles.cos(), angles.sin()), dim=1),
        "scale": torch.full((1,), 0.5, dtype=torch.float32, device=device),
    }


def new_cache(record: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((2, BLOCK_SIZE, record), 0, dtype=dtype, device=device)


def call_all(a: dict[str, Tensor], caches: dict[str, Tensor]) -> list[Tensor]:
    """All that the operators write: queries, and the caches."""
    m = deepseek_mla
    where = (a["slots"], a["positions"], a["table"])
    queries = [
        m.fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert(
            a["q"], a["kv"], caches["v4"], *where, 4, 1e-6, BLOCK_SIZE
        )
    ]
    out = torch.empty((NUM_TOKENS, 4, 512), dtype=torch.bfloat16, device=a["q"].device)
    queries.append(
        m.fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert(
            a["q"], a["kv"], caches["out"], *where, 4, 1e-6, BLOCK_SIZE, q_out=out
        )
    )
    m.fused_deepseek_v4_kv_rope_insert(a["kv"], caches["v41"], *where, BLOCK_SIZE, kv_mxfp8=True)
    m.fused_deepseek_v4_kv_norm_rope_quant_insert(
        a["kv"], a["weight"], caches["norm"], *where, 1e-6, BLOCK_SIZE
    )
    queries.append(a["q"].clone())
    m.fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert(
        queries[-1], a["kv"], caches["bf16"], *where, 1e-6, BLOCK_SIZE
    )
    queries.append(torch.empty(a["q"].shape, dtype=torch.float8_e4m3fn, device=a["q"].device))
    m.fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert(
        *(a["q"], a["kv"], queries[-1], caches["fp8"], *where),
        *(a["scale"], a["scale"], 1e-6, BLOCK_SIZE),
    )
    read = m.dequantize_cache(caches["v4"], a["slots"], BLOCK_SIZE)
    return [*queries, *caches.values(), read]


def new_caches(device: torch.device) -> dict[str, Tensor]:
    return {
        "v4": new_cache(584, torch.uint8, device),
        "out": new_cache(584, torch.uint8, device),
        "v41": new_cache(528, torch.uint8, device),
        "norm": new_cache(584, torch.uint8, device),
        "bf16": new_cache(512, torch.bfloat16, device),
        "fp8": new_cache(512, torch.float8_e4m3fn, device),
    }


def same_bits(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return len(actual) == len(expected) and all(
        (a.dtype, a.shape, a.device) == (e.dtype, e.shape, e.device)
        and torch.equal(a.view(torch.uint8), e.view(torch.uint8))
        for a, e in zip(actual, expected, strict=True)
    )


def check_values(a: dict[str, Tensor], results: list[Tensor]) -> None:
    """Against what the arguments say, roughly."""
    rows = results[-1][:, :448]
    kv = a["kv"][:, :448].to(torch.float32)
    assert float((rows - kv).norm() / kv.norm()) < 0.05
    q = a["q"].to(torch.float32)
    q = q / (q.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    got = results[0][:, :NUM_HEADS].to(torch.float32)
    assert float((got - q)[..., :448].abs().max()) < 0.02
    # A rotation keeps the length of each pair.
    lengths = [x[..., 448:].unflatten(-1, (32, 2)).norm(dim=-1) for x in (got, q)]
    assert float((lengths[0] - lengths[1]).abs().max()) < 0.03
    assert not results[0][:, NUM_HEADS:].any()


def check_under(default: Callable[[], AbstractContextManager[Any]], device: torch.device) -> None:
    """Results under a process-wide default are what they are without, for tensors of both."""
    inputs = arguments(device)
    expected = call_all(inputs, new_caches(device))
    check_values(inputs, expected)
    caches = new_caches(device)
    with default():
        inputs_under, caches_under = arguments(device), new_caches(device)
        results = [call_all(inputs_under, new_caches(device)), call_all(inputs, caches)]
    results.append(call_all(inputs_under, caches_under))
    for result in results:
        assert same_bits(result, expected)


if __name__ == "__main__":
    inputs = arguments(torch.device("cpu"))
    check_values(inputs, call_all(inputs, new_caches(torch.device("cpu"))))
    print(f"deepseek_mla {deepseek_mla.__version__} works under torch {torch.__version__}")
