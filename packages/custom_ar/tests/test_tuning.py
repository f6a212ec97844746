"""The launch configurations are those that the committed sweeps found to be good."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import custom_ar  # noqa: F401  defines torch.ops.custom_ar
import pytest
import torch

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SWEEPS = sorted(path.name for path in RESULTS.glob("tuning_*.json"))
# A sweep's best is the least of many figures, each with some noise.
MOST_OVER_BEST = 1.02
ONE_SHOT = 0


def choose(world_size: int, num_bytes: int) -> tuple[int, ...]:
    return tuple(torch.ops.custom_ar._choose_tuning(world_size, num_bytes))


def test_sweeps_are_there() -> None:
    assert {"tuning_nvidia_h200_x2.json", "tuning_nvidia_h200_x4.json"} <= set(SWEEPS)


@pytest.mark.parametrize("name", SWEEPS)
def test_chosen_is_near_the_best(name: str) -> None:
    sweep = json.loads((RESULTS / name).read_text())
    names = ("algorithm", "num_blocks", "threads_per_block", "depth")
    for num_bytes, cases in itertools.groupby(sweep["cases"], key=lambda case: case["bytes"]):
        us = {tuple(case[key] for key in names): case["us"] for case in cases if "us" in case}
        chosen = choose(sweep["world_size"], num_bytes)
        assert chosen in us, f"{num_bytes} bytes: {chosen} was not measured"
        assert us[chosen] <= MOST_OVER_BEST * min(us.values()), f"{num_bytes} bytes"


def test_more_ranks_leave_one_shot_sooner() -> None:
    """One shot sends (W - 1) times the message, two shots less than twice."""
    limits = [
        max(kib for kib in range(1, 2048) if choose(world_size, kib << 10)[0] == ONE_SHOT)
        for world_size in range(2, 9)
    ]
    assert limits == sorted(limits, reverse=True)
    assert limits[0] == 1024
    assert 256 <= limits[2] < 512
