"""Builds the probe extension: ``build.py DIRECTORY`` leaves ``_stable_common_probe.so`` there.

The interpreter that runs this has the toolchain and the stable_common wheel installed.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import stable_common

LIBRARY = "_stable_common_probe.so"


def main() -> None:
    """Configure and build in a scratch directory and copy the library to the one named."""
    programs = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as build:
        configure = [programs / "cmake", "-S", Path(__file__).parent, "-B", build, "-G", "Ninja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={programs / 'ninja'}", "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-Dstable_common_ROOT={stable_common.get_cmake_dir()}"]
        subprocess.run(configure, check=True)
        subprocess.run([programs / "cmake", "--build", build], check=True)
        shutil.copy(Path(build) / LIBRARY, sys.argv[1])


if __name__ == "__main__":
    main()
