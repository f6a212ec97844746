"""The all-reduce in plain PyTorch, for any device: what the kernels give, to the bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def all_reduce(inputs: Sequence[Tensor]) -> Tensor:
    """Sum the tensors of all ranks in float32, in the order of the ranks, and round once.

    Args:
        inputs: a tensor for each rank, of one shape, dtype (float32, float16 or bfloat16) and
            device.

    Returns:
        A new tensor: what every rank holds after the all-reduce.

    Raises:
        ValueError: there is no tensor, or shapes or dtypes differ.
    """
    if not inputs:
        raise ValueError("all_reduce: inputs must have a tensor for each rank, got none")
    first = inputs[0]
    for rank, tensor in enumerate(inputs):
        if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"all_reduce: inputs[{rank}] must be {list(first.shape)} of {first.dtype} as "
                f"inputs[0] is, got {list(tensor.shape)} of {tensor.dtype}"
            )
    total = first.detach().to(torch.float32, copy=True)
    for tensor in inputs[1:]:
        total += tensor.detach()
    return total.to(first.dtype)
