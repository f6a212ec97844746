"""Draws what bench.py measured; scripts/report.py loads this and writes the READMEs and the SVG."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from report_parts import (
    FLOOR_STYLE,
    OUR_STYLE,
    Columns,
    Json,
    Line,
    Plot,
    Series,
    by_size,
    case_table,
    latency_plot,
    measured_on,
    microseconds,
    peer_cell,
    peer_us,
    prose,
    range_cell,
    table,
    tokens_name,
    us_cell,
)

# What others measured, and our goals.
REFERENCES = Path(__file__).with_name("references.json")

IMAGE = "![Latency against tokens]({})"

CACHE_NAMES = {
    "v4": "V4 records",
    "v4.1": "V4.1 records",
    "bfloat16": "bfloat16",
    "float8_e4m3fn": "FP8",
}


class Report:
    """Tables and plot of one run of bench.py; see PackageReport in scripts/report_parts.py."""

    def __init__(self, result: Json) -> None:
        references: Json = json.loads(REFERENCES.read_text())
        self.result = result
        self.vllm: Json = references["vllm"]
        self.goals: Json = references["goals"]
        self.goal_us = by_size(self.goals["us"])
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

    def detail(self, plot_path: str) -> str:
        """Return all figures, for the package's README."""
        parts = [self.intro(), IMAGE.format(plot_path), self.legend()]
        for heads in sorted(self.by_heads):
            parts += [self.heads_title(heads), self.main_table(heads)]
        parts += [
            *self.bandwidth_goal(),
            "**Other operators and formats**: µs (of copy bandwidth)",
            self.others_table(),
            f"**Host time of a call** from Python, one token of 64 heads, {self.result['cpu']}",
            self.host_table(),
            prose(f"Method: {self.result['method']}"),
        ]
        return "\n\n".join(parts)

    def summary(self, plot_path: str) -> str:
        """Return the figures that have goals, for the root's README."""
        host = self.result["host"]["function"]
        parts = [
            self.intro(),
            self.heads_title(self.goal_heads),
            self.main_table(self.goal_heads, is_summary=True),
            self.legend(),
            *self.bandwidth_goal(),
            prose(
                f"A call from Python takes {host['us']:.1f} µs of the host's time, "
                f"{host['us_min']:.1f} µs at the least; goal: {self.host_goal(host)}."
            ),
            IMAGE.format(plot_path),
        ]
        return "\n\n".join(parts)

    def intro(self) -> str:
        """What was measured on what, and what the device can do."""
        ceilings = self.result["ceilings"]
        return prose(
            f"{measured_on(self.result)} In the same run a device copy read and wrote "
            f"{ceilings['copy_tb_per_s']:.2f} TB/s, and the shortest node of a graph, a copy of "
            f"{ceilings['node_copy_bytes'] / 2**11:g} KiB, took "
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
        return f"**`{self.vllm['op']}`**, {heads_name(heads)}, {self.vllm['dtype']}, V4 records"

    def series(self, heads: tuple[int, int]) -> Series:
        """Cases of the main operator, with vLLM's figures by version."""
        figures = {
            f"vLLM {figure['version']}": by_size(figure["us"])
            for figure in self.vllm["figures"]
            if (figure["heads"], figure["heads_padded"]) == heads
        }
        goals = self.goal_us if heads == self.goal_heads else {}
        return Series("tokens", self.by_heads.get(heads, []), figures, goals)

    def main_table(self, heads: tuple[int, int], *, is_summary: bool = False) -> str:
        """All sizes, or fewer columns and only the sizes that have goals."""
        series = self.series(heads)
        cases = series.with_goals() if is_summary else series.cases
        columns: Columns = {"tokens": lambda case: str(case["tokens"]), "µs": us_cell}
        if not is_summary:
            columns["min to max"] = range_cell
            columns["TB/s"] = lambda case: f"{case['tb_per_s']:.2f}"
        columns["of copy bandwidth"] = lambda case: f"{case['floor_ratio']:.2f}"
        columns["plain copy"] = partial(peer_cell, "copy")
        if any(case["peers"].get("compiled") for case in cases):
            columns["torch.compile"] = partial(peer_cell, "compiled")
        columns |= series.figure_columns(prefix="")

        def vllm_ratio(case: Json) -> str:
            us = series.best_figure(case)
            return f"{us / case['us']:.2f}×" if us else ""

        columns["best vLLM over ours"] = vllm_ratio
        return case_table(columns | series.goal_columns(), cases)

    def bandwidth_goal(self) -> list[str]:
        """Whether large calls reach the part of copy bandwidth that they should."""
        goal = self.goals["floor_ratio"]
        rows = []
        for heads, cases in sorted(self.by_heads.items()):
            large = [case for case in cases if case["tokens"] >= goal["from_tokens"]]
            if large:
                worst = min(large, key=lambda case: float(case["floor_ratio"]))
                verdict = "met" if worst["floor_ratio"] >= goal["at_least"] else "missed"
                # A digit more than elsewhere, so that what just misses does not look met.
                ratio = f"{worst['floor_ratio']:.3f}"
                rows.append([heads_name(heads), ratio, str(worst["tokens"]), verdict])
        if not rows:
            return []
        title = prose(
            f"**Goal at {goal['from_tokens']} tokens and above**: {goal['at_least']:.2f} of copy "
            f"bandwidth, for the operator above with {self.vllm['dtype']} and V4 records"
        )
        return [title, table(["heads", "the least", "at tokens", "goal"], rows)]

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
        return table(["operator", "input and cache", *map(tokens_name, tokens)], rows)

    def host_table(self) -> str:
        """The host's time of each way to call, and of one of torch's own operators."""
        rows = [
            [
                name,
                f"{timing['us']:.2f}",
                f"{timing['us_min']:.2f}",
                "none" if name.startswith("torch.add") else self.host_goal(timing),
            ]
            for name, timing in self.result["host"].items()
        ]
        return table(["call", "median µs", "min µs", "goal of the median"], rows)

    def host_goal(self, timing: Json) -> str:
        """The goal of the host's time, and whether the median meets it."""
        verdict = "met" if timing["us"] < self.goals["host_us"] else "missed"
        return f"below {self.goals['host_us']:g}, {verdict}"

    def plot(self) -> Plot:
        """Latency against tokens at the heads that have goals."""
        series = self.series(self.goal_heads)
        lines = [series.line("deepseek_mla", OUR_STYLE, lambda case: case["us"])]
        styles = ("s-C0", "D-C9", "v-C4", "P-C5")
        for (version, figure), style in zip(series.figures.items(), styles, strict=False):
            lines.append(Line(version, style, tuple(sorted(figure.items()))))
        lines += [
            series.line("torch.compile", "^-C2", partial(peer_us, "compiled")),
            series.line("plain copy of Q", ".:C7", partial(peer_us, "copy")),
            series.line("bytes at copy bandwidth", FLOOR_STYLE, lambda case: case["floor_us"]),
        ]
        title = f"Fused insert, {self.goal_heads[0]} heads, {self.vllm['dtype']}"
        return latency_plot(f"{title}, {self.result['gpu']}", "tokens", lines)


def heads_name(heads: tuple[int, int]) -> str:
    """`64 heads`, or `16 heads padded to 64`."""
    padded = f" padded to {heads[1]}" if heads[0] != heads[1] else ""
    return f"{heads[0]} heads{padded}"
