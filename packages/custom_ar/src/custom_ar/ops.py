"""Typed entry points of the operators, for callers that have a communicator of their own.

The operators, their names and their arguments are those of vLLM. The calling order, on each rank:

1. :func:`allocate_shared_buffer_and_handle` with ``meta_size() + max_size`` bytes; exchange the
   handles among the ranks, and :func:`open_mem_handle` those of the peers.
2. :func:`init_custom_ar` with the addresses of all ranks' buffers.
3. :func:`all_reduce` on every rank, the same calls in the same order; eagerly or in a CUDA graph.
4. Once no rank will call any more: :func:`dispose`, which closes the mappings of the peers'
   buffers, then :func:`free_shared_buffer` of the own buffer, once all peers have disposed.

A call pushes its data into the peers' buffers, so no input is ever registered. A caller that
registers buffers does no harm: those operators check their arguments, and :func:`dispose` closes
the mappings that :func:`register_buffer` was given.

``fa`` is what :func:`init_custom_ar` returned. An ``fa`` that is unknown or disposed of, and any
other argument that is not as described, raises ``RuntimeError`` naming operator, argument,
expectation and what came, before anything is launched.

What fails while ranks talk to each other (a rank that does not come within the timeout, ranks that
disagree on dtype or number of elements, two calls at once on one rank) makes NaN of what that call
has not summed yet and of the outputs of all later ones, and raises ``RuntimeError`` at the next
call. Every wait is bounded, by ``CUSTOM_AR_TIMEOUT`` seconds (environment variable), 30 by default.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._out_of_memory import raise_out_of_memory

_namespace = torch.ops.custom_ar
_all_reduce = _namespace.all_reduce.default


def init_custom_ar(
    ipc_tensors: list[int], rank_data: Tensor, rank: int, fully_connected: bool
) -> int:
    """Make this rank's communicator on the shared buffers of all ranks.

    Args:
        ipc_tensors: the address of each rank's buffer as this process maps it, 2 to 8 of them, the
            own one at ``rank``; zeroed. A buffer larger than ``meta_size()`` lets larger messages
            pass in one piece; where ranks differ, the smallest counts.
        rank_data: any CUDA tensor; its device is the one the communicator works on. Compute
            capability 8.0 or later.
        rank: of this process, in ``[0, len(ipc_tensors))``.
        fully_connected: whether all GPUs are connected to each other by NVLink. Makes no
            difference: data is pushed the same way over either.

    Returns:
        The ``fa`` of the other operators.

    Raises:
        RuntimeError: an argument is not as above, or the device is too old.

    Source: vLLM ``init_custom_ar``.
    """
    fa: int = _namespace.init_custom_ar(ipc_tensors, rank_data, rank, fully_connected)
    return fa


def all_reduce(
    fa: int, inp: Tensor, out: Tensor, reg_buffer: int, reg_buffer_sz_bytes: int
) -> None:
    """Sum ``inp`` over all ranks into ``out``, on the current stream and without synchronisation.

    Sums are in float32, in the order of the ranks, rounded once: all ranks get the same bits. All
    ranks must call with the same dtype and number of elements, in the same order. An empty ``inp``
    is no call. Can be captured in CUDA graphs; no gradient is recorded. For ``torch.compile`` it
    writes ``out`` and has no other effect: a compiler may leave out a call whose ``out`` is not
    used, and keeps the order of two calls only where one uses what the other writes.
    :meth:`custom_ar.Communicator.all_reduce` has no such limit.

    Args:
        fa: the communicator.
        inp: float32, float16 or bfloat16 on the device of ``fa``, any shape, length and alignment,
            contiguous or a permutation of a contiguous tensor. Elements are summed in the order in
            which they lie in memory.
        out: like ``inp`` in dtype, device, shape and strides; written. May be ``inp``, and must not
            overlap it otherwise.
        reg_buffer: the address of an own buffer for a copy of ``inp``, or 0. It is not used.
        reg_buffer_sz_bytes: size of that buffer; at least that of ``inp`` unless ``reg_buffer`` is
            0.

    Raises:
        RuntimeError: an argument is not as above; or an earlier call has failed, for good: which
            rank did not take part, or on what ranks disagree.

    Source: vLLM ``all_reduce`` of its custom all-reduce.
    """
    _all_reduce(fa, inp, out, reg_buffer, reg_buffer_sz_bytes)


def dispose(fa: int) -> None:
    """Wait for the device, end the communicator and close its mappings of the peers' memory.

    The own buffer stays, for peers that still write to it: :func:`free_shared_buffer` it later.

    Args:
        fa: the communicator.

    Raises:
        RuntimeError: ``fa`` is unknown or disposed of.

    Source: vLLM ``dispose``.
    """
    _namespace.dispose(fa)


def meta_size() -> int:
    """Return the bytes to allocate on top of the largest message, and the least for a buffer.

    Source: vLLM ``meta_size``.
    """
    size: int = _namespace.meta_size()
    return size


def register_buffer(fa: int, ipc_tensors: list[int]) -> None:
    """Take note of a second buffer of each rank. Nothing needs one.

    Mappings of peers' memory among them, from :func:`open_mem_handle`, are closed with ``fa``.

    Args:
        fa: the communicator.
        ipc_tensors: an address for each rank.

    Raises:
        RuntimeError: an argument is not as above.

    Source: vLLM ``register_buffer``.
    """
    _namespace.register_buffer(fa, ipc_tensors)


def get_graph_buffer_ipc_meta(fa: int) -> tuple[list[int], list[int]]:
    """Return what captured graphs need to register: two empty lists.

    Args:
        fa: the communicator.

    Returns:
        The bytes of handles, and offsets.

    Raises:
        RuntimeError: ``fa`` is unknown or disposed of.

    Source: vLLM ``get_graph_buffer_ipc_meta``.
    """
    handles, offsets = _namespace.get_graph_buffer_ipc_meta(fa)
    return handles, offsets


def register_graph_buffers(fa: int, handles: list[list[int]], offsets: list[list[int]]) -> None:
    """Take what :func:`get_graph_buffer_ipc_meta` returned on each rank. Nothing needs it.

    Args:
        fa: the communicator.
        handles: a list for each rank.
        offsets: a list for each rank.

    Raises:
        RuntimeError: an argument is not as above.

    Source: vLLM ``register_graph_buffers``.
    """
    _namespace.register_graph_buffers(fa, handles, offsets)


def allocate_shared_buffer_and_handle(size: int) -> tuple[int, Tensor]:
    """Allocate zeroed memory on the current CUDA device that other processes can map.

    Args:
        size: bytes, at least 1; rounded up to 2 MiB.

    Returns:
        The address, and the handle: 64 bytes as a uint8 CPU tensor.

    Raises:
        RuntimeError: ``size`` is not positive, or the memory cannot be shared.
        torch.OutOfMemoryError: there is not as much. (``RuntimeError`` with the same text from the
            operator itself.)

    Source: vLLM ``allocate_shared_buffer_and_handle``.
    """
    try:
        address, handle = _namespace.allocate_shared_buffer_and_handle(size)
    except RuntimeError as error:
        raise_out_of_memory(error)
        raise
    return address, handle


def open_mem_handle(mem_handle: Tensor) -> int:
    """Map the memory of another process of this host on the current CUDA device.

    Args:
        mem_handle: ``[64]`` uint8 on the CPU, from :func:`allocate_shared_buffer_and_handle` in the
            other process.

    Returns:
        The address in this process.

    Raises:
        RuntimeError: ``mem_handle`` is not as above, or the memory cannot be mapped.

    Source: vLLM ``open_mem_handle``.
    """
    address: int = _namespace.open_mem_handle(mem_handle)
    return address


def free_shared_buffer(ptr: int) -> None:
    """Free what was allocated here, or close the mapping of what was opened here.

    What was allocated here must be freed only once no peer will write to it any more and each has
    closed its mapping (or has ended): that is for the caller to make sure of.

    Args:
        ptr: from :func:`allocate_shared_buffer_and_handle` or :func:`open_mem_handle`.

    Raises:
        RuntimeError: ``ptr`` is not from these, or is freed already.

    Source: vLLM ``free_shared_buffer``.
    """
    _namespace.free_shared_buffer(ptr)
