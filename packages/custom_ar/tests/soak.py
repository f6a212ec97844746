"""All-reduces without end, each checked: ``soak.py --calls N --output DIR [--world-size N]``.

A process for each rank, on the GPUs there are. Calls of mixed sizes, dtypes and alignments, eager
and replayed, in place and not, whose inputs are overwritten right after the call on its stream,
with delays of the host and the device on random ranks. The values are integers whose sums are exact
in every dtype; each result is compared with its sum on the device. Then another such stretch, in
which one rank is killed: the others must find out in time, with no wrong result before.

Writes DIR/soak_<gpu>_x<ranks>.json. The exit code is 1 when anything was wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import custom_ar
import rank_soak
import torch
from all_reduce_cases import DTYPES
from rank_processes import Rank
from rank_soak import CALLS_PER_GRAPH
from torch import Tensor

MAX_EAGER = 1 << 23  # elements
MAX_REPLAYED = 1 << 16
LARGEST_VALUE = 8  # eight ranks' sums are integers that bfloat16 has
MAX_SHIFT = 4096  # how far into the values a call's input may begin


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


class Soak(rank_soak.Soak):
    """One rank's all-reduces."""

    package = "custom_ar"
    counted = "elements"
    default_calls = 200_000
    max_ranks = 8

    def __init__(self, rank: Rank, seed: int, timeout: float) -> None:
        super().__init__(rank, seed, timeout)
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

    def make_handle(self, timeout: float) -> custom_ar.Communicator:
        self.communicator = custom_ar.Communicator(
            self.rank.group, self.device, max_size=4 * MAX_EAGER, timeout=timeout
        )
        return self.communicator

    def count_mismatches(self, result: Tensor, expected: Tensor) -> None:
        lost = result.isnan()
        self.wrong += ((result != expected) & ~lost).sum()
        self.lost += lost.sum()

    def make_graph(self, index: int) -> Replayed:
        return Replayed(self, DTYPES[index % len(DTYPES)], self.draw_size(MAX_REPLAYED))

    def call(self) -> None:
        dtype = self.shared.choice(DTYPES)
        length = self.draw_size(MAX_EAGER)
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


if __name__ == "__main__":
    sys.exit(rank_soak.main(Soak, __doc__))
