"""Typed entry points of the operators, for callers that have a workspace of their own.

Each of ``nranks`` ranks holds a slice of the hidden dimension, of the same width on each. The
operators, their names and their arguments are those of vLLM.

``workspace`` is int64 ``[3 * nranks + 2]`` or longer, on the device of the input:

* entries ``2 * nranks`` to ``3 * nranks - 1`` are the addresses of the ranks' communication buffers
  as this process maps them, the own one among them: ``3 * comm_size`` bytes each, filled with
  -0.0f (``0x80000000``);
* entry ``3 * nranks`` is the address of int32 ``[3]`` zeros;
* entry ``3 * nranks + 1`` is the address of int64 ``[2]``, ``{0, comm_size}``, on the device;
* the entries below ``2 * nranks`` are not used.

``comm_size``, the same on all ranks, bounds the tokens of a call: it is at least ``8 * nranks``
bytes a token, and at least ``torch.ops.minimax_rms._comm_size(nranks, max_tokens)``; calls of
several ranks have fewer than 2^24 tokens. All of this must be complete on the device of every rank
before the first call of any, and stay until no rank will call any more; what is in it is the
kernels' from then on. One workspace serves all layers. With ``nranks = 1`` it is ignored. The GPUs
must have as many multiprocessors as each other, and ranks that share one must take turns on it, as
processes do by default; a workspace of :class:`minimax_rms.Workspace` needs neither.

All ranks must make the same calls in the same order, with the same number of tokens, widths, dtype
and ``eps``. Only the sums of squares cross the link, and ranks' sums are added in the order of the
ranks: all ranks have the same bits. Within a rank the order depends on the row's width alone, so a
token's result does not depend on the batch that it is in. Calls run on the current stream, without
synchronisation, and can be captured in CUDA graphs. Eager calls with one workspace on several
streams run in the order in which they are made; replays are for the caller to order, among each
other and with eager calls. On CPU tensors of a single rank :mod:`minimax_rms.reference` runs. No
operator records gradients.

To ``torch.compile`` the operators write ``workspace``, though its elements stay as they are: calls
keep their order, and those with unused results are made. Backends that give operators a copy of
what they write, such as ``aot_eager``, give these a copy of ``workspace``. The copy has the same
buffers, but is not known as that of a :class:`minimax_rms.Workspace`: its timeout, its order over
streams and what it needs for ranks that share a GPU are lost. Call the methods there.
``mode="reduce-overhead"`` makes CUDA graphs only of calls whose workspace has a static address:
that of a :class:`minimax_rms.Workspace` has; for others, ``torch._dynamo.mark_static_address``.

An argument that is not as described raises ``RuntimeError`` naming operator, argument, expectation
and what came, before anything is launched. What fails while ranks talk to each other (a rank that
does not come within the timeout, ranks that disagree on the call, two calls at once on one rank)
makes NaNs of what that call has not written yet and of the outputs of all later ones, and raises
``RuntimeError`` at the next call. So does a call of more tokens than the workspace has room for,
which exchanges nothing; with a workspace of :class:`minimax_rms.Workspace` it raises at once. What
a call waits is bounded, by ``MINIMAX_RMS_TIMEOUT`` seconds (environment variable), 30 by default.
A result that cannot be allocated raises ``torch.OutOfMemoryError``, before anything is launched;
the operators themselves, under ``torch.ops``, raise ``RuntimeError`` with the same text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._out_of_memory import raise_out_of_memory

_allreduce_rms = torch.ops.minimax_rms.minimax_allreduce_rms.default
_allreduce_rms_qk = torch.ops.minimax_rms.minimax_allreduce_rms_qk.default


def minimax_allreduce_rms(
    input: Tensor, norm_weight: Tensor, workspace: Tensor, rank: int, nranks: int, eps: float
) -> Tensor:
    """Normalize rows by their root mean square over all ranks, and scale them.

    ``input * rsqrt(sum over ranks of sum(input ** 2) / (D * nranks) + eps) * norm_weight``, in
    float32 and rounded once.

    Args:
        input: ``[T, D]`` float32, float16 or bfloat16; ``D`` a multiple of 16 bytes, the same on
            all ranks. Rows are dense, 16-byte aligned, and may be any distance apart.
        norm_weight: ``[D]`` of the dtype of ``input``, contiguous, 16-byte aligned.
        workspace: of this rank.
        rank: of this process, in ``[0, nranks)``.
        nranks: 1 to 16.
        eps: added to the mean square before the square root, rounded to float32; at least 0.

    Returns:
        ``[T, D]`` of the dtype of ``input``, contiguous. ``T = 0`` is no call.

    Raises:
        RuntimeError: an argument is not as above; or an earlier call has failed, for good: which
            rank did not take part, or on what ranks disagree.

    Source: vLLM ``minimax_allreduce_rms``.
    """
    try:
        result: Tensor = _allreduce_rms(input, norm_weight, workspace, rank, nranks, eps)
    except RuntimeError as error:
        raise_out_of_memory(error)
        raise
    return result


def minimax_allreduce_rms_qk(
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
    """Normalize q and k of rows of q, k and v, each by its own root mean square over all ranks.

    Each as by :func:`minimax_allreduce_rms`, in one launch; v is not read.

    Args:
        qkv: ``[T, q_size + 2 * kv_size]`` float32, float16 or bfloat16. Rows are dense, 16-byte
            aligned, and may be any distance apart.
        norm_weight_q: ``[q_size]`` of the dtype of ``qkv``, contiguous, 16-byte aligned.
        norm_weight_k: ``[kv_size]``, likewise.
        workspace: of this rank.
        q_size: elements of q on a rank, the same on all; a multiple of 16 bytes.
        kv_size: elements of k on a rank, and of v; a multiple of 16 bytes. May be 0.
        rank: of this process, in ``[0, nranks)``.
        nranks: 1 to 16.
        eps: added to the mean squares before the square root, rounded to float32; at least 0.

    Returns:
        q ``[T, q_size]`` and k ``[T, kv_size]`` of the dtype of ``qkv``, contiguous. ``T = 0`` is
        no call.

    Raises:
        RuntimeError: an argument is not as above; or an earlier call has failed, for good: which
            rank did not take part, or on what ranks disagree.

    Source: vLLM ``minimax_allreduce_rms_qk``.
    """
    try:
        q, k = _allreduce_rms_qk(
            qkv, norm_weight_q, norm_weight_k, workspace, q_size, kv_size, rank, nranks, eps
        )
    except RuntimeError as error:
        raise_out_of_memory(error)
        raise
    return q, k
