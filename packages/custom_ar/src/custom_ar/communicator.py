"""The all-reduce of a process group: through the kernels where they can, else through torch."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
import weakref
from collections.abc import Sequence
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling

from . import __version__ as _VERSION
from ._library import registrations
from ._out_of_memory import raise_out_of_memory
from ._peer_group import (
    PROBE_SECONDS,
    PeerBuffers,
    PeerGroup,
    call_order,
    checked_device,
    checked_timeout,
    find_obstacle,
    first_line,
    free_closed,
    id_shaped,
    ids,
    multiprocessors_per_call,
    ranks_per_gpu,
    share_large_calls,
)
from ._peer_group import Facts as _Facts
from ._peer_group import check_peer_access as _check_peer_access
from ._peer_group import host as _host

DEFAULT_MAX_SIZE = 32 << 20
TIMEOUT_VARIABLE = "CUSTOM_AR_TIMEOUT"
MAX_WORLD_SIZE = 8
MIN_CAPABILITY = (8, 0)
DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))

# Not a multiple of anything, so that all kinds of stores are tried.
_PROBE_ELEMENTS = 20_011

_MAX_MAX_SIZE = 1 << 40

_NAME = "custom_ar.Communicator"
_logger = logging.getLogger("custom_ar")
_ops = torch.ops.custom_ar
_try_all_reduce = _ops._try_all_reduce.default
_try_all_reduce_new = _ops._try_all_reduce_new.default

share_large_calls(_ops)

# By the id that functional_all_reduce names them by, which is the same on all ranks of a program
# that makes its communicators in the same order, and never reused.
_communicators: weakref.WeakValueDictionary[int, Communicator] = weakref.WeakValueDictionary()
_next_id = ids()


class Communicator:
    """All-reduces of one process group, by kernels over peer memory where these can.

    They can on 2 to 8 GPUs of one host with peer access (or one GPU that ranks share), of compute
    capability 8.0 or later. Anything else goes to ``torch.distributed``: a whole group that they
    cannot serve (:attr:`fallback_reason` says why), or a call that they cannot (:meth:`supports`).
    Either is logged once, to the logger ``custom_ar``.

    Making one is collective: all ranks of the group must. It exchanges memory handles, then lets
    the ranks write to each other and checks what arrived; where that fails on any rank, all fall
    back together. Not to be made while a CUDA graph is captured, or in several threads at once.

    A rank that does not take part in a call makes it fail on the others within ``timeout`` seconds:
    what of its output was not summed by then becomes NaN, as do the outputs of all later calls, and
    the next :meth:`all_reduce` or :meth:`check` raises ``RuntimeError`` that names the rank. A
    failed communicator can only be closed; the process and its other streams go on, and survivors
    can make a new one. (In two shots a rank may wait twice: up to some 2.25 times ``timeout``.)
    """

    group: dist.ProcessGroup
    #: Of the tensors that the kernels take.
    device: torch.device
    #: Of this process in the group.
    rank: int
    world_size: int
    #: Of the largest message that the kernels take, in bytes.
    max_size: int
    #: What a call waits for its peers, in seconds.
    timeout: float
    #: None, or why every call goes to ``torch.distributed``; the same text on all ranks.
    fallback_reason: str | None

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | int | None = None,
        max_size: int = DEFAULT_MAX_SIZE,
        *,
        timeout: float | None = None,
    ) -> None:
        """Set up the all-reduce of a group; collective.

        Args:
            group: a process group with a CPU backend, over which handles are exchanged: of the
                backend ``gloo`` or ``cpu:gloo,cuda:nccl``. By default the default group. Calls that
                the kernels cannot serve go to its backend for the tensor's device.
            device: of the tensors; by default the current CUDA device, or the CPU if there is none.
            max_size: bytes of the largest message for the kernels, the same on all ranks. Decides
                the size of the shared buffer: some 2 to 4 times as much on each rank, more for
                small ones on many ranks.
            timeout: seconds that a call waits for its peers; by default the environment variable
                ``CUSTOM_AR_TIMEOUT``, or 30.

        Raises:
            ValueError: on every rank, if an argument of any rank is not as above; without talking
                to the others, if there is no such group or it has no CPU backend.
            RuntimeError: on every rank, if ranks run different versions of this package.
        """
        self._fa: int | None = None
        self._closed = False
        self._missing_ranks: list[int] = []
        self._logged: set[str] = set()
        self._memory: _SharedMemory | None = None
        self.fallback_reason = None

        self._peers = PeerGroup(_NAME, group)
        self.group = self._peers.group
        self.rank = self._peers.rank
        self.world_size = self._peers.size
        argument_error = None
        facts = None
        try:
            self.device = checked_device(device)
            self.max_size = _checked_max_size(max_size)
            self.timeout = checked_timeout(timeout, TIMEOUT_VARIABLE)
            facts = _Facts.of_this_process(_VERSION, self.max_size, _host(), self.device)
        except Exception as error:
            # Of CUDA's, say: the others are told before it is raised.
            argument_error = first_line(error)

        all_facts = self._peers.exchange_facts(facts, argument_error)
        if self.world_size > 1:
            self.fallback_reason = _obstacle(all_facts) or self._set_up(all_facts)
            if self.fallback_reason is not None:
                self._peers.log_fallback(self.fallback_reason, all_facts)
            else:
                self._peers.log_shared_gpus(all_facts)

        has_device = all_facts[self.rank].problem is None
        self._order = call_order(self.device if has_device else torch.device("cpu"))
        self._id = next(_next_id)
        self._id_shaped = id_shaped(self._id)
        _communicators[self._id] = self

    def all_reduce(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Sum ``x`` over all ranks, on the current stream.

        All ranks must call, in the same order, with tensors of one dtype and shape and of one
        memory layout. Through the kernels: sums are in float32, in the order of the ranks, rounded
        once, so all ranks get the same bits; nothing waits on the host; the call can be captured in
        a CUDA graph, and ``x`` may be freed or overwritten right after it as after any torch
        operation. Calls on several streams are ordered as they are made; graphs that replay on
        several streams, or beside eager calls on another, are for the caller to order. An empty
        ``x`` is no call. No gradient is recorded, for ``out`` neither. Under ``torch.compile`` it
        is ``torch.ops.custom_ar.functional_all_reduce``, or ``functional_all_reduce_out``: calls
        keep their order, also among several communicators, and those with unused results are made.

        Args:
            x: what to sum; any tensor that the group's backend takes.
            out: of the shape, dtype, device and strides of ``x``; written. May be ``x``, and must
                not overlap it otherwise. Where ``x`` has gaps, the strides may be those of
                ``torch.empty_like(x)``.

        Returns:
            ``out``, or a new tensor.

        Raises:
            RuntimeError: ``out`` is not as above; the communicator is closed; or an earlier call
                has failed, for good: which rank did not take part, or on what ranks disagree.
            torch.OutOfMemoryError: the result cannot be allocated.
        """
        if is_compiling():
            arguments = (x, self._order, self._id_shaped.shape[0])
            if out is None:
                result: Tensor = torch.ops.custom_ar.functional_all_reduce(*arguments)
                return result
            torch.ops.custom_ar.functional_all_reduce_out(*arguments, out)
            return out
        return self._all_reduce(x, out)

    def supports(self, x: Tensor) -> bool:
        """Whether the kernels sum ``x`` as it is.

        They do if it is float32, float16 or bfloat16 on :attr:`device`, not empty, of at most
        :attr:`max_size` bytes, and contiguous or a permutation of a contiguous tensor, unless the
        communicator falls back or is closed. Other strides cost a copy, which :meth:`all_reduce`
        makes; everything else goes to ``torch.distributed``.
        """
        return self._takes(x) and (x.is_contiguous() or _is_dense(x))

    def capture(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing, around a capture: for callers that are used to vLLM's communicator.

        A captured call needs no registration, before or after the capture.
        """
        return contextlib.nullcontext()

    def check(self) -> None:
        """Raise if a call has failed.

        Replays of a graph do not pass through the host, so failures among them are seen here, or at
        the next :meth:`all_reduce`. Does not wait for the device: what still runs may yet fail.

        Raises:
            RuntimeError: a call has failed, or the communicator is closed.
        """
        if self._closed:
            raise RuntimeError("custom_ar.Communicator.check: the communicator is closed")
        if self._fa is not None:
            _ops._check(self._fa)

    @property
    def missing_ranks(self) -> list[int]:
        """The ranks that did not take part in the call that failed, if that is how it did."""
        if self._fa is None:
            return list(self._missing_ranks)
        return list(_ops._missing_ranks(self._fa))

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def close(self) -> None:
        """End the calls. Graphs with this communicator's calls must not be replayed any more.

        Every rank should close, in any order and at any time: this waits for the device, and for no
        peer. The shared buffer is freed once all ranks have closed: at once on the last of them, on
        the others when a communicator is next made or closed in the process, or this is called
        again. Where a rank never closes, it stays until the process ends.

        Never raises for what a peer or the device did. A failure of a call that no call and no
        :meth:`check` has raised yet is logged.
        """
        if self._closed:
            free_closed()
            return
        fa = self._fa
        if fa is not None:
            self._peers.announce_close(
                announce=lambda: _ops._announce_close(fa),
                check_unraised=lambda: _ops._check_unraised(fa),
            )
            self._missing_ranks = self.missing_ranks
        self._closed = True
        self._fa = None
        if self._memory is not None:
            self._peers.release(self._memory)

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # The memory stays until the process ends: peers may write to it, and graphs may use it.
        if getattr(self, "_fa", None) is not None:
            text = "custom_ar: a Communicator was not closed"
            warnings.warn(text, ResourceWarning, stacklevel=2, source=self)

    def __repr__(self) -> str:
        way = self.fallback_reason or ("kernels" if self.world_size > 1 else "one rank")
        how = "closed" if self._closed else way
        return f"<custom_ar.Communicator rank {self.rank} of {self.world_size}: {how}>"

    # Calls.

    def _takes(self, x: Tensor) -> bool:
        """Whether the kernels take ``x`` if its elements lie densely."""
        return (
            self._fa is not None
            and x.device == self.device
            and x.dtype in DTYPES
            and 0 < x.nbytes <= self.max_size
        )

    def _all_reduce(self, x: Tensor, out: Tensor | None) -> Tensor:
        # C++ decides whether the kernels take `x`: to ask here would take as long as the call.
        if self._fa is not None:
            if out is None:
                try:
                    result: Tensor | None = _try_all_reduce_new(self._fa, x, self.max_size)
                except RuntimeError as error:
                    raise_out_of_memory(error)
                    raise
                if result is not None:
                    return result
            elif _try_all_reduce(self._fa, x, out, self.max_size):
                return out
        return self._all_reduce_otherwise(x, out)

    @torch.no_grad()
    def _all_reduce_otherwise(self, x: Tensor, out: Tensor | None) -> Tensor:
        if self._closed:
            raise RuntimeError("custom_ar.Communicator.all_reduce: the communicator is closed")
        if out is not None:
            _check_out(x, out)
        x = x.detach()
        if x.numel() == 0 or self.world_size == 1:
            if out is None:
                return x.clone()
            return _write(out, x)
        if self._takes(x):
            dense = x.clone()
            _ops.all_reduce(self._fa, dense, dense, 0, 0)
            return dense if out is None else _write(out, dense)

        if self.fallback_reason is None:
            # Peers that are lost to the kernels would be waited for there, too.
            _ops._check(self._fa)
            self._log_unsupported(x)
        result = x.clone() if out is None else out
        # Not all backends take strides other than a contiguous tensor's.
        summed = result if result.is_contiguous() else x.contiguous().clone()
        if summed is out:
            _write(out, x)
        dist.all_reduce(summed, group=self.group)
        return result if summed is result else _write(result, summed)

    def _log_unsupported(self, x: Tensor) -> None:
        """Say, once for each reason, why a call goes another way than the others."""
        level = logging.WARNING
        if x.device != self.device:
            level = logging.INFO if x.device.type == "cpu" else level
            reason = f"the kernels take tensors on {self.device}, not on {x.device}"
        elif x.dtype not in DTYPES:
            reason = f"the kernels take float32, float16 and bfloat16, not {x.dtype}"
        else:
            reason = f"the kernels take at most max_size = {self.max_size} bytes"
        if reason in self._logged:
            return
        self._logged.add(reason)
        _logger.log(
            level,
            "custom_ar: rank %d of %d: a call with %s of %s on %s goes to torch.distributed (%s): "
            "%s; this is logged once",
            self.rank,
            self.world_size,
            list(x.shape),
            x.dtype,
            x.device,
            dist.get_backend_config(self.group),
            reason,
        )

    # Setting up.

    def _set_up(self, facts: Sequence[_Facts]) -> str | None:
        """Share memory with the peers and try it; return what failed, on whichever rank."""
        # A block takes no more than a multiprocessor. Alone on its GPU, a rank may have any number:
        # blocks start in the order of their indices, so not all need to be resident.
        is_shared = max(ranks_per_gpu(facts).values()) > 1
        max_blocks = multiprocessors_per_call(facts) if is_shared else None
        memory = _SharedMemory(self.device, self.rank, max_blocks)
        failure: str | None = self._peers.set_up(
            memory,
            _ops._buffer_size(self.world_size, self.max_size),
            check_access=lambda: _check_peer_access(facts, self.rank),
            probe=lambda: self._probe(memory.fa),
        )
        if failure is None:
            self._memory = memory
            self._fa = memory.fa
        return failure

    def _probe(self, fa: int | None) -> None:
        """Raise unless peers' writes arrive: some drivers promise access and lose them."""
        with torch.cuda.device(self.device):
            index = torch.arange(_PROBE_ELEMENTS, dtype=torch.int64, device=self.device) % 1009
            own = (index + 1009 * self.rank).float()
            ranks = range(self.world_size)
            expected = (index * len(ranks) + 1009 * sum(ranks)).float()
            outputs = []
            _ops._set_timeout(fa, PROBE_SECONDS)
            # Both algorithms, and each in both halves of the buffer, which calls take in turn.
            for algorithm in (0, 0, 1, 1):
                outputs.append(torch.full_like(own, math.nan))
                _ops._all_reduce_as(fa, own, outputs[-1], algorithm, 4, 64, 1)
            torch.cuda.synchronize(self.device)
            _ops._check(fa)
            if not all(torch.equal(output, expected) for output in outputs):
                raise RuntimeError("sums of what the peers wrote are wrong")
            _ops._set_timeout(fa, self.timeout)


class _SharedMemory:
    """What a communicator holds on the device: its own buffer, the peers' mapped, and ``fa``."""

    def __init__(self, device: torch.device, rank: int, max_blocks: int | None) -> None:
        self._device = device
        self._rank = rank
        self._max_blocks = max_blocks
        self._buffers = PeerBuffers(
            device,
            rank,
            allocate=_ops.allocate_shared_buffer_and_handle,
            open=_ops.open_mem_handle,
            free=_ops.free_shared_buffer,
        )
        self.fa: int | None = None

    def allocate(self, num_bytes: int) -> list[int]:
        """Allocate the own buffer and return the bytes of its handle."""
        handle: list[int] = self._buffers.allocate(num_bytes)
        return handle

    def open(self, handles: Sequence[Sequence[int]]) -> None:
        """Map the buffers of the peers and make ``fa``."""
        addresses = self._buffers.open(handles)
        with torch.cuda.device(self._device):
            rank_data = torch.empty(1, dtype=torch.uint8, device=self._device)
            self.fa = _ops.init_custom_ar(addresses, rank_data, self._rank, True)
            # Else dispose() would unmap them, and say nothing of what went wrong.
            _ops._keep_mappings(self.fa)
            if self._max_blocks is not None:
                _ops._set_max_blocks(self.fa, self._max_blocks)

    def close_mappings(self) -> list[str]:
        """End ``fa`` and unmap the peers' buffers; return what went wrong."""
        fa, self.fa = self.fa, None
        calls = [] if fa is None else [lambda: _ops.dispose(fa)]
        return [*self._buffers.attempt(calls), *self._buffers.close_mappings()]

    def free(self) -> list[str]:
        """Free the own buffer; return what went wrong."""
        errors: list[str] = self._buffers.free()
        return errors


def _obstacle(facts: Sequence[_Facts]) -> str | None:
    """What keeps the kernels from serving a group of such ranks; None if nothing is known to.

    Raises:
        ValueError: ``max_size`` differs.
        RuntimeError: the versions differ.
    """
    obstacle: str | None = find_obstacle(
        _NAME,
        facts,
        size_name="max_size",
        max_ranks=MAX_WORLD_SIZE,
        min_capability=MIN_CAPABILITY,
    )
    return obstacle


def _checked_max_size(max_size: int) -> int:
    if not isinstance(max_size, int) or not 0 < max_size <= _MAX_MAX_SIZE:
        raise ValueError(f"max_size must be bytes in [1, 2^40], got {max_size!r}")
    return max_size


def _write(out: Tensor, value: Tensor) -> Tensor:
    """Copy to ``out`` as the kernels write: whatever autograd and inference mode make of it."""
    with torch.inference_mode():
        out.copy_(value)
    return out


def _check_out(x: Tensor, out: Tensor) -> None:
    """As the kernels check it, for calls that go another way."""

    def require(condition: bool, text: str) -> None:
        if not condition:
            raise RuntimeError(f"custom_ar.Communicator.all_reduce: out must {text}")

    for what, expected, actual in (
        ("dtype", x.dtype, out.dtype),
        ("device", x.device, out.device),
        ("shape", list(x.shape), list(out.shape)),
    ):
        require(expected == actual, f"have the {what} of x, {expected}, got {actual}")
    if x.numel() == 0:
        return
    # Where `x` has gaps, also those that a new tensor like it would have.
    like_x = torch.empty_like(x, device="meta")
    require(
        _has_strides(out, x.stride()) or _has_strides(out, like_x.stride()),
        f"have the strides of x, {list(x.stride())}, got {list(out.stride())}",
    )
    require(not _may_overlap_itself(out), f"not overlap itself, got strides {list(out.stride())}")
    begin, end = _extent(x)
    out_begin, out_end = _extent(out)
    # Two with gaps may lie in each other's.
    require(
        (begin == out_begin and _has_strides(out, x.stride()))
        or end <= out_begin
        or out_end <= begin
        or not (_is_dense(x) or _is_dense(out)),
        "be x itself or not overlap it",
    )


def _has_strides(x: Tensor, strides: Sequence[int]) -> bool:
    """Whether these are the strides of ``x`` in the dimensions that have any."""
    return all(
        size == 1 or actual == expected
        for size, actual, expected in zip(x.shape, x.stride(), strides, strict=True)
    )


def _may_overlap_itself(x: Tensor) -> bool:
    """Whether some stride is shorter than what the dimensions of smaller strides span."""
    length = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride < length:
                return True
            length += (size - 1) * stride
    return False


def _extent(x: Tensor) -> tuple[int, int]:
    """Where the memory of a tensor that is not empty begins and ends."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _is_dense(x: Tensor) -> bool:
    """Whether ``x`` is a permutation of a contiguous tensor."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _find_communicator(communicator: int) -> Communicator:
    found = _communicators.get(communicator)
    if found is None:
        raise RuntimeError(
            "custom_ar::functional_all_reduce: communicator must be the id of a Communicator that "
            f"exists, got {communicator}"
        )
    return found


def _functional_all_reduce(input: Tensor, order: Tensor, communicator: int) -> Tensor:
    return _find_communicator(communicator)._all_reduce(input, None)


def _functional_all_reduce_out(
    input: Tensor, order: Tensor, communicator: int, out: Tensor
) -> None:
    _find_communicator(communicator)._all_reduce(input, out)


# `order` is what call_order() returned. It is neither read nor written: the schemas say that it is
# written, or a compiler would drop unused calls and reorder others. Some pass a copy of what is
# written, so it cannot identify the communicator. `communicator` is a SymInt lest it be a constant.
for _name, _schema, _function in (
    (
        "functional_all_reduce",
        "(Tensor input, Tensor(a!) order, SymInt communicator) -> Tensor",
        _functional_all_reduce,
    ),
    (
        "functional_all_reduce_out",
        "(Tensor input, Tensor(a!) order, SymInt communicator, Tensor(b!) out) -> ()",
        _functional_all_reduce_out,
    ),
):
    torch.library.define(
        f"custom_ar::{_name}", _schema, lib=registrations, tags=torch.Tag.pt2_compliant_tag
    )
    torch.library.impl(f"custom_ar::{_name}", ("cpu", "cuda"), _function, lib=registrations)
