"""Process-wide defaults of torch that callers set, none of which may change what a package does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from rank_processes import Rank


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let tensors of floats have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    """Let tensors be made on this device."""
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Refuse algorithms that are not deterministic, and fill new tensors with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


DEFAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": contextlib.nullcontext,
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: default_device("meta"),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "deterministic": deterministic_algorithms,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
}
# Where there is a GPU.
GPU_DEFAULTS = {
    **DEFAULTS,
    "cuda": lambda: default_device("cuda"),
    "autocast": lambda: torch.autocast("cuda", dtype=torch.bfloat16),
}


def check_owner(
    rank: Rank, name: str, make: Callable[[Any, torch.device], Any], check: Callable[[Any], None]
) -> None:
    """Make and call an owner under a default, and one where the other is not under it.

    ``make`` makes it of a group and a device; ``check`` makes calls of it.
    """
    default = (DEFAULTS if rank.device.type == "cpu" else GPU_DEFAULTS)[name]
    with default():
        made_under = make(rank.group, rank.device)
        check(made_under)
    check(made_under)
    made_under.close()
    made_outside = make(rank.group, rank.device)
    with default():
        check(made_outside)
        made_outside.close()
