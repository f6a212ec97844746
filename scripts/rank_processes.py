"""Runs the ranks of a test, each a process of its own that joins a group of torch.distributed.

The packages' tests and soaks import this; so do the processes, which get the path of the first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

# A host whose name does not resolve, as on an offline machine, has a loopback interface still.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

START_SECONDS = 180
GROUP_SECONDS = 90
# What the other ranks get to report what they met, once one has failed.
GRACE_SECONDS = 10


class RankFailure(Exception):
    """Some ranks raised, died or did not answer; the message has each one's traceback."""


@dataclasses.dataclass(frozen=True)
class Died:
    """The result of a rank whose process ended; a negative code is the signal that ended it."""

    exit_code: int | None


@dataclasses.dataclass(frozen=True)
class Rank:
    """What a function that runs on a rank is given."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup
    directory: Path  # shared by the ranks, for files of theirs

    def regroup(self, ranks: Sequence[int]) -> Rank:
        """Leave the group for a new one of ``ranks``, all of which call this."""
        dist.destroy_process_group()
        name = "group_" + "_".join(map(str, ranks))
        return join_group(
            ranks.index(self.rank), len(ranks), self.device, self.directory, name, "gloo"
        )


def join_group(
    rank: int, world_size: int, device: torch.device, directory: Path, name: str, backend: str
) -> Rank:
    """Make the default group of the ranks that call this, which meet in a file of this name."""
    dist.init_process_group(
        backend,
        store=FileStore(str(directory / name), world_size),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=GROUP_SECONDS),
    )
    group = dist.group.WORLD
    assert group is not None
    return Rank(rank, world_size, device, group, directory)


def serve(
    connection: Connection, rank: int, world_size: int, device: str, directory: Path, backend: str
) -> None:
    """Join the group, then run what is asked for until the other end of ``connection`` closes."""

    def attempt(function: Callable[..., Any], *args: Any) -> Any:
        try:
            result = function(*args)
        except BaseException:
            connection.send((False, traceback.format_exc()))
            return None
        connection.send((True, None if isinstance(result, Rank) else result))
        return result

    def begin() -> Rank:
        if torch.device(device).type == "cuda":
            torch.cuda.set_device(device)
        return join_group(rank, world_size, torch.device(device), directory, "group", backend)

    context = attempt(begin)
    while context is not None:
        try:
            function, args = connection.recv()
        except EOFError:
            break
        except Exception:  # what was sent cannot be imported here
            connection.send((False, traceback.format_exc()))
            continue
        attempt(function, context, *args)
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class RankProcesses:
    """A process for each rank, that runs one function after the other on all ranks.

    Rank r has device ``devices[r % len(devices)]``, or the CPU. The group is of ``backend``. Any
    failure ends all the processes.
    """

    def __init__(
        self,
        world_size: int,
        devices: Sequence[str] | None = None,
        *,
        env: Mapping[str, str] | None = None,
        backend: str = "gloo",
    ) -> None:
        self.world_size = world_size
        self.is_broken = False
        self._directory = tempfile.TemporaryDirectory(prefix="ranks-", ignore_cleanup_errors=True)
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        context = multiprocessing.get_context("spawn")
        devices = devices or ["cpu"]
        with environment(env or {}):
            for rank in range(world_size):
                own_end, its_end = context.Pipe()
                process = context.Process(
                    target=serve,
                    args=(
                        its_end,
                        rank,
                        world_size,
                        devices[rank % len(devices)],
                        Path(self._directory.name),
                        backend,
                    ),
                    daemon=True,
                )
                process.start()
                its_end.close()
                self._processes.append(process)
                self._connections.append(own_end)
        self._collect(START_SECONDS, may_die=())

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        timeout: float = 120,
        may_die: Collection[int] = (),
    ) -> list[Any]:
        """Return ``function(rank, *args)`` of each rank; the function is pickled by its name.

        The result of a rank in ``may_die`` whose process ended is ``Died``.

        Raises:
            RankFailure: a rank raised, died or took longer than ``timeout`` seconds.
        """
        assert not self.is_broken
        for connection in self._connections:
            connection.send((function, args))
        return self._collect(timeout, may_die)

    def _collect(self, timeout: float, may_die: Collection[int]) -> list[Any]:
        deadline = time.monotonic() + timeout
        pending = set(range(self.world_size))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while pending:
            awaited: dict[Any, int] = {}
            for rank in pending:
                awaited[self._connections[rank]] = rank
                awaited[self._processes[rank].sentinel] = rank
            ready = {awaited[r] for r in wait(list(awaited), max(deadline - time.monotonic(), 0))}
            if not ready:
                failures |= dict.fromkeys(sorted(pending), "did not answer in time")
                break
            for rank in sorted(ready):
                pending.remove(rank)
                try:
                    # Readable also at the end of the stream, which recv() reports.
                    answer = self._connections[rank].recv()
                except (EOFError, OSError):
                    self.is_broken = True
                    self._processes[rank].join(GRACE_SECONDS)
                    exit_code = self._processes[rank].exitcode
                    if rank in may_die:
                        results[rank] = Died(exit_code)
                    else:
                        failures[rank] = f"died with exit code {exit_code}"
                    continue
                succeeded, value = answer
                (results if succeeded else failures)[rank] = value
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if failures:
            self.close(kill=True)
            raise RankFailure(
                "\n".join(
                    f"rank {rank} of {self.world_size}: {text}" for rank, text in failures.items()
                )
            )
        return [results[rank] for rank in range(self.world_size)]

    def close(self, kill: bool = False) -> None:
        """End the processes, by force those that do not end by themselves."""
        self.is_broken = True
        for connection in self._connections:
            connection.close()
        deadline = time.monotonic() + (0 if kill else GRACE_SECONDS)
        for process in self._processes:
            process.join(max(deadline - time.monotonic(), 0))
            if process.is_alive():
                process.kill()
                process.join(GRACE_SECONDS)  # the driver may have to end its work first
        self._directory.cleanup()

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(kill=self.is_broken)


Run = Callable[..., list[Any]]  # RankProcesses.run


def runner(world_size: int, devices: Sequence[str] | None = None) -> Iterator[Run]:
    """Runs functions on ranks that stay for the next test as long as none fails."""
    started: list[RankProcesses] = []

    def run(*args: Any, **options: Any) -> list[Any]:
        if not started or started[-1].is_broken:
            # Without worker processes of torch.compile's own.
            env = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
            started.append(RankProcesses(world_size, devices, env=env))
        return started[-1].run(*args, **options)

    yield run
    for processes in started:
        processes.close()


def spawn_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    devices: Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
    backend: str = "gloo",
    timeout: float = 120,
    may_die: Collection[int] = (),
) -> list[Any]:
    """Start the processes of a ``RankProcesses``, run one function on them and end them."""
    with RankProcesses(world_size, devices, env=env, backend=backend) as processes:
        return processes.run(function, *args, timeout=timeout, may_die=may_die)


def die_in(seconds: float) -> None:
    """Kill this process a while from now, whatever it does then."""
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def check_survivors(function: Callable[..., dict[str, Any]], seed: int) -> None:
    """Check that each survivor of a killed rank names it in time, and that they go on without it.

    ``function(rank, seed, victim, timeout)`` calls until it is told so, and on the victim until it
    dies. It returns how many calls were right, how long the last one took and what was said.
    """
    timeout, victim = 3.0, 1
    results = spawn_ranks(
        *(3, function, seed, victim, timeout), devices=cuda_devices(), may_die=[victim]
    )
    assert results.pop(victim) == Died(-signal.SIGKILL)
    for result in results:
        assert result["calls"] > 0
        assert "rank 1 did not take part" in result["message"]
        assert result["waited"] < timeout + 3
        assert result["missing"] == [victim]


def left_behind(rank: Rank, run: Callable[[int], None], rounds: int) -> dict[str, int]:
    """What ``run(rounds)`` leaves behind, after some: device bytes, open files, mappings."""

    def usage() -> dict[str, int]:
        gc.collect()
        torch.cuda.synchronize()
        dist.barrier(rank.group)
        used = {
            "device bytes": -torch.cuda.mem_get_info(rank.device)[0],
            "files": len(os.listdir("/proc/self/fd")),
            "mappings": Path("/proc/self/maps").read_text().count("\n"),
        }
        dist.barrier(rank.group)
        return used

    run(20)
    before = usage()
    run(rounds)
    after = usage()
    return {name: after[name] - before[name] for name in before}


def cuda_devices() -> list[str]:
    """The names of all CUDA devices."""
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
