"""The headers, seen from Python through the probe extension."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

BUILD_PYTHON = "STABLE_KERNELS_BUILD_PYTHON"


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


OUT = bf16(2, 3)


def test_valid_arguments_pass(probe) -> None:
    probe.check_arguments(bf16(3, 16), bf16(3, 5), OUT)
    probe.check_arguments(bf16(3, 32)[:, :16], bf16(3, 0), OUT)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (
            torch.zeros(3, 16),
            bf16(3, 5),
            "x must be torch.bfloat16 or torch.float16, got torch.float32",
        ),
        (bf16(3, 17), bf16(3, 5), "x must have shape [N, 16], got [3, 17]"),
        (bf16(16), bf16(3, 5), "x must have shape [N, 16], got [16]"),
        (
            bf16(16, 3).t(),
            bf16(3, 5),
            "x must be contiguous from dimension 1 on, got strides [1, 3] for shape [3, 16]",
        ),
        (
            bf16(3, 17)[:, :16],
            bf16(3, 5),
            "x must have a stride of dimension 0 that is a multiple of 16 bytes, got 34 bytes",
        ),
        (
            bf16(1, 17)[:, 1:],
            bf16(1, 5),
            "x must be aligned to 16 bytes, got an address that is 2 past a multiple",
        ),
        (
            bf16(3, 16),
            torch.zeros(3, 5, dtype=torch.float16),
            "weight must have the dtype of x, torch.bfloat16, got torch.float16",
        ),
        (
            bf16(3, 16),
            bf16(4, 5),
            "weight must have shape [N, K] with N = x.size(0) = 3, got [4, 5]",
        ),
        (
            bf16(3, 16),
            bf16(5, 3).t(),
            "weight must be contiguous, got strides [1, 3] for shape [3, 5]",
        ),
    ],
)
def test_bad_arguments_are_named(probe, x, weight, message) -> None:
    with pytest.raises(RuntimeError) as error:
        probe.check_arguments(x, weight, OUT)
    assert str(error.value).splitlines()[0] == f"probe::check_arguments: {message}"


@pytest.mark.parametrize(
    "out",
    [
        bf16(4, 5, 6).permute(2, 0, 1),
        bf16(4, 5, 6)[1:3, ::2, 1:4],
        bf16(1, 6).expand(1, 6),
        bf16(1, 6).expand(0, 6),
        bf16(1).expand(4)[:1],
        bf16(7).as_strided((2, 3), (4, 1)),
    ],
)
def test_outputs_without_overlap_pass(probe, out) -> None:
    probe.check_arguments(bf16(3, 16), bf16(3, 5), out)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (bf16(1, 6).expand(4, 6), "got strides [0, 1] for shape [4, 6]"),
        (bf16(9).as_strided((2, 3), (2, 1)), "got strides [2, 1] for shape [2, 3]"),
        (bf16(9).as_strided((3, 3), (1, 1)), "got strides [1, 1] for shape [3, 3]"),
    ],
)
def test_outputs_with_overlap_are_refused(probe, out, message) -> None:
    with pytest.raises(RuntimeError) as error:
        probe.check_arguments(bf16(3, 16), bf16(3, 5), out)
    first_line = str(error.value).splitlines()[0]
    assert first_line == f"probe::check_arguments: out must not overlap itself, {message}"


def test_what_the_host_reads_is_on_the_cpu(probe) -> None:
    probe.check_on_cpu(bf16(3))
    message = "probe::check_on_cpu: x must be on the CPU, got "
    with pytest.raises(RuntimeError) as error:
        probe.check_on_cpu(torch.empty(3, device="meta"))
    assert str(error.value).splitlines()[0] == message + "neither cuda nor cpu"
    if torch.cuda.is_available():
        with pytest.raises(RuntimeError) as error:
            probe.check_on_cpu(torch.empty(3, device="cuda:0"))
        assert str(error.value).splitlines()[0] == message + "cuda:0"


ARCHITECTURES = """\
include("${DIRECTORY}/StableExtension.cmake")
stable_common_check_architectures(sample ${ARCHITECTURES})
"""


def check_architectures(directory: Path, *architectures: str) -> str:
    """What CMake says of a package's architectures; empty if it takes them."""
    python = os.environ.get(BUILD_PYTHON)
    if python is None:
        pytest.skip(f"{BUILD_PYTHON} is not set: no CMake")
    code = "import stable_common; print(stable_common.get_cmake_dir())"
    cmake_dir = subprocess.check_output([python, "-I", "-c", code], text=True).strip()
    script = directory / "check.cmake"
    script.write_text(ARCHITECTURES)
    result = subprocess.run(
        [
            *(Path(python).parent / "cmake", f"-DDIRECTORY={cmake_dir}"),
            *(f"-DARCHITECTURES={';'.join(architectures)}", "-P", script),
        ],
        text=True,
        capture_output=True,
        check=False,
    )
    assert bool(result.returncode) == bool(result.stderr)
    return " ".join(result.stderr.split())


@pytest.mark.parametrize("architecture", ["80", "75-virtual", "89", "86-virtual"])
def test_ptx_that_would_launch_early_is_refused(tmp_path: Path, architecture: str) -> None:
    """On a later GPU it would not wait for the grid before it, which it is told it may overlap."""
    message = check_architectures(tmp_path, "80-real", architecture, "90a-real")
    number = architecture.removesuffix("-virtual")
    assert f"sample: CUDA_ARCHITECTURES has {architecture}" in message
    assert f"name {number}-real" in message


@pytest.mark.parametrize("architecture", ["90", "90-virtual", "90a", "100", "100f-virtual", "120"])
def test_ptx_that_waits_is_taken(tmp_path: Path, architecture: str) -> None:
    assert check_architectures(tmp_path, "75-real", "80-real", "89-real", architecture) == ""


def test_cuda_is_detected(probe) -> None:
    assert probe.torch_has_cuda() == (torch.version.cuda is not None)


def test_unknown_driver_function_is_null(probe) -> None:
    assert not probe.has_driver_function("cuNoSuchFunction")


def test_driver_error_names_call_and_place(probe) -> None:
    with pytest.raises(RuntimeError, match=r"CUDA driver error: .*\(1\) from .* at probe.cpp:\d+"):
        probe.fail_driver_call(1)  # CUDA_ERROR_INVALID_VALUE
    probe.fail_driver_call(0)


def test_library_needs_libtorch_alone(probe_library: Path) -> None:
    dynamic = subprocess.check_output(["readelf", "-d", probe_library], text=True)
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    system = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"}
    system |= {"libdl.so.2", "librt.so.1", "libpthread.so.0"}
    assert "libtorch.so" in needed
    assert needed - system == {"libtorch.so"}
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_library_does_not_name_this_machine(probe_library: Path) -> None:
    content = probe_library.read_bytes()
    for place in (b"/tmp/", b"/home/", b"site-packages", b".nox"):
        assert place not in content


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_runtime_error_is_an_exception_without_a_gpu(probe) -> None:
    with pytest.raises(RuntimeError, match="CUDA"):
        probe.compute_capability(0)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_gpu
def test_compute_capability(probe) -> None:
    major, minor = torch.cuda.get_device_capability()
    assert probe.compute_capability(torch.cuda.current_device()) == 10 * major + minor
    assert probe.has_driver_function("cuMemCreate")
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        probe.compute_capability(1000)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_converts(probe, dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cuda").to(torch.int16)
    values = bits.view(dtype)
    values_of_pairs = torch.stack([values, values], dim=1).contiguous()
    got = torch.full((values.numel(), 2), 0xAB, dtype=torch.uint8, device="cuda")
    exponents = torch.full((values.numel(),), -999, dtype=torch.int32, device="cuda")
    probe.convert(values_of_pairs, got, exponents)

    expected = values.float().clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    expected[values.isnan()] = 0x7F
    assert torch.equal(got, torch.stack([expected, expected], dim=1))

    magnitude = values.double().abs()
    normal = magnitude.isfinite() & (magnitude >= torch.finfo(torch.float32).tiny)
    # Of m * 2^e with m in [0.5, 1), the ceiling of the logarithm is e, but e - 1 at m = 0.5.
    mantissa, exponent = torch.frexp(magnitude[normal] / 448)
    assert torch.equal(exponents[normal], exponent - (mantissa == 0.5).int())
