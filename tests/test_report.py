"""The measured tables and plots are those that the committed results give."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bench_ranks import result_name
from bench_timing import summarize

ROOT = Path(__file__).resolve().parents[1]
MLA = Path("packages", "deepseek_mla")
AR = Path("packages", "custom_ar")
RMS = Path("packages", "minimax_rms")


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


def load_bench(package: Path) -> Iterator[ModuleType]:
    """Yield a package's benchmarks/bench.py, for a fixture."""
    spec = importlib.util.spec_from_file_location(
        f"{package.name}_bench", ROOT / package / "benchmarks" / "bench.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def bench():
    yield from load_bench(MLA)


@pytest.fixture(scope="module")
def ar_bench():
    yield from load_bench(AR)


@pytest.fixture(scope="module")
def rms_bench():
    yield from load_bench(RMS)


def markers(package: Path) -> str:
    return f"<!-- report:begin {package.name} -->\n<!-- report:end {package.name} -->\n"


def make_tree(root: Path, package: Path, results: dict[str, Any]) -> Path:
    """Make a repository with the results of one package, not yet drawn."""
    benchmarks = root / package / "benchmarks"
    (benchmarks / "results").mkdir(parents=True)
    for name, result in results.items():
        result["library_sha256"] = "0123456789abcdef" * 4
        (benchmarks / "results" / name).write_text(json.dumps(result))
    for name in ("references.json", "report.py"):
        shutil.copy(ROOT / package / "benchmarks" / name, benchmarks)
    (root / "scripts").mkdir()
    for name in ("report.py", "report_parts.py"):
        shutil.copy(ROOT / "scripts" / name, root / "scripts")
    for readme in (root / "README.md", root / package / "README.md"):
        readme.write_text(f"before\n{markers(package)}after\n")
    return root


@pytest.fixture
def tree(bench, tmp_path: Path) -> Path:
    """A repository with one made-up result of deepseek_mla."""
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
    return make_tree(tmp_path, MLA, {"made-up_gpu.json": result})


def made_up_all_reduces(bench: ModuleType, world_size: int) -> dict[str, Any]:
    """A result of custom_ar's: 2.5 µs and 1.15 of the floor of a 400 GB/s link."""
    records = []
    for case in bench.all_cases():
        us = 2.5 + 1.15 * bench.link_bytes(case.bytes, world_size) / 400e3
        timing = summarize([us] * 3)
        peers = {
            bench.NCCL: summarize([3 * us]),
            bench.ONE_SHOT: "not in place" if case.in_place else summarize([2 * us]),
            bench.TWO_SHOT: summarize([1.25 * us]),
        }
        records.append(bench.case_record(case, world_size, timing, peers, 400.0))
    copy = summarize([bench.CEILING_COPY_BYTES / 400e3])
    host = {"Communicator.all_reduce(x)": summarize([9.0, 10.0, 11.0])}
    environment = {"gpu": "Made-up GPU", "driver": "1.2", "torch": "2.11.0", "cpu": "CPU"}
    environment |= {"world_size": world_size, "nccl": "2.28.9"}
    kernels = {"push": copy, "pull": copy} if world_size == 2 else None
    ceilings = bench.ceilings_record(copy, copy, summarize([1.4]), kernels)
    return bench.report_record(environment, ceilings, records, host)


def with_goals(root: Path, package: str, goals: list[float]) -> Path:
    """Aim at these in the runs that have goals first, whatever is aimed at today."""
    path = root / package / "benchmarks" / "references.json"
    references = json.loads(path.read_text())
    first = references["goals"][0]
    first["us"] = dict(zip(first["us"], goals, strict=True))
    path.write_text(json.dumps(references))
    return root


@pytest.fixture
def ar_tree(ar_bench, tmp_path: Path) -> Path:
    """A repository with made-up results of custom_ar: on 2 GPUs, and on 3, which have no goals."""
    results = {
        result_name("Made-up GPU", size): made_up_all_reduces(ar_bench, size) for size in (2, 3)
    }
    goals = [2.7, 2.8, 3.3, 3.6, 6.0, 8.7, 14.8, 27, 97]
    return with_goals(make_tree(tmp_path, AR, results), AR, goals)


def made_up_norms(bench: ModuleType, gpu: str, ranks: int) -> dict[str, Any]:
    """A result of minimax_rms's: 2.5 µs and 1.1 of the floor of memory that moves 4 TB/s."""
    records = []
    for case in bench.all_cases(ranks):
        us = 2.5 + 1.1 * case.bytes / 4e6
        peers = {bench.NCCL: summarize([10 * us])}
        if bench.has_compiled_peer(case):
            peers[bench.COMPILED] = "no compiler" if case.tokens == 16 else summarize([8 * us])
        timing, copy = summarize([us] * 3), summarize([0.75 * us])
        records.append(bench.case_record(case, timing, copy, peers, 4.0))
    copy = summarize([2 * bench.CEILING_COPY_BYTES / 4e6])
    host = {"Workspace.allreduce_rms_qk": summarize([9.0, 10.0, 11.0])}
    environment = {"gpu": gpu, "driver": "1.2", "torch": "2.11.0", "cpu": "CPU"}
    environment |= {"world_size": ranks, "nccl": "2.28.9"}
    ceilings = bench.ceilings_record(copy, summarize([1.4]))
    return bench.report_record(environment, ceilings, records, host)


@pytest.fixture
def rms_tree(rms_bench, tmp_path: Path) -> Path:
    """A repository with made-up results of minimax_rms; only those of two H200s have goals."""
    results = {
        result_name(gpu, ranks): made_up_norms(rms_bench, gpu, ranks)
        for gpu, ranks in (("Made-up GPU", 2), ("NVIDIA H200", 2), ("NVIDIA H200", 8))
    }
    return with_goals(make_tree(tmp_path, RMS, results), RMS, [2.9, 2.9, 3.2, 4.2, 8.8, 31])


def test_report_is_fresh():
    result = report(ROOT, "--check")
    assert result.returncode == 0, f"{result.stdout}{result.stderr}"


def test_check_finds_what_is_not_drawn(tree: Path):
    result = report(tree, "--check")
    assert result.returncode == 1
    assert "made-up_gpu.svg is not what the results give" in result.stdout
    assert f"{MLA}/README.md is not what the results give" in result.stdout
    assert (tree / "README.md").read_text() == f"before\n{markers(MLA)}after\n"


def test_drawn_report_is_fresh_until_something_changes(tree: Path):
    pytest.importorskip("matplotlib", reason="drawing a plot needs matplotlib")
    drawn = report(tree)
    assert drawn.returncode == 0, drawn.stderr
    assert report(tree, "--check").returncode == 0
    text = (tree / MLA / "README.md").read_text()
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

    svg = tree / MLA / "benchmarks" / "results" / "made-up_gpu.svg"
    edited = {
        tree / "README.md": ("2.49", "2.59"),
        tree / MLA / "README.md": ("| 173 |", "| 172 |"),
        tree / MLA / "benchmarks" / "references.json": ("2.49", "2.59"),
        svg: ("sha256 ", "sha256 0"),
        tree / MLA / "benchmarks" / "report.py": ("s-C0", "s-C1"),
        tree / "scripts" / "report.py": ("markersize=4", "markersize=5"),
        tree / "scripts" / "report_parts.py": ("'met' if", "'fine' if"),
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


def test_each_world_size_has_its_section(ar_tree: Path):
    pytest.importorskip("matplotlib", reason="drawing a plot needs matplotlib")
    drawn = report(ar_tree)
    assert drawn.returncode == 0, drawn.stderr
    assert report(ar_tree, "--check").returncode == 0
    plots = sorted(path.name for path in (ar_tree / AR / "benchmarks" / "results").glob("*.svg"))
    assert plots == ["made-up_gpu_x2.svg", "made-up_gpu_x3.svg"]

    for readme in (ar_tree / AR / "README.md", ar_tree / "README.md"):
        of_2, of_3 = readme.read_text().split("3 × Made-up GPU")
        for text, plot in zip((of_2, of_3), plots, strict=True):
            assert f"benchmarks/results/{plot})" in text
            assert "custom_ar 0.1.0 (library sha256 0123456789ab)" in " ".join(text.split())
        # 32 MiB over 400 GB/s, 1.15 of that and 2.5 µs; two of three GPUs send 4/3 of it.
        row = next(line for line in of_2.splitlines() if line.startswith("| 32 MiB "))
        assert "| 83.9 (0.85) | 297 (3.00×) | 198 (2.00×) | 124 (1.25×) |" in row
        assert row.endswith("| 127 (1.28×) | 97, missed |")
        assert "8 of 9 goals are met. The closest of all peers is symm_mem two-shot at" in of_2
        assert "| 112 (0.85) |" in of_3
        assert "goal" not in of_3
        assert "elsewhere: vLLM" not in of_3.split("**Host time")[0]

    detail = (ar_tree / AR / "README.md").read_text()
    assert "| 4 KiB | 2.51 | 2.51 to 2.51 | 0.01 (0.00) |" in detail
    assert "| 4.76 | 5.6 | 6.1 | 7.4 | 4.76 (1.90×) | 2.7, met |" in detail
    assert "symm_mem one-shot with bfloat16, in place (not in place)." in " ".join(detail.split())
    assert "| Communicator.all_reduce(x) | 10.00 | 9.00 |" in detail


def test_norms_are_drawn_with_goals_and_references(rms_tree: Path):
    pytest.importorskip("matplotlib", reason="drawing a plot needs matplotlib")
    drawn = report(rms_tree)
    assert drawn.returncode == 0, drawn.stderr
    assert report(rms_tree, "--check").returncode == 0
    plots = sorted(path.name for path in (rms_tree / RMS / "benchmarks" / "results").glob("*.svg"))
    assert plots == ["made-up_gpu_x2.svg", "nvidia_h200_x2.svg", "nvidia_h200_x8.svg"]

    for readme in (rms_tree / RMS / "README.md", rms_tree / "README.md"):
        parts = re.split(r"[28] × NVIDIA H200, driver", readme.read_text())
        for text, plot in zip(parts, plots, strict=True):
            assert f"benchmarks/results/{plot})" in text
            assert "minimax_rms 0.1.0 (library sha256 0123456789ab)" in " ".join(text.split())
        other, of_2, of_8 = parts
        assert "q and k of 3072 + 512 elements on each" in of_2
        # 8192 rows of 3584 elements in and out at 4 TB/s, 1.1 of that and 2.5 µs.
        row = next(line for line in of_2.splitlines() if line.startswith("| 8192 "))
        assert "| 29.4 (0.84) |" in row
        assert row.endswith("| 348 (10.00×) | 278 (8.00×) | 57 (1.64×) | 31, missed |")
        assert "| 16 | 2.56 |" in of_2
        # Nothing where there was no compiler.
        assert "| 25.6 (10.00×) |  | 5.13 (2.00×) | 2.9, met |" in of_2
        assert "3 of 6 goals are met. The closest of all peers is vLLM (elsewhere) at 2048" in of_2
        assert "q and k of 768 + 128 elements on each" in of_8
        for text in (other, of_8):
            assert "goal" not in text
            assert "lsewhere" not in text
            assert "All is from this run." in " ".join(text.split())

    detail = (rms_tree / RMS / "README.md").read_text()
    flat = " ".join(detail.split())
    assert "NCCL + PyTorch, compiled with bfloat16, q and k, 16 tokens (no compiler)." in flat
    assert "| bfloat16, one tensor of 3072 | minimax_rms | 2.50 | 2.93 | 9.42 |" in detail
    assert "| float32, q and k | minimax_rms |  | 3.51 | 18.6 |" in detail
    assert "|  | copy |  | 2.63 (0.75×) | 14.0 (0.75×) |" in detail
    assert "| Workspace.allreduce_rms_qk | 10.00 | 9.00 |" in detail


def test_a_package_needs_nothing_but_its_own_report(tree: Path):
    pytest.importorskip("matplotlib", reason="drawing a plot needs matplotlib")
    other = tree / "packages" / "other"
    (other / "benchmarks" / "results").mkdir(parents=True)
    (other / "benchmarks" / "results" / "gpu.json").write_text('{"us": 2.5}')
    (other / "benchmarks" / "results" / "tuning_gpu.json").write_text("[]")
    (other / "README.md").write_text(markers(other))
    with (tree / "README.md").open("a") as readme:
        readme.write(markers(other))
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


def test_a_pass_calls_every_set_of_messages_alike(ar_bench):
    for case in ar_bench.all_cases() + ar_bench.all_cases(quick=True):
        sets = case.sets
        assert sets >= 2
        assert ar_bench.CALLS_PER_GRAPH % sets == 0
        assert case.calls % sets == 0
        assert case.calls % ar_bench.CALLS_PER_GRAPH == 0
        assert case.bytes <= ar_bench.MAX_SIZE


@pytest.mark.parametrize("ranks", range(1, 17))
def test_a_pass_calls_every_set_of_rows_alike(rms_bench, ranks: int):
    for case in rms_bench.all_cases(ranks) + rms_bench.all_cases(ranks, quick=True):
        assert case.sets >= 2
        assert rms_bench.CALLS_PER_GRAPH % case.sets == 0
        assert case.calls % rms_bench.CALLS_PER_GRAPH == 0
        assert 1 <= case.tokens <= rms_bench.MAX_TOKENS
        # What the operators take: widths of whole vectors.
        itemsize = rms_bench.torch_dtype(case.dtype).itemsize
        assert all(width > 0 and width * itemsize % 16 == 0 for width in case.widths)


def test_bytes_that_are_normalized(rms_bench):
    assert rms_bench.Case(rms_bench.QK, 3, "bfloat16", 2).bytes == 3 * 2 * (6144 + 1024)
    assert rms_bench.Case(rms_bench.QK, 1, "bfloat16", 4).row_width == (6144 + 2 * 1024) // 4
    assert rms_bench.Case(rms_bench.SINGLE, 3, "float32", 4).bytes == 3 * 2 * 6144


def test_bytes_that_a_rank_sends(ar_bench):
    assert ar_bench.link_bytes(1000, 2) == 1000
    assert ar_bench.link_bytes(1000, 4) == 1500
