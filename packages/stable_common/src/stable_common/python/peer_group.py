"""What the ranks of a process group do together to share device memory, and to part again.

A kernel package has this file as its own module ``_peer_group``, which CMake installs there
(``stable_common_add_extension(... PYTHON_MODULES peer_group)``): where a wheel runs, stable_common
need not be installed. Throughout, ``owner`` is the class that the ranks make one of each, such as
``custom_ar.Communicator``: errors begin with it, and its package names the logger.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import logging
import math
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

DEFAULT_TIMEOUT = 30.0
# Bounds what a set-up waits for peers' writes, whatever the caller's timeout: at its first launch a
# rank loads its kernels, which may take longer than a short timeout of the caller's.
PROBE_SECONDS = 10.0

_MAX_TIMEOUT = 1e9


class StepFailed(Exception):
    """A step of setting up failed on some rank, which all ranks know."""


class Memory(Protocol):
    """What a rank holds on its device for its peers: its own buffer and theirs, and more."""

    def allocate(self, num_bytes: int) -> Any:
        """Allocate the own buffer; return what the peers need to map it."""

    def open(self, handles: Sequence[Any]) -> None:
        """Map the peers' buffers and make what works on them. ``handles``: of all ranks."""

    def close_mappings(self) -> list[str]:
        """End that, and unmap the peers' buffers; return what went wrong. Nothing if repeated."""

    def free(self) -> list[str]:
        """Free the own buffer; return what went wrong."""


class PeerGroup:
    """The ranks of a process group, which set up together what they share.

    Whatever fails on one rank, all ranks make the same collective calls: each step ends with an
    exchange of its results, by which all decide alike.
    """

    def __init__(self, owner: str, group: object) -> None:
        """Take the group, or the default one for None.

        Raises:
            ValueError: there is no such group, this process is not in it, or CPU tensors cannot
                be exchanged over it.
        """
        self.group = checked_group(owner, group)
        self.rank = dist.get_rank(self.group)
        self.size = dist.get_world_size(self.group)
        self._owner = owner
        self._package = owner.partition(".")[0]
        self._logger = logging.getLogger(self._package)
        self._unmapped = UnmappedFlags(self.rank, self.size)
        # Without the group, which may be destroyed long before the last error is logged.
        self._log_close = partial(
            self._logger.warning, "%s: rank %d: close: %s", self._package, self.rank
        )

    def exchange_facts(self, facts: Facts | None, argument_error: str | None) -> list[Facts]:
        """Exchange what the ranks start from; one that has bad arguments has ``argument_error``.

        Raises:
            ValueError: on every rank, if an argument is bad on any.
        """
        gathered = self._gather((facts, argument_error))
        if argument_error is not None:
            raise ValueError(f"{self._owner}: {argument_error}")
        for rank, (_, error) in enumerate(gathered):
            if error is not None:
                raise ValueError(f"{self._owner}: on rank {rank}, {error}")
        return [facts for facts, _ in gathered]

    def step(self, what: str, function: Callable[[], T]) -> list[T]:
        """Run a step on this rank and exchange the results; raise StepFailed on all if any did."""
        value: T | None = None
        error = None
        try:
            value = function()
        except Exception as exception:
            error = first_line(exception)
        gathered = self._gather((value, error))
        for rank, (_, text) in enumerate(gathered):
            if text is not None:
                raise StepFailed(f"rank {rank} could not {what}: {text}")
        return [value for value, _ in gathered]

    def _gather(self, value: object) -> list[Any]:
        """Exchange plain Python data: what each rank gave.

        all_gather_object would need NumPy, and takes tensors of the default device.
        """
        if self.size == 1:
            return [value]
        data = pickle.dumps(value)
        lengths = self._gather_tensor([len(data)], torch.int64)
        padded = data.ljust(max(length.tolist()[0] for length in lengths), b"\0")
        gathered = self._gather_tensor(list(padded), torch.uint8)
        # What follows the end of a pickle is not read.
        return [pickle.loads(bytes(data.tolist())) for data in gathered]

    def _gather_tensor(self, values: list[int], dtype: torch.dtype) -> list[torch.Tensor]:
        # On the CPU, for which the group has a backend, whichever others it has.
        own = torch.tensor(values, dtype=dtype, device="cpu")
        gathered = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(gathered, own, group=self.group)
        return gathered

    def set_up(
        self,
        memory: Memory,
        num_bytes: int,
        *,
        check_access: Callable[[], None],
        probe: Callable[[], None],
    ) -> str | None:
        """Share ``num_bytes`` of each rank with its peers and try them.

        Args:
            memory: of this rank; if anything failed, it is given back: the own buffer once no
                peer maps it any more, as :meth:`release` does.
            num_bytes: of the own buffer.
            check_access: raises if it is known that a peer's memory is out of reach.
            probe: raises unless what the peers write arrives.

        Returns:
            None, or what failed on whichever rank; the same text on all.
        """
        free_closed()
        try:
            failure = self._try_set_up(memory, num_bytes, check_access, probe)
            if failure is None:
                return None
            # No one frees memory that a peer may still map.
            with contextlib.suppress(StepFailed):
                if all(self.step("close its mappings", lambda: self._unmap(memory))):
                    _free(self._unmapped, memory, self._log_close)
                    return failure
        except BaseException:
            # The group itself failed, so there is no one to agree with.
            self.release(memory)
            raise
        self.release(memory)
        return failure

    def _try_set_up(
        self,
        memory: Memory,
        num_bytes: int,
        check_access: Callable[[], None],
        probe: Callable[[], None],
    ) -> str | None:
        """Return None, or what failed; ``memory`` holds then what it got."""
        flags = self._unmapped

        def open_all(shared: Sequence[tuple[Any, list[int]]]) -> None:
            flags.open(shared[0][1])
            memory.open([handle for handle, _ in shared])

        try:
            self.step("use its peers' memory", check_access)
            shared = self.step(
                "allocate shared memory", lambda: (memory.allocate(num_bytes), flags.create())
            )
            self.step("map its peers' memory", lambda: open_all(shared))
            flags.unlink()
            self.step("verify its peers' writes", probe)
        except StepFailed as failure:
            return str(failure)
        finally:
            flags.unlink()
        return None

    def log_fallback(self, reason: str, facts: Sequence[Facts]) -> None:
        """Log that all calls go to ``torch.distributed``, and why."""
        # All ranks on the CPU: whoever does that means it.
        is_expected = all(fact.device == "cpu" for fact in facts)
        self._logger.log(
            logging.INFO if is_expected else logging.WARNING,
            "%s: rank %d of %d: all calls go to torch.distributed (%s): %s",
            self._package,
            self.rank,
            self.size,
            dist.get_backend_config(self.group),
            reason,
        )

    def log_shared_gpus(self, facts: Sequence[Facts]) -> None:
        """Log, on rank 0, which ranks share a GPU: it works, slowly, and is seldom meant."""
        gpus: dict[str, list[int]] = {}
        for rank, fact in enumerate(facts):
            if fact.device_uuid:
                gpus.setdefault(fact.device_uuid, []).append(rank)
        for ranks in gpus.values():
            if self.rank == 0 and len(ranks) > 1:
                self._logger.warning(
                    "%s: %s share a GPU, %s %s",
                    self._package,
                    ranks_text(ranks),
                    facts[ranks[0]].device_name,
                    facts[ranks[0]].device_uuid,
                )

    def announce_close(
        self, *, announce: Callable[[], None], check_unraised: Callable[[], None]
    ) -> None:
        """Wait for the device and tell the peers that this rank makes no more calls.

        What fails is logged, and so is the failure of a call that nobody has heard of yet.
        """
        try:
            announce()
        except RuntimeError as error:
            # Kernels may still run: neither this rank nor its peers free what these use.
            self._unmapped.close()
            self._log_close(str(error))
        try:
            check_unraised()
        except RuntimeError as error:
            self._log_close(str(error))

    def release(self, memory: Memory) -> None:
        """Unmap the peers' buffers; free the own one if no peer maps it any more.

        Else it stays until the last peer has unmapped it and :func:`free_closed` is called, by the
        next of this process that is made or closed; or until the process ends. Waits for no peer,
        and for the device. What fails is logged.
        """
        self._unmap(memory)
        with _closed_lock:
            _closed.append((self._unmapped, memory, self._log_close))
        free_closed()

    def _unmap(self, memory: Memory) -> bool:
        """Unmap the peers' buffers and tell them; return False, and log it, if that went wrong."""
        errors = memory.close_mappings()
        for error in errors:
            self._log_close(error)
        if errors:
            self._unmapped.close()
        self._unmapped.set()
        return not errors


class UnmappedFlags:
    """What each rank of a host tells its peers: that it maps no memory of theirs any more.

    CUDA lets an allocation be freed only once no process maps it, and who has unmapped it cannot
    say so there. So there is a file in memory with a byte for each rank, whose name is gone once
    all have opened it. A rank that cannot open it (in a container with a ``/dev/shm`` of its own,
    say) or that dies does not say so, and its peers keep their buffers.
    """

    _DIRECTORY = "/dev/shm"

    def __init__(self, rank: int, size: int) -> None:
        """Take the rank and how many there are; there is no file yet."""
        self._rank = rank
        self._size = size
        self._file: int | None = None
        self._path: str | None = None  # as long as it has a name

    def create(self) -> list[int]:
        """Make the file, on rank 0; return bytes that name it."""
        token = os.urandom(16)
        if self._rank == 0:
            path = self._path_of(token)
            with contextlib.suppress(OSError):
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                self._path = path
                os.write(self._file, bytes(self._size))
        return list(token)

    def open(self, token: Sequence[int]) -> None:
        """Open the file that rank 0 made. ``token``: what create() returned there."""
        if self._rank != 0:
            with contextlib.suppress(OSError):
                self._file = os.open(self._path_of(bytes(token)), os.O_RDWR)

    def unlink(self) -> None:
        """Remove the name; the file stays for who has it open."""
        path, self._path = self._path, None
        if path is not None:
            with contextlib.suppress(OSError):
                os.unlink(path)

    def set(self) -> None:
        """Say that this rank maps no peer's memory any more."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self._file, b"\1", self._rank)

    def is_set_by_all(self) -> bool:
        """Whether all peers have said so."""
        if self._file is None:
            return False
        found = bytearray(os.pread(self._file, self._size, 0))
        found[self._rank : self._rank + 1] = b"\1"
        return found == b"\1" * self._size

    def close(self) -> None:
        """Close the file. Peers of a rank that did so before it set its flag keep their buffers."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def __del__(self) -> None:
        self.close()

    def _path_of(self, token: bytes) -> str:
        return f"{self._DIRECTORY}/stable-kernels-{token.hex()}"


# What was closed, and has a buffer still that a peer may map: nothing that has the process group.
_closed: list[tuple[UnmappedFlags, Memory, Callable[[str], None]]] = []
_closed_lock = threading.Lock()


def free_closed() -> None:
    """Free the buffers of what was closed, of each whose peers have all unmapped it."""
    with _closed_lock:
        is_unmapped = [flags.is_set_by_all() for flags, _, _ in _closed]
        unmapped = list(itertools.compress(_closed, is_unmapped))
        _closed[:] = [entry for entry, is_ in zip(_closed, is_unmapped, strict=True) if not is_]
    for entry in unmapped:
        _free(*entry)


def _free(flags: UnmappedFlags, memory: Memory, log: Callable[[str], None]) -> None:
    """Free the own buffer, which no peer maps any more."""
    flags.close()
    for error in memory.free():
        log(error)


class PeerBuffers:
    """A buffer of this rank on its device, and those of its peers as this process maps them."""

    def __init__(
        self,
        device: torch.device,
        rank: int,
        *,
        allocate: Callable[[int], tuple[int, torch.Tensor]],
        open: Callable[[torch.Tensor], int],
        free: Callable[[int], None],
    ) -> None:
        """Take the package's operators; nothing is allocated yet.

        Args:
            device: where the own buffer is, and which the peers' are mapped on.
            rank: of this process.
            allocate: from bytes to an address and a handle, uint8 on the CPU.
            open: from a peer's handle to an address.
            free: frees what ``allocate`` returned, and unmaps what ``open`` did.
        """
        self._device = device
        self._rank = rank
        self._allocate = allocate
        self._open = open
        self._free = free
        self._own: int | None = None
        self._opened: list[int] = []

    def allocate(self, num_bytes: int) -> list[int]:
        """Allocate the own buffer and return the bytes of its handle."""
        with torch.cuda.device(self._device):
            self._own, handle = self._allocate(num_bytes)
        result: list[int] = handle.tolist()
        return result

    def open(self, handles: Sequence[Sequence[int]]) -> list[int]:
        """Map the buffers of the peers and return the addresses of all ranks' buffers."""
        assert self._own is not None
        addresses = []
        with torch.cuda.device(self._device):
            for rank, handle in enumerate(handles):
                if rank == self._rank:
                    addresses.append(self._own)
                    continue
                address = self._open(torch.tensor(handle, dtype=torch.uint8, device="cpu"))
                self._opened.append(address)
                addresses.append(address)
        return addresses

    def close_mappings(self) -> list[str]:
        """Unmap the buffers of the peers; return what went wrong."""
        opened, self._opened = self._opened, []
        return self.attempt([partial(self._free, address) for address in opened])

    def free(self) -> list[str]:
        """Free the own buffer, which no peer maps any more; return what went wrong."""
        own, self._own = self._own, None
        return [] if own is None else self.attempt([partial(self._free, own)])

    def attempt(self, calls: Sequence[Callable[[], object]]) -> list[str]:
        """Make all the calls with the device current; return what went wrong."""
        errors = []
        for call in calls:
            try:
                with torch.cuda.device(self._device):
                    call()
            except RuntimeError as error:
                errors.append(str(error))
        return errors


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a rank tells the others before anything is allocated."""

    version: str
    max_size: int  # of a call, in what the package counts
    host_name: str
    host_id: str
    device: str  # its type
    device_name: str = ""
    device_uuid: str = ""
    capability: tuple[int, int] = (0, 0)
    num_multiprocessors: int = 0
    problem: str | None = None  # with the device

    @staticmethod
    def of_this_process(
        version: str, max_size: int, host: tuple[str, str], device: torch.device
    ) -> Facts:
        """Ask for the rest. ``host`` is what :func:`host` returned."""
        facts = Facts(version, max_size, *host, device.type)
        if device.type != "cuda":
            return facts
        if not torch.cuda.is_available():
            return dataclasses.replace(facts, problem="CUDA is not available")
        try:
            properties = torch.cuda.get_device_properties(device)
        except Exception as error:
            return dataclasses.replace(facts, problem=first_line(error))
        return dataclasses.replace(
            facts,
            device_name=properties.name,
            device_uuid=str(properties.uuid),
            capability=(properties.major, properties.minor),
            num_multiprocessors=properties.multi_processor_count,
        )


def host() -> tuple[str, str]:
    """The name of the host, and what tells it from every other: containers of one host share it."""
    name = socket.gethostname()
    try:
        return name, Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return name, name


def find_obstacle(
    owner: str,
    facts: Sequence[Facts],
    *,
    size_name: str,
    max_ranks: int,
    min_capability: tuple[int, int],
) -> str | None:
    """What keeps the kernels from serving a group of such ranks; None if nothing is known to.

    Args:
        owner: for errors.
        facts: of all ranks.
        size_name: the argument that :attr:`Facts.max_size` is, for errors.
        max_ranks: that the kernels serve.
        min_capability: that the kernels need.

    Raises:
        ValueError: the sizes differ.
        RuntimeError: the versions differ.
    """
    distribution = owner.partition(".")[0].replace("_", "-")
    for rank, fact in enumerate(facts):
        if fact.version != facts[0].version:
            raise RuntimeError(
                f"{owner}: all ranks must have the same version of {distribution}, got "
                f"{facts[0].version} on rank 0 and {fact.version} on rank {rank}"
            )
    for rank, fact in enumerate(facts):
        if fact.max_size != facts[0].max_size:
            raise ValueError(
                f"{owner}: {size_name} must be the same on all ranks, got "
                f"{facts[0].max_size} on rank 0 and {fact.max_size} on rank {rank}"
            )
    if len(facts) > max_ranks:
        return f"the kernels serve at most {max_ranks} ranks, and the group has {len(facts)}"
    hosts: dict[str, list[int]] = {}
    for rank, fact in enumerate(facts):
        hosts.setdefault(fact.host_id, []).append(rank)
    if len(hosts) > 1:
        places = [f"{ranks_text(on)} on {facts[on[0]].host_name}" for on in hosts.values()]
        return f"the group spans hosts: {', '.join(places)}"
    for type_ in sorted({fact.device for fact in facts} - {"cuda"}):
        ranks = [rank for rank, fact in enumerate(facts) if fact.device == type_]
        return f"the kernels are for CUDA, and the device of {ranks_text(ranks)} is {type_}"
    for rank, fact in enumerate(facts):
        if fact.problem is not None:
            return f"rank {rank} cannot use its device: {fact.problem}"
        if fact.capability < min_capability:
            least, actual = (".".join(map(str, pair)) for pair in (min_capability, fact.capability))
            return (
                f"the kernels need compute capability {least} or later, and the {fact.device_name} "
                f"of rank {rank} has {actual}"
            )
    return None


def share_large_calls(ops: Any) -> None:
    """Let the large calls of all packages in this process be ordered by one object.

    Which is that of the package that comes first. ``ops`` are a package's operators.
    """
    ops._use_large_calls(_shared_by_packages().setdefault("large_calls", ops._large_calls()))


def _shared_by_packages() -> dict[str, Any]:
    """What all packages of a process share. ``torch.distributed``, common to them, holds it."""
    shared: dict[str, Any] = vars(dist).setdefault("_stable_kernels", {})
    return shared


def ranks_per_gpu(facts: Sequence[Facts]) -> collections.Counter[str]:
    """How many ranks each GPU has, by its UUID."""
    return collections.Counter(fact.device_uuid for fact in facts)


def multiprocessors_per_call(facts: Sequence[Facts]) -> int:
    """The multiprocessors that a rank's call may occupy, the same on all ranks.

    Ranks that share a GPU may run on it at the same time, under MPS, and of each the next call's
    blocks wait there while this one's run: all must be resident at once.
    """
    ranks_on = ranks_per_gpu(facts)

    def share(fact: Facts) -> int:
        total = fact.num_multiprocessors
        ranks = ranks_on[fact.device_uuid]
        return total if ranks == 1 else max(1, total // (2 * ranks))

    return min(map(share, facts))


def check_peer_access(facts: Sequence[Facts], rank: int) -> None:
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


def backend_devices(group: dist.ProcessGroup) -> set[str]:
    """The types of the devices whose tensors the group exchanges, such as ``cpu``."""
    return {part.partition(":")[0] for part in dist.get_backend_config(group).split(",")}


def checked_group(owner: str, group: object) -> dist.ProcessGroup:
    """The group, or the default one; ValueError unless CPU tensors can be exchanged over it."""
    if group is None:
        if not dist.is_initialized():
            raise ValueError(
                f"{owner}: group must be a process group, got None and there is no "
                "default group; call torch.distributed.init_process_group first"
            )
        group = dist.group.WORLD
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        # What new_group returned to a process that it left out.
        group = "one that this process is not in"
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"{owner}: group must be a process group, got {group}")
    try:
        devices = backend_devices(group)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{owner}: group must be a process group, got one that "
            "torch.distributed does not know: "
            "it was destroyed, or made by other means than torch.distributed.new_group"
        ) from error
    if "cpu" not in devices:
        raise ValueError(
            f"{owner}: group must have a CPU backend, to exchange handles, got "
            f"{dist.get_backend_config(group)!r}; make it with the backend 'gloo' or "
            "'cpu:gloo,cuda:nccl'"
        )
    return group


def checked_device(device: torch.device | str | int | None) -> torch.device:
    """The device, with its index if it is a CUDA device here; ValueError if there is none such."""
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


def checked_timeout(timeout: float | None, variable: str) -> float:
    """The timeout, or what the environment variable says, or 30; ValueError if it is none."""
    name = "timeout"
    value: object = timeout
    if timeout is None:
        name = variable
        value = os.environ.get(variable) or DEFAULT_TIMEOUT
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 < seconds < _MAX_TIMEOUT:
        raise ValueError(f"{name} must be a positive number of seconds below 1e9, got {value!r}")
    return seconds


def call_order(device: torch.device) -> torch.Tensor:
    """The tensor that a compiler takes compiled calls to write to, so that it keeps their order.

    One per device for all packages and groups: calls of two groups deadlock, too, if their order on
    a stream differs between ranks. On the CPU for devices that the operators have no kernels for,
    which a compiler would else have them run on.
    """
    if device.type != "cuda":
        device = torch.device("cpu")
    orders = _shared_by_packages().setdefault("call_order", {})
    if device not in orders:
        with torch.inference_mode(False):
            orders[device] = torch.zeros(1, dtype=torch.uint8, device=device)
        mark_static(orders[device])
    result: torch.Tensor = orders[device]
    return result


def mark_static(tensor: torch.Tensor) -> None:
    """Let ``mode="reduce-overhead"`` make CUDA graphs of calls that are said to write ``tensor``.

    What ``torch._dynamo.mark_static_address(tensor, guard=False)`` does, without importing
    ``torch._dynamo``, which takes seconds.
    """
    tensor._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]


def ids() -> Iterator[int]:
    """Yield ids of owners for their functional operators; none is the size of any real tensor."""
    return itertools.count((1 << 40) + 1)


def id_shaped(identity: int) -> torch.Tensor:
    """An empty tensor of shape ``[identity, 0]``.

    ``torch.compile`` specialises on an integer attribute that it reaches through a module or a
    global variable, and compiles anew for each value. A tensor's size is dynamic if the tensor says
    so, also with ``dynamic=False``, so that one graph serves all owners.
    """
    with torch.inference_mode(False):
        result = torch.empty((identity, 0), dtype=torch.uint8, device="cpu")
    # What torch._dynamo.maybe_mark_dynamic(result, 0) does, without importing torch._dynamo.
    result._dynamo_weak_dynamic_indices = {0}  # type: ignore[attr-defined]
    result._has_dynamo_dim_marking = True  # type: ignore[attr-defined]
    return result


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def ranks_text(ranks: Sequence[int]) -> str:
    """``rank 1``, or ``ranks 1, 3``."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
