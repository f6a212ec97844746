"""Every operator under compute-sanitizer: no access outside a tensor, no race in shared memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import deepseek_mla
import pytest
import torch

DRIVER = Path(__file__).with_name("sanitizer_driver.py")


def find_sanitizer() -> str | None:
    """On PATH, in ``CUDA_HOME``, or in the usual place; ``COMPUTE_SANITIZER`` overrides."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return (
        os.environ.get("COMPUTE_SANITIZER")
        or shutil.which("compute-sanitizer")
        or shutil.which(f"{home}/bin/compute-sanitizer")
    )


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.skipif(find_sanitizer() is None, reason="compute-sanitizer was not found")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_clean(tool: str) -> None:
    sanitizer = find_sanitizer()
    assert sanitizer is not None
    package_root = str(Path(deepseek_mla.__file__).parent.parent)
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    # Without torch's caching allocator, a byte past a tensor is a byte past an allocation.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1"]
    run = subprocess.run(
        [*command, sys.executable, str(DRIVER)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    output = run.stdout + run.stderr
    assert run.returncode == 0, output[-4000:]
    assert re.search(r"^\d{2,} calls$", run.stdout, re.MULTILINE), output[-4000:]
    clean = {"memcheck": "ERROR SUMMARY: 0 errors", "racecheck": "0 hazards displayed (0 errors"}
    assert clean[tool] in output, output[-4000:]
