"""The RMSNorms in plain PyTorch, for any device: what the kernels compute, but for the order of
additions within a row.

Sums of squares and all that follows are float32, and the ranks' sums are added in the order of the
ranks, as by the kernels. The result is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def minimax_allreduce_rms(
    inputs: Sequence[Tensor], norm_weights: Sequence[Tensor], eps: float
) -> list[Tensor]:
    """Normalize rows whose elements are split over ranks.

    Args:
        inputs: ``[T, D]`` of each rank: float32, float16 or bfloat16, any strides.
        norm_weights: ``[D]`` of each rank, of the same dtype.
        eps: added to the mean square before the square root.

    Returns:
        ``[T, D]`` of each rank.

    Raises:
        ValueError: there is no rank, or shapes or dtypes differ between ranks.
    """
    check_alike("minimax_allreduce_rms", "inputs", inputs)
    check_alike("minimax_allreduce_rms", "norm_weights", norm_weights, len(inputs))
    total = total_of_ranks([sum_of_squares(x) for x in inputs])
    return [
        normalize(x, weight, total, len(inputs), eps)
        for x, weight in zip(inputs, norm_weights, strict=True)
    ]


def minimax_allreduce_rms_qk(
    qkvs: Sequence[Tensor],
    norm_weights_q: Sequence[Tensor],
    norm_weights_k: Sequence[Tensor],
    eps: float,
) -> list[tuple[Tensor, Tensor]]:
    """Normalize q and k of rows whose heads are split over ranks, each with a sum of its own.

    Args:
        qkvs: ``[T, q_size + 2 * kv_size]`` of each rank: float32, float16 or bfloat16, any strides.
        norm_weights_q: ``[q_size]`` of each rank, of the same dtype.
        norm_weights_k: ``[kv_size]`` of each rank, of the same dtype.
        eps: added to the mean squares before the square root.

    Returns:
        q ``[T, q_size]`` and k ``[T, kv_size]`` of each rank.

    Raises:
        ValueError: there is no rank, or shapes or dtypes differ between ranks.
    """
    name = "minimax_allreduce_rms_qk"
    check_alike(name, "qkvs", qkvs)
    check_alike(name, "norm_weights_q", norm_weights_q, len(qkvs))
    check_alike(name, "norm_weights_k", norm_weights_k, len(qkvs))
    q_size, kv_size = norm_weights_q[0].numel(), norm_weights_k[0].numel()
    parts = [split_qk(qkv, q_size, kv_size) for qkv in qkvs]
    q = minimax_allreduce_rms([q for q, _ in parts], norm_weights_q, eps)
    k = minimax_allreduce_rms([k for _, k in parts], norm_weights_k, eps)
    return list(zip(q, k, strict=True))


def split_qk(qkv: Tensor, q_size: int, kv_size: int) -> tuple[Tensor, Tensor]:
    """Return q ``[T, q_size]`` and k ``[T, kv_size]`` of rows, as views."""
    return qkv[:, :q_size], qkv[:, q_size : q_size + kv_size]


def sum_of_squares(x: Tensor) -> Tensor:
    """Return what a rank tells the others of ``x [T, D]``: float32 ``[T]``."""
    return x.detach().float().square().sum(dim=1)


def total_of_ranks(sums: Sequence[Tensor]) -> Tensor:
    """Add the sums of all ranks, float32, in the order of the ranks."""
    total = sums[0].clone()
    for rank_sum in sums[1:]:
        total += rank_sum
    return total


def normalize(x: Tensor, norm_weight: Tensor, total: Tensor, nranks: int, eps: float) -> Tensor:
    """Return a rank's part of the result, contiguous, for the ``total [T]`` of all ranks."""
    # The mean of nothing is of no interest.
    factor = 1.0 / max(x.shape[1] * nranks, 1)
    scale = torch.rsqrt(total * factor + eps)
    result = x.detach().float() * scale[:, None] * norm_weight.detach().float()
    return result.to(x.dtype).contiguous()


def check_alike(
    function: str, name: str, tensors: Sequence[Tensor], count: int | None = None
) -> None:
    """Raise ValueError unless there is one tensor for each rank, and all are alike."""
    if not tensors:
        raise ValueError(f"{function}: {name} must have a tensor for each rank, got none")
    if count is not None and len(tensors) != count:
        raise ValueError(
            f"{function}: {name} must have a tensor for each of {count} ranks, got {len(tensors)}"
        )
    first = tensors[0]
    for rank, tensor in enumerate(tensors):
        if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"{function}: {name}[{rank}] must be {list(first.shape)} of {first.dtype} as "
                f"{name}[0] is, got {list(tensor.shape)} of {tensor.dtype}"
            )
