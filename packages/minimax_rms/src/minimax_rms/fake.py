"""Fake (meta) implementations, for ``torch.compile`` and ``FakeTensorMode``: shapes alone.

Calls can be traced; setting up and ending a workspace cannot, since that is about real memory. What
needs no memory, such as ``_comm_size``, has one implementation for all devices. The arguments are
not checked here: the kernels check them when they run.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ._library import registrations
from .workspace import Workspace  # noqa: F401  its module defines the functional operators


def _rms(input: Tensor, *args: Any) -> Tensor:
    return input.new_empty(input.shape)


def _rms_qk(
    qkv: Tensor,
    norm_weight_q: Tensor,
    norm_weight_k: Tensor,
    workspace: Tensor,
    q_size: int,
    kv_size: int,
    *args: Any,
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty((qkv.shape[0], q_size)), qkv.new_empty((qkv.shape[0], kv_size))


def _functional_rms_qk(
    qkv: Tensor, norm_weight_q: Tensor, norm_weight_k: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    num_tokens = qkv.shape[0]
    return (
        qkv.new_empty((num_tokens, norm_weight_q.shape[0])),
        qkv.new_empty((num_tokens, norm_weight_k.shape[0])),
    )


def _check_arguments(*args: Any) -> None:
    """Stand for an operator that returns nothing."""


def _refuse(name: str) -> None:
    def fake(*args: Any) -> NoReturn:
        raise RuntimeError(
            f"minimax_rms::{name}: cannot be traced; call it outside of torch.compile"
        )

    torch.library.register_fake(f"minimax_rms::{name}", fake, lib=registrations)


torch.library.register_fake("minimax_rms::minimax_allreduce_rms", _rms, lib=registrations)
torch.library.register_fake("minimax_rms::functional_allreduce_rms", _rms, lib=registrations)
for _name in ("minimax_allreduce_rms_qk", "_minimax_allreduce_rms_qk_as"):
    torch.library.register_fake(f"minimax_rms::{_name}", _rms_qk, lib=registrations)
torch.library.register_fake(
    "minimax_rms::functional_allreduce_rms_qk", _functional_rms_qk, lib=registrations
)
for _name in ("_check_minimax_allreduce_rms", "_check_minimax_allreduce_rms_qk"):
    torch.library.register_fake(f"minimax_rms::{_name}", _check_arguments, lib=registrations)
for _name in (
    "_allocate",
    "_open",
    "_free",
    "_register",
    "_set_timeout",
    "_large_calls",
    "_use_large_calls",
    "_check",
    "_check_unraised",
    "_missing_ranks",
    "_forget",
    "_announce_close",
):
    _refuse(_name)
