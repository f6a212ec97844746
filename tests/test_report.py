"""The measured tables and plots are those that the committed results give."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path("packages", "deepseek_mla")
MARKERS = "<!-- report:begin deepseek_mla -->\n<!-- report:end deepseek_mla -->\n"


def report(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", root / "scripts" / "report.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def bench():
    path = ROOT / PACKAGE / "benchmarks" / "bench.py"
    spec = importlib.util.spec_from_file_location("deepseek_mla_bench", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def tree(bench, tmp_path: Path) -> Path:
    """A repository with one made-up result, not yet drawn."""
    copy = bench.summarize([510.0, 500.0, 520.0])
    records = []
    for case in bench.all_cases():
        timing = bench.summarize([1.5 + case.bytes / 4e6] * 3)
        peers = {"copy": timing}
        if bench.has_compiled_peer(case):
            peers["compiled"] = timing
        records.append(bench.case_record(case, timing, peers, 4.2))
    environment = {"gpu": "Made-up GPU", "driver": "1.2", "torch": "2.11.0", "cpu": "CPU"}
    host = dict.fromkeys(("function", "torch.ops", "torch.add(a, b, out=c)"), copy)
    result = bench.report_record(
        environment, bench.ceilings_record(copy, copy), records, host, None
    )
    benchmarks = tmp_path / PACKAGE / "benchmarks"
    (benchmarks / "results").mkdir(parents=True)
    (benchmarks / "results" / "made-up_gpu.json").write_text(json.dumps(result))
    shutil.copy(ROOT / PACKAGE / "benchmarks" / "references.json", benchmarks)
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "report.py", tmp_path / "scripts")
    for readme in (tmp_path / "README.md", tmp_path / PACKAGE / "README.md"):
        readme.write_text(f"before\n{MARKERS}after\n")
    return tmp_path


def test_report_is_fresh():
    result = report(ROOT, "--check")
    assert result.returncode == 0, f"{result.stdout}{result.stderr}"


def test_check_finds_what_is_not_drawn(tree: Path):
    result = report(tree, "--check")
    assert result.returncode == 1
    assert "made-up_gpu.svg is not what the results give" in result.stdout
    assert f"{PACKAGE}/README.md is not what the results give" in result.stdout
    assert (tree / "README.md").read_text() == f"before\n{MARKERS}after\n"


def test_drawn_report_is_fresh_until_something_changes(tree: Path):
    pytest.importorskip("matplotlib", reason="drawing a plot needs matplotlib")
    drawn = report(tree)
    assert drawn.returncode == 0, drawn.stderr
    assert report(tree, "--check").returncode == 0
    text = (tree / PACKAGE / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    # 8192 tokens of 16 heads padded to 64: 8192 * 83800 bytes at 4 TB/s and 1.5 µs.
    assert "| 8192 | 173 |" in text
    assert "| 191.5 | 1.11× |" in text

    svg = tree / PACKAGE / "benchmarks" / "results" / "made-up_gpu.svg"
    edited = {
        tree / "README.md": ("2.49", "2.59"),
        tree / PACKAGE / "README.md": ("| 173 |", "| 172 |"),
        tree / PACKAGE / "benchmarks" / "references.json": ("2.49", "2.59"),
        svg: ("sha256 ", "sha256 0"),
        svg.with_suffix(".json"): ('"tokens": 8192', '"tokens": 8193'),
    }
    for path, (old, new) in edited.items():
        original = path.read_text()
        assert old in original
        path.write_text(original.replace(old, new))
        assert report(tree, "--check").returncode == 1, f"{path} changed unnoticed"
        path.write_text(original)
    svg_bytes = svg.read_bytes()
    svg.unlink()
    report(tree)
    assert svg.read_bytes() == svg_bytes


def test_missing_markers_are_an_error(tree: Path):
    (tree / "README.md").write_text("no markers\n")
    result = report(tree, "--check")
    assert result.returncode != 0
    assert "expected <!-- report:begin deepseek_mla -->" in result.stderr


def test_bytes_of_the_main_operator(bench):
    # 16 heads padded to 64: Q in and out, the KV row, the V4 record, cosines, slot and position.
    case = bench.Case(bench.QUANT_INSERT, 3, 16, 64)
    assert case.bytes == 3 * (1024 * 16 + 1024 * 64 + 1024 + 584 + 272)
    assert bench.Case(bench.FULL_FP8_INSERT, 1, 64, 64, cache="float8_e4m3fn").bytes == (
        64 * 1024 + 64 * 512 + 1024 + 512 + 272
    )


def test_a_pass_rotates_through_more_than_the_l2(bench):
    for case in bench.all_cases():
        sets, calls = bench.rotation(case.bytes)
        assert 2 <= sets <= calls <= bench.MAX_CALLS
        assert calls % bench.CALLS_PER_GRAPH == 0
        assert sets * case.bytes >= bench.ROTATION_BYTES or sets == bench.MAX_CALLS
