"""A few calls of the workspace; as a script, in two processes over gloo on the CPU.

Needs nothing but torch. No tensor here depends on torch's default device and dtype.
"""

from __future__ import annotations

import datetime
import os
import tempfile
from typing import Any

import minimax_rms
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

NUM_TOKENS = 37


def make(group: Any, device: torch.device) -> minimax_rms.Workspace:
    workspace = minimax_rms.Workspace(group, NUM_TOKENS, device)
    if device.type == "cuda":
        assert workspace.fallback_reason is None, workspace.fallback_reason
    return workspace


def check(workspace: minimax_rms.Workspace) -> None:
    """Both methods, on rows of small integers of which each rank knows all."""
    device, ranks = workspace.device, range(workspace.nranks)

    def rows(rank: int, width: int) -> Tensor:
        index = torch.arange(NUM_TOKENS * width, dtype=torch.int64, device=device)
        return ((index + 5 * rank) % 11 - 3).view(NUM_TOKENS, width)

    def check_result(result: Tensor, parts: list[Tensor], scale: float, dtype: torch.dtype) -> None:
        mean = sum(part.double().square().sum(dim=1) for part in parts)
        mean = mean / (len(parts) * parts[0].shape[1])
        expected = parts[workspace.rank].double() * scale / (mean[:, None] + 0.5).sqrt()
        assert result.dtype == dtype
        error = (result.double() - expected).abs()
        bound = {torch.float32: 2**-20, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        assert bool((error <= bound * expected.abs()).all()), (dtype, error.max())

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.full((64,), 0.5, dtype=dtype, device=device)
        parts = [rows(rank, 64) for rank in ranks]
        own = parts[workspace.rank].to(dtype)
        check_result(workspace.allreduce_rms(own, weight, 0.5), parts, 0.5, dtype)
        weight_k = torch.full((16,), 2.0, dtype=dtype, device=device)
        parts = [rows(rank, 64 + 2 * 16) for rank in ranks]
        own = parts[workspace.rank].to(dtype)
        q, k = workspace.allreduce_rms_qk(own, weight, weight_k, 0.5)
        check_result(q, [part[:, :64] for part in parts], 0.5, dtype)
        check_result(k, [part[:, 64:80] for part in parts], 2.0, dtype)
        empty = workspace.allreduce_rms(own[:0, :64], weight)
        assert (empty.shape, empty.dtype) == ((0, 64), dtype)
    workspace.check()


def work(rank: int, store: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    with make(None, torch.device("cpu")) as workspace:
        check(workspace)
    dist.destroy_process_group()


if __name__ == "__main__":
    # A host whose name does not resolve has a loopback interface still.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(work, (f"{directory}/store",), nprocs=2)
    print(f"minimax_rms {minimax_rms.__version__} works under torch {torch.__version__}")
