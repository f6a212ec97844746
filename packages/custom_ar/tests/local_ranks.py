"""Runs all ranks of a test in this process on one GPU, through the raw operators."""

from __future__ import annotations

from collections.abc import Sequence

import custom_ar  # noqa: F401  defines torch.ops.custom_ar
import torch
from rank_streams import RankStreams
from torch import Tensor

SHARED_GRANULARITY = 2 << 20  # of allocations that can be shared


class LocalRanks(RankStreams):
    """A communicator for each rank.

    ``fits`` tells which kernels fit onto the GPU at the same time. Where calls are queued a second
    one of each rank may be there too; messages of 16 KiB leave room for that.
    """

    # Not less than a thread of any kernel takes, out of those of a multiprocessor.
    _REGISTERS_PER_THREAD = 128
    _REGISTERS = 1 << 16
    _CONTROL_THREADS = 32  # of a block, that move no data

    def __init__(
        self,
        world_size: int,
        *,
        max_size: int = 1 << 16,
        buffer_bytes: int | None = None,
        timeout: float = 20.0,
    ) -> None:
        super().__init__(world_size)
        self.ops = torch.ops.custom_ar
        if buffer_bytes is None:
            buffer_bytes = self.ops._buffer_size(world_size, max_size)
        self.allocations = [
            self.ops.allocate_shared_buffer_and_handle(buffer_bytes)[0] for _ in range(world_size)
        ]
        # Of an allocation, which is rounded up, the buffer is the last `buffer_bytes`.
        unused = -buffer_bytes % SHARED_GRANULARITY
        assert unused % 16 == 0
        self.buffers = [address + unused for address in self.allocations]
        rank_data = torch.empty(8, dtype=torch.uint8, device=self.device)
        self.fas = [
            self.ops.init_custom_ar(self.buffers, rank_data, rank, True)
            for rank in range(world_size)
        ]
        for fa in self.fas:
            self.ops._set_timeout(fa, timeout)

    def fits(self, num_bytes: int) -> bool:
        """Whether all ranks' kernels for a message find room at once, as they are tuned."""
        _, num_blocks, threads, _ = self.ops._choose_tuning(self.world_size, num_bytes)
        threads += self._CONTROL_THREADS
        per_multiprocessor = self._REGISTERS // (self._REGISTERS_PER_THREAD * threads)
        multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
        return bool(self.world_size * num_blocks <= per_multiprocessor * multiprocessors)

    def call(
        self,
        rank: int,
        inp: Tensor,
        out: Tensor,
        tuning: Sequence[int] | None = None,
    ) -> None:
        """One rank's call on the current stream.

        ``tuning`` is algorithm, number of blocks, threads per block and depth.
        """
        if tuning is None:
            self.ops.all_reduce(self.fas[rank], inp, out, 0, 0)
        else:
            self.ops._all_reduce_as(self.fas[rank], inp, out, *tuning)

    def all_reduce(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        tuning: Sequence[int] | None = None,
    ) -> None:
        self.launch(lambda rank: self.call(rank, inputs[rank], outputs[rank], tuning))

    def failure(self, rank: int) -> str:
        """What the rank's next call would raise, empty if nothing."""
        torch.cuda.synchronize()
        try:
            self.ops._check(self.fas[rank])
        except RuntimeError as error:
            return str(error)
        return ""

    def failures(self) -> list[str]:
        return [self.failure(rank) for rank in range(self.world_size)]

    def close(self) -> None:
        for fa in self.fas:
            self.ops._announce_close(fa)
        for fa in self.fas:
            self.ops.dispose(fa)
        for pointer in self.allocations:
            self.ops.free_shared_buffer(pointer)
        self.fas, self.allocations, self.buffers = [], [], []

    def __enter__(self) -> LocalRanks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
