"""What run.py of a bundle does with what the packages' scripts write."""

import sys
from pathlib import Path

import bundle_run
import pytest

BENCH = """
import sys
from pathlib import Path
output = Path(sys.argv[sys.argv.index("--output") + 1])
output.mkdir(parents=True)
(output / "gpu_x2.json").write_text(Path(__file__).parts[-3])
"""


def test_no_benchmark_overwrites_the_results_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = ("one", "two")
    for package in packages:
        script = tmp_path / "packages" / package / "benchmarks" / "bench.py"
        script.parent.mkdir(parents=True)
        script.write_text(BENCH)
    results = tmp_path / "results"
    monkeypatch.setattr(bundle_run, "BUNDLE", tmp_path)
    monkeypatch.setattr(bundle_run, "install", lambda target: None)
    monkeypatch.setattr(sys, "argv", ["run.py", "bench", "--output", str(results)])
    assert bundle_run.main() == 0
    assert [(results / p / "gpu_x2.json").read_text() for p in packages] == list(packages)
