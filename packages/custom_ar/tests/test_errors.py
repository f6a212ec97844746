"""What bad arguments get where no GPU is needed to find out: the whole message.

What needs a communicator, and so a GPU, is in test_gpu.py and test_processes.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from custom_ar import ops

private = torch.ops.custom_ar
# No communicator gets as far as this id, no allocation this address.
UNKNOWN = 2**40 + 1


def handle(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


UNKNOWN_FA = f"fa must be what init_custom_ar returned and not be disposed of, got {UNKNOWN}"
UNKNOWN_PTR = (
    "ptr must be what allocate_shared_buffer_and_handle or open_mem_handle returned and not be "
    "freed yet, got"
)
SECONDS = "seconds must be in (0, 1e9), got"

CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "dispose": (lambda: ops.dispose(UNKNOWN), UNKNOWN_FA),
    "register_buffer": (lambda: ops.register_buffer(UNKNOWN, [16, 32]), UNKNOWN_FA),
    "get_graph_buffer_ipc_meta": (lambda: ops.get_graph_buffer_ipc_meta(UNKNOWN), UNKNOWN_FA),
    "register_graph_buffers": (
        lambda: ops.register_graph_buffers(UNKNOWN, [[], []], [[], []]),
        UNKNOWN_FA,
    ),
    "_set_timeout": (lambda: private._set_timeout(UNKNOWN, 1.0), UNKNOWN_FA),
    "_keep_mappings": (lambda: private._keep_mappings(UNKNOWN), UNKNOWN_FA),
    "_set_max_blocks": (lambda: private._set_max_blocks(UNKNOWN, 1), UNKNOWN_FA),
    "_set_max_blocks zero": (
        lambda: private._set_max_blocks(UNKNOWN, 0),
        "max_blocks must be in [1, 65535], got 0",
    ),
    "_use_large_calls null": (
        lambda: private._use_large_calls(0),
        "address must be what _large_calls returned, got 0",
    ),
    "_missing_ranks": (lambda: private._missing_ranks(UNKNOWN), UNKNOWN_FA),
    "_announce_close": (lambda: private._announce_close(UNKNOWN), UNKNOWN_FA),
    "_choose_tuning no peer": (
        lambda: private._choose_tuning(1, 4096),
        "world_size must be in [2, 8], got 1",
    ),
    "_choose_tuning zero ranks": (
        lambda: private._choose_tuning(0, 4096),
        "world_size must be in [2, 8], got 0",
    ),
    "_choose_tuning negative": (
        lambda: private._choose_tuning(2, -1),
        "num_bytes must be at least 0, got -1",
    ),
    "_set_timeout zero": (lambda: private._set_timeout(UNKNOWN, 0.0), f"{SECONDS} 0"),
    "_set_timeout negative": (lambda: private._set_timeout(UNKNOWN, -2.5), f"{SECONDS} -2.5"),
    "_set_timeout inf": (lambda: private._set_timeout(UNKNOWN, float("inf")), f"{SECONDS} inf"),
    "_set_timeout nan": (lambda: private._set_timeout(UNKNOWN, float("nan")), f"{SECONDS} nan"),
    "free_shared_buffer": (
        lambda: ops.free_shared_buffer(UNKNOWN),
        f"{UNKNOWN_PTR} {UNKNOWN}",
    ),
    "free_shared_buffer null": (lambda: ops.free_shared_buffer(0), f"{UNKNOWN_PTR} 0"),
    "allocate_shared_buffer_and_handle zero": (
        lambda: ops.allocate_shared_buffer_and_handle(0),
        "size must be positive, got 0",
    ),
    "allocate_shared_buffer_and_handle negative": (
        lambda: ops.allocate_shared_buffer_and_handle(-5),
        "size must be positive, got -5",
    ),
    "open_mem_handle dtype": (
        lambda: ops.open_mem_handle(handle(64, dtype=torch.int8)),
        "mem_handle must be torch.uint8, got torch.int8",
    ),
    "open_mem_handle length": (
        lambda: ops.open_mem_handle(handle(63)),
        "mem_handle must have shape [64], got [63]",
    ),
    "open_mem_handle rank": (
        lambda: ops.open_mem_handle(handle(1, 64)),
        "mem_handle must have shape [64], got [1, 64]",
    ),
    "open_mem_handle strides": (
        lambda: ops.open_mem_handle(handle(128)[::2]),
        "mem_handle must be contiguous, got strides [2] for shape [64]",
    ),
    "_buffer_size one rank": (
        lambda: private._buffer_size(1, 1),
        "world_size must be in [2, 8], got 1",
    ),
    "_buffer_size nine ranks": (
        lambda: private._buffer_size(9, 1),
        "world_size must be in [2, 8], got 9",
    ),
    "_buffer_size zero": (
        lambda: private._buffer_size(2, 0),
        "max_size must be in [1, 2^40], got 0",
    ),
    "_buffer_size huge": (
        lambda: private._buffer_size(2, 2**40 + 1),
        f"max_size must be in [1, 2^40], got {2**40 + 1}",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message(case: str) -> None:
    call, expected = CASES[case]
    name = case.split(" ")[0]
    with pytest.raises(RuntimeError, match=f"^{re.escape(f'custom_ar::{name}: {expected}')}$"):
        call()


def test_check_speaks_for_the_calls() -> None:
    """``_check`` raises what the next all_reduce would."""
    message = f"^{re.escape(f'custom_ar::all_reduce: {UNKNOWN_FA}')}$"
    with pytest.raises(RuntimeError, match=message):
        private._check(UNKNOWN)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("all_reduce", lambda: ops.all_reduce(1, torch.ones(4), torch.ones(4), 0, 0)),
        ("init_custom_ar", lambda: ops.init_custom_ar([16, 32], torch.ones(4), 0, True)),
    ],
)
def test_cpu_tensors_have_no_kernel(name: str, call: Callable[[], Any]) -> None:
    message = rf"Could not run 'custom_ar::{name}' with arguments from the 'CPU' backend"
    with pytest.raises(NotImplementedError, match=message):
        call()


def test_wrong_number_of_arguments() -> None:
    with pytest.raises(RuntimeError, match=r"custom_ar::all_reduce\(\) is missing value for"):
        private.all_reduce(1, torch.ones(4), torch.ones(4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device() -> None:
    for call in (
        lambda: ops.allocate_shared_buffer_and_handle(64),
        lambda: ops.open_mem_handle(handle(64)),
    ):
        with pytest.raises(RuntimeError, match=r"."):
            call()
