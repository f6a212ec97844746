"""Runs all ranks of a test in this process on one GPU, each on a stream of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import torch

# The kernels of ranks wait for each other, so each stream needs a hardware queue of its own. CUDA
# reads this when it makes a context.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

SLEEP_CYCLES = 200_000_000


class RankStreams:
    """A stream for each rank, on the current device.

    The kernels of all ranks must fit onto the GPU at the same time. Allocate and compute what calls
    need before ``launch``: a kernel that waits for a peer holds up what waits for the whole device,
    such as the first launch of any other kernel.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.streams = [torch.cuda.Stream() for _ in range(world_size)]

    def launch(self, call: Callable[[int], object], ranks: Sequence[int] | None = None) -> None:
        """Let each rank ``call(rank)`` on its stream, between what the current stream has and gets.

        Waits for nothing on the host.
        """
        current = torch.cuda.current_stream()
        before = current.record_event()
        for rank in range(self.world_size) if ranks is None else ranks:
            self.streams[rank].wait_event(before)
            with torch.cuda.stream(self.streams[rank]):
                call(rank)
        for stream in self.streams:
            current.wait_stream(stream)

    def capture(
        self,
        call: Callable[[int], object],
        *,
        error_mode: str = "global",
        keeper: torch.cuda.CUDAGraph | None = None,
    ) -> list[torch.cuda.CUDAGraph]:
        """Each rank's ``call(rank)`` as a graph.

        ``error_mode`` is CUDA's mode of capture. With ``keeper``, what the calls allocate is of its
        memory pool.
        """
        graphs = [torch.cuda.CUDAGraph() for _ in range(self.world_size)]
        torch.cuda.synchronize()
        for rank, graph in enumerate(graphs):
            # torch.cuda.graph would collect garbage each time.
            with torch.cuda.stream(self.streams[rank]):
                graph.capture_begin(
                    pool=None if keeper is None else keeper.pool(), capture_error_mode=error_mode
                )
                try:
                    call(rank)
                finally:
                    graph.capture_end()
        return graphs

    def replay(self, graphs: Sequence[torch.cuda.CUDAGraph]) -> None:
        """Replay each rank's graph on its stream, as ``launch`` does."""
        self.launch(lambda rank: graphs[rank].replay())


def why_not_at_once(num_streams: int) -> str:
    """Why kernels of so many streams do not run at once here, empty if they do.

    They do not under some tools: then the ranks of one process would wait for each other in vain.
    """
    streams = [torch.cuda.Stream() for _ in range(num_streams)]

    def seconds_of_sleeps(count: int) -> float:
        torch.cuda.synchronize()
        begin = time.monotonic()
        for stream in streams[:count]:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(SLEEP_CYCLES)
        torch.cuda.synchronize()
        return time.monotonic() - begin

    torch.cuda._sleep(1000)
    alone = min(seconds_of_sleeps(1) for _ in range(2))
    together = min(seconds_of_sleeps(num_streams) for _ in range(2))
    if together <= 1.6 * alone:
        return ""
    return (
        f"kernels of {num_streams} streams do not run at once here: {together:.2f} s, "
        f"one alone {alone:.2f} s"
    )
