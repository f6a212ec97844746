"""Runs every operator for compute-sanitizer: ``python sanitizer_driver.py [OVERRUN]``.

Each tensor is an allocation of its own that ends with its last element, which takes
``PYTORCH_NO_CUDA_MEMORY_CACHING=1``. Prints how many calls it made.

With OVERRUN, the name of a tensor argument, it instead makes one call in which that tensor's
allocation is a row shorter than its shape says. memcheck must report it.

Needs torch and the package; with OVERRUN also NumPy, which torch reads array interfaces with.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import deepseek_mla
import mla_calls
from exact_tensors import exact_copy
from mla_calls import Call, make_call

KINDS = {
    mla_calls.QUANT_INSERT: ("v4", "v41"),
    mla_calls.KV_ROPE_INSERT: ("v4", "v41", "bf16", "fp8"),
    mla_calls.KV_NORM_INSERT: ("v4",),
    mla_calls.FULL_BF16_INSERT: ("bf16",),
    mla_calls.FULL_FP8_INSERT: ("fp8",),
}


def exact_rows(tensor: torch.Tensor, rows_missing: int = 0) -> torch.Tensor:
    """A CUDA copy with the same strides, in an allocation from its first to its last element.

    The allocation lacks the last ``rows_missing`` rows, of ``tensor.shape[-1]`` elements.
    """
    extent = 0
    if tensor.numel() > 0:
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        extent = 1 + last
    elements = tensor.as_strided((extent,), (1,), tensor.storage_offset())
    missing = rows_missing * tensor.shape[-1] if rows_missing else 0
    storage = exact_copy(elements, missing)
    return storage.as_strided(tensor.shape, tensor.stride())


def on_device(call: Call, overrun: str | None = None) -> Call:
    args = {
        name: exact_rows(value, rows_missing=int(name == overrun))
        if isinstance(value, torch.Tensor)
        else value
        for name, value in call.args.items()
    }
    return Call(call.op, args, call.kv_dtype, call.kind)


def calls(generator: torch.Generator) -> Iterator[Call]:
    """Calls on the CPU: inputs made there leave hardly any kernel but the operators' to check."""
    for op, kinds in KINDS.items():
        for kind in kinds:
            for dtype in mla_calls.DTYPES:
                for num_tokens, num_heads in ((1, 1), (5, 3), (33, 16)):
                    for gaps in (False, True):
                        yield make_call(
                            op,
                            generator,
                            num_tokens=num_tokens,
                            num_heads=num_heads,
                            dtype=dtype,
                            kind=kind,
                            gaps=gaps,
                        )
    for options in (
        {"is_q_interleaved": True, "q_head_padded": 16},
        {"q_head_padded": 16, "with_q_out": True, "slots_missing": 3},
        {"q_head_padded": 0},
        {"apply_q_norm": False},
        {"apply_q_rope": False},
    ):
        yield make_call(mla_calls.QUANT_INSERT, generator, **options)
    for variant, rows_per_multiprocessor in mla_calls.TUNED_CALLS:
        yield mla_calls.make_tuned_call(variant, rows_per_multiprocessor, generator)


def overrunning_call(name: str, generator: torch.Generator) -> Call:
    """A call that reaches the last row of every tensor, on the device, where ``name`` lacks it."""
    call = make_call(mla_calls.QUANT_INSERT, generator, with_q_out=True, cache_rank=3)
    cache, slots = call.args["k_cache"], call.args["slot_mapping"]
    num_slots = cache.shape[0] * cache.shape[1]
    slots.copy_(torch.arange(num_slots - len(slots), num_slots))
    call.args["position_ids"].zero_()
    return on_device(call, overrun=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrun", nargs="?", choices=("kv", "k_cache", "q_out"))
    overrun = parser.parse_args().overrun
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
        # torch would cut tensors out of larger allocations, where memcheck sees no overrun.
        sys.exit("sanitizer_driver.py: PYTORCH_NO_CUDA_MEMORY_CACHING must be 1")
    generator = torch.Generator().manual_seed(2026)
    count = 0
    if overrun is not None:
        overrunning_call(overrun, generator).run(deepseek_mla)
        count = 1
    else:
        for call in calls(generator):
            on_device(call).run(deepseek_mla)
            count += 1
    torch.cuda.synchronize()
    print(f"{count} calls")


if __name__ == "__main__":
    main()
