"""The kernels under compute-sanitizer, all ranks in one process.

memcheck: no access outside an allocation, of which each tensor has its own; and that it would
report one. racecheck: no race in shared memory, which is all that it looks at.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import minimax_rms
import pytest
import torch
from gpu_machine import SANITIZER_TOOLS, find_sanitizer, run_under_sanitizer

DRIVER = Path(__file__).with_name("minimax_sanitizer_driver.py")
SERIALISED = 3  # the driver's exit code where kernels do not run at once
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.sanitizer,
    pytest.mark.skipif(find_sanitizer() is None, reason="compute-sanitizer was not found"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def run_driver(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    run = run_under_sanitizer(tool, minimax_rms, DRIVER, *arguments)
    if run.returncode == SERIALISED:
        reason = re.search(r"^kernels of .*$", run.stdout, re.MULTILINE)
        assert reason, run.stdout + run.stderr
        pytest.skip(f"under {tool} {reason[0]}")
    return run


@pytest.mark.parametrize("tool", SANITIZER_TOOLS)
def test_clean(tool: str) -> None:
    run = run_driver(tool)
    output = run.stdout + run.stderr
    assert run.returncode == 0, output[-4000:]
    assert re.search(r"^\d{2,} calls$", run.stdout, re.MULTILINE), output[-4000:]
    _, clean = SANITIZER_TOOLS[tool]
    assert clean in output, output[-4000:]


@pytest.mark.parametrize(
    ("name", "access"), [("input", "read"), ("norm_weight", "read"), ("buffer", "(?:read|write)")]
)
def test_memcheck_reports_an_overrun(name: str, access: str) -> None:
    """A vector more than the allocation has is one too many."""
    run = run_driver("memcheck", name)
    output = run.stdout + run.stderr
    assert run.returncode != 0, output[-4000:]
    invalid = rf"Invalid __global__ {access} of size \d+ bytes\s+=+\s+at [^\n]*minimax_rms::"
    assert re.search(invalid, output), output[:4000]
