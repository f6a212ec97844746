"""Soaks: calls of all ranks without end, each checked, and a rank killed in the middle of more.

A package's soak is a subclass of Soak, and its script ends with ``sys.exit(main(<subclass>,
__doc__))``. Ranks are processes, on the GPUs there are.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import platform
import random
import secrets
import signal
import sys
import time
from abc import ABC, abstractmethod
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from gpu_machine import driver_version
from rank_processes import Died, Rank, cuda_devices, die_in, spawn_ranks

CALLS_PER_GRAPH = 8
GRAPHS = 24
CALLS_PER_CHECK = 1000
DELAYED_STEPS = 0.02
TIMEOUT = 30.0
SOAK_SECONDS = 600.0
KILL_TIMEOUT = 4.0
KILL_STRETCH = 60.0


class Mismatch(Exception):
    """A result was not what it had to be."""


class Handle(Protocol):
    """What a rank makes its calls through."""

    fallback_reason: str | None
    missing_ranks: list[int]

    def check(self) -> None:
        """Raise if a call has failed."""

    def close(self) -> None:
        """Release all memory."""


class Soak(ABC):
    """One rank's side. ``shared`` draws the same on all ranks, ``own`` does not."""

    #: The name of the package.
    package: str
    #: What a result has that is counted if it is wrong.
    counted: str
    default_calls: int
    max_ranks: int

    def __init__(self, rank: Rank, seed: int, timeout: float) -> None:
        """Make the handle; a subclass has its inputs after that."""
        self.rank = rank
        self.device = rank.device
        self.shared = random.Random(seed)
        self.own = random.Random(seed + 1 + rank.rank)
        self.handle = self.make_handle(timeout)
        if self.handle.fallback_reason is not None:
            raise RuntimeError(self.handle.fallback_reason)
        # NaNs count apart: they are what a call that failed leaves.
        self.wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        self.lost = torch.zeros((), dtype=torch.int64, device=self.device)
        self.calls = {"eager": 0, "replayed": 0}
        self.bytes = 0

    @abstractmethod
    def make_handle(self, timeout: float) -> Handle:
        """Make what the calls are made through."""

    @abstractmethod
    def make_graph(self, index: int) -> Any:
        """Capture CALLS_PER_GRAPH calls, each with its check."""

    @abstractmethod
    def call(self) -> None:
        """Make an eager call and check it; count it in ``calls`` and ``bytes``."""

    @abstractmethod
    def replay(self, graph: Any) -> None:
        """Replay what ``make_graph`` returned, with inputs of its own; count it likewise."""

    def draw_size(self, largest: int) -> int:
        """Log-uniform."""
        return min(int(2 ** self.shared.uniform(0, largest.bit_length() - 1)), largest)

    def delay(self) -> None:
        """Now and then hold up this rank's device or host."""
        if self.own.random() < DELAYED_STEPS:
            if self.own.random() < 0.5:
                torch.cuda._sleep(self.own.randrange(1000, 1_000_000))
            else:
                time.sleep(self.own.uniform(0, 0.001))

    def check(self) -> None:
        """Raise if anything was wrong so far."""
        torch.cuda.synchronize()
        self.handle.check()
        if self.wrong or self.lost:
            raise Mismatch(
                f"rank {self.rank.rank}: {int(self.wrong)} wrong {self.counted} and "
                f"{int(self.lost)} with NaN in {self.calls}"
            )

    def run(self, calls: int) -> None:
        """Half of the calls in replays, and the rest eager, in random order."""
        graphs = [self.make_graph(index) for index in range(GRAPHS)]
        done = checked = 0
        while done < calls:
            self.delay()
            if self.shared.random() * CALLS_PER_GRAPH < 1:
                self.replay(self.shared.choice(graphs))
            else:
                self.call()
            done = sum(self.calls.values())
            if done - checked >= CALLS_PER_CHECK:
                self.check()
                checked = done
        self.check()


def stretch(rank: Rank, kind: type[Soak], seed: int, calls: int) -> dict[str, Any]:
    """What a rank of the soak runs."""
    soak = kind(rank, seed, TIMEOUT)
    dist.barrier(rank.group)
    begin = time.monotonic()
    soak.run(calls)
    seconds = time.monotonic() - begin
    dist.barrier(rank.group)
    soak.handle.close()
    return {
        "calls": soak.calls,
        "mismatches": int(soak.wrong + soak.lost),
        "bytes": soak.bytes,
        "seconds": round(seconds, 2),
    }


def killed_stretch(rank: Rank, kind: type[Soak], seed: int, victim: int) -> dict[str, Any]:
    """Eager calls until the loss of ``victim`` is noticed; NaNs are no mismatch from then on."""
    soak = kind(rank, seed, KILL_TIMEOUT)
    soak.call()
    soak.check()
    dist.barrier(rank.group)
    if rank.rank == victim:
        die_in(random.Random(seed).uniform(1, 2))
    begin = last = time.monotonic()
    lost = 0
    while time.monotonic() - begin < KILL_STRETCH:
        soak.delay()
        try:
            soak.call()
            if soak.calls["eager"] % 20 == 0:
                seen = int(soak.lost)
                soak.handle.check()
                last, lost = time.monotonic(), seen
        except RuntimeError as error:
            waited = time.monotonic() - last
            torch.cuda.synchronize()
            missing = list(soak.handle.missing_ranks)
            soak.handle.close()
            return {
                "calls": soak.calls["eager"],
                "mismatches": int(soak.wrong) + lost,
                "waited": round(waited, 2),
                "missing": missing,
                "message": str(error),
            }
    raise AssertionError(f"rank {rank.rank}: no error within {KILL_STRETCH} s")


@dataclasses.dataclass(frozen=True)
class Result:
    """What ``run_soak`` found, by rank; of the killed stretch, by survivor."""

    kind: type[Soak]
    seed: int
    stretches: list[dict[str, Any]]
    survivors: list[dict[str, Any]]
    victim: int

    def faults(self) -> list[str]:
        """What was not as it must be, in words."""
        faults = []
        for what, records in (("soak", self.stretches), ("kill", self.survivors)):
            wrong = [record["mismatches"] for record in records]
            if any(wrong):
                faults.append(f"{what}: wrong {self.kind.counted} by rank: {wrong}")
        for record in self.survivors:
            if record["missing"] != [self.victim]:
                faults.append(f"rank {self.victim} was killed: {record['message']}")
            if record["waited"] > KILL_TIMEOUT + 3:
                faults.append(f"the loss was noticed after {record['waited']} s")
        return faults

    def record(self, world_size: int, devices: list[str]) -> dict[str, Any]:
        """The same for a file, with what it was run on."""
        calls = self.stretches[0]["calls"]
        package = self.kind.package
        library = import_module(f"{package}._library").LIBRARY_PATH
        return {
            "gpu": torch.cuda.get_device_name(0),
            "gpus": min(len(devices), world_size),
            "world_size": world_size,
            "driver": driver_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            package: metadata.version(package.replace("_", "-")),
            "library_sha256": hashlib.sha256(library.read_bytes()).hexdigest(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "seed": self.seed,
            "calls": sum(calls.values()),
            "calls_eager": calls["eager"],
            "calls_replayed": calls["replayed"],
            "bytes_per_rank": self.stretches[0]["bytes"],
            "mismatches": sum(record["mismatches"] for record in self.stretches),
            "seconds": max(record["seconds"] for record in self.stretches),
            "kill": {
                "rank": self.victim,
                "timeout_seconds": KILL_TIMEOUT,
                "survivors": self.survivors,
            },
            "faults": self.faults(),
        }


def run_soak(
    kind: type[Soak], calls: int, world_size: int, devices: list[str], seed: int
) -> Result:
    """Soak ``world_size`` ranks for ``calls`` calls, then once more with a rank killed."""
    stretches = spawn_ranks(
        *(world_size, stretch, kind, seed, calls), devices=devices, timeout=SOAK_SECONDS
    )
    victim = world_size - 1
    survivors = spawn_ranks(
        *(world_size, killed_stretch, kind, seed, victim), devices=devices, may_die=[victim]
    )
    if survivors.pop(victim) != Died(-signal.SIGKILL):
        raise AssertionError(f"rank {victim} was not killed")
    return Result(kind, seed, stretches, survivors, victim)


def check_soak(kind: type[Soak], calls: int, devices: list[str], seed: int) -> None:
    """Soak a rank on each device, two at least, as a test."""
    result = run_soak(kind, calls, max(min(len(devices), kind.max_ranks), 2), devices, seed)
    assert not result.faults()
    for record in result.stretches:
        assert sum(record["calls"].values()) >= calls
        assert min(record["calls"].values()) > calls // 4


def main(kind: type[Soak], description: str | None) -> int:
    """Soak as the command line says, and write what came of it."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=kind.default_calls)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--world-size", type=int, help="the number of GPUs unless given")
    parser.add_argument("--seed", type=int, default=secrets.randbits(31))
    arguments = parser.parse_args()
    devices = cuda_devices()
    if not devices:
        print(f"{Path(sys.argv[0]).name} needs a CUDA device", file=sys.stderr)
        return 1
    world_size = arguments.world_size or max(min(len(devices), kind.max_ranks), 2)
    result = run_soak(kind, arguments.calls, world_size, devices, arguments.seed)
    record = result.record(world_size, devices)
    arguments.output.mkdir(parents=True, exist_ok=True)
    gpu = record["gpu"].lower().replace(" ", "_")
    path = arguments.output / f"soak_{gpu}_x{world_size}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(
        f"{path}: {record['calls']} calls in {record['seconds']} s, "
        f"{record['mismatches']} wrong {kind.counted}; {record['faults'] or 'no faults'}"
    )
    return 1 if record["faults"] else 0
