"""Draws what bench.py measured; scripts/report.py loads this and writes the READMEs and the SVG."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from report_parts import (
    FLOOR_STYLE,
    Columns,
    Json,
    Line,
    Plot,
    Series,
    SeriesReport,
    figure_cell,
    floor_cell,
    latency_plot,
    measured_on,
    microseconds,
    peer_columns,
    prose,
    range_cell,
    us_cell,
)

# What others measured, and our goals.
REFERENCES = Path(__file__).with_name("references.json")


class Report(SeriesReport):
    """Tables and plot of one run of bench.py; see PackageReport in scripts/report_parts.py."""

    size_key = "bytes"
    columns_note = (
        "Medians in µs of the slowest rank. In brackets: under “link floor”, the floor over our "
        "time; else, a peer's time over ours."
    )
    others_title = "Other formats and eager calls"
    host_title = "4 KiB"

    def __init__(self, result: Json) -> None:
        references: Json = json.loads(REFERENCES.read_text())
        self.world_size = int(result["world_size"])
        self.dtype = str(references["dtype"])
        self.image = f"Latency against message size on {self.world_size} GPUs"
        super().__init__(result, references)

    def scope(self, case: Json) -> Json | None:
        """The number of GPUs, of eager calls and other formats none."""
        is_main = case["dtype"] == self.dtype and not case["in_place"] and not case["eager"]
        return {"world_size": self.world_size} if is_main else None

    def kind(self, case: Json) -> str:
        """`bfloat16, in place`."""
        flags = (("in_place", "in place"), ("eager", "eager"))
        return ", ".join([case["dtype"], *(name for flag, name in flags if case[flag])])

    def size_name(self, size: int) -> str:
        """`256 KiB`."""
        return f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"

    def intro(self) -> str:
        """What was measured on what, and what the link and the device can do."""
        ceilings = self.result["ceilings"]
        kernels = ceilings["kernels"]
        by_kernels = (
            f"{kernels['push']['gb_per_s']:.0f} GB/s by kernels that store to a peer, "
            f"{kernels['pull']['gb_per_s']:.0f} GB/s by kernels that load from it, "
            if kernels
            else ""
        )
        return prose(
            f"{measured_on(self.result)} In the same run a copy to a peer moved "
            f"{ceilings['peer_copy_gb_per_s']:.0f} GB/s, "
            f"{ceilings['peer_copy_both_ways_gb_per_s']:.0f} GB/s while as much went the other "
            f"way, {by_kernels}and the shortest node of a graph took "
            f"{microseconds(ceilings['node_us'])} µs."
        )

    def title(self, series: Series) -> str:
        """The heading of the main table."""
        return f"**All-reduce on {self.world_size} GPUs**, {self.dtype}, in CUDA graphs"

    def columns(self, series: Series, *, is_summary: bool) -> Columns:
        """Times beside the link's, the peers' and others'; of the latter the best in a summary."""
        columns: Columns = {
            "message": lambda case: self.size_name(case["bytes"]),
            "µs": us_cell,
        }
        if not is_summary:
            columns["min to max"] = range_cell
        columns["link floor"] = floor_cell
        columns |= peer_columns(series.cases)
        if not is_summary:
            columns |= series.figure_columns()
        if series.figures:
            columns["best elsewhere"] = lambda case: figure_cell(series.best_figure(case), case)
        return columns | series.goal_columns()

    def plot(self) -> Plot:
        """Latency against message size, of all that was measured here and elsewhere."""
        [main] = self.series
        lines = [
            *main.lines(self.package),
            main.line("link floor", FLOOR_STYLE, lambda case: case["floor_us"]),
        ]
        return latency_plot(
            f"All-reduce, {self.dtype}, {self.world_size} × {self.result['gpu']}",
            "KiB of the message",
            map(in_kib, lines),
        )


def in_kib(line: Line) -> Line:
    """Return the line with KiB for bytes."""
    return replace(line, points=tuple((size / 1024, us) for size, us in line.points))
