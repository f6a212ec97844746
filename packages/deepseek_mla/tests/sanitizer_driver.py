"""Runs every operator on small shapes, for compute-sanitizer: ``python sanitizer_driver.py``.

Needs torch and the package only. Prints how many calls it made.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import deepseek_mla
import mla_calls

KINDS = {
    mla_calls.QUANT_INSERT: ("v4", "v41"),
    mla_calls.KV_ROPE_INSERT: ("v4", "v41", "bf16", "fp8"),
    mla_calls.KV_NORM_INSERT: ("v4",),
    mla_calls.FULL_BF16_INSERT: ("bf16",),
    mla_calls.FULL_FP8_INSERT: ("fp8",),
}


def main() -> None:
    # Inputs are made on the CPU, so that hardly any kernel but the operators' runs.
    generator = torch.Generator().manual_seed(2026)
    calls = 0
    for op, kinds in KINDS.items():
        for kind in kinds:
            for dtype in mla_calls.DTYPES:
                for num_tokens, num_heads in ((1, 1), (5, 3), (33, 16), (200, 8)):
                    for gaps in (False, True):
                        call = mla_calls.make_call(
                            op,
                            generator,
                            num_tokens=num_tokens,
                            num_heads=num_heads,
                            dtype=dtype,
                            kind=kind,
                            gaps=gaps,
                        )
                        call.clone("cuda").run(deepseek_mla)
                        calls += 1
    for options in (
        {"is_q_interleaved": True, "q_head_padded": 16},
        {"q_head_padded": 16, "with_q_out": True, "slots_missing": 3},
        {"q_head_padded": 0},
        {"apply_q_norm": False},
        {"apply_q_rope": False},
    ):
        call = mla_calls.make_call(mla_calls.QUANT_INSERT, generator, **options)
        call.clone("cuda").run(deepseek_mla)
        calls += 1
    torch.cuda.synchronize()
    print(f"{calls} calls")


if __name__ == "__main__":
    main()
