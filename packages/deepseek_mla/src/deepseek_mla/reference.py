"""Plain PyTorch implementation of the operators, for any device.

It is the oracle of the tests and the CPU implementation. Every rounding is the one the CUDA
kernels make, in the same order, so results agree to the bit (NaN payloads of 16-bit values apart).
The functions named after an operator have its arguments and write the same tensors; they do not
check their arguments (``torch.ops.deepseek_mla`` does).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

HEAD_DIM = 512
ROPE_DIM = 64
NOPE_DIM = HEAD_DIM - ROPE_DIM
E4M3_MAX = 448.0
E4M3_NAN = 0x7F
E8M0_BIAS = 127
E8M0_NAN = 255
ABSMAX_FLOOR = 1e-4

# Head rows taken at once, which bounds temporaries to tens of MiB whatever the batch.
_CHUNK_ROWS = 8192
# A chunk of Q in interleaved storage holds this many dimensions of every head.
_INTERLEAVE = 16


@dataclass(frozen=True)
class PackedFormat:
    """A layout of quantised tokens in a paged ``uint8`` cache.

    Token ``i`` of a block has its data at ``i * data_stride`` and its scales at ``scale_offset +
    i * scale_stride``, bytes from the start of the block.
    """

    quantized_dims: int
    """Leading dimensions stored as E4M3; the others keep the input dtype."""
    block: int
    """Values that share one scale."""
    data_bytes: int
    data_stride: int
    scale_bytes: int
    scale_stride: int
    scale_offset: int
    block_bytes: int

    @property
    def num_scales(self) -> int:
        """Scales of a token."""
        return self.quantized_dims // self.block


def packed_format(cache_block_size: int, kv_mxfp8: bool) -> PackedFormat:
    """Layout of a cache block of ``cache_block_size`` tokens: V4, or V4.1 if ``kv_mxfp8``.

    V4 (584 bytes a token): 448 E4M3 values and 64 values of the input dtype for every token, then
    for every token 7 scales and a zero byte. V4.1 (528 bytes a token): 512 E4M3 values and their
    16 scales, token by token.
    """
    if kv_mxfp8:
        record = HEAD_DIM + HEAD_DIM // 32
        return PackedFormat(
            quantized_dims=HEAD_DIM,
            block=32,
            data_bytes=HEAD_DIM,
            data_stride=record,
            scale_bytes=HEAD_DIM // 32,
            scale_stride=record,
            scale_offset=HEAD_DIM,
            block_bytes=cache_block_size * record,
        )
    data = NOPE_DIM + 2 * ROPE_DIM
    return PackedFormat(
        quantized_dims=NOPE_DIM,
        block=64,
        data_bytes=data,
        data_stride=data,
        scale_bytes=8,
        scale_stride=8,
        scale_offset=cache_block_size * data,
        block_bytes=cache_block_size * (data + 8),
    )


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` of float32 tensors, rounded once to float32.

    The product is exact in float64. The sum is rounded to odd there: its exact error (two-sum)
    moves an inexact even result to the odd neighbour on the error's side, after which the rounding
    to float32 is the only one that shows (Boldo and Melquiond, "Emulation of a FMA and
    correctly-rounded sums", 2008).
    """
    product = a.double() * b.double()
    addend = c.double()
    total = product + addend
    bb = total - product
    error = (product - (total - bb)) + (addend - bb)
    bits = total.view(torch.int64)
    away_from_zero = (error > 0) == (total > 0)
    odd = bits + torch.where(away_from_zero, 1, -1)
    inexact_even = torch.isfinite(total) & (error != 0) & ((bits & 1) == 0)
    return torch.where(inexact_even, odd, bits).view(torch.float64).float()


def sum_of_squares(x: Tensor) -> Tensor:
    """Sum over the last dimension (512) of squares, float32, in the kernels' fixed order.

    Each run of 8 elements is summed from left to right with :func:`fma`, then the 64 sums are
    folded in halves. The order does not depend on the batch, so neither do the bits of a row.

    Args:
        x: ``[..., 512]`` float32, holding bfloat16 or float16 values.

    Returns:
        ``[..., 1]`` float32.
    """
    chunks = x.reshape(*x.shape[:-1], HEAD_DIM // 8, 8)
    sums = torch.zeros_like(chunks[..., 0])
    for i in range(8):
        sums = fma(chunks[..., i], chunks[..., i], sums)
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """``x * rsqrt(mean(x**2) + eps)`` over the last dimension, without a weight.

    Args:
        x: ``[..., 512]`` float32, holding bfloat16 or float16 values.
        eps: added to the mean, rounded to float32.

    Returns:
        ``[..., 512]`` float32.
    """
    mean = sum_of_squares(x) * (1.0 / HEAD_DIM)
    biased = mean + torch.tensor(eps, dtype=torch.float32, device="cpu")
    # Both float64 operations round, yet over all 2**24 float32 significands and exponent parities
    # the result rounds to the correct float32.
    return x * (1.0 / torch.sqrt(biased.double())).float()


def gather_cos_sin(cos_sin_cache: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the table at the positions.

    Args:
        cos_sin_cache: ``[max_pos, 64]`` float32, 32 cosines then 32 sines.
        position_ids: ``[T]`` int64 or int32.

    Returns:
        Cosines ``[T, 32]``, sines ``[T, 32]`` and ``[T]`` bool: the position is inside the table.
        Where it is not, cosine and sine are zero.
    """
    max_position = cos_sin_cache.shape[0]
    in_range = (position_ids >= 0) & (position_ids < max_position)
    rows = cos_sin_cache.new_zeros((position_ids.shape[0], ROPE_DIM))
    inside = in_range.nonzero().squeeze(1)
    rows[inside] = cos_sin_cache[position_ids[inside].long()]
    return rows[:, : ROPE_DIM // 2], rows[:, ROPE_DIM // 2 :], in_range


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last 64 of 512 dimensions in interleaved (GPT-J) pairs.

    ``(e, o) -> (fma(e, cos, -(o * sin)), fma(e, sin, o * cos))`` in float32.

    Args:
        x: ``[..., 512]`` float32.
        cos: float32 that broadcasts to ``[..., 32]``.
        sin: float32 that broadcasts to ``[..., 32]``.

    Returns:
        ``[..., 512]`` float32.
    """
    even, odd = x[..., NOPE_DIM::2], x[..., NOPE_DIM + 1 :: 2]
    rotated = torch.stack((fma(even, cos, -(odd * sin)), fma(even, sin, odd * cos)), dim=-1)
    return torch.cat((x[..., :NOPE_DIM], rotated.flatten(-2)), dim=-1)


def quantize_e4m3(x: Tensor) -> Tensor:
    """Saturate to +-448 and round to nearest even E4M3.

    Args:
        x: float32, any shape. NaN becomes ``0x7F``; infinities saturate.

    Returns:
        uint8 of the same shape, the E4M3 bits.
    """
    bits = x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return bits.masked_fill(torch.isnan(x), E4M3_NAN)


def quantize_e4m3_ue8m0(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Quantise runs of ``block`` values to E4M3 with a power-of-two scale each.

    With ``m = max(absmax, 1e-4)``, the scale is ``2**e``, ``e = ceil(log2(m / 448))``, and a value
    is ``x * 2**-e``, saturated and rounded to nearest even.

    NaN elements are left out of the absmax and stored as E4M3 NaN. A run that has an infinity gets
    the E8M0 NaN as its scale, so that it reads back as NaN; its infinities and NaNs are stored as
    E4M3 NaN, its finite values as zeros of their sign.

    Args:
        x: ``[..., n]`` float32, ``n`` a multiple of ``block``.

    Returns:
        E4M3 bits ``[..., n]`` uint8, and E8M0 bits ``[..., n // block]`` uint8 (exponent + 127).
    """
    runs = x.reshape(*x.shape[:-1], x.shape[-1] // block, block)
    magnitude = torch.where(torch.isnan(runs), 0.0, runs.abs())
    absmax = magnitude.amax(-1).clamp_min(ABSMAX_FLOOR)
    is_inf = torch.isinf(absmax)
    # 448 is 1.75 * 2**8: adding 0.25 of a significand less one unit carries into the exponent
    # exactly where m exceeds 448 * 2**k.
    exponent = ((absmax.view(torch.int32) + 0x1FFFFF) >> 23) - 135
    inverse_scale = ((E8M0_BIAS - exponent) << 23).view(torch.float32).masked_fill(is_inf, 0.0)
    values = quantize_e4m3(runs * inverse_scale.unsqueeze(-1)).flatten(-2)
    scales = (exponent + E8M0_BIAS).clamp(0, 255).masked_fill(is_inf, E8M0_NAN)
    return values, scales.to(torch.uint8)


def decode_e8m0(scales: Tensor) -> Tensor:
    """``2**(byte - 127)`` in float32 for E8M0 bits (uint8); byte 255 is NaN."""
    exponent = scales.to(torch.int32)
    value = (exponent << 23).view(torch.float32)
    return value.masked_fill(exponent == 0, 2.0**-127).masked_fill(exponent == E8M0_NAN, torch.nan)


def pack_tokens(rows: Tensor, fmt: PackedFormat) -> tuple[Tensor, Tensor]:
    """Data and scale bytes of tokens in a packed format.

    Args:
        rows: ``[n, 512]`` bfloat16 or float16, rotated.

    Returns:
        ``[n, fmt.data_bytes]`` and ``[n, fmt.scale_bytes]``, uint8.
    """
    values, scales = quantize_e4m3_ue8m0(rows[:, : fmt.quantized_dims].float(), fmt.block)
    unquantized = rows[:, fmt.quantized_dims :].contiguous().view(torch.uint8)
    padding = scales.new_zeros((rows.shape[0], fmt.scale_bytes - fmt.num_scales))
    return torch.cat((values, unquantized), dim=1), torch.cat((scales, padding), dim=1)


def packed_views(
    k_cache: Tensor, cache_block_size: int, fmt: PackedFormat
) -> tuple[Tensor, Tensor]:
    """Views of a packed cache by token.

    Args:
        k_cache: ``[num_blocks, bytes]`` or ``[num_blocks, cache_block_size, record]`` uint8 with
            dense blocks. The stride between blocks is free.

    Returns:
        Data ``[num_blocks, cache_block_size, fmt.data_bytes]`` and scales ``[num_blocks,
        cache_block_size, fmt.scale_bytes]``, both aliasing ``k_cache``.
    """
    num_blocks, block_stride = k_cache.shape[0], k_cache.stride(0)
    data = k_cache.as_strided(
        (num_blocks, cache_block_size, fmt.data_bytes),
        (block_stride, fmt.data_stride, 1),
        k_cache.storage_offset(),
    )
    scales = k_cache.as_strided(
        (num_blocks, cache_block_size, fmt.scale_bytes),
        (block_stride, fmt.scale_stride, 1),
        k_cache.storage_offset() + fmt.scale_offset,
    )
    return data, scales


def rotate_kv(kv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of KV rows ``[n, 512]`` in float32, rounded to their dtype."""
    return apply_rope(kv.float(), cos, sin).to(kv.dtype)


def fused_deepseek_v4_kv_rope_insert(
    kv: Tensor,
    k_cache: Tensor,
    slot_mapping: Tensor,
    position_ids: Tensor,
    cos_sin_cache: Tensor,
    cache_block_size: int,
    fp8_scale: Tensor | None = None,
    kv_mxfp8: bool = False,
) -> None:
    """Reference of the operator of this name, and of every other one's insert.

    Rotates KV rows and writes them to their slots, in the format of the cache's dtype. A row is
    skipped if it has no slot (``slot_mapping`` is shorter than ``kv``), if its slot is negative or
    past the cache's end, or if its position is outside the table.
    """
    num_slots = k_cache.shape[0] * cache_block_size
    num_rows = slot_mapping.shape[0]
    cos, sin, in_range = gather_cos_sin(cos_sin_cache, position_ids[:num_rows])
    kept = ((slot_mapping >= 0) & (slot_mapping < num_slots) & in_range).nonzero().squeeze(1)
    if kept.numel() == 0:
        return
    rows = rotate_kv(kv[kept], cos[kept], sin[kept])
    slots = slot_mapping[kept]
    index = (slots // cache_block_size, slots % cache_block_size)
    if k_cache.dtype == torch.uint8:
        fmt = packed_format(cache_block_size, kv_mxfp8)
        data, scales = packed_views(k_cache, cache_block_size, fmt)
        data[index], scales[index] = pack_tokens(rows, fmt)
    elif k_cache.dtype == torch.float8_e4m3fn:
        assert fp8_scale is not None
        k_cache.view(torch.uint8)[index] = quantize_e4m3(rows.float() / fp8_scale.reshape(1))
    else:
        k_cache[index] = rows.to(k_cache.dtype)


def normalize_and_rotate_q(
    q: Tensor,
    position_ids: Tensor,
    cos_sin_cache: Tensor,
    eps: float,
    apply_q_norm: bool,
    apply_q_rope: bool,
) -> Tensor:
    """Q of ``[T, H, 512]`` in float32 before it is rounded.

    A token whose position is outside the table is not rotated.
    """
    x = q.float()
    if apply_q_norm:
        x = rms_norm(x, eps)
    if apply_q_rope:
        cos, sin, in_range = gather_cos_sin(cos_sin_cache, position_ids)
        rotated = apply_rope(x, cos.unsqueeze(1), sin.unsqueeze(1))
        x = torch.where(in_range.view(-1, 1, 1), rotated, x)
    return x


def _token_chunks(q: Tensor) -> Iterator[slice]:
    num_tokens, num_heads = q.shape[0], q.shape[1]
    step = max(1, _CHUNK_ROWS // max(1, num_heads))
    for start in range(0, num_tokens, step):
        yield slice(start, min(start + step, num_tokens))


def deinterleave_q(q: Tensor) -> Tensor:
    """View of a ``[T, H, 512]`` tensor stored in chunks ``[T, 32, H, 16]``: ``[T, H, 32, 16]``."""
    num_tokens, num_heads, _ = q.shape
    chunks = q.view(num_tokens, HEAD_DIM // _INTERLEAVE, num_heads, _INTERLEAVE)
    return chunks.transpose(1, 2)


def fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert(
    q_in: Tensor,
    kv: Tensor,
    k_cache: Tensor,
    slot_mapping: Tensor,
    position_ids: Tensor,
    cos_sin_cache: Tensor,
    q_head_padded: int,
    eps: float,
    cache_block_size: int,
    apply_q_norm: bool = True,
    kv_mxfp8: bool = False,
    apply_q_rope: bool = True,
    is_q_interleaved: bool = False,
    *,
    q_out: Tensor | None = None,
) -> Tensor:
    """Reference of the operator of this name; see :mod:`deepseek_mla.ops`."""
    num_tokens, num_heads, _ = q_in.shape
    if q_out is None:
        q_out = q_in.new_empty((num_tokens, q_head_padded, HEAD_DIM))
    if q_head_padded > 0 and num_tokens > 0:
        source, target = q_in, q_out
        if is_q_interleaved:
            source, target = deinterleave_q(q_in), deinterleave_q(q_out)
        for tokens in _token_chunks(q_in):
            x = normalize_and_rotate_q(
                source[tokens].reshape(tokens.stop - tokens.start, num_heads, HEAD_DIM),
                position_ids[tokens],
                cos_sin_cache,
                eps,
                apply_q_norm,
                apply_q_rope,
            )
            target[tokens, :num_heads] = x.to(q_out.dtype).view(target[tokens, :num_heads].shape)
        target[:, num_heads:] = 0
    fused_deepseek_v4_kv_rope_insert(
        kv,
        k_cache,
        slot_mapping,
        position_ids,
        cos_sin_cache,
        cache_block_size,
        kv_mxfp8=kv_mxfp8,
    )
    return q_out


def fused_deepseek_v4_kv_norm_rope_quant_insert(
    kv: Tensor,
    norm_weight: Tensor,
    k_cache: Tensor,
    slot_mapping: Tensor,
    position_ids: Tensor,
    cos_sin_cache: Tensor,
    eps: float,
    cache_block_size: int,
) -> None:
    """Reference of the operator of this name; see :mod:`deepseek_mla.ops`."""
    normalized = (rms_norm(kv.float(), eps) * norm_weight.float()).to(kv.dtype)
    fused_deepseek_v4_kv_rope_insert(
        normalized, k_cache, slot_mapping, position_ids, cos_sin_cache, cache_block_size
    )


def fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert(
    q: Tensor,
    kv: Tensor,
    k_cache: Tensor,
    slot_mapping: Tensor,
    position_ids: Tensor,
    cos_sin_cache: Tensor,
    eps: float,
    cache_block_size: int,
    apply_q_norm: bool = True,
) -> None:
    """Reference of the operator of this name; see :mod:`deepseek_mla.ops`."""
    for tokens in _token_chunks(q):
        q[tokens] = normalize_and_rotate_q(
            q[tokens], position_ids[tokens], cos_sin_cache, eps, apply_q_norm, True
        ).to(q.dtype)
    fused_deepseek_v4_kv_rope_insert(
        kv, k_cache, slot_mapping, position_ids, cos_sin_cache, cache_block_size
    )


def fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert(
    q: Tensor,
    kv: Tensor,
    q_fp8: Tensor,
    k_cache: Tensor,
    slot_mapping: Tensor,
    position_ids: Tensor,
    cos_sin_cache: Tensor,
    fp8_scale: Tensor,
    q_fp8_scale_inv: Tensor,
    eps: float,
    cache_block_size: int,
    apply_q_norm: bool = True,
) -> None:
    """Reference of the operator of this name; see :mod:`deepseek_mla.ops`."""
    q_bits = q_fp8.view(torch.uint8)
    for tokens in _token_chunks(q):
        x = normalize_and_rotate_q(
            q[tokens], position_ids[tokens], cos_sin_cache, eps, apply_q_norm, True
        )
        q_bits[tokens] = quantize_e4m3(x * q_fp8_scale_inv.reshape(1))
    fused_deepseek_v4_kv_rope_insert(
        kv, k_cache, slot_mapping, position_ids, cos_sin_cache, cache_block_size, fp8_scale
    )


def dequantize_cache(
    k_cache: Tensor,
    slots: Tensor,
    cache_block_size: int,
    kv_mxfp8: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    fp8_scale: Tensor | None = None,
) -> Tensor:
    """Read tokens back from any cache the operators write.

    Args:
        k_cache: the cache. uint8: packed V4, or V4.1 if ``kv_mxfp8``; float8_e4m3fn, bfloat16 or
            float16: ``[num_blocks, cache_block_size, 512]``.
        slots: ``[n]`` int64, each in ``[0, num_blocks * cache_block_size)``.
        cache_block_size: tokens in a block.
        kv_mxfp8: whether a uint8 cache holds V4.1 records.
        dtype: dtype of the KV that was inserted, in which a V4 record keeps its last 64 values.
        fp8_scale: one-element float32, the scale of a float8_e4m3fn cache. Without it the stored
            values are returned unscaled.

    Returns:
        ``[n, 512]`` float32.

    Raises:
        IndexError: a slot is outside the cache.
        ValueError: the cache's blocks do not have ``cache_block_size`` tokens.
    """
    if k_cache.dim() == 3 and k_cache.shape[1] != cache_block_size:
        raise ValueError(
            "dequantize_cache: k_cache must have shape [num_blocks, cache_block_size, ...] with "
            f"cache_block_size = {cache_block_size}, got {list(k_cache.shape)}"
        )
    num_slots = k_cache.shape[0] * cache_block_size
    if bool(((slots < 0) | (slots >= num_slots)).any()):
        raise IndexError(f"dequantize_cache: slots must be in [0, {num_slots}), got {slots}")
    index = (slots // cache_block_size, slots % cache_block_size)
    if k_cache.dtype == torch.float8_e4m3fn:
        values: Tensor = k_cache.view(torch.uint8)[index].view(torch.float8_e4m3fn).float()
        return values if fp8_scale is None else values * fp8_scale.reshape(1)
    if k_cache.dtype != torch.uint8:
        unquantized: Tensor = k_cache[index].float()
        return unquantized
    fmt = packed_format(cache_block_size, kv_mxfp8)
    data, scales = (view[index] for view in packed_views(k_cache, cache_block_size, fmt))
    quantized = data[:, : fmt.quantized_dims].contiguous().view(torch.float8_e4m3fn).float()
    scale = decode_e8m0(scales[:, : fmt.num_scales]).unsqueeze(-1)
    nope = (quantized.view(-1, fmt.num_scales, fmt.block) * scale).flatten(-2)
    if fmt.quantized_dims == HEAD_DIM:
        return nope
    rope = data[:, fmt.quantized_dims :].contiguous().view(dtype).float()
    return torch.cat((nope, rope), dim=1)
