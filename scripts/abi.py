"""Prints what the wheels ask of torch, the system and the GPU; fails when one breaks a rule.

Usage: abi.py --min-torch VERSION [--tested FILE] WHEEL...

Needs torch-abi-audit, pyelftools, nvidia-cuda-cuobjdump and nm.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch_abi_audit
from wheel_audit import RULES, Wheel, dotted, read_wheel

# A cubin of each of these architectures is in every kernel wheel, with or without the suffix a.
REQUIRED_ARCHITECTURES = ("sm_90", "sm_100")


@dataclass(frozen=True)
class Audit:
    """What the libraries of one wheel hold, all taken together."""

    unstable_symbols: int
    min_torch: str
    """The oldest torch that has every function used, or "-" when no library uses torch."""
    architectures: tuple[str, ...]
    """Those with a cubin, and those with PTX as sm_120+PTX."""
    complaints: tuple[str, ...]


def cuobjdump() -> Path:
    """Return cuobjdump of the nvidia-cuda-cuobjdump wheel."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else None
    for root in roots or []:
        for path in Path(root).glob("*/bin/cuobjdump"):
            return path
    raise FileNotFoundError("cuobjdump; install nvidia-cuda-cuobjdump")


def architectures(library: Path) -> tuple[str, ...]:
    """Return the architectures whose code a library holds, oldest first."""
    listing = subprocess.run(
        [cuobjdump(), "--list-elf", "--list-ptx", library],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = set(re.findall(r"\.(sm_\w+)\.(cubin|ptx)", listing))
    names = {f"{arch}+PTX" if kind == "ptx" else arch for arch, kind in found}
    plain = {name for name in names if f"{name}+PTX" not in names}
    return tuple(sorted(plain, key=lambda name: (int(re.findall(r"\d+", name)[0]), name)))


def audit(wheel: Wheel, min_torch: str) -> Audit:
    """Audit one wheel; `min_torch` is the torch version that its libraries must load under."""
    complaints = [complaint for rule in RULES for complaint in rule(wheel)]
    unstable = 0
    needed_torch = "-"
    found: tuple[str, ...] = ()
    with tempfile.TemporaryDirectory() as directory:
        with zipfile.ZipFile(wheel.path) as archive:
            archive.extractall(directory)
        for library in wheel.libraries:
            path = Path(directory, library.name)
            report = torch_abi_audit.inspect_extension(path)
            if report.error:
                complaints.append(f"{library.name}: {report.error}")
            verdict = report.torch
            unstable += len(verdict.unstable_symbols)
            needed_torch = verdict.min_torch_version or needed_torch
            complaints += [f"{library.name} uses {name}" for name in verdict.unstable_symbols]
            complaints += [
                f"{library.name} uses {name}, of a torch newer than torch-abi-audit knows"
                for name in verdict.unknown_shim_symbols
            ]
            if not verdict.stable:
                complaints.append(f"{library.name} is not a library on torch's stable ABI")
            if verdict.min_torch_version != min_torch:
                complaints.append(
                    f"{library.name} needs torch {verdict.min_torch_version}, not {min_torch},"
                    f" for {', '.join(verdict.version_defining_symbols)}"
                )
            found += architectures(path)
    for required in REQUIRED_ARCHITECTURES:
        if wheel.libraries and not any(re.match(f"{required}(a|f)?(\\+|$)", a) for a in found):
            complaints.append(f"no cubin for {required}")
    return Audit(unstable, needed_torch, found, tuple(complaints))


def table(rows: list[tuple[str, ...]]) -> str:
    """Lay rows out in columns, a line under the first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def main() -> int:
    """Print the table and the complaints; return 1 when there are any, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--min-torch", required=True, help="the torch that libraries must ask for")
    parser.add_argument("--tested", type=Path, help="JSON: sha256 -> torch versions tested under")
    parser.add_argument("wheels", nargs="+", type=Path)
    arguments = parser.parse_args()
    has_record = arguments.tested is not None and arguments.tested.exists()
    tested = json.loads(arguments.tested.read_text()) if has_record else {}

    rows: list[tuple[str, ...]] = [
        (
            *("package", "version", "size", "unstable", "torch >=", "glibc >=", "platform"),
            *("architectures", "sha256", "passed under torch"),
        )
    ]
    failures = []
    for wheel in map(read_wheel, arguments.wheels):
        result = audit(wheel, arguments.min_torch)
        glibc = max((library.glibc for library in wheel.libraries), default=())
        rows.append(
            (
                wheel.package,
                wheel.version,
                f"{wheel.size_mb:.2f} MB",
                str(result.unstable_symbols),
                result.min_torch,
                dotted(glibc) or "-",
                wheel.platform,
                " ".join(result.architectures) or "-",
                wheel.sha256[:12],
                " ".join(tested.get(wheel.sha256, [])) or "-",
            )
        )
        failures += [f"{wheel.path.name}: {complaint}" for complaint in result.complaints]
    print(table(rows))
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
