"""All-reduces without end, each checked: ``soak.py --calls N --output DIR [--world-size N]``.

A process for each rank, on the GPUs there are. Calls of mixed sizes, dtypes and alignments, eager
and replayed, in place and not, whose inputs are overwritten right after the call on its stream,
with delays of the host and the device on random ranks. The values are integers whose sums are exact
in every dtype; each result is compared with its sum on the device. Then another such stretch, in
which one rank is killed: the others must find out in time, with no wrong result before.

Writes DIR/soak_<gpu>_x<ranks>.json. The exit code is 1 when anything was wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import random
import secrets
import signal
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import custom_ar
import torch
import torch.distributed as dist
from all_reduce_cases import DTYPES
from gpu_machine import driver_version
from rank_processes import Died, Rank, cuda_devices, spawn_ranks
from torch import Tensor

MAX_EAGER = 1 << 23  # elements
MAX_REPLAYED = 1 << 16
CALLS_PER_GRAPH = 8
GRAPHS = 24
LARGEST_VALUE = 8  # eight ranks' sums are integers that bfloat16 has
MAX_SHIFT = 4096  # how far into the values a call's input may begin
CALLS_PER_CHECK = 1000
DELAYED_STEPS = 0.02
KILL_TIMEOUT = 4.0
KILL_STRETCH = 60.0


class Mismatch(Exception):
    """A result was not the sum."""


class Replayed:
    """A graph of several calls of one size, of which each is checked in the graph."""

    def __init__(self, soak: Soak, dtype: torch.dtype, length: int) -> None:
        self.dtype, self.length = dtype, length
        shape = (CALLS_PER_GRAPH, length)
        self.inputs = torch.zeros(shape, dtype=dtype, device=soak.device)
        self.expected = torch.zeros_like(self.inputs)
        self.graph = torch.cuda.CUDAGraph()
        with soak.communicator.capture(), torch.cuda.graph(self.graph):
            for index in range(CALLS_PER_GRAPH):
                inp = self.inputs[index]
                if index % 3 == 0:
                    out = soak.communicator.all_reduce(inp, out=inp)
                else:
                    out = soak.communicator.all_reduce(inp)
                    inp.fill_(torch.nan)
                soak.count_mismatches(out, self.expected[index])
                out.fill_(torch.nan)


class Soak:
    """One rank's side. ``shared`` draws the same on all ranks, ``own`` does not."""

    def __init__(self, rank: Rank, seed: int, timeout: float) -> None:
        self.rank = rank
        self.device = rank.device
        self.shared = random.Random(seed)
        self.own = random.Random(seed + 1 + rank.rank)
        self.communicator = custom_ar.Communicator(
            rank.group, rank.device, max_size=4 * MAX_EAGER, timeout=timeout
        )
        if self.communicator.fallback_reason is not None:
            raise RuntimeError(self.communicator.fallback_reason)
        num_values = max(MAX_EAGER, CALLS_PER_GRAPH * MAX_REPLAYED) + MAX_SHIFT
        generator = torch.Generator().manual_seed(seed)
        values = torch.randint(
            -LARGEST_VALUE,
            LARGEST_VALUE + 1,
            (rank.world_size, num_values),
            generator=generator,
            dtype=torch.int32,
        )
        total = values.sum(0, dtype=torch.int32).to(self.device)
        own = values[rank.rank].to(self.device)
        self.values = {dtype: own.to(dtype) for dtype in DTYPES}
        self.totals = {dtype: total.to(dtype) for dtype in DTYPES}
        for dtype in DTYPES:
            assert torch.equal(self.totals[dtype].int(), total)
        self.inputs = {
            dtype: torch.empty(MAX_EAGER + 8, dtype=dtype, device=self.device) for dtype in DTYPES
        }
        self.outputs = {dtype: torch.empty_like(self.inputs[dtype]) for dtype in DTYPES}
        self.mismatches = torch.zeros((), dtype=torch.int64, device=self.device)
        self.lost = torch.zeros((), dtype=torch.int64, device=self.device)
        self.calls = {"eager": 0, "replayed": 0}
        self.bytes = 0

    def count_mismatches(self, result: Tensor, expected: Tensor) -> None:
        """NaNs count apart: they are what a call that failed leaves."""
        self.mismatches += (result != expected).sum()
        self.lost += result.isnan().sum()

    def draw_length(self, largest: int) -> int:
        """Log-uniform."""
        return min(int(2 ** self.shared.uniform(0, largest.bit_length() - 1)), largest)

    def make_graphs(self) -> list[Replayed]:
        return [
            Replayed(self, DTYPES[index % len(DTYPES)], self.draw_length(MAX_REPLAYED))
            for index in range(GRAPHS)
        ]

    def delay(self) -> None:
        if self.own.random() < DELAYED_STEPS:
            if self.own.random() < 0.5:
                torch.cuda._sleep(self.own.randrange(1000, 1_000_000))
            else:
                time.sleep(self.own.uniform(0, 0.001))

    def call(self) -> None:
        dtype = self.shared.choice(DTYPES)
        length = self.draw_length(MAX_EAGER)
        shift = self.shared.randrange(MAX_SHIFT)
        # Aligned half of the time, and then as the ranks each like.
        begins = [self.own.choice((0, 0, 8, 1, 3)) for _ in range(2)]
        inp = self.inputs[dtype][begins[0] : begins[0] + length]
        inp.copy_(self.values[dtype][shift : shift + length])
        kind = self.shared.randrange(3)
        if kind == 0:
            out = self.communicator.all_reduce(inp, out=inp)
        elif kind == 1:
            out = self.outputs[dtype][begins[1] : begins[1] + length]
            out.fill_(torch.nan)
            self.communicator.all_reduce(inp, out=out)
        else:
            out = self.communicator.all_reduce(inp)
        if kind != 0:
            inp.fill_(torch.nan)
        self.count_mismatches(out, self.totals[dtype][shift : shift + length])
        out.fill_(torch.nan)
        self.calls["eager"] += 1
        self.bytes += length * dtype.itemsize

    def replay(self, replayed: Replayed) -> None:
        shift = self.shared.randrange(MAX_SHIFT)
        end = shift + CALLS_PER_GRAPH * replayed.length
        for target, source in (
            (replayed.inputs, self.values[replayed.dtype]),
            (replayed.expected, self.totals[replayed.dtype]),
        ):
            target.copy_(source[shift:end].view_as(target))
        replayed.graph.replay()
        self.calls["replayed"] += CALLS_PER_GRAPH
        self.bytes += CALLS_PER_GRAPH * replayed.length * replayed.dtype.itemsize

    def check(self) -> None:
        torch.cuda.synchronize()
        self.communicator.check()
        if self.mismatches:
            raise Mismatch(
                f"rank {self.rank.rank}: {int(self.mismatches)} wrong elements, of which "
                f"{int(self.lost)} are NaN, in {self.calls}"
            )

    def run(self, calls: int) -> None:
        """Half of the calls in replays, and the rest eager, in random order."""
        graphs = self.make_graphs()
        done = checked = 0
        while done < calls:
            self.delay()
            if self.shared.random() * CALLS_PER_GRAPH < 1:
                self.replay(self.shared.choice(graphs))
                done += CALLS_PER_GRAPH
            else:
                self.call()
                done += 1
            if done - checked >= CALLS_PER_CHECK:
                self.check()
                checked = done
        self.check()


def stretch(rank: Rank, seed: int, calls: int, timeout: float) -> dict[str, Any]:
    soak = Soak(rank, seed, timeout)
    dist.barrier(rank.group)
    begin = time.monotonic()
    soak.run(calls)
    seconds = time.monotonic() - begin
    dist.barrier(rank.group)
    soak.communicator.close()
    return {
        "calls": soak.calls,
        "mismatches": int(soak.mismatches),
        "bytes": soak.bytes,
        "seconds": round(seconds, 2),
    }


def killed_stretch(rank: Rank, seed: int, victim: int) -> dict[str, Any]:
    """Eager calls until the loss of ``victim`` is noticed; NaNs are no mismatch in these."""
    soak = Soak(rank, seed, KILL_TIMEOUT)
    soak.call()
    soak.check()
    dist.barrier(rank.group)
    if rank.rank == victim:
        delay = random.Random(seed).uniform(1, 2)
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    begin = last = time.monotonic()
    while time.monotonic() - begin < KILL_STRETCH:
        soak.delay()
        try:
            soak.call()
            if soak.calls["eager"] % 20 == 0:
                torch.cuda.synchronize()
                soak.communicator.check()
                last = time.monotonic()
        except RuntimeError as error:
            waited = time.monotonic() - last
            torch.cuda.synchronize()
            missing = list(soak.communicator.missing_ranks)
            soak.communicator.close()
            return {
                "calls": soak.calls["eager"],
                "mismatches": int(soak.mismatches - soak.lost),
                "waited": round(waited, 2),
                "missing": missing,
                "message": str(error),
            }
    raise AssertionError(f"rank {rank.rank}: no error within {KILL_STRETCH} s")


@dataclasses.dataclass(frozen=True)
class Result:
    """What ``run_soak`` found, by rank; of the killed stretch, by survivor."""

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
                faults.append(f"{what}: wrong elements by rank: {wrong}")
        for record in self.survivors:
            if record["missing"] != [self.victim]:
                faults.append(f"rank {self.victim} was killed: {record['message']}")
            if record["waited"] > KILL_TIMEOUT + 3:
                faults.append(f"the loss was noticed after {record['waited']} s")
        return faults


def run_soak(
    calls: int, world_size: int, devices: list[str], seed: int, timeout: float = 600
) -> Result:
    """Soak ``world_size`` ranks for ``calls`` all-reduces, then once more with a rank killed."""
    stretches = spawn_ranks(
        *(world_size, stretch, seed, calls, 30.0), devices=devices, timeout=timeout
    )
    victim = world_size - 1
    survivors = spawn_ranks(
        *(world_size, killed_stretch, seed, victim), devices=devices, may_die=[victim]
    )
    if survivors.pop(victim) != Died(-signal.SIGKILL):
        raise AssertionError(f"rank {victim} was not killed")
    return Result(seed, stretches, survivors, victim)


def make_record(result: Result, world_size: int, devices: list[str]) -> dict[str, Any]:
    calls = result.stretches[0]["calls"]
    return {
        "gpu": torch.cuda.get_device_name(0),
        "gpus": min(len(devices), world_size),
        "world_size": world_size,
        "driver": driver_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "custom_ar": metadata.version("custom-ar"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seed": result.seed,
        "calls": sum(calls.values()),
        "calls_eager": calls["eager"],
        "calls_replayed": calls["replayed"],
        "bytes_per_rank": result.stretches[0]["bytes"],
        "mismatches": sum(record["mismatches"] for record in result.stretches),
        "seconds": max(record["seconds"] for record in result.stretches),
        "kill": {
            "rank": result.victim,
            "timeout_seconds": KILL_TIMEOUT,
            "survivors": result.survivors,
        },
        "faults": result.faults(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=200_000)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--world-size", type=int, help="the number of GPUs unless given")
    parser.add_argument("--seed", type=int, default=secrets.randbits(31))
    arguments = parser.parse_args()
    devices = cuda_devices()
    if not devices:
        print("soak.py needs a CUDA device", file=sys.stderr)
        return 1
    world_size = arguments.world_size or max(min(len(devices), 8), 2)
    result = run_soak(arguments.calls, world_size, devices, arguments.seed)
    record = make_record(result, world_size, devices)
    arguments.output.mkdir(parents=True, exist_ok=True)
    gpu = record["gpu"].lower().replace(" ", "_")
    path = arguments.output / f"soak_{gpu}_x{world_size}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(
        f"{path}: {record['calls']} calls in {record['seconds']} s, "
        f"{record['mismatches']} wrong elements; {record['faults'] or 'no faults'}"
    )
    return 1 if record["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
