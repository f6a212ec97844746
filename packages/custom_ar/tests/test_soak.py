"""Many all-reduces, each checked, and a rank killed in the middle of more: soak.py, shortened.

``CUSTOM_AR_SOAK_CALLS`` is the number of calls with a GPU for each rank.
"""

from __future__ import annotations

import os

import pytest
import torch
from rank_processes import cuda_devices
from rank_soak import check_soak
from soak import Soak

CALLS = int(os.environ.get("CUSTOM_AR_SOAK_CALLS") or 20_000)
# Ranks that share a GPU take turns on it: a call takes milliseconds.
CALLS_PER_SHARED_CALL = 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ranks_of_one_gpu(seed: int) -> None:
    check_soak(Soak, CALLS // CALLS_PER_SHARED_CALL, cuda_devices()[:1], seed)


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_gpu_for_each_rank(seed: int) -> None:
    check_soak(Soak, CALLS, cuda_devices(), seed)
