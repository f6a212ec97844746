"""The RMSNorms of a process group: through the kernels where they can, else through torch."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling

from . import __version__ as _VERSION
from . import reference
from ._library import registrations
from ._peer_group import (
    PROBE_SECONDS,
    PeerBuffers,
    PeerGroup,
    backend_devices,
    call_order,
    checked_device,
    checked_timeout,
    find_obstacle,
    first_line,
    free_closed,
    id_shaped,
    ids,
    mark_static,
    multiprocessors_per_call,
    ranks_per_gpu,
    share_large_calls,
)
from ._peer_group import Facts as _Facts
from ._peer_group import check_peer_access as _check_peer_access
from ._peer_group import host as _host
from .ops import minimax_allreduce_rms as _rms
from .ops import minimax_allreduce_rms_qk as _rms_qk

TIMEOUT_VARIABLE = "MINIMAX_RMS_TIMEOUT"
MAX_RANKS = 16
MIN_CAPABILITY = (8, 0)

_MAX_TOKENS = 1 << 24

# Tokens of a call of the probe, and what its rows count to: neither a multiple of anything.
_PROBE_TOKENS = 1009
_PROBE_VALUES = 61

_NAME = "minimax_rms.Workspace"
_ops = torch.ops.minimax_rms

share_large_calls(_ops)

# By the id that the functional operators name them by, which is the same on all ranks of a program
# that makes its workspaces in the same order, and never reused.
_workspaces: weakref.WeakValueDictionary[int, Workspace] = weakref.WeakValueDictionary()
_next_id = ids()


class Workspace:
    """RMSNorms of rows whose elements are split over a process group, by kernels where these can.

    They can on up to 16 GPUs of one host with peer access (ranks may share one), of compute
    capability 8.0 or later. Any other group goes to ``torch.distributed``, with the same results up
    to the order of additions: :attr:`fallback_reason` says why, which is logged once, to the logger
    ``minimax_rms``. One workspace serves all layers of a model.

    Making one is collective: all ranks of the group must. It exchanges memory handles, then lets
    the ranks write to each other and checks what arrived; where that fails on any rank, all fall
    back together. Not to be made while a CUDA graph is captured, or in several threads at once.

    A rank that does not take part in a call makes it fail on the others within ``timeout`` seconds:
    what of its outputs was not written by then becomes NaN, as do the outputs of all later calls,
    and the next call or :meth:`check` raises ``RuntimeError`` that names the rank. A failed
    workspace can only be closed; the process and its other streams go on, and survivors can make a
    new one.
    """

    group: dist.ProcessGroup
    #: Of the tensors that the kernels take.
    device: torch.device
    #: Of this process in the group.
    rank: int
    nranks: int
    #: Of the largest call.
    max_tokens: int
    #: What a call waits for its peers, in seconds.
    timeout: float
    #: None, or why every call goes to ``torch.distributed``; the same text on all ranks.
    fallback_reason: str | None

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        max_tokens: int,
        device: torch.device | str | int | None = None,
        *,
        timeout: float | None = None,
    ) -> None:
        """Set up the RMSNorms of a group; collective.

        Args:
            group: a process group with a CPU backend, over which handles are exchanged: of the
                backend ``gloo`` or ``cpu:gloo,cuda:nccl``. None for the default group.
            max_tokens: of the largest call, the same on all ranks, below 2^24. The buffer on each
                rank takes 24 bytes for each of them and each rank, rounded up to 2 MiB.
            device: of the tensors; by default the current CUDA device, or the CPU if there is none.
            timeout: seconds that a call waits for its peers; by default the environment variable
                ``MINIMAX_RMS_TIMEOUT``, or 30.

        Raises:
            ValueError: on every rank, if an argument of any rank is not as above; without talking
                to the others, if there is no such group or it has no CPU backend.
            RuntimeError: on every rank, if ranks run different versions of this package.
        """
        # What the kernels get as a workspace; None where they cannot serve.
        self._workspace: Tensor | None = None
        self._closed = False
        self._missing_ranks: list[int] = []
        self._memory: _SharedMemory | None = None
        self.fallback_reason = None

        self._peers = PeerGroup(_NAME, group)
        self.group = self._peers.group
        self.rank = self._peers.rank
        self.nranks = self._peers.size
        argument_error = None
        facts = None
        try:
            self.device = checked_device(device)
            self.max_tokens = _checked_max_tokens(max_tokens)
            self.timeout = checked_timeout(timeout, TIMEOUT_VARIABLE)
            facts = _Facts.of_this_process(_VERSION, self.max_tokens, _host(), self.device)
        except Exception as error:
            # Of CUDA's, say: the others are told before it is raised.
            argument_error = first_line(error)

        all_facts = self._peers.exchange_facts(facts, argument_error)
        if self.nranks > 1:
            self.fallback_reason = _obstacle(all_facts) or self._set_up(all_facts)
            if self.fallback_reason is not None:
                self._peers.log_fallback(self.fallback_reason, all_facts)
            else:
                self._peers.log_shared_gpus(all_facts)

        has_device = all_facts[self.rank].problem is None
        self._order = call_order(self.device if has_device else torch.device("cpu"))
        self._id = next(_next_id)
        self._id_shaped = id_shaped(self._id)
        _workspaces[self._id] = self

    def allreduce_rms(self, x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
        """Normalize rows by their root mean square over all ranks, and scale them.

        All ranks must call, in the same order and with the same number of tokens, width, dtype and
        ``eps``, each with its slice of the rows. Through the kernels: nothing waits on the host,
        the call can be captured in a CUDA graph, and calls on several streams are ordered as they
        are made; graphs that replay on several streams, or beside eager calls on another, are for
        the caller to order. No gradient is recorded.
        Under ``torch.compile`` it is ``torch.ops.minimax_rms.functional_allreduce_rms``: calls keep
        their order, also among several workspaces, and those with unused results are made.

        Args:
            x: ``[T, D]`` float32, float16 or bfloat16, ``T`` at most :attr:`max_tokens`; ``D`` a
                multiple of 16 bytes, the same on all ranks. Rows are dense, 16-byte aligned, and
                may be any distance apart.
            weight: ``[D]`` of the dtype of ``x``, contiguous, 16-byte aligned.
            eps: added to the mean square before the square root, rounded to float32; at least 0.

        Returns:
            ``[T, D]`` of the dtype of ``x``, contiguous. ``T = 0`` is no call.

        Raises:
            RuntimeError: an argument is not as above; the workspace is closed; or an earlier call
                has failed, for good: which rank did not take part, or on what ranks disagree.
            torch.OutOfMemoryError: a result cannot be allocated.
        """
        if is_compiling():
            result: Tensor = torch.ops.minimax_rms.functional_allreduce_rms(
                x, weight, eps, self._order, self._id_shaped.shape[0]
            )
            return result
        if self._workspace is not None:
            return _rms(x, weight, self._workspace, self.rank, self.nranks, eps)
        return self._allreduce_rms_otherwise(x, weight, eps)

    def allreduce_rms_qk(
        self, qkv: Tensor, weight_q: Tensor, weight_k: Tensor, eps: float = 1e-6
    ) -> tuple[Tensor, Tensor]:
        """Normalize q and k of rows of q, k and v, each by its own root mean square over all ranks.

        Each as by :meth:`allreduce_rms`, in one launch; v is not read. Under ``torch.compile`` it
        is ``torch.ops.minimax_rms.functional_allreduce_rms_qk``.

        Args:
            qkv: ``[T, q_size + 2 * kv_size]`` float32, float16 or bfloat16, ``T`` at most
                :attr:`max_tokens`. Rows are dense, 16-byte aligned, and may be any distance apart.
            weight_q: ``[q_size]`` of the dtype of ``qkv``, contiguous, 16-byte aligned;
                ``q_size``, the elements of q on a rank, a multiple of 16 bytes and the same on all.
            weight_k: ``[kv_size]``, likewise.
            eps: added to the mean squares before the square root, rounded to float32; at least 0.

        Returns:
            q ``[T, q_size]`` and k ``[T, kv_size]`` of the dtype of ``qkv``, contiguous. ``T = 0``
            is no call.

        Raises:
            RuntimeError: an argument is not as above; the workspace is closed; or an earlier call
                has failed, for good: which rank did not take part, or on what ranks disagree.
            torch.OutOfMemoryError: a result cannot be allocated.
        """
        if is_compiling():
            q, k = torch.ops.minimax_rms.functional_allreduce_rms_qk(
                qkv, weight_q, weight_k, eps, self._order, self._id_shaped.shape[0]
            )
            return q, k
        if self._workspace is not None:
            return _rms_qk(
                qkv,
                weight_q,
                weight_k,
                self._workspace,
                weight_q.numel(),
                weight_k.numel(),
                self.rank,
                self.nranks,
                eps,
            )
        return self._allreduce_rms_qk_otherwise(qkv, weight_q, weight_k, eps)

    @property
    def tensor(self) -> Tensor | None:
        """The ``workspace`` of the raw operators, int64 ``[3 * nranks + 2]`` on :attr:`device`.

        None for a single rank, which needs none, where calls go to ``torch.distributed``, and once
        closed. Calls of the raw operators and of the methods are calls of one workspace. Not to be
        used once this is closed: it has addresses of memory that is gone.
        """
        return self._workspace

    def check(self) -> None:
        """Raise if a call has failed.

        Replays of a graph do not pass through the host, so failures among them are seen here, or at
        the next call. Does not wait for the device: what still runs may yet fail.

        Raises:
            RuntimeError: a call has failed, or the workspace is closed.
        """
        self._require_open("check")
        if self._workspace is not None:
            _ops._check(self._workspace)

    @property
    def missing_ranks(self) -> list[int]:
        """The ranks that did not take part in the call that failed, if that is how it did."""
        if self._workspace is None:
            return list(self._missing_ranks)
        return list(_ops._missing_ranks(self._workspace))

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def close(self) -> None:
        """End the calls. Graphs with this workspace's calls must not be replayed any more.

        Every rank should close, in any order and at any time: this waits for the device, and for no
        peer. The shared buffer is freed once all ranks have closed: at once on the last of them, on
        the others when a workspace is next made or closed in the process, or this is called again.
        Where a rank never closes, it stays until the process ends.

        Never raises for what a peer or the device did. A failure of a call that no call and no
        :meth:`check` has raised yet is logged.
        """
        if self._closed:
            free_closed()
            return
        memory, workspace = self._memory, self._workspace
        if memory is not None:
            self._peers.announce_close(
                announce=memory.announce_close,
                check_unraised=lambda: _ops._check_unraised(workspace),
            )
            self._missing_ranks = self.missing_ranks
        self._closed = True
        self._workspace = None
        if memory is not None:
            self._peers.release(memory)

    def __enter__(self) -> Workspace:
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
        if getattr(self, "_workspace", None) is not None:
            _dropped.append(self._memory)
            text = "minimax_rms: a Workspace was not closed"
            warnings.warn(text, ResourceWarning, stacklevel=2, source=self)

    def __repr__(self) -> str:
        way = self.fallback_reason or ("kernels" if self.nranks > 1 else "one rank")
        how = "closed" if self._closed else way
        return f"<minimax_rms.Workspace rank {self.rank} of {self.nranks}: {how}>"

    # Calls that the kernels do not get as they are.

    def _allreduce_rms_otherwise(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        self._require_open("allreduce_rms")
        # But for the workspace, what the operator checks.
        _ops._check_minimax_allreduce_rms(x, weight, _no_workspace(), 0, 1, eps)
        self._require_room("minimax_allreduce_rms", x)
        if self.nranks == 1 or x.shape[0] == 0:
            return _rms(x, weight, _no_workspace(), 0, 1, eps)
        [total] = self._totals([x])
        return reference.normalize(x, weight, total, self.nranks, eps)

    def _allreduce_rms_qk_otherwise(
        self, qkv: Tensor, weight_q: Tensor, weight_k: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        self._require_open("allreduce_rms_qk")
        sizes = (weight_q.numel(), weight_k.numel())
        _ops._check_minimax_allreduce_rms_qk(
            qkv, weight_q, weight_k, _no_workspace(), *sizes, 0, 1, eps
        )
        self._require_room("minimax_allreduce_rms_qk", qkv)
        if self.nranks == 1 or qkv.shape[0] == 0:
            return _rms_qk(qkv, weight_q, weight_k, _no_workspace(), *sizes, 0, 1, eps)
        q, k = reference.split_qk(qkv, *sizes)
        total_q, total_k = self._totals([q, k])
        return (
            reference.normalize(q, weight_q, total_q, self.nranks, eps),
            reference.normalize(k, weight_k, total_k, self.nranks, eps),
        )

    def _totals(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The sums of squares of each part's rows over all ranks, through ``torch.distributed``."""
        own = torch.stack([reference.sum_of_squares(part) for part in parts])
        device = own.device
        if device.type not in backend_devices(self.group):
            own = own.cpu()
        sums = [torch.empty_like(own) for _ in range(self.nranks)]
        dist.all_gather(sums, own, group=self.group)
        return list(reference.total_of_ranks(sums).to(device).unbind())

    def _require_open(self, method: str) -> None:
        if self._closed:
            raise RuntimeError(f"minimax_rms.Workspace.{method}: the workspace is closed")

    def _require_room(self, op: str, x: Tensor) -> None:
        """As the operator checks it."""
        if x.shape[0] > self.max_tokens:
            raise RuntimeError(
                f"minimax_rms::{op}: a call may have at most max_tokens = {self.max_tokens} tokens "
                f"in this workspace, got {x.shape[0]}"
            )

    # Setting up.

    def _set_up(self, facts: Sequence[_Facts]) -> str | None:
        """Share memory with the peers and try it; return what failed, on whichever rank."""
        memory = _SharedMemory(
            self.device,
            self.rank,
            self.nranks,
            self.max_tokens,
            multiprocessors_per_call(facts),
            shares_gpu=max(ranks_per_gpu(facts).values()) > 1,
        )
        failure: str | None = self._peers.set_up(
            memory,
            memory.num_bytes,
            check_access=lambda: _check_peer_access(facts, self.rank),
            probe=lambda: self._probe(memory.tensor),
        )
        if failure is None:
            self._memory = memory
            self._workspace = memory.tensor
        return failure

    def _probe(self, workspace: Tensor | None) -> None:
        """Raise unless peers' writes arrive: some drivers promise access and lose them."""
        assert workspace is not None
        num_tokens = min(_PROBE_TOKENS, self.max_tokens)
        q_size, kv_size = 8, 4
        with torch.cuda.device(self.device):
            counts = torch.arange(num_tokens, dtype=torch.int64, device=self.device)
            weight_q = torch.ones(q_size, dtype=torch.float32, device=self.device)
            weight_k = torch.ones(kv_size, dtype=torch.float32, device=self.device)
            # The input is small integers, and an output is input / sqrt(sum / elements).
            right = []

            def rows(rank: int, call: int, size: int) -> Tensor:
                values = 1 + (counts + 17 * rank + 7 * call) % _PROBE_VALUES
                return values.float()[:, None].expand(num_tokens, size)

            def compare(output: Tensor, call: int, size: int) -> None:
                expected = sum(rows(r, call, size).double().square() for r in range(self.nranks))
                own = rows(self.rank, call, size).double()
                found = (own / output.double()).square() * self.nranks
                # Each is an integer; a NaN is not close to one.
                right.append(((found - expected).abs() < 0.25).all())

            # Each operator in both halves of the buffer, which calls take in turn.
            for call in (0, 1):
                x = rows(self.rank, call, q_size).contiguous()
                compare(_rms(x, weight_q, workspace, self.rank, self.nranks, 0.0), call, q_size)
            for call in (2, 3):
                parts = [(call, q_size), (call + 2, kv_size), (0, kv_size)]
                qkv = torch.cat([rows(self.rank, *part) for part in parts], dim=1)
                sizes = (q_size, kv_size, self.rank, self.nranks)
                outputs = _rms_qk(qkv, weight_q, weight_k, workspace, *sizes, 0.0)
                for output, part in zip(outputs, parts[:2], strict=True):
                    compare(output, *part)
            torch.cuda.synchronize(self.device)
            _ops._check(workspace)
            if not all(right):
                raise RuntimeError("sums of what the peers wrote are wrong")
            _ops._set_timeout(workspace, self.timeout)


# What workspaces that were dropped without being closed hold on the device.
_dropped: list[object] = []


class _SharedMemory:
    """What a workspace holds on the device: buffers, its own and the peers', and its tensors."""

    def __init__(
        self,
        device: torch.device,
        rank: int,
        nranks: int,
        max_tokens: int,
        num_multiprocessors: int,
        *,
        shares_gpu: bool,
    ) -> None:
        self._device = device
        self._rank = rank
        self._nranks = nranks
        self._max_tokens = max_tokens
        self._num_multiprocessors = num_multiprocessors
        self._shares_gpu = shares_gpu
        self._comm_size: int = _ops._comm_size(nranks, max_tokens)
        self._buffers = PeerBuffers(
            device, rank, allocate=_ops._allocate, open=_ops._open, free=_ops._free
        )
        self._addresses: list[int] = []
        # What `tensor` has the addresses of.
        self._pointees: list[Tensor] = []
        self.tensor: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Of the own buffer."""
        return 3 * self._comm_size

    def allocate(self, num_bytes: int) -> list[int]:
        """Allocate the own buffer and return the bytes of its handle."""
        handle: list[int] = self._buffers.allocate(num_bytes)
        return handle

    def open(self, handles: Sequence[Sequence[int]]) -> None:
        """Map the buffers of the peers and make ``tensor``, in the form that callers know."""
        self._addresses = self._buffers.open(handles)
        with torch.cuda.device(self._device):
            counters = torch.zeros(3, dtype=torch.int32, device=self._device)
            sizes = torch.tensor([0, self._comm_size], dtype=torch.int64, device=self._device)
            self._pointees = [counters, sizes]
            entries = [0] * (2 * self._nranks) + self._addresses
            entries += [pointee.data_ptr() for pointee in self._pointees]
            tensor = torch.tensor(entries, dtype=torch.int64, device=self._device)
            # A call may be on any stream.
            torch.cuda.synchronize(self._device)
            limits = (self._max_tokens, self._num_multiprocessors, PROBE_SECONDS)
            _ops._register(tensor, self._rank, self._nranks, *limits, self._shares_gpu)
        mark_static(tensor)
        self.tensor = tensor

    def announce_close(self) -> None:
        """Tell the peers that this rank writes no more, once it does not."""
        with torch.cuda.device(self._device):
            _ops._announce_close(self._addresses, self._rank)

    def close_mappings(self) -> list[str]:
        """Forget ``tensor`` and unmap the peers' buffers; return what went wrong."""
        tensor, self.tensor = self.tensor, None
        calls = [] if tensor is None else [lambda: _ops._forget(tensor)]
        return [*self._buffers.attempt(calls), *self._buffers.close_mappings()]

    def free(self) -> list[str]:
        """Free the own buffer; return what went wrong."""
        errors: list[str] = self._buffers.free()
        self._pointees.clear()
        return errors


def _no_workspace() -> Tensor:
    """What a single rank gives the operators. On the CPU: it does not choose the kernel."""
    return torch.empty(0, dtype=torch.int64, device="cpu")


def _obstacle(facts: Sequence[_Facts]) -> str | None:
    """What keeps the kernels from serving a group of such ranks; None if nothing is known to.

    Raises:
        ValueError: ``max_tokens`` differs.
        RuntimeError: the versions differ.
    """
    obstacle: str | None = find_obstacle(
        _NAME,
        facts,
        size_name="max_tokens",
        max_ranks=MAX_RANKS,
        min_capability=MIN_CAPABILITY,
    )
    return obstacle


def _checked_max_tokens(max_tokens: int) -> int:
    if type(max_tokens) is not int or not 0 < max_tokens < _MAX_TOKENS:
        raise ValueError(f"max_tokens must be tokens in [1, 2^24), got {max_tokens!r}")
    return max_tokens


def _found(op: str, workspace: int) -> Workspace:
    found = _workspaces.get(workspace)
    if found is None:
        raise RuntimeError(
            f"minimax_rms::{op}: workspace must be the id of a Workspace that exists, got "
            f"{workspace}"
        )
    return found


def _functional_rms(x: Tensor, weight: Tensor, eps: float, order: Tensor, workspace: int) -> Tensor:
    return _found("functional_allreduce_rms", workspace).allreduce_rms(x, weight, eps)


def _functional_rms_qk(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, eps: float, order: Tensor, workspace: int
) -> tuple[Tensor, Tensor]:
    found = _found("functional_allreduce_rms_qk", workspace)
    return found.allreduce_rms_qk(qkv, weight_q, weight_k, eps)


# `order` is what call_order() returned. It is neither read nor written: the schemas say that it is
# written, or a compiler would drop unused calls and reorder others. Some pass a copy of what is
# written, so it cannot identify the workspace. `workspace` is a SymInt lest it be a constant.
for _name, _schema, _function in (
    (
        "functional_allreduce_rms",
        "(Tensor x, Tensor weight, float eps, Tensor(a!) order, SymInt workspace) -> Tensor",
        _functional_rms,
    ),
    (
        "functional_allreduce_rms_qk",
        "(Tensor qkv, Tensor weight_q, Tensor weight_k, float eps, Tensor(a!) order, "
        "SymInt workspace) -> (Tensor, Tensor)",
        _functional_rms_qk,
    ),
):
    torch.library.define(
        f"minimax_rms::{_name}", _schema, lib=registrations, tags=torch.Tag.pt2_compliant_tag
    )
    torch.library.impl(f"minimax_rms::{_name}", ("cpu", "cuda"), _function, lib=registrations)
