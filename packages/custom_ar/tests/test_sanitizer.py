"""The kernels under compute-sanitizer, all ranks in one process.

memcheck: no access outside an allocation, of which each tensor has its own; and that it would
report one. racecheck: no race in shared memory, which is all that it looks at.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import custom_ar
import pytest
import torch

DRIVER = Path(__file__).with_name("sanitizer_driver.py")
SERIALISED = 3  # the driver's exit code where kernels do not run at once
TOOLS = {
    # Padding after each allocation, or what follows a tensor may be another one.
    "memcheck": (["--padding", "4096"], "ERROR SUMMARY: 0 errors"),
    "racecheck": ([], "0 hazards displayed (0 errors"),
}


def find_sanitizer() -> str | None:
    """On PATH, in ``CUDA_HOME``, or in the usual place; ``COMPUTE_SANITIZER`` overrides."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return (
        os.environ.get("COMPUTE_SANITIZER")
        or shutil.which("compute-sanitizer")
        or shutil.which(f"{home}/bin/compute-sanitizer")
    )


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.sanitizer,
    pytest.mark.skipif(find_sanitizer() is None, reason="compute-sanitizer was not found"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def run_driver(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    sanitizer = find_sanitizer()
    assert sanitizer is not None
    package_root = str(Path(custom_ar.__file__).parent.parent)
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        # Each tensor is a cudaMalloc of its own, of its own size.
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    options, _ = TOOLS[tool]
    command = [sanitizer, "--tool", tool, *options, "--error-exitcode", "1"]
    run = subprocess.run(
        [*command, sys.executable, str(DRIVER), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    if run.returncode == SERIALISED:
        reason = re.search(r"^kernels of .*$", run.stdout, re.MULTILINE)
        assert reason, run.stdout + run.stderr
        pytest.skip(f"under {tool} {reason[0]}")
    return run


@pytest.mark.parametrize("tool", TOOLS)
def test_clean(tool: str) -> None:
    run = run_driver(tool)
    output = run.stdout + run.stderr
    assert run.returncode == 0, output[-4000:]
    assert re.search(r"^\d{2,} calls$", run.stdout, re.MULTILINE), output[-4000:]
    _, clean = TOOLS[tool]
    assert clean in output, output[-4000:]


@pytest.mark.parametrize(("name", "access"), [("inp", "read"), ("out", "write")])
def test_memcheck_reports_an_overrun(name: str, access: str) -> None:
    """A vector more than the allocation has is one too many."""
    run = run_driver("memcheck", name)
    output = run.stdout + run.stderr
    assert run.returncode != 0, output[-4000:]
    invalid = rf"Invalid __global__ {access} of size \d+ bytes\s+=+\s+at [^\n]*custom_ar::"
    assert re.search(invalid, output), output[:4000]
