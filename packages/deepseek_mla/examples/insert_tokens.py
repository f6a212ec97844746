"""Inserts tokens into a paged FP8 cache with one fused call, and reads them back."""

import sys
import time

import deepseek_mla
import torch

TEXT = "One launch: Q norm and RoPE, KV RoPE, FP8 quantisation and paged-cache insert."
NUM_HEADS, HEADS_PADDED, NUM_BLOCKS, BLOCK_SIZE, MAX_POSITION = 16, 64, 4, 64, 4096
NOPE_DIM = 448  # of 512; the last 64 are rotated, and stored unquantised
CALLS = 200
# E4M3 rounds a value by 1/16 of it at most, bfloat16 by 1/256.
NOPE_TOLERANCE, ROPE_TOLERANCE = 0.05, 0.005


def main() -> int:
    """Return 1 when what is read back is not what was inserted, else 0."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else "the CPU, by the reference"
    print(f"deepseek_mla {deepseek_mla.__version__}, torch {torch.__version__}, on {where}")

    # Tokens are bytes. A fixed random projection stands in for the model up to its attention.
    tokens = torch.tensor(list(TEXT.encode()))
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn((256, 512), generator=generator).bfloat16()
    heads = torch.randn((NUM_HEADS, 512), generator=generator).bfloat16()
    kv = embedding[tokens].to(device)
    q = (embedding[tokens].unsqueeze(1) * heads).to(device)
    angles = torch.outer(torch.arange(MAX_POSITION), 10000.0 ** (-torch.arange(32) / 32))
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).to(device)
    positions = torch.arange(len(tokens), device=device)

    # The sequence has two blocks of the cache, not next to each other.
    blocks = torch.tensor([2, 0], device=device)
    slots = blocks[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    cache = torch.full((NUM_BLOCKS, BLOCK_SIZE, 584), 0xAA, dtype=torch.uint8, device=device)

    insert = deepseek_mla.fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert
    arguments = (q, kv, cache, slots, positions, cos_sin, HEADS_PADDED, 1e-6, BLOCK_SIZE)
    q_out = insert(*arguments)
    print(f"inserted {len(tokens)} tokens into blocks {blocks.tolist()} of {tuple(cache.shape)}")
    print(f"query {tuple(q.shape)} -> {tuple(q_out.shape)}, normalised and rotated")

    rows = deepseek_mla.dequantize_cache(cache, slots, BLOCK_SIZE)
    pairs = torch.view_as_complex(kv[:, NOPE_DIM:].double().unflatten(1, (32, 2)))
    turns = torch.view_as_complex(cos_sin[positions].double().view(-1, 2, 32).mT.contiguous())
    rotated = torch.view_as_real(pairs * turns).flatten(1)
    nope_error = relative_error(rows[:, :NOPE_DIM], kv[:, :NOPE_DIM])
    rope_error = relative_error(rows[:, NOPE_DIM:], rotated)
    print("read back, relative error (and what is tolerated):")
    print(f"  FP8 part {nope_error:.4f} ({NOPE_TOLERANCE}), ", end="")
    print(f"bfloat16 part {rope_error:.4f} ({ROPE_TOLERANCE})")

    # Both parts of a slot lie in its block: data of all slots first, then 8 scales a slot.
    data = cache.view(NUM_BLOCKS, -1)[:, : BLOCK_SIZE * 576].reshape(-1, 576)
    scales = cache.view(NUM_BLOCKS, -1)[:, BLOCK_SIZE * 576 :].reshape(-1, 8)
    free = torch.ones(NUM_BLOCKS * BLOCK_SIZE, dtype=torch.bool, device=device)
    free[slots] = False
    untouched = bool((data[free] == 0xAA).all() and (scales[free] == 0xAA).all())
    print(f"the other {int(free.sum())} slots are {'as before' if untouched else 'damaged'}")

    if device == "cuda":
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS):
            insert(*arguments, q_out=q_out)
        torch.cuda.synchronize()
        print(f"{(time.perf_counter() - begin) / CALLS * 1e6:.1f} us a call, eager")

    exact = nope_error < NOPE_TOLERANCE and rope_error < ROPE_TOLERANCE
    return 0 if untouched and exact else 1


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((actual - expected).double().norm() / expected.double().norm())


if __name__ == "__main__":
    sys.exit(main())
