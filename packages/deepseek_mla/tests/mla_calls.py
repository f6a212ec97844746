"""Random calls of the operators, on any device, and comparison of everything they touch.

A :class:`Call` holds one operator's arguments. Its tensors sit in larger storages filled with
random bytes, and two calls are compared by whole storages, so that a byte written outside a tensor,
in a gap between rows or in an input fails the comparison like a wrong value does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from deepseek_mla import reference

QUANT_INSERT = "fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert"
KV_ROPE_INSERT = "fused_deepseek_v4_kv_rope_insert"
KV_NORM_INSERT = "fused_deepseek_v4_kv_norm_rope_quant_insert"
FULL_BF16_INSERT = "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert"
FULL_FP8_INSERT = "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert"
OPS = (QUANT_INSERT, KV_ROPE_INSERT, KV_NORM_INSERT, FULL_BF16_INSERT, FULL_FP8_INSERT)

DTYPES = (torch.bfloat16, torch.float16)
Q_OPS = (QUANT_INSERT, FULL_BF16_INSERT, FULL_FP8_INSERT)

# Every way in which Q is read and written. All have 64 heads in the output.
Q_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "quant_insert": (QUANT_INSERT, {"num_heads": 64}),
    "padded": (QUANT_INSERT, {"num_heads": 16, "q_head_padded": 64}),
    "interleaved": (QUANT_INSERT, {"num_heads": 64, "is_q_interleaved": True}),
    "interleaved_padded": (
        QUANT_INSERT,
        {"num_heads": 16, "q_head_padded": 64, "is_q_interleaved": True},
    ),
    "full_bf16": (FULL_BF16_INSERT, {"num_heads": 64}),
    "full_fp8": (FULL_FP8_INSERT, {"num_heads": 64}),
}
# Sizes of a call, in heads of the output per multiprocessor, one within each entry of the tuning
# tables in csrc/fused_insert_tuning.cpp.
ROWS_PER_MULTIPROCESSOR = (1, 20, 50, 100, 200)
PADDED_ROWS_PER_MULTIPROCESSOR = (1, 10, 50, 200, 1100)
# Every variant at every tuning it can get: (variant, rows per multiprocessor).
TUNED_CALLS = [
    (variant, rows)
    for variant, (_, options) in Q_VARIANTS.items()
    for rows in (
        PADDED_ROWS_PER_MULTIPROCESSOR if "q_head_padded" in options else ROWS_PER_MULTIPROCESSOR
    )
]

GUARD_BYTES = 4096
CACHE_DTYPES = {
    "v4": torch.uint8,
    "v41": torch.uint8,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}


def strided(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> torch.Tensor:
    """A tensor of random bytes, with guard bytes before and after it in its storage."""
    itemsize = torch.empty((), dtype=dtype).element_size()
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    used = extent * itemsize if all(shape) else 0
    used += -used % 16
    storage = torch.randint(
        256,
        (used + 2 * GUARD_BYTES,),
        dtype=torch.uint8,
        generator=generator,
        device=generator.device,
    )
    return storage.view(dtype).as_strided(shape, strides, GUARD_BYTES // itemsize)


def dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for n in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(n, 1))
    return tuple(strides)


def whole_storage(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def clone_with_storage(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    storage = torch.empty_like(whole_storage(tensor), device=device)
    storage.copy_(whole_storage(tensor))
    return torch.empty(0, dtype=tensor.dtype, device=device).set_(
        storage.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def wide_values(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Normal values times powers of two that vary much by row and some by element."""
    device = generator.device
    row_spread = 20 if dtype == torch.bfloat16 else 6
    rows = (*shape[:-1], 1)
    exponent = torch.randint(-row_spread, row_spread + 1, rows, generator=generator, device=device)
    exponent = exponent + torch.randint(-4, 5, shape, generator=generator, device=device)
    values = torch.randn(shape, generator=generator, device=device)
    return torch.ldexp(values, exponent).to(dtype)


def cos_sin_table(max_position: int, generator: torch.Generator) -> torch.Tensor:
    """``[max_position, 64]``, unit vectors of random angles, unlike at every position."""
    angles = torch.rand((max_position, 32), generator=generator, device=generator.device) * 6.2832
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def shuffled_slots(count: int, num_slots: int, generator: torch.Generator) -> torch.Tensor:
    """Distinct slots in any order, about one in eight outside the cache."""
    device = generator.device
    slots = torch.randperm(num_slots, generator=generator, device=device)[:count]
    outside = torch.tensor(
        [-1, -(2**63), num_slots, num_slots + 1, 2**32, 2**63 - 1], device=device
    )
    picks = torch.randint(len(outside), (count,), generator=generator, device=device)
    is_outside = torch.rand((count,), generator=generator, device=device) < 0.125
    return torch.where(is_outside, outside[picks], slots)


def scattered_positions(
    count: int, max_position: int, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Positions, about one in eight outside the table."""
    device = generator.device
    positions = torch.randint(max_position, (count,), generator=generator, device=device)
    outside = torch.tensor([-1, -(2**31), max_position, 2**31 - 1], device=device)
    picks = torch.randint(len(outside), (count,), generator=generator, device=device)
    is_outside = torch.rand((count,), generator=generator, device=device) < 0.125
    return torch.where(is_outside, outside[picks], positions).to(dtype)


def make_cache(
    kind: str,
    num_blocks: int,
    block_size: int,
    generator: torch.Generator,
    *,
    rank: int = 3,
    block_padding: int = 0,
) -> torch.Tensor:
    """A cache of random bytes; ``block_padding`` is elements between blocks."""
    dtype = CACHE_DTYPES[kind]
    record = {"v4": 584, "v41": 528}.get(kind, 512)
    block_stride = block_size * record + block_padding
    if rank == 2:
        return strided((num_blocks, block_size * record), (block_stride, 1), dtype, generator)
    shape = (num_blocks, block_size, record)
    return strided(shape, (block_stride, record, 1), dtype, generator)


@dataclass
class Call:
    op: str
    args: dict[str, Any]
    kv_dtype: torch.dtype
    kind: str
    result: torch.Tensor | None = field(default=None)

    def clone(self, device: torch.device | str | None = None) -> Call:
        args = {
            name: clone_with_storage(value, device or value.device)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in self.args.items()
        }
        return Call(self.op, args, self.kv_dtype, self.kind)

    def copy_inputs_from(self, other: Call) -> None:
        for name, value in self.args.items():
            if isinstance(value, torch.Tensor):
                whole_storage(value).copy_(whole_storage(other.args[name]))

    def run(self, implementation: Any) -> Call:
        """Call this operator's function in a module: ``deepseek_mla`` or its reference."""
        self.result = getattr(implementation, self.op)(**self.args)
        return self

    def reference_of(self) -> Call:
        return self.clone().run(reference)


def make_call(
    op: str,
    generator: torch.Generator,
    *,
    num_tokens: int = 17,
    num_heads: int = 3,
    q_head_padded: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    kind: str | None = None,
    block_size: int = 16,
    cache_rank: int | None = None,
    block_padding: int = 0,
    slots_missing: int = 0,
    position_dtype: torch.dtype = torch.int64,
    max_position: int = 64,
    gaps: bool = False,
    weight_dtype: torch.dtype | None = None,
    with_q_out: bool = False,
    **flags: Any,
) -> Call:
    """A call with fresh random arguments on the generator's device.

    ``gaps`` puts 16-byte multiples between rows and heads. ``slots_missing`` makes
    ``slot_mapping`` shorter than the batch. ``flags`` are passed to the operator.
    """
    default_kind = {FULL_BF16_INSERT: "bf16", FULL_FP8_INSERT: "fp8"}.get(op, "v4")
    kind = kind or default_kind
    num_blocks = -(-num_tokens // block_size) + 2
    num_slots = num_blocks * block_size

    def rows(shape: tuple[int, ...], row_dtype: torch.dtype, fill: bool = True) -> torch.Tensor:
        strides = dense(shape)
        if gaps:
            strides = (528,) if len(shape) == 1 else (shape[1] * 528 + 32, 528, 1)
            strides = (544, 1) if len(shape) == 2 else strides
        tensor = strided(shape, strides, row_dtype, generator)
        if fill:
            tensor.copy_(wide_values(shape, row_dtype, generator))
        return tensor

    kv = rows((num_tokens, 512), dtype)
    common: dict[str, Any] = {
        "k_cache": make_cache(
            kind,
            num_blocks,
            block_size,
            generator,
            rank=cache_rank or (2 if kind in ("v4", "v41") and op == QUANT_INSERT else 3),
            block_padding=block_padding,
        ),
        "slot_mapping": shuffled_slots(num_tokens - slots_missing, num_slots, generator),
        "position_ids": scattered_positions(num_tokens, max_position, position_dtype, generator),
        "cos_sin_cache": cos_sin_table(max_position, generator),
    }
    q_shape = (num_tokens, num_heads, 512)
    scales = torch.rand((2, 1), generator=generator, device=generator.device) + 0.5
    if op == QUANT_INSERT:
        q_head_padded = num_heads if q_head_padded is None else q_head_padded
        args = {"q_in": rows(q_shape, dtype), "kv": kv, **common, "q_head_padded": q_head_padded}
        args |= {"eps": 1e-6, "cache_block_size": block_size, **flags}
        args["kv_mxfp8"] = kind == "v41"
        if with_q_out:
            args["q_out"] = rows((num_tokens, q_head_padded, 512), dtype, fill=False)
    elif op == KV_ROPE_INSERT:
        args = {"kv": kv, **common, "cache_block_size": block_size, "kv_mxfp8": kind == "v41"}
        if kind == "fp8":
            args["fp8_scale"] = scales[0].clone()
    elif op == KV_NORM_INSERT:
        weight = torch.randn(512, generator=generator, device=generator.device)
        args = {"kv": kv, "norm_weight": weight.to(weight_dtype or dtype), **common}
        args |= {"eps": 1e-6, "cache_block_size": block_size}
    elif op == FULL_BF16_INSERT:
        args = {"q": rows(q_shape, dtype), "kv": kv, **common}
        args |= {"eps": 1e-6, "cache_block_size": block_size, **flags}
    else:
        args = {"q": rows(q_shape, dtype), "kv": kv}
        args["q_fp8"] = rows(q_shape, torch.float8_e4m3fn, fill=False)
        args |= {**common, "fp8_scale": scales[0].clone(), "q_fp8_scale_inv": scales[1].clone()}
        args |= {"eps": 1e-6, "cache_block_size": block_size, **flags}
    return Call(op, args, dtype, kind)


def _canonical_bits(call: Call, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's storage with every NaN of a 16-bit float replaced by one pattern."""
    storage = whole_storage(tensor).clone()
    if tensor.dtype in DTYPES:
        values = storage.view(tensor.dtype)
        storage.view(torch.int16).masked_fill_(values.isnan(), 0x7FFF)
    elif name == "k_cache" and call.kind == "v4":
        shape = (tensor.shape[0], call.args["cache_block_size"], 64)
        strides = (tensor.stride(0) // 2, 288, 1)
        rope = storage.view(torch.int16).as_strided(
            shape, strides, tensor.storage_offset() // 2 + 224
        )
        rope.masked_fill_(rope.contiguous().view(call.kv_dtype).isnan(), 0x7FFF)
    return storage


def assert_same_bits(actual: Call, expected: Call) -> None:
    """Every byte of every argument and of the result is equal, NaN payloads of 16 bits apart."""
    pairs = {
        name: (value, expected.args[name])
        for name, value in actual.args.items()
        if isinstance(value, torch.Tensor)
    }
    if isinstance(expected.result, torch.Tensor):
        assert actual.result is not None
        assert actual.result.shape == expected.result.shape
        assert actual.result.dtype == expected.result.dtype
        assert actual.result.stride() == expected.result.stride()
        pairs["result"] = (actual.result, expected.result)
    else:
        assert actual.result is None
    for name, (got, want) in pairs.items():
        got_bits = _canonical_bits(actual, name, got)
        want_bits = _canonical_bits(expected, name, want).to(got_bits.device)
        different = (got_bits != want_bits).nonzero()
        assert different.numel() == 0, (
            f"{actual.op}: {len(different)} bytes of {name} {tuple(got.shape)} {got.dtype} differ, "
            f"storage offsets {different.flatten()[:8].tolist()} (tensor starts at "
            f"{got.storage_offset() * got.element_size()}): got "
            f"{got_bits[different].flatten()[:8].tolist()}, expected "
            f"{want_bits[different].flatten()[:8].tolist()}"
        )


def make_tuned_call(
    variant: str,
    rows_per_multiprocessor: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.bfloat16,
) -> Call:
    """A call of ``Q_VARIANTS`` of about that size for the current CUDA device."""
    op, options = Q_VARIANTS[variant]
    multiprocessors = torch.cuda.get_device_properties().multi_processor_count
    num_tokens = max(1, rows_per_multiprocessor * multiprocessors // 64)
    return make_call(op, generator, num_tokens=num_tokens, dtype=dtype, **options)


def adversarial_rows(dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """``[n, 512]``: rows at the edges of the quantisation's arithmetic.

    Where a value shall be an absmax, its neighbours in ``dtype`` have rows too.
    """
    info = torch.finfo(dtype)
    low, high = (-26, 119) if dtype == torch.bfloat16 else (-26, 7)
    exponents = torch.arange(low, high + 1, dtype=torch.float64)
    absmax = (448.0 * torch.exp2(exponents)).to(dtype)
    bits = absmax.view(torch.int16)
    edges = torch.cat((bits - 1, bits, bits + 1)).view(dtype)
    fractions = torch.linspace(-1, 1, 512, dtype=torch.float64)
    ramps = (edges.double()[:, None] * fractions).to(dtype)
    ramps[:, ::64] = edges[:, None]

    def constant(value: float) -> torch.Tensor:
        return torch.full((1, 512), value, dtype=dtype)

    zeros = torch.zeros(2, 512, dtype=dtype)
    zeros[1, 1::2] = -0.0
    subnormals = (torch.arange(512) - 256).to(torch.int16).abs().view(dtype)[None]
    below_floor = torch.linspace(-1e-4, 1e-4, 512, dtype=torch.float64).to(dtype)[None]
    halfway = torch.tensor([448.0, 2**-10, 3 * 2**-10, 2**-9, 17.0, 19.0, 432.0, 440.0])
    halfway = torch.cat((halfway, -halfway)).repeat(32).to(dtype)[None]

    def with_specials(*specials: float) -> torch.Tensor:
        row = torch.linspace(-3, 3, 512, dtype=torch.float64).to(dtype)
        for i, special in enumerate(specials):
            row[37 + 131 * i] = special
        return row[None]

    inf, nan = float("inf"), float("nan")
    rows = torch.cat(
        (
            ramps,
            zeros,
            subnormals,
            -subnormals,
            below_floor,
            halfway,
            constant(info.max),
            constant(-info.max),
            constant(info.tiny),
            constant(nan),
            constant(inf),
            constant(-inf),
            with_specials(nan),
            with_specials(inf),
            with_specials(-inf, nan, inf, nan),
            with_specials(nan, nan, nan, -nan),
            with_specials(info.max, -info.max, info.tiny, -0.0),
        )
    )
    return rows.to(device)
