"""The rules of scripts/wheel_audit.py complain about wheels that break them."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from wheel_audit import RULES, Wheel, read_wheel

METADATA = """\
Metadata-Version: 2.4
Name: sample
Version: 1.0
License-Expression: Apache-2.0
Requires-Dist: torch>=2.9.99
"""
WHEEL = """\
Wheel-Version: 1.0
Tag: py3-none-manylinux_2_34_x86_64
"""
SOURCE = 'extern "C" int torch_call_dispatcher();\nint call() { return torch_call_dispatcher(); }\n'
HIDDEN = ("-O2", "-fvisibility=hidden", "-Wl,-z,now")


def compile_library(
    directory: Path, source: str = SOURCE, flags: tuple[str, ...] = HIDDEN, needs: str = "torch"
) -> bytes:
    """Compile a library that needs an empty lib<needs>.so."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    empty = directory / f"lib{needs}.so"
    link = ["g++", "-shared", "-fPIC"]
    subprocess.run([*link, "-x", "c++", "/dev/null", "-o", empty], check=True)
    (directory / "sample.cpp").write_text(source)
    subprocess.run(
        [
            *(*link, *flags, directory / "sample.cpp", "-o", directory / "_sample.so"),
            *("-Wl,--no-as-needed", f"-L{directory}", f"-l{needs}"),
        ],
        check=True,
    )
    return (directory / "_sample.so").read_bytes()


def make_wheel(directory: Path, library: bytes, **changes: str | None) -> Wheel:
    """Write a wheel that keeps every rule but for its changed members; None leaves one out."""
    path = directory / "sample-1.0-py3-none-manylinux_2_34_x86_64.whl"
    members: dict[str, str | bytes | None] = {
        "sample/__init__.py": '__version__ = "1.0"\n',
        "sample/py.typed": "",
        "sample/_sample.so": library,
        "sample-1.0.dist-info/METADATA": METADATA,
        "sample-1.0.dist-info/WHEEL": WHEEL,
        "sample-1.0.dist-info/licenses/LICENSE": "",
    } | changes
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)
    return read_wheel(path)


def complaints(wheel: Wheel) -> list[str]:
    return [complaint for rule in RULES for complaint in rule(wheel)]


def test_sound_wheel_passes(tmp_path: Path):
    assert complaints(make_wheel(tmp_path, compile_library(tmp_path))) == []


@pytest.mark.parametrize(
    ("source", "flags", "needs", "expected"),
    [
        (SOURCE, ("-Wl,-z,now",), "torch", "exports _Z4callv"),
        (SOURCE, ("-fvisibility=hidden", "-Wl,-z,lazy"), "torch", "not linked with -z now"),
        (SOURCE, (*HIDDEN, "-Wl,-rpath,/opt/lib"), "torch", "has the run path /opt/lib"),
        (SOURCE, HIDDEN, "cudart", "needs libcudart.so"),
        (SOURCE, HIDDEN, "c10_cuda", "does not need libtorch.so"),
        (
            SOURCE.replace("torch_call_dispatcher", "aoti_torch_get_current_cuda_stream"),
            HIDDEN,
            "torch",
            "which a CPU build of torch lacks",
        ),
        (
            SOURCE.replace("torch_call_dispatcher", "cuLaunchKernelEx"),
            HIDDEN,
            "torch",
            "CUDA library",
        ),
    ],
)
def test_unsound_library_is_named(tmp_path: Path, source, flags, needs, expected):
    found = complaints(make_wheel(tmp_path, compile_library(tmp_path, source, flags, needs)))
    assert any(expected in complaint for complaint in found), found


@pytest.mark.parametrize(
    "source",
    [
        '#pragma weak aoti_torch_get_current_cuda_stream\nextern "C" int '
        "aoti_torch_get_current_cuda_stream();\n"
        "int call() { return aoti_torch_get_current_cuda_stream(); }\n",
        SOURCE.replace("torch_call_dispatcher", "aoti_torch_device_type_cuda"),
        "#include <vector>\nvoid grow(std::vector<int>& v) { v.resize(v.size() + 7); }\n",
    ],
    ids=["weak CUDA function", "function of every build", "C++ library template"],
)
def test_sound_library_is_let_through(tmp_path: Path, source):
    assert complaints(make_wheel(tmp_path, compile_library(tmp_path, source))) == []


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("METADATA", METADATA.replace("torch>=2.9.99", "torch"), "requires ['torch']"),
        ("METADATA", METADATA.replace("Apache-2.0", "MIT"), "License-Expression is MIT"),
        ("WHEEL", WHEEL.replace("py3-none", "cp312-cp312"), "is not py3-none-*"),
        ("licenses/LICENSE", None, "no licence file"),
    ],
)
def test_unsound_metadata_is_named(tmp_path: Path, name, content, expected):
    wheel = make_wheel(
        tmp_path, compile_library(tmp_path), **{f"sample-1.0.dist-info/{name}": content}
    )
    assert any(expected in complaint for complaint in complaints(wheel)), complaints(wheel)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("__init__", '__version__ = "1.1"', 'lacks the line __version__ = "1.0"'),
        ("a", "import numpy as np", "sample/a.py imports numpy"),
        ("a", "def f():\n    from numpy.linalg import norm", "sample/a.py imports numpy"),
        ("a", "dist.all_gather_object(x, y)", "uses all_gather_object"),
        ("a", "from torch.distributed import send_object_list", "uses send_object_list"),
        ("a", "x = 1\ntorch.empty(3, dtype=d)", "a.py:2 calls torch.empty without device"),
        ("a", "f(torch.tensor([1]))", "calls torch.tensor without device and dtype"),
    ],
)
def test_unsound_module_is_named(tmp_path: Path, name, text, expected):
    found = complaints(
        make_wheel(tmp_path, compile_library(tmp_path), **{f"sample/{name}.py": text})
    )
    assert any(expected in complaint for complaint in found), found


def test_sound_module_is_let_through(tmp_path: Path):
    text = """
from torch import Tensor
import torch.numpy_is_not_this

x = torch.zeros(3, device="cpu", dtype=torch.int32)
y = x.new_empty(2) + torch.empty_like(x)
dist.all_gather(x, y)
"""
    wheel = make_wheel(tmp_path, compile_library(tmp_path), **{"sample/a.py": text})
    assert complaints(wheel) == []


@pytest.mark.parametrize("name", ["sample/kernel.cuh", "sample/tests/test_it.py", "other/it.py"])
def test_stray_file_is_named(tmp_path: Path, name):
    found = complaints(make_wheel(tmp_path, compile_library(tmp_path), **{name: ""}))
    assert any(name.split("/")[0] in complaint for complaint in found), found


def test_large_wheel_is_named(tmp_path: Path):
    wheel = make_wheel(tmp_path, compile_library(tmp_path), **{"sample/data": "x" * 11_000_000})
    assert any("is above 10.0 MB" in complaint for complaint in complaints(wheel))
