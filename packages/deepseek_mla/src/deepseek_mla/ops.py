"""Typed entry points of the operators.

Throughout, ``T`` is tokens, ``H`` query heads, a head has 512 dimensions of which the last 64 carry
position (RoPE, interleaved pairs), and "input dtype" is the one of ``kv``: bfloat16 or float16. The
operators, their names and their arguments are those of vLLM; the model is DeepSeek-V4.

All operators run on CUDA (compute capability 8.0 and later) on the current stream, without
synchronisation, so they can be captured in CUDA graphs; on CPU tensors they run
:mod:`deepseek_mla.reference`. Arguments are checked before anything is written; a violated
requirement raises ``RuntimeError`` naming operator, argument, expectation and what came. ``T = 0``
is no error and does nothing. A tensor that is written must not share memory with another argument,
except that ``q_out`` may be ``q_in`` itself. No operator records gradients.

What holds for every cache insert:

* A KV row is not inserted if ``slot_mapping`` has no entry for it (``S < T``), if its slot is
  negative or at or past ``num_blocks * cache_block_size``, or if its position is outside
  ``[0, max_pos)``. No other byte of the cache is written. If two rows of one call name the same
  slot, that slot's content is undefined.
* KV is rotated in float32 and the row is rounded to the input dtype before it is quantised.
* Packed caches: each run of 64 (V4) or 32 (V4.1) values shares a power-of-two scale ``2**e``,
  ``e = ceil(log2(max(absmax, 1e-4) / 448))``, stored as the byte ``e + 127`` (E8M0); values are
  stored as E4M3, to nearest even. A NaN is left out of the absmax and stored as E4M3 NaN. A run
  with an infinity gets the scale byte 255 (E8M0 NaN) and reads back as NaN.

Q is normalised as ``x * rsqrt(mean(x**2) + eps)``, rotated in float32, and rounded once at the
store. A token whose position is outside ``[0, max_pos)`` is normalised but not rotated. A row's
bits do not depend on the batch it is in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._out_of_memory import raise_out_of_memory

_namespace = torch.ops.deepseek_mla
_quant_insert = _namespace.fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert.default
_quant_insert_out = _namespace.fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert.out
_kv_rope_insert = _namespace.fused_deepseek_v4_kv_rope_insert.default
_kv_norm_insert = _namespace.fused_deepseek_v4_kv_norm_rope_quant_insert.default
_full_bf16_insert = _namespace.fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert.default
_full_fp8_insert = _namespace.fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert.default

# apply_q_norm, kv_mxfp8, apply_q_rope and is_q_interleaved of the schema.
_DEFAULT_FLAGS = (True, False, True, False)


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
    """Normalise and rotate Q; rotate, quantise and insert KV into a packed cache; in one launch.

    Args:
        q_in: ``[T, H, 512]`` bfloat16 or float16, last dimension dense, token and head strides
            multiples of 16 bytes; contiguous if ``is_q_interleaved``.
        kv: ``[T, 512]`` of the dtype of ``q_in``, rows 16-byte aligned.
        k_cache: uint8 ``[num_blocks, bytes]`` or ``[num_blocks, cache_block_size, record]`` with
            dense blocks, any multiple of 8 bytes apart; written. A V4 record has 584 bytes, and a
            block holds ``cache_block_size * 576`` bytes of data (448 E4M3, 64 values of the input
            dtype a token), then 8 bytes of scales a token (7, and a zero). A V4.1 record has 528
            bytes: 512 E4M3 and 16 scales. Further bytes of a block are left alone.
        slot_mapping: ``[S]`` int64, ``S <= T``: token slot ``block * cache_block_size + offset``.
        position_ids: ``[T]`` int64 or int32.
        cos_sin_cache: ``[max_pos, 64]`` float32, 32 cosines then 32 sines.
        q_head_padded: heads of the result, at least ``H``; heads from ``H`` on are zeros. 0: Q is
            not processed and the result is empty.
        eps: added to the mean square before the square root, rounded to float32.
        cache_block_size: tokens in a cache block, at least 1.
        apply_q_norm: whether Q is normalised.
        kv_mxfp8: whether the cache holds V4.1 records, else V4.
        apply_q_rope: whether Q is rotated. KV always is.
        is_q_interleaved: Q is stored in chunks of 16 dimensions, in and out: element (head h,
            dimension d) of a token is at ``(d // 16) * heads * 16 + h * 16 + d % 16``, ``heads``
            being ``H`` for the input and ``q_head_padded`` for the output. Shapes stay as declared.
        q_out: ``[T, q_head_padded, 512]`` of the input dtype, strides as for ``q_in``; if given, Q
            is written there, nothing is allocated and ``q_out`` is returned.

    Returns:
        ``[T, q_head_padded, 512]`` of the input dtype.

    Raises:
        RuntimeError: device, dtype, shape, stride, alignment or size of an argument is not as
            above.
        torch.OutOfMemoryError: the result cannot be allocated. (``RuntimeError`` with the same text
            from the operator itself, which is what a compiled graph calls.)

    Source: vLLM ``fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert``.
    """
    flags: tuple[bool, ...] = (apply_q_norm, kv_mxfp8, apply_q_rope, is_q_interleaved)
    if flags == _DEFAULT_FLAGS:
        # What the schema fills in is not converted from Python, which saves 0.5 us a call.
        flags = ()
    if q_out is not None:
        _quant_insert_out(
            q_in,
            kv,
            k_cache,
            slot_mapping,
            position_ids,
            cos_sin_cache,
            q_head_padded,
            eps,
            cache_block_size,
            *flags,
            q_out=q_out,
        )
        return q_out
    try:
        result: Tensor = _quant_insert(
            q_in,
            kv,
            k_cache,
            slot_mapping,
            position_ids,
            cos_sin_cache,
            q_head_padded,
            eps,
            cache_block_size,
            *flags,
        )
    except RuntimeError as error:
        raise_out_of_memory(error)
        raise
    return result


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
    """Rotate KV and insert it into a cache whose dtype chooses the format.

    Args:
        kv: ``[T, 512]`` bfloat16 or float16, rows 16-byte aligned.
        k_cache: written. uint8: packed V4 or V4.1, as in
            :func:`fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert`. bfloat16, float8_e4m3fn or
            (for float16 ``kv``) float16: ``[num_blocks, cache_block_size, 512]``, last dimension
            dense, other strides multiples of 16 bytes (float8: of 8). float16 rows in a bfloat16
            cache are rounded to float16 first. In a float8_e4m3fn cache a value is
            ``kv / fp8_scale``, saturated to +-448, to nearest even, NaN as ``0x7F``.
        slot_mapping: ``[S]`` int64, ``S <= T``.
        position_ids: ``[T]`` int64 or int32.
        cos_sin_cache: ``[max_pos, 64]`` float32, 32 cosines then 32 sines.
        cache_block_size: tokens in a cache block, at least 1.
        fp8_scale: one-element float32 on the device of ``kv``; required for a float8_e4m3fn cache,
            ignored for others.
        kv_mxfp8: whether a uint8 cache holds V4.1 records, else V4. False for other caches.

    Raises:
        RuntimeError: device, dtype, shape, stride, alignment or size of an argument is not as
            above.

    Source: vLLM ``fused_deepseek_v4_kv_rope_insert``.
    """
    _kv_rope_insert(
        kv,
        k_cache,
        slot_mapping,
        position_ids,
        cos_sin_cache,
        cache_block_size,
        fp8_scale,
        kv_mxfp8,
    )


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
    """RMSNorm KV with a weight, rotate it, quantise it and insert it as V4 records.

    The normalised and weighted row is rounded to the input dtype before it is rotated.

    Args:
        kv: ``[T, 512]`` bfloat16 or float16, any row stride that is a multiple of 16 bytes.
        norm_weight: ``[512]`` of the dtype of ``kv`` or float32.
        k_cache: uint8 packed V4, as in
            :func:`fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert`; written.
        slot_mapping: ``[S]`` int64, ``S <= T``.
        position_ids: ``[T]`` int64 or int32.
        cos_sin_cache: ``[max_pos, 64]`` float32, 32 cosines then 32 sines.
        eps: added to the mean square before the square root, rounded to float32.
        cache_block_size: tokens in a cache block, at least 1.

    Raises:
        RuntimeError: device, dtype, shape, stride, alignment or size of an argument is not as
            above.

    Source: vLLM ``fused_deepseek_v4_kv_norm_rope_quant_insert``.
    """
    _kv_norm_insert(
        kv,
        norm_weight,
        k_cache,
        slot_mapping,
        position_ids,
        cos_sin_cache,
        eps,
        cache_block_size,
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
    """Normalise and rotate Q in place, and rotate KV and insert it unquantised.

    Args:
        q: ``[T, H, 512]`` bfloat16 or float16, last dimension dense, token and head strides
            multiples of 16 bytes; written.
        kv: ``[T, 512]`` of the dtype of ``q``, rows 16-byte aligned.
        k_cache: ``[num_blocks, cache_block_size, 512]`` bfloat16, or float16 for float16 ``kv``;
            last dimension dense, other strides multiples of 16 bytes; written.
        slot_mapping: ``[S]`` int64, ``S <= T``.
        position_ids: ``[T]`` int64 or int32.
        cos_sin_cache: ``[max_pos, 64]`` float32, 32 cosines then 32 sines.
        eps: added to the mean square before the square root, rounded to float32.
        cache_block_size: tokens in a cache block, at least 1.
        apply_q_norm: whether Q is normalised.

    Raises:
        RuntimeError: device, dtype, shape, stride, alignment or size of an argument is not as
            above.

    Source: vLLM ``fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert``.
    """
    _full_bf16_insert(
        q,
        kv,
        k_cache,
        slot_mapping,
        position_ids,
        cos_sin_cache,
        eps,
        cache_block_size,
        apply_q_norm,
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
    """Normalise, rotate and quantise Q; rotate, quantise and insert KV; with tensor-wide scales.

    Values are saturated to +-448 and rounded to nearest even E4M3; NaN becomes ``0x7F``, and
    infinities saturate.

    Args:
        q: ``[T, H, 512]`` bfloat16 or float16, last dimension dense, token and head strides
            multiples of 16 bytes.
        kv: ``[T, 512]`` of the dtype of ``q``, rows 16-byte aligned.
        q_fp8: ``[T, H, 512]`` float8_e4m3fn, last dimension dense, token and head strides
            multiples of 8 bytes; receives Q times ``q_fp8_scale_inv``, without having been rounded
            to the input dtype.
        k_cache: ``[num_blocks, cache_block_size, 512]`` float8_e4m3fn, last dimension dense, other
            strides multiples of 8 bytes; receives KV (rounded to the input dtype) divided by
            ``fp8_scale``.
        slot_mapping: ``[S]`` int64, ``S <= T``.
        position_ids: ``[T]`` int64 or int32.
        cos_sin_cache: ``[max_pos, 64]`` float32, 32 cosines then 32 sines.
        fp8_scale: one-element float32: what one unit of the cache stands for.
        q_fp8_scale_inv: one-element float32: the inverse of Q's scale.
        eps: added to the mean square before the square root, rounded to float32.
        cache_block_size: tokens in a cache block, at least 1.
        apply_q_norm: whether Q is normalised.

    Raises:
        RuntimeError: device, dtype, shape, stride, alignment or size of an argument is not as
            above.

    Source: vLLM ``fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert``.
    """
    _full_fp8_insert(
        q,
        kv,
        q_fp8,
        k_cache,
        slot_mapping,
        position_ids,
        cos_sin_cache,
        fp8_scale,
        q_fp8_scale_inv,
        eps,
        cache_block_size,
        apply_q_norm,
    )
