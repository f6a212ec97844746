"""The probe: a tiny extension built with the installed stable_common wheel."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

PROBE = Path(__file__).parent / "probe"
LIBRARY = "_stable_common_probe.so"
BUILD_PYTHON = "STABLE_KERNELS_BUILD_PYTHON"


@pytest.fixture(scope="session")
def probe_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the library that came with the tests, or build it where there is a toolchain."""
    if (PROBE / LIBRARY).exists():
        return PROBE / LIBRARY
    build_python = os.environ.get(BUILD_PYTHON)
    if build_python is None:
        pytest.skip(f"{BUILD_PYTHON} is not set: no toolchain to build the probe with")
    directory = tmp_path_factory.mktemp("probe")
    build = subprocess.run(
        [build_python, PROBE / "build.py", directory],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert build.returncode == 0, build.stdout
    return directory / LIBRARY


@pytest.fixture(scope="session")
def probe(probe_library: Path) -> Any:
    """Load the probe into this process's torch and return its namespace of ops."""
    assert "stable_common" not in sys.modules, "the probe must not need stable_common at run time"
    torch.ops.load_library(probe_library)
    return torch.ops.stable_common_probe
