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


# A package's benchmarks/report.py, as short as can be.
OTHER_REPORT = """
from report_parts import Line, Plot

class Report:
    def __init__(self, result):
        self.us = result["us"]

    def detail(self, plot_path):
        return f"in detail {self.us} {plot_path}"

    def summary(self, plot_path):
        return f"in short {self.us} {plot_path}"

    def plot(self):
        return Plot("title", "x", "y", (Line("line", "o-", ((1, self.us), (2, self.us))),))
"""


def report(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # -B: bytecode would hide an edit within one second. -S: checking needs nothing but Python.
    options = ["-B", "-E", "-s", *(["-S"] if "--check" in arguments else [])]
    return subprocess.run(
        [sys.executable, *options, root / "scripts" / "report.py", *arguments],
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
    result["library_sha256"] = "0123456789abcdef" * 4
    benchmarks = tmp_path / PACKAGE / "benchmarks"
    (benchmarks / "results").mkdir(parents=True)
    (benchmarks / "results" / "made-up_gpu.json").write_text(json.dumps(result))
    for name in ("references.json", "report.py"):
        shutil.copy(ROOT / PACKAGE / "benchmarks" / name, benchmarks)
    (tmp_path / "scripts").mkdir()
    for name in ("report.py", "report_parts.py"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
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
    for readme in (text, (tree / "README.md").read_text()):
        assert "deepseek_mla 0.1.0 (library sha256 0123456789ab)" in " ".join(readme.split())
        # Each by its least: 1024 * (1024 * (heads + padded) + 1880) bytes at 4.2 TB/s, over ours.
        assert "| 16 heads padded to 64 | 0.890 | 1024 | missed |" in readme
        assert "| 64 heads | 0.912 | 1024 | met |" in readme
        assert "| 128 heads | 0.932 | 1024 | met |" in readme
    assert "| function | 510.00 | 500.00 | below 10, missed |" in text
    assert "| torch.add(a, b, out=c) | 510.00 | 500.00 | none |" in text

    svg = tree / PACKAGE / "benchmarks" / "results" / "made-up_gpu.svg"
    edited = {
        tree / "README.md": ("2.49", "2.59"),
        tree / PACKAGE / "README.md": ("| 173 |", "| 172 |"),
        tree / PACKAGE / "benchmarks" / "references.json": ("2.49", "2.59"),
        svg: ("sha256 ", "sha256 0"),
        tree / PACKAGE / "benchmarks" / "report.py": ("s-C0", "s-C1"),
        tree / "scripts" / "report.py": ("markersize=4", "markersize=5"),
        svg.with_suffix(".json"): ('"tokens": 8192', '"tokens": 8193'),
    }
    for path, (old, new) in edited.items():
        original = path.read_text()
        assert old in original
        path.write_text(original.replace(old, new))
        assert report(tree, "--check").returncode == 1, f"{path} changed unnoticed"
        path.write_text(original)

    svg_bytes = svg.read_bytes()
    last = svg_bytes.rindex(b"<!-- report")
    edited_svgs = {
        "a colour": svg_bytes.replace(b"#ffffff", b"#fffffe", 1),
        "a line appended": svg_bytes + b"<!-- -->\n",
        "no digest": svg_bytes[:last],
        "nothing but the digest": svg_bytes[last:],
        "nothing": b"",
    }
    for what, content in edited_svgs.items():
        assert content != svg_bytes
        svg.write_bytes(content)
        assert report(tree, "--check").returncode == 1, f"{what} went unnoticed"
    svg.unlink()
    report(tree)
    assert svg.read_bytes() == svg_bytes


def test_a_package_needs_nothing_but_its_own_report(tree: Path):
    pytest.importorskip("matplotlib", reason="drawing a plot needs matplotlib")
    other = tree / "packages" / "other"
    (other / "benchmarks" / "results").mkdir(parents=True)
    (other / "benchmarks" / "results" / "gpu.json").write_text('{"us": 2.5}')
    (other / "benchmarks" / "results" / "tuning_gpu.json").write_text("[]")
    markers = MARKERS.replace("deepseek_mla", "other")
    (other / "README.md").write_text(markers)
    with (tree / "README.md").open("a") as readme:
        readme.write(markers)
    missing = report(tree, "--check")
    assert missing.returncode != 0
    assert "packages/other/benchmarks/report.py is missing" in missing.stderr

    (other / "benchmarks" / "report.py").write_text(OTHER_REPORT)
    drawn = report(tree)
    assert drawn.returncode == 0, drawn.stderr
    plot = "benchmarks/results/gpu.svg"
    assert f"-->\nin detail 2.5 {plot}\n<!--" in (other / "README.md").read_text()
    assert f"-->\nin short 2.5 packages/other/{plot}\n<!--" in (tree / "README.md").read_text()
    assert (other / plot).exists()
    assert report(tree, "--check").returncode == 0


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
