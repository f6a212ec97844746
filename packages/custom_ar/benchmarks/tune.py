"""Times ways to cut an all-reduce and writes JSON: the figures behind choose_tuning().

tune.py --output DIR starts a process for each GPU, or for --world-size of them, and writes
DIR/tuning_<gpu>_x<world size>.json. For each size of a bfloat16 message it tries algorithms,
numbers of blocks and threads, and depths; the best are timed a second time, more often. Results are
compared with the reference to the bit. A tuning that fails is recorded with its error.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import torch
import torch.distributed as dist
from bench import MAX_SIZE, SIZES, Case, RawCommunicator, Workload, describe_bytes
from bench_ranks import (
    CALLS_PER_GRAPH,
    Timing,
    World,
    as_bytes,
    describe_error,
    result_name,
    same_bytes,
    start_ranks,
    time_passes,
)
from custom_ar import reference

ALGORITHMS = ("one-shot", "two-shot")
BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128, 132, 256, 264, 528)
THREADS = (64, 128, 256, 512)
DEPTHS = (1, 2, 4, 8)
VECTOR_BYTES = 16
# A tuning that does not work must not take long to say so.
TIMEOUT_SECONDS = 1.0
FIRST_REPETITIONS = 5
FINAL_REPETITIONS = 25
FINALISTS = 8
SHOWN = 5


@dataclass(frozen=True, order=True)
class Tuning:
    """How a call is cut; see AllReduceTuning in csrc/all_reduce.h."""

    algorithm: int
    num_blocks: int
    threads_per_block: int
    depth: int

    def __str__(self) -> str:
        return (
            f"{ALGORITHMS[self.algorithm]}, {self.num_blocks:3} blocks of "
            f"{self.threads_per_block:3} threads, depth {self.depth}"
        )


@dataclass(frozen=True)
class Space:
    """What is tried at each size."""

    algorithms: Sequence[int]
    blocks: Sequence[int]
    threads: Sequence[int]


def tunings(num_bytes: int, world_size: int, space: Space) -> list[Tuning]:
    """Return what to try: grids that take 1/32 to twice of what a rank sums at a time."""
    tried = []
    for algorithm in space.algorithms:
        summed = num_bytes if algorithm == 0 else math.ceil(num_bytes / world_size)
        for threads in space.threads:
            for blocks in space.blocks:
                at_once = blocks * threads * VECTOR_BYTES
                if not summed / 32 <= at_once <= 2 * summed:
                    continue
                per_thread = math.ceil(summed / at_once)
                # To send further ahead than a thread has vectors changes nothing.
                depths = [depth for depth in DEPTHS if depth < 2 * per_thread]
                tried += [Tuning(algorithm, blocks, threads, depth) for depth in depths]
    return tried


def make_communicator(world: World) -> RawCommunicator:
    """Return one whose buffer passes every message in one piece, whatever the algorithm."""
    # By one shot a rank receives (W - 1) messages, by two 2 (W - 1) / W, for which sizes are meant.
    return RawCommunicator(world, MAX_SIZE * world.size // 2, TIMEOUT_SECONDS)


class Tuner:
    """Times the tunings of one message size."""

    def __init__(self, world: World, num_bytes: int, communicator: RawCommunicator) -> None:
        self.world = world
        self.case = Case("bfloat16", num_bytes)
        self.workload = Workload(world, self.case)
        self.expected = reference.all_reduce(self.workload.all_inputs)
        self.outputs = torch.empty_like(self.expected)
        self.communicator = communicator

    def time(self, tuning: Tuning, repetitions: int) -> Timing | str:
        """Return the figures of the slowest rank, or what went wrong, the same on all ranks."""
        world, inputs, outputs = self.world, self.workload.inputs, self.outputs
        ops = torch.ops.custom_ar

        def call(i: int) -> None:
            ops._all_reduce_as(
                self.communicator.fa,
                inputs[i],
                outputs[i],
                tuning.algorithm,
                tuning.num_blocks,
                tuning.threads_per_block,
                tuning.depth,
            )

        as_bytes(outputs).fill_(0xFF)
        error = None
        try:
            call(0)
            torch.cuda.synchronize()
            ops._check(self.communicator.fa)
        except RuntimeError as caught:
            error = describe_error(caught)
        us: list[float] = []
        # No rank waits in a barrier for one that has given up.
        if (reason := world.first_error(error)) is None:
            calls = CALLS_PER_GRAPH * (3 if self.case.bytes <= 1 << 20 else 1)
            sets = self.workload.sets
            try:
                us = time_passes(world, call, sets, calls, repetitions=repetitions)
                ops._check(self.communicator.fa)
                if not same_bytes(outputs, self.expected):
                    error = "differs from the reference"
            except RuntimeError as caught:
                error = describe_error(caught)
            reason = world.first_error(error)
        if reason is None:
            return world.slowest(us)
        self.renew_communicator()
        return reason

    def renew_communicator(self) -> None:
        """A failed communicator stays failed."""
        self.communicator.close()
        self.communicator = make_communicator(self.world)

    def run(self, space: Space) -> list[dict[str, Any]]:
        """Time a space, then the best of it and the present tuning; return JSON, best first."""
        present = Tuning(*torch.ops.custom_ar._choose_tuning(self.world.size, self.case.bytes))
        tried = sorted({*tunings(self.case.bytes, self.world.size, space), present})
        results = {tuning: self.time(tuning, FIRST_REPETITIONS) for tuning in tried}

        def us(tuning: Tuning) -> float:
            result = results[tuning]
            return math.inf if isinstance(result, str) else result.us

        finalists = sorted(results, key=us)[:FINALISTS]
        for tuning in dict.fromkeys((present, *finalists)):
            if not isinstance(results[tuning], str):
                results[tuning] = self.time(tuning, FINAL_REPETITIONS)
        return [
            {
                "bytes": self.case.bytes,
                **asdict(tuning),
                "present": tuning == present,
                **({"error": result} if isinstance(result, str) else asdict(result)),
            }
            for tuning in sorted(results, key=us)
            for result in [results[tuning]]
        ]


def show(records: list[dict[str, Any]]) -> None:
    """Print the best tunings of one size, the present one, and how many failed."""
    errors = [record["error"] for record in records if "error" in record]
    print(
        f"{describe_bytes(records[0]['bytes'])}: {len(records)} tunings, {len(errors)} failed"
        + (f", the first: {errors[0]}" if errors else "")
    )
    for place, record in enumerate(records, 1):
        if place <= SHOWN or record["present"]:
            tuning = Tuning(*(record[name] for name in Tuning.__dataclass_fields__))
            figure = f"{record['us']:8.2f} us" if "us" in record else "  failed"
            note = f"  (present, place {place})" if record["present"] else ""
            print(f"  {figure}  {tuning}{note}", flush=True)


def run_rank(
    rank: int, world_size: int, port: int, output: Path, sizes: list[int], space: Space
) -> None:
    """Tune as one of the ranks; the first prints, and writes the JSON."""
    begin = time.monotonic()
    world = World(rank, world_size, port)
    torch.manual_seed(rank)
    communicator = make_communicator(world)
    records = []
    for size in sizes:
        tuner = Tuner(world, size, communicator)
        found = tuner.run(space)
        communicator = tuner.communicator
        records += found
        if rank == 0:
            show(found)
    communicator.close()
    if rank == 0:
        gpu = torch.cuda.get_device_name(world.device)
        head = {"gpu": gpu, "world_size": world_size, "dtype": "bfloat16"}
        lines = ",\n".join(map(json.dumps, records))
        output.mkdir(parents=True, exist_ok=True)
        path = output / f"tuning_{result_name(gpu, world_size)}"
        path.write_text(f'{json.dumps(head)[:-1]}, "cases": [\n{lines}\n]}}\n')
        print(f"{path}: {time.monotonic() - begin:.0f} s")
    dist.destroy_process_group()


def main() -> int:
    """Tune, and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--world-size", type=int, metavar="N", help="how many GPUs; else all")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=list(SIZES), metavar="BYTES", help="of the message"
    )
    parser.add_argument("--algorithms", nargs="+", default=ALGORITHMS, choices=ALGORITHMS)
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS, metavar="N")
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS, metavar="N")
    arguments = parser.parse_args()
    algorithms = [ALGORITHMS.index(name) for name in arguments.algorithms]
    space = Space(algorithms, arguments.blocks, arguments.threads)
    return start_ranks(run_rank, arguments.world_size, arguments.output, arguments.sizes, space)


if __name__ == "__main__":
    sys.exit(main())
