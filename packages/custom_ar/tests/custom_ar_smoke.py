"""A few calls of the communicator; as a script, in two processes over gloo on the CPU.

Needs nothing but torch. No tensor here depends on torch's default device and dtype.
"""

from __future__ import annotations

import datetime
import os
import tempfile
from typing import Any

import custom_ar
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def make(group: Any, device: torch.device) -> custom_ar.Communicator:
    communicator = custom_ar.Communicator(group, device, max_size=1 << 16)
    if device.type == "cuda":
        assert communicator.fallback_reason is None, communicator.fallback_reason
    return communicator


def check(communicator: custom_ar.Communicator) -> None:
    """Every way to call, on values that are exact in every dtype."""
    device, rank, size = communicator.device, communicator.rank, communicator.world_size
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        index = torch.arange(1003, dtype=torch.int64, device=device) % 13
        x = (index + rank).to(dtype)
        total = (index * size + sum(range(size))).to(dtype)
        assert torch.equal(communicator.all_reduce(x), total), dtype
        assert torch.equal(communicator.all_reduce(x[::2]), total[::2]), dtype
        out = torch.full((1003,), -1, dtype=dtype, device=device)
        assert communicator.all_reduce(x, out=out) is out
        assert torch.equal(out, total), dtype
        assert communicator.all_reduce(x, out=x) is x
        assert torch.equal(x, total), dtype
    empty = torch.empty((0, 3), dtype=torch.float32, device=device)
    assert communicator.all_reduce(empty).shape == (0, 3)
    # Another device than the communicator's, and another dtype than the kernels take.
    count = torch.full((3,), rank + 1, dtype=torch.int32, device="cpu")
    assert communicator.all_reduce(count).tolist() == [size * (size + 1) // 2] * 3
    communicator.check()


def work(rank: int, store: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    with make(None, torch.device("cpu")) as communicator:
        check(communicator)
    dist.destroy_process_group()


if __name__ == "__main__":
    # A host whose name does not resolve has a loopback interface still.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(work, (f"{directory}/store",), nprocs=2)
    print(f"custom_ar {custom_ar.__version__} works under torch {torch.__version__}")
