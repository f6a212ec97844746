"""The launch configurations are those that the committed sweeps found to be good."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SWEEPS = sorted(path.name for path in RESULTS.glob("tuning_*.json"))
# A sweep's best is the least of many figures, each with some noise.
MOST_OVER_BEST = 1.05
MULTIPROCESSORS = 132  # of an H100 and an H200
# q and k of MiniMax-M2 over all ranks, in bfloat16.
ROW_BYTES = (6144 + 1024) * 2


def test_sweeps_are_there() -> None:
    assert "tuning_nvidia_h200_x4.json" in SWEEPS


@pytest.mark.parametrize("name", SWEEPS)
def test_chosen_is_near_the_best(name: str) -> None:
    sweep = json.loads((RESULTS / name).read_text())
    ranks = sweep["as_if"]
    row_bytes = ROW_BYTES // ranks
    for case in sweep["cases"]:
        warps, num_blocks, threads = torch.ops.minimax_rms._choose_tuning(
            row_bytes, ranks, case["tokens"], MULTIPROCESSORS
        )
        chosen = (warps, num_blocks, threads)
        us = {
            (t["warps_per_token"], t["num_blocks"], t["threads_per_block"]): t["us"]
            for t in (case["chosen"], *case["best"])
        }
        assert chosen in us, f"{case['tokens']} tokens: {chosen} is none of the best"
        assert us[chosen] <= MOST_OVER_BEST * case["best"][0]["us"], f"{case['tokens']} tokens"
