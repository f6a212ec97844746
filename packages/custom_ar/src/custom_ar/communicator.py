"""The all-reduce of a process group: through the kernels where they can, else through torch."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import os
import socket
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling

from . import _library  # noqa: F401  defines the operators

T = TypeVar("T")

DEFAULT_MAX_SIZE = 32 << 20
DEFAULT_TIMEOUT = 30.0
TIMEOUT_VARIABLE = "CUSTOM_AR_TIMEOUT"
MAX_WORLD_SIZE = 8
MIN_CAPABILITY = (8, 0)
DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))

# Bounds what construction waits for peers' writes, whatever the caller's timeout: at its first
# launch a rank loads its kernels, which may take longer than a short timeout of the caller's.
_PROBE_SECONDS = 10.0
# Not a multiple of anything, so that all kinds of stores are tried.
_PROBE_ELEMENTS = 20_011
_CLOSE_SECONDS = 5.0

_MAX_MAX_SIZE = 1 << 40
_MAX_TIMEOUT = 1e9

_VERSION = version("custom-ar")
_logger = logging.getLogger("custom_ar")
_ops = torch.ops.custom_ar
_try_all_reduce = _ops._try_all_reduce.default
_try_all_reduce_new = _ops._try_all_reduce_new.default

# By the id that functional_all_reduce names them by, which is the same on all ranks of a program
# that makes its communicators in the same order, and never reused.
_communicators: weakref.WeakValueDictionary[int, Communicator] = weakref.WeakValueDictionary()
_next_id = itertools.count(1)


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

        self.group = _checked_group(group)
        self.rank = dist.get_rank(self.group)
        self.world_size = dist.get_world_size(self.group)
        argument_error = None
        facts = None
        try:
            self.device = _checked_device(device)
            self.max_size = _checked_max_size(max_size)
            self.timeout = _checked_timeout(timeout)
            facts = _Facts.of_this_process(self.device, self.max_size)
        except Exception as error:
            # Of CUDA's, say: the others are told before it is raised.
            argument_error = _first_line(error)

        if self.world_size > 1:
            all_facts = self._exchange_facts(facts, argument_error)
            self.fallback_reason = _obstacle(all_facts) or self._set_up(all_facts)
            if self.fallback_reason is not None:
                self._log_fallback(all_facts)
        elif argument_error is not None:
            raise ValueError(f"custom_ar.Communicator: {argument_error}")

        self._id = next(_next_id)
        _communicators[self._id] = self

    def all_reduce(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Sum ``x`` over all ranks, on the current stream.

        All ranks must call, in the same order, with tensors of one dtype and shape and of one
        memory layout. Through the kernels: sums are in float32, in the order of the ranks, rounded
        once, so all ranks get the same bits; nothing waits on the host; the call can be captured in
        a CUDA graph, and ``x`` may be freed or overwritten right after it as after any torch
        operation. Calls on several streams are ordered as they are made; graphs that replay on
        several streams at once are for the caller to order. An empty ``x`` is no call. No gradient
        is recorded. Under ``torch.compile`` it is ``torch.ops.custom_ar.functional_all_reduce``.

        Args:
            x: what to sum; any tensor that the group's backend takes.
            out: of the shape, dtype, device and strides of ``x``; written. May be ``x``, and must
                not overlap it otherwise.

        Returns:
            ``out``, or a new tensor.

        Raises:
            RuntimeError: ``out`` is not as above; the communicator is closed; or an earlier call
                has failed, for good: which rank did not take part, or on what ranks disagree.
        """
        if is_compiling():
            result: Tensor = torch.ops.custom_ar.functional_all_reduce(x, self._id)
            return result if out is None else out.copy_(result)
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
        """Release all memory. Graphs with this communicator's calls must not be replayed any more.

        Every rank should close. Waits for the device and then, at most for 5 seconds or the
        timeout, until the peers will not write here any more; not for missing ranks. Never raises
        for what a peer or the device did, and may be called again.
        """
        if self._closed:
            return
        if self._fa is not None:
            self._missing_ranks = self.missing_ranks
            self._part_from_peers(self._fa)
        self._closed = True
        self._fa = None
        if self._memory is not None:
            for error in [*self._memory.close_mappings(), *self._memory.free()]:
                _logger.warning("custom_ar: rank %d: close: %s", self.rank, error)

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
                result: Tensor | None = _try_all_reduce_new(self._fa, x, self.max_size)
                if result is not None:
                    return result
            elif _try_all_reduce(self._fa, x, out, self.max_size):
                return out
        return self._all_reduce_otherwise(x, out)

    def _all_reduce_otherwise(self, x: Tensor, out: Tensor | None) -> Tensor:
        if self._closed:
            raise RuntimeError("custom_ar.Communicator.all_reduce: the communicator is closed")
        if out is not None:
            _check_out(x, out)
        x = x.detach()
        if x.numel() == 0 or self.world_size == 1:
            if out is None:
                return x.clone()
            return out.copy_(x)
        if self._takes(x):
            dense = x.clone()
            _ops.all_reduce(self._fa, dense, dense, 0, 0)
            return dense if out is None else out.copy_(dense)

        if self.fallback_reason is None:
            # Peers that are lost to the kernels would be waited for there, too.
            _ops._check(self._fa)
            self._log_unsupported(x)
        result = x.clone() if out is None else out
        # Not all backends take strides other than a contiguous tensor's.
        summed = result if result.is_contiguous() else x.contiguous().clone()
        if summed is out:
            out.copy_(x)
        dist.all_reduce(summed, group=self.group)
        return result if summed is result else result.copy_(summed)

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

    def _log_fallback(self, facts: Sequence[_Facts]) -> None:
        # All ranks on the CPU: whoever does that means it.
        is_expected = all(fact.device == "cpu" for fact in facts)
        _logger.log(
            logging.INFO if is_expected else logging.WARNING,
            "custom_ar: rank %d of %d: all calls go to torch.distributed (%s): %s",
            self.rank,
            self.world_size,
            dist.get_backend_config(self.group),
            self.fallback_reason,
        )

    # Setting up. Whatever fails on one rank, all ranks make the same collective calls: each step
    # ends with an exchange of its results, by which all decide alike.

    def _exchange_facts(self, facts: _Facts | None, argument_error: str | None) -> list[_Facts]:
        """Exchange what the ranks start from; raise on all if an argument is bad on any."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, (facts, argument_error), group=self.group)
        if argument_error is not None:
            raise ValueError(f"custom_ar.Communicator: {argument_error}")
        for rank, (_, error) in enumerate(gathered):
            if error is not None:
                raise ValueError(f"custom_ar.Communicator: on rank {rank}, {error}")
        return [facts for facts, _ in gathered]

    def _step(self, what: str, function: Callable[[], T]) -> list[T]:
        """Run a step on this rank and exchange the results; raise _StepFailed on all if any did."""
        value: T | None = None
        error = None
        try:
            value = function()
        except Exception as exception:
            error = _first_line(exception)
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, (value, error), group=self.group)
        for rank, (_, text) in enumerate(gathered):
            if text is not None:
                raise _StepFailed(f"rank {rank} could not {what}: {text}")
        return [value for value, _ in gathered]

    def _set_up(self, facts: Sequence[_Facts]) -> str | None:
        """Share memory with the peers and try it; return what failed, on whichever rank."""
        memory = _SharedMemory(self.device, self.rank)
        try:
            self._step("use its peers' memory", lambda: _check_peer_access(facts, self.rank))
            num_bytes = _ops._buffer_size(self.world_size, self.max_size)
            handles = self._step("allocate shared memory", lambda: memory.allocate(num_bytes))
            self._step("map its peers' memory", lambda: memory.open(handles))
            self._step("verify its peers' writes", lambda: self._probe(memory.fa))
        except _StepFailed as failure:
            # No one frees memory that a peer still maps.
            with contextlib.suppress(_StepFailed):
                self._step("close its mappings", memory.close_mappings)
            memory.free()
            return str(failure)
        except BaseException:
            # The group itself failed, so there is no one to agree with.
            memory.close_mappings()
            memory.free()
            raise
        self._memory = memory
        self._fa = memory.fa
        return None

    def _probe(self, fa: int | None) -> None:
        """Raise unless peers' writes arrive: some drivers promise access and lose them."""
        with torch.cuda.device(self.device):
            index = torch.arange(_PROBE_ELEMENTS, device=self.device) % 1009
            own = (index + 1009 * self.rank).float()
            ranks = range(self.world_size)
            expected = (index * len(ranks) + 1009 * sum(ranks)).float()
            outputs = []
            _ops._set_timeout(fa, _PROBE_SECONDS)
            # Both algorithms, and each in both halves of the buffer, which calls take in turn.
            for algorithm in (0, 0, 1, 1):
                outputs.append(torch.full_like(own, math.nan))
                _ops._all_reduce_as(fa, own, outputs[-1], algorithm, 4, 64, 1)
            torch.cuda.synchronize(self.device)
            _ops._check(fa)
            if not all(torch.equal(output, expected) for output in outputs):
                raise RuntimeError("sums of what the peers wrote are wrong")
            _ops._set_timeout(fa, self.timeout)

    def _part_from_peers(self, fa: int) -> None:
        """Let the peers know that this rank writes no more, and wait for the same from them."""
        try:
            _ops._announce_close(fa)
            deadline = time.monotonic() + min(_CLOSE_SECONDS, self.timeout)
            while True:
                awaited = sorted(set(_ops._open_peers(fa)) - set(self._missing_ranks))
                if not awaited or time.monotonic() >= deadline:
                    break
                time.sleep(0.001)
        except RuntimeError as error:
            _logger.warning("custom_ar: rank %d: close: %s", self.rank, error)
            return
        if awaited:
            _logger.warning(
                "custom_ar: rank %d of %d: closed without %s, which did not close in time",
                self.rank,
                self.world_size,
                _ranks_text(awaited),
            )


class _SharedMemory:
    """What a communicator holds on the device: its own buffer, the peers' mapped, and ``fa``."""

    def __init__(self, device: torch.device, rank: int) -> None:
        self._device = device
        self._rank = rank
        self._own: int | None = None
        self._opened: list[int] = []
        self.fa: int | None = None

    def allocate(self, num_bytes: int) -> list[int]:
        """Allocate the own buffer and return the bytes of its handle."""
        with torch.cuda.device(self._device):
            self._own, handle = _ops.allocate_shared_buffer_and_handle(num_bytes)
        result: list[int] = handle.tolist()
        return result

    def open(self, handles: Sequence[Sequence[int]]) -> None:
        """Map the buffers of the peers and make ``fa``."""
        addresses = []
        with torch.cuda.device(self._device):
            for rank, handle in enumerate(handles):
                if rank == self._rank:
                    addresses.append(self._own)
                    continue
                address = _ops.open_mem_handle(torch.tensor(handle, dtype=torch.uint8))
                self._opened.append(address)
                addresses.append(address)
            rank_data = torch.empty(1, dtype=torch.uint8, device=self._device)
            self.fa = _ops.init_custom_ar(addresses, rank_data, self._rank, True)
        # `fa` closes them from now on.
        self._opened.clear()

    def close_mappings(self) -> list[str]:
        """End ``fa`` and unmap the peers' buffers; return what went wrong."""
        calls = [(_ops.free_shared_buffer, address) for address in self._opened]
        if self.fa is not None:
            calls.append((_ops.dispose, self.fa))
        self._opened, self.fa = [], None
        return self._attempt(calls)

    def free(self) -> list[str]:
        """Free the own buffer; return what went wrong.

        A peer that writes no more may still have it mapped. The driver keeps memory as long as
        anyone maps it.
        """
        calls = [] if self._own is None else [(_ops.free_shared_buffer, self._own)]
        self._own = None
        return self._attempt(calls)

    def _attempt(self, calls: Sequence[tuple[Callable[[int], None], int]]) -> list[str]:
        errors = []
        for function, argument in calls:
            try:
                with torch.cuda.device(self._device):
                    function(argument)
            except RuntimeError as error:
                errors.append(str(error))
        return errors


class _StepFailed(Exception):
    """A step of setting up failed on some rank, which all ranks know."""


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What a rank tells the others before anything is allocated."""

    version: str
    max_size: int
    host_name: str
    host_id: str
    device: str  # its type
    device_name: str = ""
    device_uuid: str = ""
    capability: tuple[int, int] = (0, 0)
    problem: str | None = None  # with the device

    @staticmethod
    def of_this_process(device: torch.device, max_size: int) -> _Facts:
        host_name, host_id = _host()
        facts = _Facts(_VERSION, max_size, host_name, host_id, device.type)
        if device.type != "cuda":
            return facts
        if not torch.cuda.is_available():
            return dataclasses.replace(facts, problem="CUDA is not available")
        try:
            properties = torch.cuda.get_device_properties(device)
        except Exception as error:
            return dataclasses.replace(facts, problem=_first_line(error))
        return dataclasses.replace(
            facts,
            device_name=properties.name,
            device_uuid=str(properties.uuid),
            capability=(properties.major, properties.minor),
        )


def _host() -> tuple[str, str]:
    """The name of the host, and what tells it from every other: containers of one host share it."""
    name = socket.gethostname()
    try:
        return name, Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return name, name


def _obstacle(facts: Sequence[_Facts]) -> str | None:
    """What keeps the kernels from serving a group of such ranks; None if nothing is known to.

    Raises:
        ValueError: ``max_size`` differs.
        RuntimeError: the versions differ.
    """
    for rank, fact in enumerate(facts):
        if fact.version != facts[0].version:
            raise RuntimeError(
                "custom_ar.Communicator: all ranks must have the same version of custom-ar, got "
                f"{facts[0].version} on rank 0 and {fact.version} on rank {rank}"
            )
    for rank, fact in enumerate(facts):
        if fact.max_size != facts[0].max_size:
            raise ValueError(
                "custom_ar.Communicator: max_size must be the same on all ranks, got "
                f"{facts[0].max_size} on rank 0 and {fact.max_size} on rank {rank}"
            )
    if len(facts) > MAX_WORLD_SIZE:
        return f"the kernels serve at most {MAX_WORLD_SIZE} ranks, and the group has {len(facts)}"
    hosts: dict[str, list[int]] = {}
    for rank, fact in enumerate(facts):
        hosts.setdefault(fact.host_id, []).append(rank)
    if len(hosts) > 1:
        places = [f"{_ranks_text(on)} on {facts[on[0]].host_name}" for on in hosts.values()]
        return f"the group spans hosts: {', '.join(places)}"
    for type_ in sorted({fact.device for fact in facts} - {"cuda"}):
        ranks = [rank for rank, fact in enumerate(facts) if fact.device == type_]
        return f"the kernels are for CUDA, and the device of {_ranks_text(ranks)} is {type_}"
    for rank, fact in enumerate(facts):
        if fact.problem is not None:
            return f"rank {rank} cannot use its device: {fact.problem}"
        if fact.capability < MIN_CAPABILITY:
            least, actual = (".".join(map(str, pair)) for pair in (MIN_CAPABILITY, fact.capability))
            return (
                f"the kernels need compute capability {least} or later, and the {fact.device_name} "
                f"of rank {rank} has {actual}"
            )
    return None


def _check_peer_access(facts: Sequence[_Facts], rank: int) -> None:
    """Raise if a peer's device is known to be out of reach.

    A device that this process does not see is found out about by mapping its memory.
    """
    indices = {
        str(torch.cuda.get_device_properties(index).uuid): index
        for index in range(torch.cuda.device_count())
    }
    own = indices.get(facts[rank].device_uuid)
    for peer, fact in enumerate(facts):
        index = indices.get(fact.device_uuid)
        if own is None or index is None or index == own:
            continue
        if not torch.cuda.can_device_access_peer(own, index):
            raise RuntimeError(f"no peer access to the device of rank {peer}, cuda:{index}")


def _checked_group(group: object) -> dist.ProcessGroup:
    """The group, or the default one; ValueError unless objects can be exchanged over it."""
    if group is None:
        if not dist.is_initialized():
            raise ValueError(
                "custom_ar.Communicator: group must be a process group, got None and there is no "
                "default group; call torch.distributed.init_process_group first"
            )
        group = dist.group.WORLD
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        # What new_group returned to a process that it left out.
        group = "one that this process is not in"
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"custom_ar.Communicator: group must be a process group, got {group}")
    backend = dist.get_backend_config(group)
    if "cpu" not in (part.partition(":")[0] for part in backend.split(",")):
        raise ValueError(
            "custom_ar.Communicator: group must have a CPU backend, to exchange handles, got "
            f"{backend!r}; make it with the backend 'gloo' or 'cpu:gloo,cuda:nccl'"
        )
    return group


def _checked_device(device: torch.device | str | int | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        result = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a torch device, got {device!r}") from error
    if result.type != "cuda" or not torch.cuda.is_available():
        return result
    index: Any = result.index  # None for "cuda", whatever its annotation says
    if index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"device must be one of {torch.cuda.device_count()} CUDA devices, got {result}"
        )
    return result


def _checked_max_size(max_size: int) -> int:
    if not isinstance(max_size, int) or not 0 < max_size <= _MAX_MAX_SIZE:
        raise ValueError(f"max_size must be bytes in [1, 2^40], got {max_size!r}")
    return max_size


def _checked_timeout(timeout: float | None) -> float:
    name = "timeout"
    value: object = timeout
    if timeout is None:
        name = TIMEOUT_VARIABLE
        value = os.environ.get(TIMEOUT_VARIABLE) or DEFAULT_TIMEOUT
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 < seconds < _MAX_TIMEOUT:
        raise ValueError(f"{name} must be a positive number of seconds below 1e9, got {value!r}")
    return seconds


def _check_out(x: Tensor, out: Tensor) -> None:
    """As the kernels check it, for calls that go another way."""
    for what, expected, actual in (
        ("dtype", x.dtype, out.dtype),
        ("device", x.device, out.device),
        ("shape", list(x.shape), list(out.shape)),
    ):
        if expected != actual:
            raise RuntimeError(
                f"custom_ar.Communicator.all_reduce: out must have the {what} of x, {expected}, "
                f"got {actual}"
            )


def _is_dense(x: Tensor) -> bool:
    """Whether ``x`` is a permutation of a contiguous tensor."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _ranks_text(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _functional_all_reduce(input: Tensor, communicator: int) -> Tensor:
    found = _communicators.get(communicator)
    if found is None:
        raise RuntimeError(
            "custom_ar::functional_all_reduce: communicator must be the id of a Communicator that "
            f"exists, got {communicator}"
        )
    return found._all_reduce(input, None)


torch.library.define(
    "custom_ar::functional_all_reduce",
    "(Tensor input, int communicator) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("custom_ar::functional_all_reduce", ("cpu", "cuda"), _functional_all_reduce)
