"""What the packages' tests under compute-sanitizer check: a driver script makes the calls.

It prints how many it made, or says that the kernels of several ranks do not run at once under the
tool, and exits with SERIALISED. With the name of a tensor it makes a call with one that is short.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import ModuleType
from unittest import SkipTest

from gpu_machine import SANITIZER_TOOLS, SERIALISED, run_under_sanitizer


def run_driver(
    tool: str, package: ModuleType, driver: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run the driver, or skip where it cannot."""
    run = run_under_sanitizer(tool, package, driver, *arguments)
    if run.returncode == SERIALISED:
        reason = re.search(r"^kernels of .*$", run.stdout, re.MULTILINE)
        assert reason, run.stdout + run.stderr
        raise SkipTest(f"under {tool} {reason[0]}")
    return run


def check_clean(tool: str, package: ModuleType, driver: Path) -> None:
    """Check that the tool finds nothing in the driver's calls."""
    run = run_driver(tool, package, driver)
    output = run.stdout + run.stderr
    assert run.returncode == 0, output[-4000:]
    assert re.search(r"^\d{2,} calls$", run.stdout, re.MULTILINE), output[-4000:]
    _, clean = SANITIZER_TOOLS[tool]
    assert clean in output, output[-4000:]


def check_overrun(
    package: ModuleType, driver: Path, name: str, access: str, kernel: str | None = None
) -> None:
    """Check that memcheck reports an ``access`` past the end of a tensor, by the kernel."""
    run = run_driver("memcheck", package, driver, name)
    output = run.stdout + run.stderr
    assert run.returncode != 0, output[-4000:]
    where = kernel or f"{package.__name__}::"
    invalid = rf"Invalid __global__ {access} of size \d+ bytes\s+=+\s+at [^\n]*{where}"
    assert re.search(invalid, output), output[:4000]
