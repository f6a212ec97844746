"""CPU kernels of the operators: the library's argument checks, then the reference.

``minimax_rms::_check_<op>`` is the check that the CUDA kernels run too, so an error reads the same
on every device. A CPU tensor has no peers: only a single rank is served.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._library import registrations

_check_rms = torch.ops.minimax_rms._check_minimax_allreduce_rms.default
_check_rms_qk = torch.ops.minimax_rms._check_minimax_allreduce_rms_qk.default


def _refuse_peers(op: str, method: str, nranks: int) -> None:
    if nranks > 1:
        raise RuntimeError(
            f"minimax_rms::{op}: nranks must be 1 for CPU tensors, which have no peers to reach, "
            f"got {nranks}; minimax_rms.Workspace.{method} takes them to torch.distributed"
        )


def _rms(
    input: Tensor, norm_weight: Tensor, workspace: Tensor, rank: int, nranks: int, eps: float
) -> Tensor:
    _check_rms(input, norm_weight, workspace, rank, nranks, eps)
    _refuse_peers("minimax_allreduce_rms", "allreduce_rms", nranks)
    return reference.minimax_allreduce_rms([input], [norm_weight], eps)[0]


def _rms_qk(
    qkv: Tensor,
    norm_weight_q: Tensor,
    norm_weight_k: Tensor,
    workspace: Tensor,
    q_size: int,
    kv_size: int,
    rank: int,
    nranks: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    _check_rms_qk(qkv, norm_weight_q, norm_weight_k, workspace, q_size, kv_size, rank, nranks, eps)
    _refuse_peers("minimax_allreduce_rms_qk", "allreduce_rms_qk", nranks)
    return reference.minimax_allreduce_rms_qk([qkv], [norm_weight_q], [norm_weight_k], eps)[0]


torch.library.impl("minimax_rms::minimax_allreduce_rms", "cpu", _rms, lib=registrations)
torch.library.impl("minimax_rms::minimax_allreduce_rms_qk", "cpu", _rms_qk, lib=registrations)
