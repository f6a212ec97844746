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

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import minimax_rms
import rank_soak
import torch
from minimax_arithmetic import bounds
from minimax_cases import EPS, m2_widths, make_problem
from rank_processes import Rank
from rank_soak import CALLS_PER_GRAPH
from torch import Tensor

MAX_TOKENS = 8192
MAX_REPLAYED = 256
MAX_SHIFT = 512  # how far into a layer's rows a call's may begin
SLACK = 2.0**-19  # of so many results some come near the usual one


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


class Soak(rank_soak.Soak):
    """One rank's RMSNorms."""

    package = "minimax_rms"
    counted = "outputs"
    default_calls = 100_000
    max_ranks = 16

    def __init__(self, rank: Rank, seed: int, timeout: float) -> None:
        super().__init__(rank, seed, timeout)
        self.layers = make_layers(rank, seed)

    def make_handle(self, timeout: float) -> minimax_rms.Workspace:
        self.workspace = minimax_rms.Workspace(
            self.rank.group, MAX_TOKENS, self.device, timeout=timeout
        )
        return self.workspace

    def count_mismatches(self, result: Tensor, least: Tensor, greatest: Tensor) -> None:
        self.wrong += ((result < least) | (result > greatest)).any()
        self.lost += result.isnan().any()

    def make_graph(self, index: int) -> Replayed:
        return Replayed(self, self.draw_size(MAX_REPLAYED))

    def call(self) -> None:
        layer = self.shared.choice(self.layers)
        num_tokens = self.draw_size(MAX_TOKENS)
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


if __name__ == "__main__":
    sys.exit(rank_soak.main(Soak, __doc__))
