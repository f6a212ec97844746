"""What the packages' benchmarks and GPU tests ask of the machine that they run on."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

# Options of each tool of compute-sanitizer, and what it prints when it has found nothing.
SANITIZER_TOOLS: dict[str, tuple[list[str], str]] = {
    # Padding after each allocation, or what follows a tensor may be another one.
    "memcheck": (["--padding", "4096"], "ERROR SUMMARY: 0 errors"),
    "racecheck": ([], "0 hazards displayed (0 errors"),
}

# The exit code of a script that cannot make its calls under a tool: kernels do not run at once.
SERIALISED = 3


def driver_version() -> str:
    """The version of the NVIDIA driver, from NVML."""
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    version = ctypes.create_string_buffer(80)
    if nvml.nvmlInit_v2() != 0 or nvml.nvmlSystemGetDriverVersion(version, len(version)) != 0:
        raise RuntimeError("NVML does not tell the driver's version")
    return version.value.decode()


def host_cpu() -> str:
    """The CPU's model name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def find_sanitizer() -> str | None:
    """On PATH, in ``CUDA_HOME``, or in the usual place; ``COMPUTE_SANITIZER`` overrides."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return (
        os.environ.get("COMPUTE_SANITIZER")
        or shutil.which("compute-sanitizer")
        or shutil.which(f"{home}/bin/compute-sanitizer")
    )


def environment_with(package: ModuleType) -> dict[str, str]:
    """The environment for a script that is to import the package, wherever it lies."""
    assert package.__file__ is not None
    package_root = str(Path(package.__file__).parent.parent)
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def run_under_sanitizer(
    tool: str, package: ModuleType, driver: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run a script, which can import the package, under one of SANITIZER_TOOLS."""
    sanitizer = find_sanitizer()
    assert sanitizer is not None
    # Each tensor is a cudaMalloc of its own, of its own size.
    environment = {**environment_with(package), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options, _ = SANITIZER_TOOLS[tool]
    command = [sanitizer, "--tool", tool, *options, "--error-exitcode", "1"]
    return subprocess.run(
        [*command, sys.executable, str(driver), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
