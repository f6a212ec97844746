"""The kernels under compute-sanitizer, all ranks in one process.

memcheck: no access outside an allocation, of which each tensor has its own; and that it would
report one. racecheck: no race in shared memory, which is all that it looks at.
"""

from __future__ import annotations

from pathlib import Path

import custom_ar
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
    check_clean(tool, custom_ar, DRIVER)


@pytest.mark.parametrize(("name", "access"), [("inp", "read"), ("out", "write")])
def test_memcheck_reports_an_overrun(name: str, access: str) -> None:
    """A vector more than the allocation has is one too many."""
    check_overrun(custom_ar, DRIVER, name, access)
