"""RMSNorms without end, each checked: ``minimax_soak.py --calls N --output DIR``.

A process for each rank, on the GPUs there are, or ``--world-size`` of them. Calls of all layers of
a model of mixed dtypes, widths and operators share one workspace: of 1 to 8192 tokens, few more
often (now and then of none, which does not count), eager and replayed, with delays of the host and
the device on random ranks, and with inputs that are overwritten right after the call on its stream.
Each output is compared on the device with the bounds that float64 gives. Then another such stretch,
in which one rank is killed: the others must find out in time, with no wrong result before.

Writes DIR/soak_<gpu>_x<ranks>.json. The exit code is 1 when anything was wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
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

import minimax_rms
import torch
import torch.distributed as dist
from gpu_machine import driver_version
from minimax_arithmetic import bounds
from minimax_cases import EPS, m2_widths, make_problem
from minimax_rms._library import LIBRARY_PATH
from rank_processes import Died, Rank, cuda_devices, spawn_ranks
from torch import Tensor

MAX_TOKENS = 8192
MAX_REPLAYED = 256
MAX_SHIFT = 512  # how far into a layer's rows a call's may begin
CALLS_PER_GRAPH = 8
GRAPHS = 24
CALLS_PER_CHECK = 1000
DELAYED_STEPS = 0.02
KILL_TIMEOUT = 4.0
KILL_STRETCH = 60.0
SLACK = 2.0**-19  # of so many results some come near the usual one


class Mismatch(Exception):
    """A result was not what it had to be."""


class Layer:
    """Rows of one dtype and width with weights of their own, and the bounds of their results."""

    def __init__(
        self, rank: Rank, widths: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        problem = make_problem(rank.world_size, MAX_TOKENS + MAX_SHIFT, widths, dtype, generator)
        self.rows = problem.inputs[rank.rank]
        self.weights = problem.weights[rank.rank]
        exact = problem.exact()[rank.rank]
        self.bounds = [bounds(part, dtype, SLACK) for part in exact]
        self.row_bytes = problem.row_bytes

    def call(self, workspace: minimax_rms.Workspace, x: Tensor) -> tuple[Tensor, ...]:
        if len(self.weights) == 1:
            return (workspace.allreduce_rms(x, self.weights[0], EPS),)
        return workspace.allreduce_rms_qk(x, *self.weights, EPS)


def make_layers(rank: Rank, seed: int) -> list[Layer]:
    """The same rows on all ranks' devices, each of which keeps its own."""
    generator = torch.Generator(rank.device).manual_seed(seed)
    layers = []
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32):
        q, k = m2_widths(rank.world_size, dtype)
        vector = 16 // dtype.itemsize
        for widths in ((q, k), (q,), (77 * vector, 5 * vector), (vector, vector)):
            layers.append(Layer(rank, widths, dtype, generator))
    torch.cuda.empty_cache()
    return layers


class Replayed:
    """A graph of calls of several layers, of which each is checked in the graph."""

    def __init__(self, soak: Soak, num_tokens: int) -> None:
        self.begin = torch.zeros((), dtype=torch.int64, device=soak.device)
        # Kept: the graph reads it.
        self.tokens = torch.arange(num_tokens, device=soak.device)
        layers = [soak.shared.choice(soak.layers) for _ in range(CALLS_PER_GRAPH)]
        self.bytes = sum(layer.row_bytes for layer in layers) * num_tokens
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            places = self.tokens + self.begin
            inputs = [layer.rows[places] for layer in layers]
            # Back to back, and then the checks.
            outputs = [
                layer.call(soak.workspace, x) for layer, x in zip(layers, inputs, strict=True)
            ]
            for layer, x, parts in zip(layers, inputs, outputs, strict=True):
                x.fill_(torch.nan)
                for part, (least, greatest) in zip(parts, layer.bounds, strict=True):
                    soak.count_mismatches(part, least[places], greatest[places])
                    part.fill_(torch.nan)


class Soak:
    """One rank's side. ``shared`` draws the same on all ranks, ``own`` does not."""

    def __init__(self, rank: Rank, seed: int, timeout: float) -> None:
        self.rank = rank
        self.device = rank.device
        self.shared = random.Random(seed)
        self.own = random.Random(seed + 1 + rank.rank)
        self.workspace = minimax_rms.Workspace(rank.group, MAX_TOKENS, rank.device, timeout=timeout)
        if self.workspace.fallback_reason is not None:
            raise RuntimeError(self.workspace.fallback_reason)
        self.layers = make_layers(rank, seed)
        self.wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        self.lost = torch.zeros((), dtype=torch.int64, device=self.device)
        self.calls = {"eager": 0, "replayed": 0}
        self.bytes = 0

    def count_mismatches(self, result: Tensor, least: Tensor, greatest: Tensor) -> None:
        """NaNs count apart: they are what a call that failed leaves."""
        self.wrong += ((result < least) | (result > greatest)).any()
        self.lost += result.isnan().any()

    def draw_tokens(self, largest: int) -> int:
        """Log-uniform."""
        return min(int(2 ** self.shared.uniform(0, largest.bit_length() - 1)), largest)

    def delay(self) -> None:
        if self.own.random() < DELAYED_STEPS:
            if self.own.random() < 0.5:
                torch.cuda._sleep(self.own.randrange(1000, 1_000_000))
            else:
                time.sleep(self.own.uniform(0, 0.001))

    def call(self) -> None:
        layer = self.shared.choice(self.layers)
        num_tokens = self.draw_tokens(MAX_TOKENS)
        if self.shared.random() < 0.02:
            num_tokens = self.shared.choice((0, MAX_TOKENS))
        begin = self.shared.randrange(MAX_SHIFT)
        rows = layer.rows[begin : begin + num_tokens]
        # As they lie among others, or in memory that is something else right after.
        if self.own.random() < 0.5:
            outputs = layer.call(self.workspace, rows)
        else:
            x = rows.clone()
            outputs = layer.call(self.workspace, x)
            x.fill_(torch.nan)
        for part, (least, greatest) in zip(outputs, layer.bounds, strict=True):
            end = begin + num_tokens
            self.count_mismatches(part, least[begin:end], greatest[begin:end])
            part.fill_(torch.nan)
        self.calls["eager"] += num_tokens > 0
        self.bytes += num_tokens * layer.row_bytes

    def replay(self, replayed: Replayed) -> None:
        replayed.begin.fill_(self.shared.randrange(MAX_SHIFT))
        replayed.graph.replay()
        self.calls["replayed"] += CALLS_PER_GRAPH
        self.bytes += replayed.bytes

    def check(self) -> None:
        torch.cuda.synchronize()
        self.workspace.check()
        if self.wrong or self.lost:
            raise Mismatch(
                f"rank {self.rank.rank}: {int(self.wrong)} outputs with wrong values and "
                f"{int(self.lost)} with NaNs in {self.calls}"
            )

    def run(self, calls: int) -> None:
        """Half of the calls in replays, and the rest eager, in random order."""
        graphs = [Replayed(self, self.draw_tokens(MAX_REPLAYED)) for _ in range(GRAPHS)]
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


def stretch(rank: Rank, seed: int, calls: int, timeout: float) -> dict[str, Any]:
    soak = Soak(rank, seed, timeout)
    dist.barrier(rank.group)
    begin = time.monotonic()
    soak.run(calls)
    seconds = time.monotonic() - begin
    dist.barrier(rank.group)
    soak.workspace.close()
    return {
        "calls": soak.calls,
        "mismatches": int(soak.wrong + soak.lost),
        "bytes": soak.bytes,
        "seconds": round(seconds, 2),
    }


def killed_stretch(rank: Rank, seed: int, victim: int) -> dict[str, Any]:
    """Eager calls until the loss of ``victim`` is noticed; NaNs are no mismatch from then on."""
    soak = Soak(rank, seed, KILL_TIMEOUT)
    soak.call()
    soak.check()
    dist.barrier(rank.group)
    if rank.rank == victim:
        delay = random.Random(seed).uniform(1, 2)
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    begin = last = time.monotonic()
    lost = 0
    while time.monotonic() - begin < KILL_STRETCH:
        soak.delay()
        try:
            soak.call()
            if soak.calls["eager"] % 20 == 0:
                torch.cuda.synchronize()
                seen = int(soak.lost)
                soak.workspace.check()
                last, lost = time.monotonic(), seen
        except RuntimeError as error:
            waited = time.monotonic() - last
            torch.cuda.synchronize()
            missing = list(soak.workspace.missing_ranks)
            soak.workspace.close()
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
                faults.append(f"{what}: wrong outputs by rank: {wrong}")
        for record in self.survivors:
            if record["missing"] != [self.victim]:
                faults.append(f"rank {self.victim} was killed: {record['message']}")
            if record["waited"] > KILL_TIMEOUT + 3:
                faults.append(f"the loss was noticed after {record['waited']} s")
        return faults


def run_soak(
    calls: int, world_size: int, devices: list[str], seed: int, timeout: float = 600
) -> Result:
    """Soak ``world_size`` ranks for ``calls`` calls, then once more with a rank killed."""
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
        "minimax_rms": metadata.version("minimax-rms"),
        "library_sha256": hashlib.sha256(LIBRARY_PATH.read_bytes()).hexdigest(),
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
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--world-size", type=int, help="the number of GPUs unless given")
    parser.add_argument("--seed", type=int, default=secrets.randbits(31))
    arguments = parser.parse_args()
    devices = cuda_devices()
    if not devices:
        print("minimax_soak.py needs a CUDA device", file=sys.stderr)
        return 1
    world_size = arguments.world_size or max(min(len(devices), 16), 2)
    result = run_soak(arguments.calls, world_size, devices, arguments.seed)
    record = make_record(result, world_size, devices)
    arguments.output.mkdir(parents=True, exist_ok=True)
    gpu = record["gpu"].lower().replace(" ", "_")
    path = arguments.output / f"soak_{gpu}_x{world_size}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(
        f"{path}: {record['calls']} calls in {record['seconds']} s, "
        f"{record['mismatches']} wrong outputs; {record['faults'] or 'no faults'}"
    )
    return 1 if record["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
