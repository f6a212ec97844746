"""CPU kernels of the operators: the library's argument checks, then the reference.

``deepseek_mla::_check_<op>`` is the check that the CUDA kernels run too, so an error reads the
same on every device. Where the operator returns a tensor, the check returns it, yet to be filled.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._library import registrations


def _register(name: str, overload: str = "") -> None:
    implementation = getattr(reference, name)
    signature = inspect.signature(implementation)
    check = getattr(getattr(torch.ops.deepseek_mla, f"_check_{name}"), overload or "default")

    # Like the CUDA kernels, which autograd does not know.
    @torch.no_grad()
    def kernel(*args: Any, **kwargs: Any) -> Tensor | None:
        # The dispatcher leaves out arguments that have their default value.
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        outputs = {name: tensor for name, tensor in bound.kwargs.items() if tensor is not None}
        result: Tensor | None = check(*bound.args, **outputs)
        if result is not None:
            outputs["q_out"] = result
        # Else tensors that were made in inference mode could be written nowhere else.
        with torch.inference_mode():
            implementation(*bound.args, **outputs)
        return result

    qualified_name = f"deepseek_mla::{name}" + (overload and f".{overload}")
    torch.library.impl(qualified_name, "cpu", kernel, lib=registrations)


_register("fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert")
_register("fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert", "out")
_register("fused_deepseek_v4_kv_rope_insert")
_register("fused_deepseek_v4_kv_norm_rope_quant_insert")
_register("fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert")
_register("fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert")
