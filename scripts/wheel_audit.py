"""What a wheel of this repository holds, and the rules it must keep.

Needs pyelftools. A rule is a function from a :class:`Wheel` to a list of complaints, empty when the
wheel keeps it; :data:`RULES` has them all.
"""

from __future__ import annotations

import ast
import email.message
import email.parser
import hashlib
import io
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection
from elftools.elf.sections import SymbolTableSection

SIZE_LIMIT_MB = 10.0
# glibc of the manylinux_2_34 tag: what the static CUDA runtime asks for.
GLIBC_LIMIT = (2, 34)
TORCH_FLOOR = "2.10"
# The floor and its pre-releases, without naming one: that would let pip install pre-releases.
TORCH_REQUIREMENT = "torch>=2.9.99"

TORCH_LIBRARY = "libtorch.so"
SYSTEM_LIBRARIES = {
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "librt.so.1",
    "libstdc++.so.6",
}

SOURCE_SUFFIXES = {".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".o", ".a"}

# Templates of the C++ library that a compiler instantiates stay visible whatever the flags say.
STANDARD_LIBRARY_SYMBOL = re.compile(
    r"_Z(GV|T[ISV])?Z*(N[rVK]*[RO]?)?(S[abdiost]|9__gnu_cxx|10__cxxabiv1)"
)
LINKER_SYMBOLS = {"_init", "_fini", "_edata", "_end", "__bss_start"}

# torch's C functions that only a CUDA build of torch has. aoti_torch_device_type_cuda is in all.
CUDA_BUILD_SYMBOL = re.compile(r"(aoti_torch|torch)_\w*cuda(?<!_device_type_cuda)")
CUDA_LIBRARY_SYMBOL = re.compile(r"cu(da)?[A-Z]")

# torch.distributed's collectives of Python objects.
OBJECT_COLLECTIVE = re.compile(r"\w+_object(_list)?")
# What makes a tensor of the default device or dtype; not what takes both from another tensor.
FACTORY = re.compile(
    r"torch\.(arange|as_tensor|asarray|empty|empty_permuted|empty_strided|eye|full|linspace|logspace"
    r"|normal|ones|rand|randint|randn|randperm|range|scalar_tensor|tensor|zeros)"
)


@dataclass(frozen=True)
class Library:
    """A shared library: what it asks of the system and what it shows to others."""

    name: str
    needed: tuple[str, ...]
    """DT_NEEDED entries, in the file's order."""
    run_paths: tuple[str, ...]
    """DT_RPATH and DT_RUNPATH entries."""
    exported: tuple[str, ...]
    """Defined dynamic symbols that are neither local nor hidden, mangled."""
    required: tuple[str, ...]
    """Undefined dynamic symbols without which the library does not load, mangled."""
    glibc: tuple[int, ...]
    """The newest version of glibc that a symbol asks for, (0,) when none does."""
    binds_now: bool
    """Whether every symbol is resolved when the library is loaded."""


@dataclass(frozen=True)
class Wheel:
    """A wheel file."""

    path: Path
    sha256: str
    members: tuple[str, ...]
    metadata: email.message.Message
    """The core metadata, headers such as Requires-Dist."""
    tags: tuple[str, ...]
    """The tags of the WHEEL file, such as py3-none-any."""
    libraries: tuple[Library, ...]
    modules: dict[str, str]
    """The text of each Python file."""

    @property
    def package(self) -> str:
        """The import name."""
        return self.path.name.split("-")[0]

    @property
    def version(self) -> str:
        """The version in the file name."""
        return self.path.name.split("-")[1]

    @property
    def platform(self) -> str:
        """The platform tag of the file name, the first of them if several."""
        return self.path.stem.split("-")[-1].split(".")[0]

    @property
    def is_pure(self) -> bool:
        """Whether the wheel serves every platform."""
        return self.platform == "any"

    @property
    def size_mb(self) -> float:
        """The size of the file in MB."""
        return self.path.stat().st_size / 1e6


def read_wheel(path: Path) -> Wheel:
    """Read a wheel file and the shared libraries in it."""
    parser = email.parser.BytesParser()
    with zipfile.ZipFile(path) as archive:
        members = tuple(name for name in archive.namelist() if not name.endswith("/"))
        info = "-".join(path.name.split("-")[:2]) + ".dist-info"
        return Wheel(
            path=path,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            members=members,
            metadata=parser.parsebytes(archive.read(f"{info}/METADATA")),
            tags=tuple(parser.parsebytes(archive.read(f"{info}/WHEEL")).get_all("Tag", [])),
            libraries=tuple(
                read_library(name, archive.read(name))
                for name in members
                if archive.read(name)[:4] == b"\x7fELF"
            ),
            modules={name: archive.read(name).decode() for name in members if name.endswith(".py")},
        )


def read_library(name: str, content: bytes) -> Library:
    """Read the dynamic section of a shared library."""
    elf = ELFFile(io.BytesIO(content))
    sections = list(elf.iter_sections())
    # Any: which attributes a tag has depends on its kind.
    tags: list[Any] = [
        tag for s in sections if isinstance(s, DynamicSection) for tag in s.iter_tags()
    ]
    dynsym = [
        symbol
        for section in sections
        if isinstance(section, SymbolTableSection) and section.name == ".dynsym"
        for symbol in section.iter_symbols()
        if symbol.name and symbol["st_info"]["bind"] != "STB_LOCAL"
    ]
    versions = [
        version.name
        for section in sections
        if isinstance(section, GNUVerNeedSection)
        for _, auxiliaries in section.iter_versions()
        for version in auxiliaries
    ]
    glibc = [
        tuple(map(int, name.removeprefix("GLIBC_").split(".")))
        for name in versions
        if re.fullmatch(r"GLIBC_[\d.]+", name)
    ]
    flags = {tag.entry.d_tag: tag.entry.d_val for tag in tags}
    return Library(
        name=name,
        needed=tuple(tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"),
        run_paths=tuple(
            tag.rpath if tag.entry.d_tag == "DT_RPATH" else tag.runpath
            for tag in tags
            if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")
        ),
        exported=tuple(
            symbol.name
            for symbol in dynsym
            if symbol["st_shndx"] != "SHN_UNDEF"
            and symbol["st_other"]["visibility"] in ("STV_DEFAULT", "STV_PROTECTED")
        ),
        required=tuple(
            symbol.name
            for symbol in dynsym
            if symbol["st_shndx"] == "SHN_UNDEF" and symbol["st_info"]["bind"] != "STB_WEAK"
        ),
        glibc=max(glibc, default=(0,)),
        # DF_BIND_NOW, DF_1_NOW
        binds_now="DT_BIND_NOW" in flags
        or bool(flags.get("DT_FLAGS", 0) & 0x8)
        or bool(flags.get("DT_FLAGS_1", 0) & 0x1),
    )


def dotted(version: tuple[int, ...]) -> str:
    """Write a version as 2.34."""
    return ".".join(map(str, version))


def tag_complaints(wheel: Wheel) -> Iterator[str]:
    """A wheel serves every Python 3, and every platform or manylinux up to the limit."""
    for tag in wheel.tags:
        if not tag.startswith("py3-none-"):
            yield f"tag {tag} is not py3-none-*"
    if bool(wheel.libraries) == wheel.is_pure:
        yield f"{len(wheel.libraries)} libraries under the platform tag {wheel.platform}"
    if not wheel.is_pure:
        manylinux = re.match(r"manylinux_(\d+)_(\d+)_", wheel.platform)
        if not manylinux:
            yield f"platform tag {wheel.platform} is not manylinux_*"
        elif tuple(map(int, manylinux.groups())) > GLIBC_LIMIT:
            yield f"platform tag {wheel.platform} is above glibc {dotted(GLIBC_LIMIT)}"


def size_complaints(wheel: Wheel) -> Iterator[str]:
    """A wheel stays small."""
    if wheel.size_mb > SIZE_LIMIT_MB:
        yield f"{wheel.size_mb:.1f} MB is above {SIZE_LIMIT_MB} MB"


def metadata_complaints(wheel: Wheel) -> Iterator[str]:
    """A wheel names its licence and, when it has libraries, the torch that these need."""
    if wheel.metadata["License-Expression"] != "Apache-2.0":
        yield f"License-Expression is {wheel.metadata['License-Expression']}, not Apache-2.0"
    if not any("/licenses/" in name for name in wheel.members):
        yield "no licence file in dist-info"
    required = wheel.metadata.get_all("Requires-Dist", [])
    wanted = [TORCH_REQUIREMENT] if wheel.libraries else []
    if required != wanted:
        yield f"requires {required}, not {wanted}"


def content_complaints(wheel: Wheel) -> Iterator[str]:
    """A wheel has one package and its metadata; with libraries, one library and no sources."""
    info = f"{wheel.package}-{wheel.version}.dist-info"
    top_level = {PurePosixPath(name).parts[0] for name in wheel.members}
    if top_level != {wheel.package, info}:
        yield f"top level is {sorted(top_level)}, not {[wheel.package, info]}"
    if f"{wheel.package}/py.typed" not in wheel.members:
        yield "no py.typed"
    for name in wheel.members:
        path = PurePosixPath(name)
        if "tests" in path.parts or (wheel.libraries and path.suffix in SOURCE_SUFFIXES):
            yield f"{name} does not belong in a wheel"
    expected = [f"{wheel.package}/_{wheel.package}.so"] if wheel.libraries else []
    if [library.name for library in wheel.libraries] != expected:
        yield f"libraries are {[library.name for library in wheel.libraries]}, not {expected}"


def linkage_complaints(wheel: Wheel) -> Iterator[str]:
    """A library needs libtorch.so and the system, from anywhere, and binds when it is loaded."""
    for library in wheel.libraries:
        if TORCH_LIBRARY not in library.needed:
            yield f"{library.name} does not need {TORCH_LIBRARY}"
        for needed in sorted(set(library.needed) - SYSTEM_LIBRARIES - {TORCH_LIBRARY}):
            yield f"{library.name} needs {needed}"
        for path in library.run_paths:
            yield f"{library.name} has the run path {path}"
        if library.glibc > GLIBC_LIMIT:
            yield f"{library.name} needs glibc {dotted(library.glibc)}"
        if not library.binds_now:
            yield f"{library.name} is not linked with -z now"


def symbol_complaints(wheel: Wheel) -> Iterator[str]:
    """A library exports nothing of its own, and loads under a torch without CUDA."""
    for library in wheel.libraries:
        for symbol in library.exported:
            if symbol not in LINKER_SYMBOLS and not STANDARD_LIBRARY_SYMBOL.match(symbol):
                yield f"{library.name} exports {symbol}"
        for symbol in library.required:
            if CUDA_BUILD_SYMBOL.match(symbol):
                yield f"{library.name} needs {symbol}, which a CPU build of torch lacks: not weak"
            if CUDA_LIBRARY_SYMBOL.match(symbol):
                yield f"{library.name} needs {symbol}, of a CUDA library that is not linked"


def version_complaints(wheel: Wheel) -> Iterator[str]:
    """A package knows its version, also where it has no metadata, as vendored or frozen."""
    wanted = f'__version__ = "{wheel.version}"'
    name = f"{wheel.package}/__init__.py"
    if wanted not in wheel.modules[name].splitlines():
        yield f"{name} lacks the line {wanted}"


def import_complaints(wheel: Wheel) -> Iterator[str]:
    """A package needs torch alone: not NumPy, which torch does not bring.

    torch's collectives of objects need it.
    """
    for name, text in wheel.modules.items():
        for node in ast.walk(ast.parse(text)):
            imported = [
                alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")
            ]
            if isinstance(node, ast.ImportFrom):
                imported.append(node.module or "")
            if any(module.split(".")[0] == "numpy" for module in imported if module):
                yield f"{name} imports numpy"
            called = node.attr if isinstance(node, ast.Attribute) else ""
            for collective in {called, *imported}:
                if OBJECT_COLLECTIVE.fullmatch(collective):
                    yield f"{name} uses {collective}, which needs numpy"


def factory_complaints(wheel: Wheel) -> Iterator[str]:
    """No tensor depends on the process's default device and dtype, which belong to the caller."""
    for name, text in wheel.modules.items():
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call):
                continue
            function = ast.unparse(node.func)
            missing = {"device", "dtype"} - {keyword.arg for keyword in node.keywords}
            if FACTORY.fullmatch(function) and missing:
                lacks = " and ".join(sorted(missing))
                yield f"{name}:{node.lineno} calls {function} without {lacks}"


RULES: tuple[Callable[[Wheel], Iterator[str]], ...] = (
    tag_complaints,
    size_complaints,
    metadata_complaints,
    content_complaints,
    linkage_complaints,
    symbol_complaints,
    version_complaints,
    import_complaints,
    factory_complaints,
)
