"""Autograd passes the operators by: no gradient is recorded.

Else results would say that they require a gradient, which no one can compute.
"""

from __future__ import annotations

import torch

from ._library import registrations

for _name in (
    "fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert",
    "fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert.out",
    "fused_deepseek_v4_kv_rope_insert",
    "fused_deepseek_v4_kv_norm_rope_quant_insert",
    "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert",
    "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert",
):
    registrations.impl(_name, torch.library.fallthrough_kernel, "Autograd")
