"""C++ headers and CMake functions that CUDA extensions on LibTorch's stable ABI share.

The package is needed at build time only. CMake projects built by scikit-build-core find it with
``find_package(stable_common CONFIG REQUIRED)``; anything else can ask for the two directories here.
"""

from pathlib import Path

__all__ = ["__version__", "get_cmake_dir", "get_include"]

__version__ = "0.1.0"

_ROOT = Path(__file__).resolve().parent


def get_include() -> str:
    """Return the directory to add to a compiler's include path."""
    return str(_ROOT / "include")


def get_cmake_dir() -> str:
    """Return the directory of ``stable_commonConfig.cmake``, what ``stable_common_ROOT`` names."""
    return str(_ROOT / "cmake")
