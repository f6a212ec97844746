"""What a rank does in the tests of an owner: the class that the ranks of a group make one of each.

These tests have no GPU. A package's workers describe its owner by a subclass of Kind, which goes to
the ranks by its name, and have a stand-in for its operators, a subclass of StandIn.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import time
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.distributed as dist
from rank_processes import Rank
from rank_reports import error_of, logged
from torch import Tensor
from torch._C._distributed_c10d import HashStore

# Why a rank falls back, and the lines that it logged.
Fallback = tuple[str | None, list[tuple[str, str]]]


class StandIn:
    """The operators, by a process group on the CPU: what an owner asks of them, and when.

    ``failing`` names operators that raise, or ``writes``, which the peers do not see then.
    """

    def __init__(self, rank: Rank, failing: str | None = None) -> None:
        self.rank = rank
        self.failing = failing
        self.calls: list[str] = []
        self.own: set[int] = set()
        self.opened: set[int] = set()
        self.timeouts: list[float] = []
        self.missing: list[int] = []
        self.failure: str | None = None
        self.is_raised = False
        self.shares_gpu = True  # as ranks without a GPU seem to
        self._addresses = itertools.count(1000 * (rank.rank + 1))

    def enter(self, name: str) -> None:
        """Note that an operator is called, which may be to fail."""
        self.calls.append(name)
        if name == self.failing:
            raise RuntimeError(f"{name} failed\nand more lines")

    def allocate(self) -> tuple[int, Tensor]:
        """The address of a new buffer, and its handle."""
        address = next(self._addresses)
        self.own.add(address)
        return address, torch.full((64,), self.rank.rank, dtype=torch.uint8)

    def open(self, handle: Tensor) -> int:
        """The address of a peer's buffer."""
        assert handle.shape == (64,)
        assert handle[0] != self.rank.rank
        address = next(self._addresses)
        self.opened.add(address)
        return address

    def free(self, address: int) -> None:
        """Forget a buffer."""
        (self.own if address in self.own else self.opened).remove(address)

    def check(self) -> None:
        """Raise if a call has failed."""
        if self.failure is not None:
            self.is_raised = True
            raise RuntimeError(self.failure)

    def check_unraised(self) -> None:
        """Raise if a call has failed and check() has not raised it."""
        if not self.is_raised:
            self.check()

    def holds_nothing(self) -> bool:
        """Whether all memory was given back."""
        return not (self.own or self.opened)


class Kind(ABC):
    """An owner, and what its tests do by means of their own."""

    owner: type[Any]
    module: ModuleType  # that it is defined in
    timeout_variable: str
    free: str  # the operator that frees and unmaps buffers
    # What it cannot be made without.
    arguments: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def make(cls, rank: Rank, **arguments: Any) -> Any:
        """Make one of CPU tensors."""
        return cls.owner(rank.group, **{"device": rank.device, **cls.arguments, **arguments})

    @staticmethod
    @abstractmethod
    def call(owner: Any, x: Tensor) -> Tensor:
        """A call of all ranks with their ``x``, float32 ``[T, 8]``; of its shape."""

    @staticmethod
    @abstractmethod
    def fallback(rank: Rank) -> Fallback:
        """Make one, and all its calls."""

    @staticmethod
    @abstractmethod
    def default_group(rank: Rank) -> None:
        """Make one of the default group, and a call."""

    @staticmethod
    @abstractmethod
    def stand_in(rank: Rank, failing: str | None = None) -> AbstractContextManager[Any]:
        """Let those of CPU tensors take the way that those of CUDA tensors take."""


@contextlib.contextmanager
def operators_replaced(module: ModuleType, ops: StandIn, **functions: object) -> Iterator[None]:
    """Let an owner's module have a stand-in for its operators, and nothing to object."""
    with contextlib.ExitStack() as stack:
        for name, value in {"_ops": ops, **functions}.items():
            stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(mock.patch.object(module, "_obstacle", return_value=None))
        device = contextlib.nullcontext()
        stack.enter_context(mock.patch.object(torch.cuda, "device", return_value=device))
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize"))
        yield


def subgroup(rank: Rank, kind: type[Kind], members: list[int]) -> Fallback | str:
    """In a group of some of the ranks; the error of the others."""
    group = dist.new_group(members, backend="gloo")
    if rank.rank not in members:
        error, text = error_of(kind.owner, group, **{**kind.arguments, "device": "cpu"})
        assert error == "ValueError"
        return text
    inside = Rank(members.index(rank.rank), len(members), rank.device, group, rank.directory)
    result = kind.fallback(inside)
    dist.destroy_process_group(group)
    return result


def spanning_hosts(rank: Rank, kind: type[Kind], hosts: list[str]) -> Fallback:
    """Ranks that believe to be on these hosts."""
    host = hosts[rank.rank]
    with mock.patch.object(kind.module, "_host", return_value=(host, f"boot id of {host}")):
        return kind.fallback(rank)


def without_cpu_backend(rank: Rank, kind: type[Kind]) -> tuple[str, str]:
    """The error of a group that exchanges CUDA tensors alone."""
    group = dist.new_group(backend="cuda:gloo")
    return error_of(kind.owner, group, **{**kind.arguments, "device": "cpu"})


def unknown_group(rank: Rank, kind: type[Kind], how: str) -> tuple[str, str]:
    """The error of a group that is not one of torch.distributed's."""
    if how == "destroyed":
        group = dist.new_group(backend="gloo")
        dist.destroy_process_group(group)
    else:
        group = dist.ProcessGroup(HashStore(), 0, 1)
    return error_of(kind.owner, group, **{**kind.arguments, "device": "cpu"})


def bad_argument(
    rank: Rank,
    kind: type[Kind],
    bad_rank: int,
    arguments: dict[str, Any],
    environment: dict[str, str],
) -> tuple[str, str]:
    """The error of each rank where one has a bad argument; the next one works."""
    is_bad = rank.rank == bad_rank
    with mock.patch.dict(os.environ, environment if is_bad else {}):
        error = error_of(kind.make, rank, **(arguments if is_bad else {}))
    kind.default_group(rank)
    return error


def other_version(rank: Rank, kind: type[Kind]) -> tuple[str, str]:
    """The error where each rank has another version."""
    with mock.patch.object(kind.module, "_VERSION", f"1.{rank.rank}"):
        return error_of(kind.make, rank)


def timeouts(rank: Rank, kind: type[Kind]) -> list[float]:
    """From the argument, the environment, and neither."""
    with mock.patch.dict(os.environ, {kind.timeout_variable: "2.5"}):
        given = kind.make(rank, timeout=1)
        named = kind.make(rank)
    with mock.patch.dict(os.environ, {kind.timeout_variable: ""}):
        neither = kind.make(rank)
    return [each.timeout for each in (given, named, neither)]


def closed(rank: Rank, owner: Any) -> float:
    """Close this rank's owner, and then once more when all have; how long it took at first."""
    begin = time.monotonic()
    owner.close()
    seconds = time.monotonic() - begin
    assert owner.closed
    dist.barrier(rank.group)
    owner.close()
    return seconds


def closing(rank: Rank, kind: type[Kind]) -> None:
    """No rank waits for another, and no buffer is freed that a peer may write to."""
    is_first = rank.rank == 0
    with kind.stand_in(rank) as ops:
        before = set(os.listdir("/dev/shm"))
        owner = kind.make(rank)
        dist.barrier(rank.group)
        assert set(os.listdir("/dev/shm")) <= before
        if is_first:
            owner.close()
            assert not ops.opened
            for _ in range(2):
                owner.close()
                assert len(ops.own) == 1
        dist.barrier(rank.group)
        assert len(ops.own) == 1
        if not is_first:
            # The last one to close finds that nobody maps its buffer.
            owner.close()
            assert ops.holds_nothing()
        dist.barrier(rank.group)
        # What is made or closed next frees what was left.
        successor = kind.make(rank)
        assert len(ops.own) == 1
        closed(rank, successor)
        assert ops.holds_nothing()

        # In another order on the second rank.
        owners = [kind.make(rank) for _ in range(2)]
        assert len(ops.own) == 2
        for owner in owners if is_first else reversed(owners):
            assert closed(rank, owner) < 1
        assert ops.holds_nothing()


def closing_with_failures(rank: Rank, kind: type[Kind]) -> list[list[tuple[str, str]]]:
    """Where a rank does not get to say that it has unmapped its peers' memory, they keep it.

    Returns what was logged in each case.
    """
    package = kind.owner.__module__.partition(".")[0]
    flags = f"{package}._peer_group.UnmappedFlags"
    logs = []

    def close(failing: str | None) -> None:
        with kind.stand_in(rank) as ops, logged(package) as lines:
            owner = kind.make(rank)
            if rank.rank == 1:
                ops.failing = failing
            closed(rank, owner)
            # What could not be unmapped stays.
            assert len(ops.opened) == (ops.failing == kind.free)
            assert len(ops.own) == 1
            logs.append(list(lines))

    # Kernels may still run, on this rank and at its peers.
    close("_announce_close")
    # This rank maps its peer's memory still.
    close(kind.free)
    # There is no directory, or none that the ranks share.
    with mock.patch(f"{flags}._DIRECTORY", "/dev/shm/none"):
        close(None)
    with mock.patch(f"{flags}._DIRECTORY", f"{rank.directory}/{rank.rank}"):
        os.mkdir(f"{rank.directory}/{rank.rank}")
        close(None)
        assert os.listdir(f"{rank.directory}/{rank.rank}") == []
    return logs


def dropping(rank: Rank, kind: type[Kind]) -> None:
    """What was closed or dropped keeps no group, and what was dropped no file."""

    def num_files() -> int:
        files = Path("/proc/self/fd").iterdir()
        return sum("stable-kernels-" in os.readlink(file) for file in files if file.is_symlink())

    before = num_files()
    with kind.stand_in(rank) as ops:
        owner = kind.make(rank)
        peers = weakref.ref(owner._peers)
        assert num_files() == before + 1
        if rank.rank == 0:
            owner.close()
        dist.barrier(rank.group)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            del owner
            gc.collect()
        assert peers() is None
        # The first rank looks there still for what the others never say.
        assert num_files() == before + (rank.rank == 0)
        dist.barrier(rank.group)
        kind.module.free_closed()
        assert len(ops.own) == 1


def set_up_fails_and_unmapping(rank: Rank, kind: type[Kind]) -> list[tuple[str, str]]:
    """The second rank cannot unmap its peer's memory after a failure: said once, and both keep it.

    Returns what was logged.
    """
    package = kind.owner.__module__.partition(".")[0]
    error = RuntimeError("cannot unmap") if rank.rank == 1 else None
    with kind.stand_in(rank, "writes") as ops, logged(package) as lines:
        with mock.patch.object(ops, kind.free, side_effect=error, wraps=getattr(ops, kind.free)):
            kind.make(rank)
        assert len(ops.own) == 1
        return [line for line in lines if ": close: " in line[1]]


def set_up_fails_and_group(rank: Rank, kind: type[Kind]) -> None:
    """The group dies as the ranks agree on what they have unmapped: each buffer is freed, once."""
    step = kind.module.PeerGroup.step

    def dying_step(self: Any, what: str, function: Callable[[], Any]) -> list[Any]:
        results: list[Any] = step(self, what, function)
        if what == "close its mappings":
            raise ConnectionError("the group died")
        return results

    with (
        kind.stand_in(rank, "writes") as ops,
        mock.patch.object(kind.module.PeerGroup, "step", dying_step),
    ):
        assert error_of(kind.make, rank) == ("ConnectionError", "the group died")
        dist.barrier(rank.group)
        kind.module.free_closed()
        assert ops.holds_nothing()
        assert ops.calls.count(kind.free) == rank.world_size


def closing_after_a_failure(rank: Rank, kind: type[Kind]) -> list[list[tuple[str, str]]]:
    """What is logged of a failed call where nobody has heard of it yet, and where somebody has."""
    package = kind.owner.__module__.partition(".")[0]
    logs = []
    with kind.stand_in(rank) as ops, logged(package) as lines:
        for is_heard in (False, True):
            owner = kind.make(rank)
            ops.failure, ops.missing = "a call has failed", [1 - rank.rank]
            if is_heard:
                assert error_of(owner.check) == ("RuntimeError", "a call has failed")
            closed(rank, owner)
            assert owner.missing_ranks == [1 - rank.rank]
            assert ops.holds_nothing()
            ops.failure, ops.missing, ops.is_raised = None, [], False
            logs.append(list(lines))
            lines.clear()
    return logs


def sharing_gpus(rank: Rank, kind: type[Kind], uuids: list[str]) -> list[tuple[str, str]]:
    """What is logged where the ranks have these GPUs."""
    package = kind.owner.__module__.partition(".")[0]

    def of_this_process(version: str, max_size: int, *args: Any) -> Any:
        own = {"device_uuid": uuids[rank.rank], "num_multiprocessors": 1}
        return facts(1, version=version, max_size=max_size, **own)[0]

    with (
        mock.patch.object(kind.module, "_Facts", SimpleNamespace(of_this_process=of_this_process)),
        kind.stand_in(rank) as ops,
        logged(package) as lines,
    ):
        ops.shares_gpu = len(set(uuids)) < len(uuids)
        closed(rank, kind.make(rank))
        return list(lines)


def rows_of(rank: Rank, num_tokens: int, ratio: float) -> Tensor:
    """Rows that are ``ratio`` times those of the rank before: no two ratios give one result."""
    return torch.full((num_tokens, 8), ratio * ratio**rank.rank, device=rank.device)


def compiled_order(
    rank: Rank, kind: type[Kind], how: Mapping[str, Any], sizes: tuple[int, ...] = (3, 5, 8, 5)
) -> dict[str, int]:
    """Odd ranks compile and the others do not: calls keep their order, and unused ones are made.

    Nothing here needs code that inductor would want a C++ compiler for. Returns how many CUDA
    graphs there are, and how many inductor refused to make.
    """
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    is_compiled = rank.rank % 2 == 1

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, **how) if is_compiled else function

    with kind.make(rank) as owner, kind.make(rank) as other:

        def swapped(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            first = kind.call(owner, x)
            second = kind.call(owner, y)
            return second, first

        def unused(x: Tensor) -> Tensor:
            result = kind.call(owner, x)
            return x.t() if is_compiled else result.t()

        def two_owners(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            first = kind.call(owner, x)
            second = kind.call(other, y)
            kind.call(owner, y)
            third = kind.call(other, x)
            return third, second, first

        functions: list[Callable[..., tuple[Tensor, ...]]] = [swapped, two_owners]
        for function in functions:
            run = compiled(function)
            for num_tokens in sizes:
                x, y = rows_of(rank, num_tokens, 2.0), rows_of(rank, num_tokens, 3.0)
                all_expected = function(x, y)
                torch.compiler.cudagraph_mark_step_begin()
                for got, right in zip(run(x, y), all_expected, strict=True):
                    assert torch.equal(got, right), (function.__name__, num_tokens)
        run = compiled(unused)
        for num_tokens in sizes:
            x, y = rows_of(rank, num_tokens, 2.0), rows_of(rank, num_tokens, 3.0)
            expected = kind.call(owner, y)
            torch.compiler.cudagraph_mark_step_begin()
            run(x)
            # Were a call left out, this one would be another's.
            assert torch.equal(kind.call(owner, y), expected)
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    return {"graphs": _num_cuda_graphs(rank.device), "skipped": skipped}


def _num_cuda_graphs(device: torch.device) -> int:
    """Those of inductor, of functions that others do not follow."""
    if device.type != "cuda":
        return 0
    from torch._inductor.cudagraph_trees import get_manager

    manager = get_manager(device.index, create_if_none_exists=False)
    return 0 if manager is None else sum(map(len, manager.roots.values()))


class _Layer(torch.nn.Module):
    def __init__(self, kind: type[Kind], owner: Any) -> None:
        super().__init__()
        self.kind = kind
        self.owner = owner

    def forward(self, x: Tensor) -> Tensor:
        return self.kind.call(self.owner, x)


def compiled_for_many(rank: Rank, kind: type[Kind], how: Mapping[str, Any]) -> None:
    """What is compiled for one owner serves any number, as arguments and in modules."""
    graphs: list[torch.fx.GraphModule] = []
    backend = torch._dynamo.lookup_backend(how["backend"])

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return backend(graph, inputs)

    how = {**how, "backend": counting}
    with contextlib.ExitStack() as stack:
        owners = [stack.enter_context(kind.make(rank)) for _ in range(10)]
        x = rows_of(rank, 3, 2.0)
        expected = kind.call(owners[0], x)
        functions: list[Callable[[Any], Tensor]] = []
        as_argument = torch.compile(kind.call, fullgraph=True, **how)
        functions.append(lambda owner: as_argument(owner, x))
        in_module = torch.compile(_Layer.forward, fullgraph=True, **how)
        functions.append(lambda owner: in_module(_Layer(kind, owner), x))
        for function in functions:
            torch.compiler.reset()
            # Some backends ask to begin again, and then get a second graph.
            function(owners[0])
            graphs.clear()
            for owner in [*owners, *owners]:
                assert torch.equal(function(owner), expected)
            assert graphs == []


def compiled_elsewhere(rank: Rank, kind: type[Kind], device: str, backend: str) -> None:
    """Calls with CPU tensors of an owner for a device that the kernels are not for."""
    torch.compiler.reset()
    with kind.make(rank) as right, kind.make(rank, device=device) as owner:
        x = rows_of(rank, 3, 2.0)
        expected = kind.call(right, x)
        function = torch.compile(kind.call, fullgraph=True, backend=backend)
        assert torch.equal(kind.call(owner, x), expected)
        assert torch.equal(function(owner, x), expected)


def resource_warnings(drop: Callable[[], None]) -> list[str]:
    """What Python warns of as the last reference to something goes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        drop()
        gc.collect()
    return [str(w.message) for w in caught if w.category is ResourceWarning]


def facts(count: int, **changes: Any) -> list[Any]:
    """What ``count`` ranks on one host of good GPUs know of themselves; ``changes``: the last."""
    one = SimpleNamespace(
        version="1",
        max_size=1,
        host_name="a",
        host_id="a",
        device="cuda",
        device_name="GPU",
        device_uuid="u",
        capability=(9, 0),
        num_multiprocessors=132,
        problem=None,
    )
    ranks = [SimpleNamespace(**vars(one)) for _ in range(count)]
    for name, value in changes.items():
        setattr(ranks[-1], name, value)
    return ranks
