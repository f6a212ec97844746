"""Builds the probe extension: ``build.py DIRECTORY`` leaves ``_stable_common_probe.so`` there.

The interpreter that runs this has the toolchain and the stable_common wheel installed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import stable_common

LIBRARY = "_stable_common_probe.so"


def main() -> None:
    """Configure and build in a scratch directory and copy the library to the one named."""
    bin_directory = Path(sys.executable).parent
    leaks = {"CUDACXX", "CUDA_HOME", "CUDA_PATH", "PYTHONPATH"}
    environment = {name: value for name, value in os.environ.items() if name not in leaks}
    # The toolchain and the system's compiler: an nvcc elsewhere must not serve.
    environment["PATH"] = os.pathsep.join([str(bin_directory), "/usr/bin", "/bin"])
    with tempfile.TemporaryDirectory() as build:
        configure = ["cmake", "-S", Path(__file__).parent, "-B", build, "-G", "Ninja"]
        configure += ["-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-Dstable_common_ROOT={stable_common.get_cmake_dir()}"]
        subprocess.run(configure, env=environment, check=True)
        subprocess.run(["cmake", "--build", build], env=environment, check=True)
        shutil.copy(Path(build) / LIBRARY, sys.argv[1])


if __name__ == "__main__":
    main()
