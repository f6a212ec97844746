"""Fake (meta) implementations: output shapes for ``torch.compile`` and ``FakeTensorMode``.

The arguments are not checked here: the kernels check them when they run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._library import registrations
from .reference import HEAD_DIM


def _quant_insert(
    q_in: Tensor,
    kv: Tensor,
    k_cache: Tensor,
    slot_mapping: Tensor,
    position_ids: Tensor,
    cos_sin_cache: Tensor,
    q_head_padded: int,
    *args: Any,
) -> Tensor:
    return q_in.new_empty((q_in.shape[0], q_head_padded, HEAD_DIM))


def _write_arguments(*args: Any, **kwargs: Any) -> None:
    """Stand for an operator that returns nothing."""


torch.library.register_fake(
    "deepseek_mla::fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert",
    _quant_insert,
    lib=registrations,
)
for _name in (
    "fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert.out",
    "fused_deepseek_v4_kv_rope_insert",
    "fused_deepseek_v4_kv_norm_rope_quant_insert",
    "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert",
    "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert",
):
    torch.library.register_fake(f"deepseek_mla::{_name}", _write_arguments, lib=registrations)
