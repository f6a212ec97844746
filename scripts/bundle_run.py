"""Tests and measures the wheels beside this file. Needs torch, pytest, numpy and pip, no network.

Usage: run.py tests|bench|sanitize [PACKAGE...] [-- ARGUMENT...]

tests     runs the packages' tests; arguments go to pytest
bench     runs the packages' benchmarks, each of which writes JSON to a folder of the package's name
          in --output; arguments go to them
sanitize  runs the packages' compute-sanitizer tests; arguments go to pytest
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

BUNDLE = Path(__file__).resolve().parent


def parse_arguments(argv: list[str], available: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the parsed arguments and those after `--`."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["tests", "bench", "sanitize"])
    parser.add_argument(
        "packages", nargs="*", default=[], metavar="PACKAGE", help=", ".join(available)
    )
    parser.add_argument(
        "--output", type=Path, default=Path("results"), help="where bench writes its JSON"
    )
    arguments = parser.parse_args(argv[:split])
    unknown = sorted(set(arguments.packages) - set(available))
    if unknown:
        parser.error(f"no package {', '.join(unknown)} here; there are {', '.join(available)}")
    return arguments, argv[split + 1 :]


def install(target: Path) -> None:
    """Install every wheel of the bundle into `target`, and nothing that they require."""
    wheels = sorted((BUNDLE / "wheels").glob("*.whl"))
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"),
            *("--disable-pip-version-check", f"--target={target}", *map(str, wheels)),
        ],
        check=True,
    )


def count_passed(record: Path) -> int:
    """Return how many tests of a JUnit record ran and did not fail."""
    cases = ElementTree.parse(record).iter("testcase")
    return sum(1 for case in cases if all(child.tag == "properties" for child in case))


def main() -> int:
    """Run one command for the packages; return 1 when any of it fails, else 0."""
    available = sorted(path.name for path in (BUNDLE / "packages").iterdir())
    arguments, rest = parse_arguments(sys.argv[1:], available)
    packages = arguments.packages or available
    output = arguments.output.resolve()

    with tempfile.TemporaryDirectory(prefix="stable-kernels-") as target:
        install(Path(target))
        environ = {**os.environ, "PYTHONPATH": target}

        def run(*command: str | Path) -> int:
            print("+", *command, flush=True)
            return subprocess.run(command, cwd=BUNDLE, env=environ, check=False).returncode

        if arguments.command == "bench":
            scripts = {p: BUNDLE / "packages" / p / "benchmarks" / "bench.py" for p in packages}
            scripts = {p: script for p, script in scripts.items() if script.exists()}
            if not scripts:
                print(f"no benchmarks in {', '.join(packages)}", file=sys.stderr)
                return 1
            # Results of two packages on the same GPUs have the same name.
            codes = [
                run(sys.executable, script, "--output", output / package, *rest)
                for package, script in scripts.items()
            ]
        else:
            record = Path(target) / "tests.xml"
            sanitize = arguments.command == "sanitize"
            options = ["-m", "sanitizer", f"--junitxml={record}"] if sanitize else []
            tests = [f"packages/{package}/tests" for package in packages]
            codes = [run(sys.executable, "-m", "pytest", *options, *rest, *tests)]
            if sanitize and not any(codes) and count_passed(record) == 0:
                print("no test ran under compute-sanitizer", file=sys.stderr)
                codes.append(1)
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
