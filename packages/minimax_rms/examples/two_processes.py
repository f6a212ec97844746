"""Normalizes rows that two processes have a half each of: on two GPUs, or over gloo on the CPU."""

import tempfile

import minimax_rms
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def work(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    device = torch.device("cuda", rank) if torch.cuda.device_count() >= 2 else torch.device("cpu")
    with minimax_rms.Workspace(None, max_tokens=8192, device=device) as workspace:
        x = torch.full((5, 64), 3.0 + 4.0 * rank, dtype=torch.bfloat16, device=device)
        weight = torch.ones(64, dtype=torch.bfloat16, device=device)
        y = workspace.allreduce_rms(x, weight)
        how = workspace.fallback_reason or "by the kernels"
        print(f"rank {rank} on {device}: {y[0, 0]:.3f} ({how})", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(work, (f"{directory}/store",), nprocs=2)
