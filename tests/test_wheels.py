"""The wheel files keep every rule of scripts/wheel_audit.py and are what is installed."""

import re
from importlib import metadata
from pathlib import Path

import pytest
from wheel_audit import RULES, SYSTEM_LIBRARIES, TORCH_FLOOR, read_wheel


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_wheel_keeps_rule(wheel_path: Path, rule):
    assert list(rule(read_wheel(wheel_path))) == []


def test_kernel_wheel_needs_torch_and_the_system(wheel_path: Path):
    for library in read_wheel(wheel_path).libraries:
        assert set(library.needed) - SYSTEM_LIBRARIES == {"libtorch.so"}


def test_installed_package_is_the_wheel(wheel_path: Path):
    wheel = read_wheel(wheel_path)
    distribution = metadata.distribution(wheel.package)
    assert distribution.version == wheel.version
    installed = {str(file) for file in distribution.files or []}
    assert set(wheel.members) <= installed


def test_torch_floor_is_the_torch_built_against():
    root = Path(__file__).resolve().parents[1]
    pin = re.search(r"^torch==(\d+\.\d+)\.\d+$", (root / "toolchain.txt").read_text(), re.MULTILINE)
    assert pin is not None
    assert pin[1] == TORCH_FLOOR
