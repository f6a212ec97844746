"""CUDA tensors that end with their allocations, for tests under compute-sanitizer."""

from __future__ import annotations

import torch
from torch import Tensor


class Overlong:
    """The bytes of a CUDA tensor, and more bytes after them that are not there."""

    def __init__(self, tensor: Tensor, num_bytes: int) -> None:
        self.tensor = tensor
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def exact_copy(values: Tensor, missing: int = 0) -> Tensor:
    """Copy a flat CPU tensor to an allocation of its own, which ends with the last element.

    Copies bytes, so that no kernel runs. It takes ``PYTORCH_NO_CUDA_MEMORY_CACHING=1``, and with
    ``missing`` also NumPy, which torch reads array interfaces with.

    Args:
        values: contiguous, of one dimension.
        missing: how many of the last elements the allocation lacks.
    """
    if not missing:
        return values.cuda()
    present = values[:-missing].contiguous().view(torch.uint8).cuda()
    source = Overlong(present, values.numel() * values.element_size())
    return torch.as_tensor(source, device="cuda").view(values.dtype)
