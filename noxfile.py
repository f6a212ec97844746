"""Builds, audits and tests the wheels; `./nox --list` shows the sessions."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "uv"
nox.options.sessions = ["lint", "wheels", "tests", "abi", "bundle"]

# Every torch that the wheels are tested under, oldest first. The first is the floor they declare.
TORCH_VERSIONS = ["2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0"]

ROOT = Path(__file__).resolve().parent
DIST = ROOT / "dist"
BUNDLE = DIST / "bundle"
BUNDLE_LIMIT_MB = 50
# sha256 of a wheel file -> the torch versions that its tests passed under.
TESTED = DIST / "tested.json"
TOOLCHAIN = ROOT / "toolchain.txt"
BUILD_ENV = ROOT / ".nox" / "build"
# One place for every environment with a torch in it, so that no two exist at a time.
TORCH_ENV = ROOT / ".nox" / "torch"

PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")

PACKAGES = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
KERNEL_PACKAGES = [name for name in PACKAGES if name != "stable_common"]

# What would let a toolkit or flags from outside of the build environment into a wheel.
LEAKS = [
    *("CUDACXX", "CUDAARCHS", "CUDAFLAGS", "CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"),
    *("CUDAToolkit_ROOT", "CUDAHOSTCXX", "NVCC_CCBIN", "NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS"),
    *("CFLAGS", "CXXFLAGS", "LDFLAGS"),
    *("CMAKE_PREFIX_PATH", "CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "PYTHONPATH"),
]


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and types of the Python, C++, CUDA and CMake sources; -- --fix reformats them."""
    fix = "--fix" in session.posargs
    session.install(*nox.project.dependency_groups(PYPROJECT, "lint"))

    session.run("ruff", "check", *(["--fix"] if fix else []), ".")
    session.run("ruff", "format", *([] if fix else ["--check"]), ".")

    suffixes = {".h", ".cuh", ".cu", ".cpp"}
    sources = [str(p) for p in sorted(ROOT.glob("packages/**/*")) if p.suffix in suffixes]
    session.run("clang-format", *(["-i"] if fix else ["--dry-run", "-Werror"]), *sources)

    session.run(
        *("gersemi", "-i" if fix else "--check", "--indent=2", "--line-length=100"),
        "--no-cache",
        *("--definitions", "packages/stable_common/src/stable_common/cmake", "--", "packages"),
    )

    # torch's types come from the build environment, nox's from where nox runs.
    python = build_python(session)
    for package in PACKAGES:
        session.run(
            *("mypy", "--python-version=3.10", f"--python-executable={python}"),
            f"packages/{package}/src",
        )
    session.run("mypy", f"--python-executable={sys.executable}", "noxfile.py")
    with_torch = [
        *("bench_ranks", "exact_tensors", "peer_group_workers"),
        *("rank_processes", "rank_soak", "rank_streams", "torch_defaults"),
    ]
    session.run("mypy", f"--exclude={'|'.join(with_torch)}", "scripts")
    # As the benchmarks and tests that import them, they call what torch gives no types for.
    session.run(
        *("mypy", "--allow-untyped-calls", f"--python-executable={python}"),
        *(f"scripts/{name}.py" for name in with_torch),
    )
    for path in sorted(ROOT.glob("packages/*/benchmarks/report.py")):
        session.run("mypy", str(path.relative_to(ROOT)), env={"MYPYPATH": "scripts"})


@nox.session(venv_backend="none")
def wheels(session: nox.Session) -> None:
    """Build the wheels into dist/, of every package or of -- PACKAGE..."""
    build_wheels(session, named_packages(session))


@nox.session
def abi(session: nox.Session) -> None:
    """Audit every wheel in dist/ and print a table of what it asks for."""
    audited = [find_wheel(session, package) for package in named_packages(session)]
    session.install(*nox.project.dependency_groups(PYPROJECT, "abi"))
    session.run("twine", "check", "--strict", *map(str, audited))
    session.run("check-wheel-contents", *map(str, audited))
    session.run(
        *("python", "scripts/abi.py", f"--min-torch={TORCH_VERSIONS[0]}", f"--tested={TESTED}"),
        *map(str, audited),
    )


@nox.session(venv_backend="none")
@nox.parametrize("torch", TORCH_VERSIONS)
def tests(session: nox.Session, torch: str) -> None:
    """Test the wheels of dist/ under one torch; -- PACKAGE... for its own tests, pytest options."""
    packages, pytest_args = split_posargs(session)
    tested = {package: find_wheel(session, package) for package in packages}
    digests = {package: sha256(wheel) for package, wheel in tested.items()}
    for package, wheel in tested.items():
        session.log(f"{wheel.name} sha256 {digests[package]}")

    environ: dict[str, str | None] = {"PYTHONPATH": None, "STABLE_KERNELS_BUILD_PYTHON": None}
    # stable_common is headers: its tests build an extension, and load it at both ends of the list.
    is_end = torch in (TORCH_VERSIONS[0], TORCH_VERSIONS[-1])
    if is_end and "stable_common" in packages:
        python = build_python(session)
        install(session, python, "--no-deps", "--reinstall", tested["stable_common"])
        environ |= build_environ()
        environ["STABLE_KERNELS_BUILD_PYTHON"] = str(python)

    requirements = nox.project.dependency_groups(PYPROJECT, "test")
    with (
        torch_environment(session, f"torch=={torch}", *tested.values()) as python,
        tempfile.TemporaryDirectory(prefix="stable-kernels-") as directory,
    ):
        stage = Path(directory)
        stage_tests(stage, packages)
        directories = [f"packages/{package}/tests" for package in packages]
        if packages == PACKAGES:
            # Documents, reports and audits are the same under every torch.
            directories.insert(0, "tests" if is_end else "tests/test_coinstall.py")
            for name in ("tests", "README.md", "LICENSE", "noxfile.py", "toolchain.txt"):
                copy(ROOT / name, stage / name)
            for wheel in tested.values():
                copy(wheel, stage / "dist" / wheel.name)
        if torch == TORCH_VERSIONS[-1]:
            run_scripts(session, python, stage)
        install(session, python, *requirements)
        with session.chdir(stage):
            # -I: neither the working directory nor the user's site-packages are on the path.
            session.run(
                *(str(python), "-I", "-m", "pytest", "-p", "no:cacheprovider"),
                *("--basetemp=tmp", *pytest_args, *directories),
                env={**environ, "STABLE_KERNELS_TORCH": torch, "MPLCONFIGDIR": directory},
                external=True,
            )

    if not pytest_args:
        # Between the two ends all that stable_common's tests do is skip.
        ran = {p: w for p, w in tested.items() if p != "stable_common" or is_end}
        for package, wheel in ran.items():
            passed = record_tested(digests[package], torch)
            session.log(f"{wheel.name} sha256 {digests[package]} passed under {', '.join(passed)}")


@nox.session(venv_backend="none")
def quickstart(session: nox.Session) -> None:
    """Build deepseek_mla's wheel, install it alone and run its example; -- torch==... picks one."""
    package = "deepseek_mla"
    if not is_up_to_date(package):
        build_wheels(session, [package])
    wheel = find_wheel(session, package)
    example = ROOT / "packages" / package / "examples" / "insert_tokens.py"
    # torch warns at import when numpy is missing.
    with torch_environment(session, wheel, "numpy", *session.posargs) as python:
        session.run(python, "-I", example, env={"PYTHONPATH": None}, external=True)
    session.log(f"to use it: pip install {wheel.relative_to(ROOT)}")


@nox.session(venv_backend="none")
def bundle(session: nox.Session) -> None:
    """Write dist/bundle/, which tests and measures wheels on an offline GPU machine, and try it."""
    packages = named_packages(session)
    bundled = {package: find_wheel(session, package) for package in packages}
    shutil.rmtree(BUNDLE, ignore_errors=True)
    stage_tests(BUNDLE, packages)
    for wheel in bundled.values():
        copy(wheel, BUNDLE / "wheels" / wheel.name)
    # The GPU machine may have no compiler for what is not in the wheels.
    python = build_python(session)
    if "stable_common" in packages:
        install(session, python, "--no-deps", "--reinstall", bundled["stable_common"])
        probe = BUNDLE / "packages" / "stable_common" / "tests" / "probe"
        session.run(python, probe / "build.py", probe, env=build_environ(), external=True)
    for tune in sorted(BUNDLE.glob("packages/*/benchmarks/tune.cu")):
        build_tune(session, tune)
    copy(ROOT / "scripts" / "bundle_run.py", BUNDLE / "run.py")
    size = sum(path.stat().st_size for path in BUNDLE.rglob("*") if path.is_file()) / 1e6
    session.log(f"{BUNDLE.relative_to(ROOT)}: {size:.1f} MB")
    if size > BUNDLE_LIMIT_MB:
        session.error(f"the bundle is larger than {BUNDLE_LIMIT_MB} MB")
    # With no more than the bundle needs there.
    needed = [
        requirement
        for requirement in nox.project.dependency_groups(PYPROJECT, "test")
        if Requirement(requirement).name in ("numpy", "pytest")
    ]
    with torch_environment(session, f"torch=={TORCH_VERSIONS[-1]}", "pip", *needed) as python:
        session.run(
            *(python, BUNDLE / "run.py", "tests", "--", "-p", "no:cacheprovider", "--quiet"),
            # All of them are imported. Those run that start programs or compare with the wheels;
            # the tests session has run the rest.
            *("-k", "example or errors or schemas or readme"),
            env={"PYTHONPATH": None, "PYTHONDONTWRITEBYTECODE": "1"},
            external=True,
        )


@nox.session
def report(session: nox.Session) -> None:
    """Draw the measured tables and plots from benchmarks/results/; -- --check only compares."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "report"))
    session.run(
        "python", "scripts/report.py", *session.posargs, env={"MPLCONFIGDIR": session.create_tmp()}
    )


def run_scripts(session: nox.Session, python: Path, stage: Path) -> None:
    """Run examples and smokes with what a user has who installs a wheel: torch, and no NumPy."""
    code = "import importlib.util as u; assert u.find_spec('numpy') is None"
    session.run(python, "-I", "-c", code, external=True)
    environ = {"PYTHONPATH": None, "GLOO_SOCKET_IFNAME": "lo"}
    scripts = [*stage.glob("packages/*/examples/*.py"), *stage.glob("packages/*/tests/*_smoke.py")]
    for script in sorted(scripts):
        session.run(python, "-I", script, env=environ, external=True)


def build_tune(session: nox.Session, tune: Path) -> None:
    """Compile a package's tuning benchmark with all its kernels, for SM90, beside its source."""
    csrc = ROOT / "packages" / tune.parents[1].name / "csrc"
    nvcc = next(BUILD_ENV.glob("lib/python*/site-packages/nvidia/cu13/bin/nvcc"))
    headers = ROOT / "packages" / "stable_common" / "src" / "stable_common" / "include"
    sources: list[str | Path] = [tune, *sorted(csrc.glob("*.cu"))]
    session.run(
        *(nvcc, "-std=c++20", "-O3", "-gencode=arch=compute_90a,code=sm_90a"),
        *("--expt-relaxed-constexpr", f"-L{nvcc.parents[1] / 'lib'}", f"-I{csrc}", f"-I{headers}"),
        *sources,
        *("-o", tune.with_suffix("")),
        env=build_environ(),
        external=True,
    )


def split_posargs(session: nox.Session) -> tuple[list[str], list[str]]:
    """Return the packages named after `--`, all when none is, and the options that follow them."""
    named = []
    rest = list(session.posargs)
    while rest and not rest[0].startswith("-"):
        named.append(rest.pop(0).replace("-", "_"))
    unknown = sorted(set(named) - set(PACKAGES))
    if unknown:
        session.error(f"no package {', '.join(unknown)}; there are {', '.join(PACKAGES)}")
    return named or PACKAGES, rest


def named_packages(session: nox.Session) -> list[str]:
    """Return the packages named after `--`, all when none is; anything else there is an error."""
    packages, rest = split_posargs(session)
    if rest:
        session.error(f"unexpected arguments: {' '.join(rest)}")
    return packages


def make_environment(session: nox.Session, path: Path, *requirements: str | Path) -> Path:
    """Make a fresh virtual environment of this Python at `path` and return its interpreter."""
    python = path / "bin" / "python"
    session.log(f"making {path.relative_to(ROOT)}")
    session.run_install(
        "uv", "venv", "--quiet", "--clear", f"--python={sys.executable}", path, external=True
    )
    install(session, python, *requirements)
    return python


def install(session: nox.Session, python: Path, *requirements: str | Path) -> None:
    """Install into the environment of `python`."""
    session.run_install("uv", "pip", "install", f"--python={python}", *requirements, external=True)


def build_python(session: nox.Session) -> Path:
    """Return the interpreter of the build environment, which is remade when its pins change."""
    if " " in str(ROOT):
        session.error(f"nvcc cannot work in a path with a space: {ROOT}")
    stamp = BUILD_ENV / "toolchain.sha256"
    wanted = hashlib.sha256(TOOLCHAIN.read_bytes() + sys.version.encode()).hexdigest()
    if not stamp.exists() or stamp.read_text() != wanted:
        make_environment(session, BUILD_ENV, "--no-deps", "--requirements", TOOLCHAIN)
        stamp.write_text(wanted)
    return BUILD_ENV / "bin" / "python"


def build_environ() -> dict[str, str | None]:
    """Return the environment variables of a build, which sees no nvcc but the pinned one."""

    def may_stay(directory: str) -> bool:
        path = Path(directory)
        return not (path / "nvcc").exists() or (path / "g++").exists()

    outer = filter(may_stay, os.environ["PATH"].split(os.pathsep))
    return {
        **dict.fromkeys(LEAKS),
        # The time in a wheel's archive: a rebuild of the same sources gives the same file.
        "SOURCE_DATE_EPOCH": "1577836800",
        "PATH": os.pathsep.join([str(BUILD_ENV / "bin"), *outer]),
        "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1),
    }


def build_wheels(session: nox.Session, packages: Iterable[str]) -> None:
    """Build the packages, kernels against the stable_common wheel that is built before them."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        session.error("no C++ compiler; on Debian and Ubuntu: apt-get install g++")
    python = build_python(session)
    stable_common = build_wheel(session, python, "stable_common")
    install(session, python, "--no-deps", "--reinstall", stable_common)
    version = stable_common.name.split("-")[1]
    for package in packages:
        if package in KERNEL_PACKAGES:
            check_pin(session, package, version)
            build_wheel(session, python, package)


def check_pin(session: nox.Session, package: str, version: str) -> None:
    """Fail when a package's build requirements do not admit the stable_common built here."""
    pyproject = tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text())
    requirements = map(Requirement, pyproject["build-system"]["requires"])
    pins = [r for r in requirements if r.name.replace("_", "-") == "stable-common"]
    if not any(pin.specifier.contains(version, prereleases=True) for pin in pins):
        session.error(f"{package}'s build-system.requires does not admit stable-common {version}")


def build_wheel(session: nox.Session, python: Path, package: str) -> Path:
    """Build one package into dist/ in place of its older wheels; a binary wheel is repaired."""
    session.log(f"building {package}")
    environ = build_environ()
    with tempfile.TemporaryDirectory(prefix=f"{package}-") as directory:
        scratch = Path(directory)
        session.run(
            *("uv", "build", "--wheel", "--no-build-isolation", f"--python={python}"),
            *(f"--config-setting=build-dir={scratch / 'cmake'}", f"--out-dir={scratch / 'built'}"),
            ROOT / "packages" / package,
            env=environ,
            external=True,
        )
        [wheel] = (scratch / "built").glob("*.whl")
        if not wheel.name.endswith("-none-any.whl"):
            check_compiler(session, scratch / "cmake" / "CMakeCache.txt")
            session.run(
                *(python, "-m", "auditwheel", "repair", "--exclude=libtorch*", "--exclude=libc10*"),
                *(f"--wheel-dir={scratch / 'repaired'}", wheel),
                env=environ,
                external=True,
            )
            [wheel] = (scratch / "repaired").glob("*.whl")
            if "-py3-none-manylinux_" not in wheel.name:
                session.error(f"{wheel.name} is not tagged py3-none-manylinux")
        for older in DIST.glob(f"{package}-*.whl"):
            older.unlink()
        built = DIST / wheel.name
        copy(wheel, built)
    session.log(f"built {built.relative_to(ROOT)}, {built.stat().st_size / 1e6:.2f} MB")
    return built


def check_compiler(session: nox.Session, cmake_cache: Path) -> None:
    """Fail unless CMake compiled CUDA with the build environment's nvcc."""
    found = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.*)$", cmake_cache.read_text(), re.MULTILINE)
    if not found or not Path(found[1]).is_relative_to(BUILD_ENV):
        session.error(f"CUDA was compiled with {found and found[1]}, not with nvcc of {BUILD_ENV}")


def find_wheel(session: nox.Session, package: str) -> Path:
    """Return the package's wheel in dist/."""
    found = sorted(DIST.glob(f"{package}-*.whl"))
    if len(found) != 1:
        session.error(
            f"dist/ has {len(found)} wheels of {package}, not 1; run ./nox -s wheels -- {package}"
        )
    if not is_up_to_date(package):
        session.warn(f"{found[0].name} is older than its sources: ./nox -s wheels -- {package}")
    return found[0]


def is_up_to_date(package: str) -> bool:
    """Tell whether dist/ has a wheel of the package that is newer than all it is built from."""
    roots = [ROOT / "packages" / name for name in ("stable_common", package)]
    parts = ("src", "csrc", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE")
    sources = [file for root in roots for part in parts for file in files(root / part)]
    newest = max(source.stat().st_mtime for source in [TOOLCHAIN, *sources])
    built = list(DIST.glob(f"{package}-*.whl"))
    return len(built) == 1 and built[0].stat().st_mtime >= newest


def files(path: Path) -> list[Path]:
    """Return the file itself, or the files below a directory but for compiled Python."""
    below = path.rglob("*") if path.is_dir() else [path]
    return [p for p in below if p.is_file() and p.suffix != ".pyc"]


@contextlib.contextmanager
def torch_environment(session: nox.Session, *requirements: str | Path) -> Iterator[Path]:
    """Make a fresh environment, yield its interpreter, and delete it: with a torch it is 5 GiB."""
    try:
        yield make_environment(session, TORCH_ENV, *requirements)
    finally:
        shutil.rmtree(TORCH_ENV, ignore_errors=True)


def stage_tests(target: Path, packages: Iterable[str]) -> None:
    """Copy what tests, measures and documents the packages to `target`: all but their sources."""
    copy(ROOT / "pyproject.toml", target / "pyproject.toml")
    copy(ROOT / "scripts", target / "scripts")
    for package in packages:
        for part in ("tests", "benchmarks", "examples", "README.md", "CHANGELOG.md"):
            if (ROOT / "packages" / package / part).exists():
                copy(ROOT / "packages" / package / part, target / "packages" / package / part)


def copy(source: Path, target: Path) -> None:
    """Copy a file or a directory, without caches, and make the directories above it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    else:
        shutil.copyfile(source, target)


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def record_tested(digest: str, torch: str) -> list[str]:
    """Note that the wheel of this digest passed under `torch`; return all that it passed under."""
    tested = json.loads(TESTED.read_text()) if TESTED.exists() else {}
    current = {sha256(wheel) for wheel in DIST.glob("*.whl")}
    tested = {known: passed for known, passed in tested.items() if known in current}
    passed = {torch, *tested.get(digest, [])}
    tested[digest] = [version for version in TORCH_VERSIONS if version in passed]
    TESTED.write_text(json.dumps(tested, indent=2) + "\n")
    return list(tested[digest])
