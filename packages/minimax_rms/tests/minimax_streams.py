"""Runs all ranks of a test in this process on one GPU, with workspaces as callers build them."""

from __future__ import annotations

from collections.abc import Sequence

import minimax_rms  # noqa: F401  defines torch.ops.minimax_rms
import torch
from rank_streams import RankStreams
from torch import Tensor

GUARD_WORDS = 1024


class WorkspaceStreams(RankStreams):
    """A workspace for each rank, of plain tensors. ``num_blocks`` is small, so that all fit."""

    def __init__(self, nranks: int, max_tokens: int = 1024, timeout: float | None = None) -> None:
        super().__init__(nranks)
        self.ops = torch.ops.minimax_rms
        self.nranks = nranks
        self.comm_size = self.ops._comm_size(nranks, max_tokens)
        words = 3 * self.comm_size // 4
        # Between guards, which nobody may write.
        self.storages = [
            torch.full((words + 2 * GUARD_WORDS,), -0.0, device=self.device) for _ in range(nranks)
        ]
        for storage in self.storages:
            storage[:GUARD_WORDS] = 7.0
            storage[-GUARD_WORDS:] = 7.0
        buffers = [storage[GUARD_WORDS:].data_ptr() for storage in self.storages]
        self.counters = torch.zeros(3, dtype=torch.int32, device=self.device)
        self.layout = torch.tensor([0, self.comm_size], device=self.device)
        entries = [0] * 2 * nranks + buffers + [self.counters.data_ptr(), self.layout.data_ptr()]
        self.workspaces = [torch.tensor(entries, device=self.device) for _ in range(nranks)]
        torch.cuda.synchronize()
        if timeout is not None:
            for rank, workspace in enumerate(self.workspaces):
                self.ops._register(workspace, rank, nranks, max_tokens, timeout)

    def close(self) -> None:
        torch.cuda.synchronize()
        for workspace in self.workspaces:
            self.ops._forget(workspace)

    def guards_are_whole(self) -> bool:
        return all(
            bool((part == 7.0).all())
            for storage in self.storages
            for part in (storage[:GUARD_WORDS], storage[-GUARD_WORDS:])
        )

    def qk(
        self,
        rank: int,
        qkv: Tensor,
        weights: Sequence[Tensor],
        tuning: Sequence[int] = (1, 4, 64),
        eps: float = 1e-6,
    ) -> tuple[Tensor, Tensor]:
        """One rank's call on the current stream; ``tuning``: warps, blocks and threads."""
        sizes = weights[0].numel(), weights[1].numel()
        q, k = self.ops._minimax_allreduce_rms_qk_as(
            qkv, *weights, self.workspaces[rank], *sizes, rank, self.nranks, eps, *tuning
        )
        return q, k

    def all_qk(
        self,
        qkvs: Sequence[Tensor],
        weights: Sequence[Sequence[Tensor]],
        tuning: Sequence[int] = (1, 4, 64),
        ranks: Sequence[int] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        results: dict[int, tuple[Tensor, Tensor]] = {}

        def call(rank: int) -> None:
            results[rank] = self.qk(rank, qkvs[rank], weights[rank], tuning)

        self.launch(call, ranks)
        return [results[rank] for rank in sorted(results)]

    def failure(self, rank: int) -> str:
        """What the calls of a rank have failed with, if they have."""
        torch.cuda.synchronize()
        try:
            self.ops._check(self.workspaces[rank])
        except RuntimeError as error:
            return str(error)
        return ""
