"""The wheel files keep every rule of scripts/wheel_audit.py and are what is installed."""

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from wheel_audit import RULES, SYSTEM_LIBRARIES, TORCH_FLOOR, TORCH_REQUIREMENT, read_wheel


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


def test_torch_requirement_keeps_a_pre_release_and_asks_for_none():
    """pip and uv look at pre-releases of the index where the requirement names one."""
    requirement = Requirement(TORCH_REQUIREMENT).specifier
    assert not requirement.prereleases
    for version in (f"{TORCH_FLOOR}.0a0+b558c986e8.nv25.11", f"{TORCH_FLOOR}.0", "2.15.0"):
        assert requirement.contains(version, prereleases=True)
    for version in ("2.9.1", "2.9.0a0"):
        assert not requirement.contains(version, prereleases=True)
