"""DeepSeek-V4 MLA prologue: Q RMSNorm and RoPE, KV RoPE, quantisation and paged-cache insert.

Importing the package loads its operator library and registers the operators as
``torch.ops.deepseek_mla.*`` with CUDA kernels, CPU kernels and fake implementations.
"""

__version__ = "0.1.0"

from . import autograd, cpu, fake, reference  # noqa: F401
from .ops import (
    fused_deepseek_v4_kv_norm_rope_quant_insert,
    fused_deepseek_v4_kv_rope_insert,
    fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert,
    fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert,
    fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert,
)
from .reference import dequantize_cache

__all__ = [
    "__version__",
    "dequantize_cache",
    "fused_deepseek_v4_kv_norm_rope_quant_insert",
    "fused_deepseek_v4_kv_rope_insert",
    "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert",
    "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert",
    "fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert",
]
