"""Fake (meta) implementations, for ``torch.compile`` and ``FakeTensorMode``.

Calls can be traced; setting up and ending a communicator cannot, since that is about real memory.
What needs no memory, such as ``meta_size``, has one implementation for all devices.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ._library import registrations


def _functional_all_reduce(input: Tensor, order: Tensor, communicator: int) -> Tensor:
    return torch.empty_like(input)


def _write_arguments(*args: Any) -> None:
    """Stand for an operator that returns nothing; the kernel checks the arguments when it runs."""


def _refuse(name: str) -> None:
    def fake(*args: Any) -> NoReturn:
        raise RuntimeError(f"custom_ar::{name}: cannot be traced; call it outside of torch.compile")

    torch.library.register_fake(f"custom_ar::{name}", fake, lib=registrations)


torch.library.register_fake(
    "custom_ar::functional_all_reduce", _functional_all_reduce, lib=registrations
)
for _name in ("all_reduce", "_all_reduce_as", "functional_all_reduce_out"):
    torch.library.register_fake(f"custom_ar::{_name}", _write_arguments, lib=registrations)
for _name in (
    "init_custom_ar",
    "dispose",
    "register_buffer",
    "get_graph_buffer_ipc_meta",
    "register_graph_buffers",
    "allocate_shared_buffer_and_handle",
    "open_mem_handle",
    "free_shared_buffer",
    "_keep_mappings",
    "_try_all_reduce",
    "_try_all_reduce_new",
    "_set_timeout",
    "_set_max_blocks",
    "_large_calls",
    "_use_large_calls",
    "_check",
    "_check_unraised",
    "_missing_ranks",
    "_announce_close",
):
    _refuse(_name)
