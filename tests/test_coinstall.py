"""The wheels import from site-packages, all in one process and each without the others."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import torch

IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    print(importlib.import_module(name).__file__)
"""

# Imports argv[2] from argv[1] in a process that cannot import any of argv[3:].
IMPORT_ALONE = """
import importlib, sys

target, alone, *others = sys.argv[1:]


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in others:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)


sys.meta_path.insert(0, Absent())
sys.path.insert(0, target)
print(importlib.import_module(alone).__file__)
"""

# Imports argv[2] from a package in argv[1], three times, each time all its modules. No metadata is
# found.
IMPORT_VENDORED = """
import importlib, importlib.metadata, sys

target, package = sys.argv[1:]
find = importlib.metadata.distribution


def distribution(name):
    if name.replace("-", "_") == package:
        raise importlib.metadata.PackageNotFoundError(name)
    return find(name)


importlib.metadata.distribution = distribution
sys.path.insert(0, target)
for _ in range(3):
    module = importlib.import_module(f"outer.vendored.{package}")
    names = [name for name in sys.modules if name.startswith(module.__name__)]
    print(module.__file__, module.__version__, len(names))
    for name in names:
        del sys.modules[name]
"""


def run_python(code: str, *arguments: str | Path) -> list[str]:
    """Run code in a fresh interpreter and return the lines it printed."""
    result = subprocess.run(
        [sys.executable, "-I", "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def package_of(wheel_path: Path) -> str:
    return wheel_path.name.split("-")[0]


def test_torch_is_the_one_asked_for():
    wanted = os.environ.get("STABLE_KERNELS_TORCH", torch.__version__)
    assert torch.__version__.split("+")[0] == wanted.split("+")[0]


def test_all_import_together(wheel_paths: list[Path]):
    packages = [package_of(path) for path in wheel_paths]
    site_packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    for order in (packages, packages[::-1]):
        files = run_python(IMPORT_ALL, *order)
        assert [Path(file).parent.name for file in files] == order
        assert {str(Path(file).parents[1]) for file in files} <= site_packages


# Prints where each package keeps the order of its large calls.
LARGE_CALLS = """
import importlib, sys, torch
for name in sys.argv[1:]:
    importlib.import_module(name)
for name in sys.argv[1:]:
    print(getattr(torch.ops, name)._large_calls())
"""


def test_large_calls_of_all_packages_have_one_order() -> None:
    for order in (["custom_ar", "minimax_rms"], ["minimax_rms", "custom_ar"]):
        first, second = run_python(LARGE_CALLS, *order)
        assert first == second != "0"


def test_each_imports_alone(wheel_path: Path, wheel_paths: list[Path], tmp_path: Path):
    with zipfile.ZipFile(wheel_path) as archive:
        archive.extractall(tmp_path)
    alone = package_of(wheel_path)
    others = [package_of(path) for path in wheel_paths if path != wheel_path]
    [file] = run_python(IMPORT_ALONE, tmp_path, alone, *others)
    assert Path(file).parents[1] == tmp_path


def test_each_imports_vendored_and_again(wheel_path: Path, tmp_path: Path):
    """As part of another package, without metadata; what it registered with torch is no hindrance.

    Modules that were removed from sys.modules are made anew.
    """
    vendored = tmp_path / "outer" / "vendored"
    with zipfile.ZipFile(wheel_path) as archive:
        members = [name for name in archive.namelist() if ".dist-info/" not in name]
        archive.extractall(vendored, members)
    first, *others = run_python(IMPORT_VENDORED, tmp_path, package_of(wheel_path))
    file, version, num_modules = first.split()
    assert Path(file).parents[1] == vendored
    assert version == wheel_path.name.split("-")[1]
    assert int(num_modules) > 0
    assert others == [first] * 2
