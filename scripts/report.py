"""Draws the measured tables and plots from packages/*/benchmarks/results/*.json.

Usage: report.py [--check]

A package's figures go between the markers `<!-- report:begin PACKAGE -->` and
`<!-- report:end PACKAGE -->` of its README and of the root's, and into one SVG beside each JSON.
With --check nothing is written, and the exit status is 1 when something would be. Only drawing a
plot needs matplotlib: an SVG holds a digest of what it shows.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

Json = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One line of a plot; `style` is matplotlib's format string."""

    label: str
    style: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Plot:
    """A plot with two logarithmic axes."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]

    def digest(self) -> str:
        """Return what identifies the data and the code that draws it."""
        content = json.dumps(asdict(self)) + inspect.getsource(draw)
        return f"sha256 {hashlib.sha256(content.encode()).hexdigest()}"


@dataclass(frozen=True)
class Report:
    """What one JSON gives."""

    detail: str
    """Markdown for the package's README."""
    summary: str
    """Markdown for the root's README."""
    plot: Plot


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, numbers to the right but for the first column."""
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def prose(text: str) -> str:
    """Wrap a paragraph as the READMEs are."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def microseconds(us: float) -> str:
    """Return three digits, or all before the point."""
    return f"{us:.2f}" if us < 9.995 else f"{us:.1f}" if us < 99.95 else f"{us:.0f}"


def draw(plot: Plot, path: Path) -> None:
    """Write the plot as SVG; the same plot gives the same bytes under one matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullLocator

    with pyplot.rc_context({"svg.hashsalt": "report", "svg.fonttype": "path"}):
        figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
        for line in plot.lines:
            axes.plot(*zip(*line.points, strict=True), line.style, label=line.label, markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.set(title=plot.title, xlabel=plot.x_label, ylabel=plot.y_label)
        axes.grid(which="major", color="0.88")
        axes.legend(frameon=False)
        metadata = {"Date": None, "Creator": None, "Description": plot.digest()}
        figure.savefig(path, format="svg", metadata=metadata)
        pyplot.close(figure)


class MlaReport:
    """Draws what packages/deepseek_mla/benchmarks/bench.py measured."""

    def __init__(self, result: Json, references: Json) -> None:
        self.result = result
        self.vllm: Json = references["vllm"]
        self.goals: Json = references["goals"]
        self.goal_us = by_tokens(self.goals["us"])
        self.goal_heads = (self.goals["heads"], self.goals["heads_padded"])
        main = [self.vllm["op"], self.vllm["dtype"], self.vllm["cache"], False]
        # Cases of the main operator by heads, and the others by what they are; both by tokens.
        self.by_heads: dict[tuple[int, int], list[Json]] = {}
        self.others: dict[tuple[str, str, str, bool, int], dict[int, Json]] = {}
        for case in sorted(result["cases"], key=lambda case: int(case["tokens"])):
            kind = [case[name] for name in ("op", "dtype", "cache", "interleaved")]
            if kind == main:
                heads = (case["heads"], case["heads_padded"])
                self.by_heads.setdefault(heads, []).append(case)
            else:
                self.others.setdefault((*kind, case["heads"]), {})[case["tokens"]] = case

    def report(self, plot_path: str) -> Report:
        """Return texts and plot; `plot_path` is relative to the package's directory."""
        image = "![Latency against tokens]({})"
        detail = [self.intro(), image.format(plot_path), self.legend()]
        for heads in sorted(self.by_heads):
            detail += [self.heads_title(heads), self.main_table(heads)]
        detail += [
            *self.bandwidth_goal(),
            "**Other operators and formats**: µs (of copy bandwidth)",
            self.others_table(),
            f"**Host time of a call** from Python, one token of 64 heads, {self.result['cpu']}",
            self.host_table(),
            prose(f"Method: {self.result['method']}"),
        ]
        host_us = self.result["host"]["function"]["us"]
        summary = [
            self.intro(),
            self.heads_title(self.goal_heads),
            self.main_table(self.goal_heads, is_summary=True),
            self.legend(),
            f"A call from Python takes {host_us:.1f} µs of the host's time.",
            image.format(f"packages/deepseek_mla/{plot_path}"),
        ]
        return Report("\n\n".join(detail), "\n\n".join(summary), self.plot())

    def intro(self) -> str:
        """What was measured on what, and what the device can do."""
        result, ceilings = self.result, self.result["ceilings"]
        return prose(
            f"{result['gpu']}, driver {result['driver']}, torch {result['torch']}, deepseek_mla "
            f"{result['version']}, {result['date'][:10]}. In the same run a device copy read and "
            f"wrote {ceilings['copy_tb_per_s']:.2f} TB/s, and the shortest node of a graph, a copy "
            f"of {ceilings['node_copy_bytes'] / 2**11:g} KiB, took "
            f"{microseconds(ceilings['node_us'])} µs."
        )

    def legend(self) -> str:
        """What the columns mean and where figures come from."""
        note = self.result["compiled_note"]
        compiled = (
            f"there is no torch.compile peer ({note})"
            if note
            else "torch.compile runs the same operator written in PyTorch"
        )
        return prose(
            "Medians in µs. “Of copy bandwidth”: the time that the bytes moved take at the copy's "
            "rate, over ours. In brackets: a peer's time over ours, from the same run. The plain "
            f"copy moves as many bytes as Q alone; {compiled}. vLLM's figures: "
            f"{self.vllm['source']}"
        )

    def heads_title(self, heads: tuple[int, int]) -> str:
        """The heading of a table of the main operator."""
        padded = f" padded to {heads[1]}" if heads[0] != heads[1] else ""
        return (
            f"**`{self.vllm['op']}`**, {heads[0]} heads{padded}, {self.vllm['dtype']}, V4 records"
        )

    def vllm_figures(self, heads: tuple[int, int]) -> dict[str, dict[int, float]]:
        """vLLM's microseconds by version and tokens."""
        return {
            f"vLLM {figure['version']}": by_tokens(figure["us"])
            for figure in self.vllm["figures"]
            if (figure["heads"], figure["heads_padded"]) == heads
        }

    def main_table(self, heads: tuple[int, int], *, is_summary: bool = False) -> str:
        """All sizes, or fewer columns and only the sizes that have goals."""
        cases = self.by_heads.get(heads, [])
        figures = self.vllm_figures(heads)
        columns: dict[str, Callable[[Json], str]] = {
            "tokens": lambda case: str(case["tokens"]),
            "µs": lambda case: microseconds(case["us"]),
        }
        if is_summary:
            cases = [case for case in cases if case["tokens"] in self.goal_us]
        else:
            columns["min to max"] = lambda case: (
                f"{microseconds(case['us_min'])} to {microseconds(case['us_max'])}"
            )
            columns["TB/s"] = lambda case: f"{case['tb_per_s']:.2f}"
        columns["of copy bandwidth"] = lambda case: f"{case['floor_ratio']:.2f}"
        columns["plain copy"] = lambda case: peer_cell(case, "copy")
        if any(case["peers"].get("compiled") for case in cases):
            columns["torch.compile"] = lambda case: peer_cell(case, "compiled")
        for version, figure in figures.items():
            columns[version] = partial(reference_cell, figure)

        def vllm_ratio(case: Json) -> str:
            known = [us[case["tokens"]] for us in figures.values() if case["tokens"] in us]
            return f"{min(known) / case['us']:.2f}×" if known else ""

        def goal(case: Json) -> str:
            us = self.goal_us.get(case["tokens"])
            return f"{us:g}, {'met' if case['us'] <= us else 'missed'}" if us else ""

        columns["best vLLM over ours"] = vllm_ratio
        if heads == self.goal_heads:
            columns["goal"] = goal
        return table(list(columns), [[cell(case) for cell in columns.values()] for case in cases])

    def bandwidth_goal(self) -> list[str]:
        """Whether large calls reach the part of copy bandwidth that they should."""
        goal = self.goals["floor_ratio"]
        cases = self.by_heads.get(self.goal_heads, [])
        ratios = [c["floor_ratio"] for c in cases if c["tokens"] >= goal["from_tokens"]]
        if not ratios:
            return []
        verdict = "met" if min(ratios) >= goal["at_least"] else "missed"
        return [
            f"Goal of {self.goal_heads[0]} heads at {goal['from_tokens']} tokens and above: "
            f"{goal['at_least']:.2f} of copy bandwidth, {verdict}; the least is {min(ratios):.2f}."
        ]

    def others_table(self) -> str:
        """The other operators and formats, a column for each number of tokens."""
        tokens = sorted({count for cases in self.others.values() for count in cases})

        def cell(case: Json | None) -> str:
            return f"{microseconds(case['us'])} ({case['floor_ratio']:.2f})" if case else ""

        rows = [
            [
                f"`{op}`{', interleaved' if interleaved else ''}",
                f"{dtype}, {CACHE_NAMES[cache]}{f', {heads} heads' if heads else ''}",
                *(cell(cases.get(count)) for count in tokens),
            ]
            for (op, dtype, cache, interleaved, heads), cases in self.others.items()
        ]
        return table(
            ["operator", "input and cache", *(f"{n} token{'s'[: n > 1]}" for n in tokens)], rows
        )

    def host_table(self) -> str:
        """The host's time of each way to call, and of one of torch's own operators."""

        def goal(name: str, us: float) -> str:
            if name.startswith("torch.add"):
                return ""
            verdict = "met" if us < self.goals["host_us"] else "missed"
            return f"below {self.goals['host_us']}, {verdict}"

        rows = [
            [name, f"{timing['us']:.2f}", goal(name, timing["us"])]
            for name, timing in self.result["host"].items()
        ]
        return table(["call", "µs", "goal"], rows)

    def plot(self) -> Plot:
        """Latency against tokens at the heads that have goals."""
        cases = self.by_heads.get(self.goal_heads, [])

        def line(label: str, style: str, us: Callable[[Json], float | None]) -> Line:
            points = ((case["tokens"], us(case)) for case in cases)
            return Line(label, style, tuple((x, y) for x, y in points if y is not None))

        lines = [line("deepseek_mla", "o-C3", lambda case: case["us"])]
        styles = ("s-C0", "D-C9", "v-C4", "P-C5")
        figures = self.vllm_figures(self.goal_heads).items()
        for (version, figure), style in zip(figures, styles, strict=False):
            lines.append(Line(version, style, tuple(sorted(figure.items()))))
        lines += [
            line("torch.compile", "^-C2", lambda case: peer_us(case, "compiled")),
            line("plain copy of Q", ".:C7", lambda case: peer_us(case, "copy")),
            line("bytes at copy bandwidth", "--k", lambda case: case["floor_us"]),
        ]
        return Plot(
            title=f"Fused insert, {self.goal_heads[0]} heads, {self.vllm['dtype']}, "
            f"{self.result['gpu']}",
            x_label="tokens",
            y_label="µs a call, in a CUDA graph",
            lines=tuple(line for line in lines if line.points),
        )


def by_tokens(figures: Json) -> dict[int, float]:
    """JSON's keys are strings."""
    return {int(tokens): us for tokens, us in figures.items()}


def peer_us(case: Json, name: str) -> float | None:
    """Microseconds of a peer, if it was measured."""
    peer = case["peers"].get(name)
    return peer["us"] if peer else None


def peer_cell(case: Json, name: str) -> str:
    """`12.3 (1.05×)`: a peer's time, and over ours; nothing where it was not measured."""
    peer = case["peers"].get(name)
    return f"{microseconds(peer['us'])} ({peer['ratio']:.2f}×)" if peer else ""


def reference_cell(figure: dict[int, float], case: Json) -> str:
    """A figure from elsewhere as it was given; nothing where there is none."""
    return f"{figure[case['tokens']]:g}" if case["tokens"] in figure else ""


def mla_report(result: Json, references: Json, plot_path: str) -> Report:
    """Draw one run of deepseek_mla's benchmark."""
    return MlaReport(result, references).report(plot_path)


CACHE_NAMES = {
    "v4": "V4 records",
    "v4.1": "V4.1 records",
    "bfloat16": "bfloat16",
    "float8_e4m3fn": "FP8",
}

# By package: the JSON of a run, references.json, and the plot's path from the package's directory.
REPORTS: dict[str, Callable[[Json, Json, str], Report]] = {"deepseek_mla": mla_report}


def replace_section(text: str, package: str, content: str) -> str:
    """Return `text` with `content` between the package's markers.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    begin, end = (f"<!-- report:{edge} {package} -->" for edge in ("begin", "end"))
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin} and {end} once each")
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n{content and content + chr(10)}{end}{after}"


def update(check: bool) -> list[Path]:
    """Draw what is out of date, or only look; return the files that are."""
    stale = []
    root_readme = ROOT / "README.md"
    root_text = root_readme.read_text()
    measured = {path.parents[2].name for path in ROOT.glob("packages/*/benchmarks/results/*.json")}
    if unknown := measured - set(REPORTS):
        raise ValueError(f"nothing draws the results of {', '.join(sorted(unknown))}")
    for package, report in REPORTS.items():
        directory = ROOT / "packages" / package
        reports = []
        results = sorted((directory / "benchmarks" / "results").glob("*.json"))
        for path in (p for p in results if not p.name.startswith("tuning")):
            references = json.loads((directory / "benchmarks" / "references.json").read_text())
            plot_path = path.with_suffix(".svg")
            relative = plot_path.relative_to(directory).as_posix()
            drawn = report(json.loads(path.read_text()), references, relative)
            reports.append(drawn)
            if not plot_path.exists() or drawn.plot.digest() not in plot_path.read_text():
                stale.append(plot_path)
                if not check:
                    draw(drawn.plot, plot_path)

        root_text = replace_section(root_text, package, "\n\n".join(r.summary for r in reports))
        readme = directory / "README.md"
        text = readme.read_text()
        drawn_text = replace_section(text, package, "\n\n".join(r.detail for r in reports))
        if drawn_text != text:
            stale.append(readme)
            if not check:
                readme.write_text(drawn_text)
    if root_text != root_readme.read_text():
        stale.append(root_readme)
        if not check:
            root_readme.write_text(root_text)
    return stale


def main() -> int:
    """Draw, or check; return 1 when a check finds something out of date."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    check = parser.parse_args().check
    stale = update(check)
    for path in stale:
        relative = path.relative_to(ROOT)
        print(f"{relative} is not what the results give" if check else f"wrote {relative}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
