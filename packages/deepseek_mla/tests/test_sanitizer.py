"""Every operator under compute-sanitizer.

memcheck: no access outside an allocation, of which each tensor has its own; and that it would
report one. racecheck: no race in shared memory. It looks at nothing else, and the kernels use no
shared memory: it is here so that they stay free of such races if they come to use it.
"""

from __future__ import annotations

from pathlib import Path

import deepseek_mla
import pytest
import torch
from gpu_machine import SANITIZER_TOOLS, find_sanitizer
from sanitizer_checks import check_clean, check_overrun

DRIVER = Path(__file__).with_name("sanitizer_driver.py")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.sanitizer,
    pytest.mark.skipif(find_sanitizer() is None, reason="compute-sanitizer was not found"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("tool", SANITIZER_TOOLS)
def test_clean(tool: str) -> None:
    check_clean(tool, deepseek_mla, DRIVER)


@pytest.mark.parametrize(
    ("name", "access"), [("kv", "read"), ("k_cache", "write"), ("q_out", "write")]
)
def test_memcheck_reports_an_overrun(name: str, access: str) -> None:
    """One row less than the tensor's shape says is one row too few."""
    check_overrun(deepseek_mla, DRIVER, name, access, kernel="fused_insert_kernel")
