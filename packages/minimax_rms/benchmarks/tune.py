"""Times ways to cut a call and writes JSON: the figures behind choose_tuning().

tune.py --output DIR starts a process for each GPU, or for --gpus of them, and writes
DIR/tuning_<gpu>_x<GPUs>.json. For each number of tokens it tries warps for a token, threads and
numbers of blocks, on q and k of MiniMax-M2 in bfloat16; the best are timed a second time, more
often. --as-if N takes the widths that each of N ranks has. Results are compared with those of the
operator to the bit, and these with the reference. A tuning that fails is recorded with its error.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import minimax_rms
import torch
import torch.distributed as dist
from bench import EPS, MAX_TOKENS, QK, Case, Norm, Workload, our_norm
from bench_ranks import (
    Timing,
    World,
    describe_error,
    describe_package,
    result_name,
    same_bytes,
    start_ranks,
    torch_dtype,
)
from minimax_rms._library import LIBRARY_PATH
from torch import Tensor

TOKENS = tuple(2**i for i in range(14))
# By warps for a token: the most threads of a block, and vectors of 16 bytes of a thread; see
# max_threads_of() and max_vectors_of() in csrc/rms_norm.h.
TEAMS = {1: (512, 7), 2: (128, 7), 4: (128, 7), 8: (256, 4)}
THREADS = (32, 64, 128, 256, 512)  # as many of them as are whole teams
# Beside a grid that has a warp, or several, for each token: 1/2 to 16 blocks a multiprocessor.
MAX_BLOCKS = (66, 132, 264, 528, 1056, 2112)
# A tuning that does not work must not take long to say so.
TIMEOUT_SECONDS = 1.0
FIRST_REPETITIONS = 5
FINAL_REPETITIONS = 25
FINALISTS = 12
RECORDED = 10
SHOWN = 3


@dataclass(frozen=True, order=True)
class Tuning:
    """How a call is cut; see RmsNormTuning in csrc/rms_norm.h."""

    warps_per_token: int
    num_blocks: int
    threads_per_block: int

    def __str__(self) -> str:
        return f"{self.warps_per_token}w {self.num_blocks:4}x{self.threads_per_block:<3}"


def tunings(tokens: int, row_bytes: int) -> list[Tuning]:
    """Return what to try: grids with as many teams of warps as tokens, and smaller ones.

    Teams that cannot hold a row are left out: another one would take it.
    """
    tried = []
    for warps, (most, vectors) in TEAMS.items():
        team = 32 * warps
        if row_bytes > 16 * vectors * team:
            continue
        for threads in (count for count in THREADS if count % team == 0 and count <= most):
            enough = math.ceil(tokens / (threads // team))
            blocks = [enough, *(count for count in MAX_BLOCKS if count < enough)]
            tried += [Tuning(warps, count, threads) for count in blocks]
    return tried


def make_workspace(world: World) -> minimax_rms.Workspace:
    """Return a workspace for all calls, which does not wait for long.

    Raises:
        RuntimeError: it would not use the kernels.
    """
    workspace = minimax_rms.Workspace(
        world.group, MAX_TOKENS, world.device, timeout=TIMEOUT_SECONDS
    )
    if workspace.fallback_reason is not None:
        raise RuntimeError(f"calls would go to torch.distributed: {workspace.fallback_reason}")
    return workspace


class Tuner:
    """Times the tunings of one number of tokens, on rows as each of `as_if` ranks has them."""

    def __init__(
        self, world: World, tokens: int, as_if: int, workspace: minimax_rms.Workspace
    ) -> None:
        self.world = world
        self.workspace = workspace
        self.case = Case(QK, tokens, "bfloat16", as_if)
        self.workload = Workload(world, self.case)
        # How a call is cut does not change a bit.
        norm = our_norm(world, self.case, workspace)
        for i in range(self.case.sets):
            self.workload.run(norm, i)
        workspace.check()
        if error := world.first_error(self.workload.error()):
            raise RuntimeError(f"{tokens} tokens: {error}")
        self.expected = self.workload.outputs
        self.workload.outputs = [()] * self.case.sets

    def norm(self, tuning: Tuning) -> Norm:
        """Return the operator with a given tuning."""
        case, world = self.case, self.world
        operator = torch.ops.minimax_rms._minimax_allreduce_rms_qk_as
        sizes = (case.q_size, case.kv_size, world.rank, world.size)

        def norm(rows: Tensor, weight_q: Tensor, weight_k: Tensor) -> tuple[Tensor, ...]:
            outputs: tuple[Tensor, ...] = operator(
                *(rows, weight_q, weight_k, self.workspace.tensor, *sizes, EPS),
                *astuple(tuning),
            )
            return outputs

        return norm

    def time(self, tuning: Tuning, repetitions: int) -> Timing | str:
        """Return the figures of the slowest rank, or what went wrong, the same on all ranks."""
        world, norm = self.world, self.norm(tuning)
        error = None
        try:
            self.workload.run(norm, 0)
            torch.cuda.synchronize()
            self.workspace.check()
        except RuntimeError as caught:
            error = describe_error(caught)
        us: list[float] = []
        # No rank waits in a barrier for one that has given up.
        if (reason := world.first_error(error)) is None:
            try:
                us = self.workload.time(norm, repetitions)
                self.workspace.check()
                if not self.is_as_expected():
                    error = "differs from the operator"
            except RuntimeError as caught:
                error = describe_error(caught)
            reason = world.first_error(error)
        if reason is None:
            return world.slowest(us)
        self.renew_workspace()
        return reason

    def is_as_expected(self) -> bool:
        """Compare the outputs of all sets on this rank to the bit."""
        return all(
            same_bytes(output, expected)
            for outputs, all_expected in zip(self.workload.outputs, self.expected, strict=True)
            for output, expected in zip(outputs, all_expected, strict=True)
        )

    def renew_workspace(self) -> None:
        """A failed workspace stays failed."""
        self.workspace.close()
        self.workspace = make_workspace(self.world)

    def run(self) -> dict[str, Any]:
        """Time all tunings, then the best of them and the chosen one; return JSON."""
        case = self.case
        row_bytes = (case.q_size + case.kv_size) * torch_dtype(case.dtype).itemsize
        multiprocessors = torch.cuda.get_device_properties(self.world.device).multi_processor_count
        chosen = Tuning(
            *torch.ops.minimax_rms._choose_tuning(
                row_bytes, self.world.size, case.tokens, multiprocessors
            )
        )
        tried = sorted({*tunings(case.tokens, row_bytes), chosen})
        results = {tuning: self.time(tuning, FIRST_REPETITIONS) for tuning in tried}

        def us(tuning: Tuning) -> float:
            result = results[tuning]
            return math.inf if isinstance(result, str) else result.us

        finalists = sorted(results, key=us)[:FINALISTS]
        for tuning in dict.fromkeys((chosen, *finalists)):
            if not isinstance(results[tuning], str):
                results[tuning] = self.time(tuning, FINAL_REPETITIONS)
        # The others were timed less often.
        ranking = sorted({chosen, *finalists}, key=us)

        def record(tuning: Tuning) -> dict[str, Any]:
            result = results[tuning]
            figures = {"error": result} if isinstance(result, str) else asdict(result)
            return {**asdict(tuning), **figures}

        return {
            "tokens": case.tokens,
            "tried": len(tried),
            "failed": [record(t) for t in tried if isinstance(results[t], str)],
            "chosen": {**record(chosen), "place": ranking.index(chosen) + 1},
            "chosen_over_best": round(us(chosen) / us(ranking[0]), 4)
            if us(chosen) < math.inf
            else None,
            "best": [record(t) for t in ranking[:RECORDED] if not isinstance(results[t], str)],
        }


def describe_tuning(record: dict[str, Any]) -> str:
    """`1w  132x64   3.02 us`."""
    tuning = Tuning(*(record[field.name] for field in fields(Tuning)))
    return f"{tuning} {record['us']:6.2f}" if "us" in record else f"{tuning} failed"


def show(record: dict[str, Any]) -> None:
    """Print the chosen tuning of one number of tokens, the best ones, and how many failed."""
    best = " | ".join(describe_tuning(tuning) for tuning in record["best"][:SHOWN])
    print(
        f"{record['tokens']:5} tokens: {describe_tuning(record['chosen'])} "
        f"({record['chosen_over_best'] or math.nan:.3f} of the best) | {best}",
        flush=True,
    )
    if failed := record["failed"]:
        print(f"    {len(failed)} of {record['tried']} failed, the first: {failed[0]['error']}")


def run_rank(
    rank: int, world_size: int, port: int, output: Path, tokens: list[int], as_if: int | None
) -> None:
    """Tune as one of the ranks; the first prints, and writes the JSON."""
    begin = time.monotonic()
    world = World(rank, world_size, port)
    torch.manual_seed(rank)
    workspace = make_workspace(world)
    if rank == 0:
        print("warps a token, blocks x threads, us: the chosen one | the best ones")
    records = []
    for count in tokens:
        tuner = Tuner(world, count, as_if or world_size, workspace)
        records.append(tuner.run())
        workspace = tuner.workspace
        del tuner
        torch.cuda.empty_cache()
        if rank == 0:
            show(records[-1])
    workspace.close()
    if rank == 0:
        gpu = torch.cuda.get_device_name(world.device)
        head = {
            **describe_package(minimax_rms, LIBRARY_PATH),
            "gpu": gpu,
            "world_size": world_size,
            "as_if": as_if or world_size,
            "dtype": "bfloat16",
        }
        lines = ",\n".join(map(json.dumps, records))
        output.mkdir(parents=True, exist_ok=True)
        name = f"tuning_{result_name(gpu, world_size)}"
        if as_if not in (None, world_size):
            name = name.replace(".json", f"_as_x{as_if}.json")
        path = output / name
        path.write_text(f'{json.dumps(head)[:-1]}, "cases": [\n{lines}\n]}}\n')
        print(f"{path}: {time.monotonic() - begin:.0f} s")
    dist.destroy_process_group()


def main() -> int:
    """Tune, and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        *("--gpus", "--world-size"), type=int, metavar="N", help="how many GPUs; else all"
    )
    parser.add_argument(
        "--as-if", type=int, metavar="N", help="take the widths of this many ranks (1 to 16)"
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=list(TOKENS), metavar="T", help="of a call"
    )
    arguments = parser.parse_args()
    if arguments.as_if is not None and not 1 <= arguments.as_if <= 16:
        parser.error("--as-if: a number from 1 to 16")
    if not all(1 <= tokens <= MAX_TOKENS for tokens in arguments.tokens):
        parser.error(f"--tokens: numbers from 1 to {MAX_TOKENS}")
    return start_ranks(
        *(run_rank, arguments.gpus, arguments.output, arguments.tokens, arguments.as_if), most=16
    )


if __name__ == "__main__":
    sys.exit(main())
