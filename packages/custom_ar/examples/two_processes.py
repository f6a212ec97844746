"""Sums a tensor over two processes: on two GPUs, or without them over gloo on the CPU."""

import tempfile

import custom_ar
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def work(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    device = torch.device("cuda", rank) if torch.cuda.device_count() >= 2 else torch.device("cpu")
    with custom_ar.Communicator(device=device) as communicator:
        x = torch.full((4096,), rank + 1.0, dtype=torch.bfloat16, device=device)
        total = communicator.all_reduce(x)
        how = communicator.fallback_reason or "by the kernels"
        print(f"rank {rank} on {device}: {total[0]:g} ({how})", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(work, (f"{directory}/store",), nprocs=2)
