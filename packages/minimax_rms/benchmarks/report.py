"""Draws what bench.py measured; scripts/report.py loads this and writes the READMEs and the SVG."""

from __future__ import annotations

import json
from pathlib import Path

from report_parts import (
    FLOOR_STYLE,
    Columns,
    Json,
    Plot,
    Series,
    SeriesReport,
    floor_cell,
    latency_plot,
    measured_on,
    microseconds,
    peer_columns,
    prose,
    range_cell,
    timing_cell,
    tokens_name,
    us_cell,
)

# What others measured, and our goals.
REFERENCES = Path(__file__).with_name("references.json")

# What is drawn of the floor, which is next to nothing for a few tokens.
LEAST_FLOOR_US = 0.5


class Report(SeriesReport):
    """Tables and plot of one run of bench.py; see PackageReport in scripts/report_parts.py."""

    size_key = "tokens"
    columns_note = (
        "Medians in µs of the slowest rank. In brackets: under “HBM floor”, the floor over our "
        "time; else, the other's time over ours. The floor is q and k read and written once at "
        "the bandwidth of a large copy; “copy” moves as many bytes and exchanges nothing."
    )
    others_title = "Other formats, and one tensor alone"
    host_title = "1 token"

    def __init__(self, result: Json) -> None:
        references: Json = json.loads(REFERENCES.read_text())
        self.world_size = int(result["world_size"])
        self.op = str(references["op"])
        self.dtype = str(references["dtype"])
        self.image = f"Latency against tokens on {self.world_size} GPUs"
        super().__init__(result, references)

    def scope(self, case: Json) -> Json | None:
        """The GPUs and how many, of other formats and of one tensor none."""
        is_main = (case["op"], case["dtype"]) == (self.op, self.dtype)
        return {"gpu": self.result["gpu"], "world_size": self.world_size} if is_main else None

    def kind(self, case: Json) -> str:
        """`float16, q and k`, or `bfloat16, one tensor of 3072`."""
        widths = case["widths"]
        return f"{case['dtype']}, {'q and k' if len(widths) > 1 else f'one tensor of {widths[0]}'}"

    def name_in_notes(self, case: Json) -> str:
        """`float16, q and k, 16 tokens`: a peer may be missing at some sizes only."""
        return f"{self.kind(case)}, {tokens_name(case['tokens'])}"

    def size_name(self, size: int) -> str:
        """`16 tokens`."""
        return tokens_name(size)

    def intro(self) -> str:
        """What was measured on what, and what a device can do."""
        ceilings = self.result["ceilings"]
        return prose(
            f"{measured_on(self.result)} In the same run a copy on each device moved "
            f"{ceilings['copy_tb_per_s']:.2f} TB/s, read and written, and the shortest node of a "
            f"graph took {microseconds(ceilings['node_us'])} µs."
        )

    def title(self, series: Series) -> str:
        """The heading of the main table."""
        widths = " + ".join(map(str, series.cases[0]["widths"]))
        return (
            f"**QK norm of MiniMax-M2 on {self.world_size} GPUs**, {self.dtype}, q and k of "
            f"{widths} elements on each, in CUDA graphs"
        )

    def columns(self, series: Series, *, is_summary: bool) -> Columns:
        """Times beside the memory's, the peers' and others'."""
        columns: Columns = {"tokens": lambda case: str(case["tokens"]), "µs": us_cell}
        if not is_summary:
            columns["min to max"] = range_cell
        columns["HBM floor"] = floor_cell
        columns |= self.other_columns() | peer_columns(series.cases)
        columns |= series.figure_columns(with_ratio=True)
        return columns | series.goal_columns()

    def other_columns(self) -> Columns:
        """The copy of as many bytes."""
        return {"copy": lambda case: timing_cell(case["copy"])}

    def plot(self) -> Plot:
        """Latency against tokens, of all that was measured here and elsewhere."""
        [main] = self.series

        def floor_us(case: Json) -> float | None:
            # Further down it says nothing, and would take most of the axis.
            return case["floor_us"] if case["floor_us"] >= LEAST_FLOOR_US else None

        lines = [
            *main.lines(self.package),
            main.line("copy of q and k", ".:C7", lambda case: case["copy"]["us"]),
            main.line("HBM floor", FLOOR_STYLE, floor_us),
        ]
        return latency_plot(
            f"MiniMax-M2 QK norm, {self.dtype}, {self.world_size} × {self.result['gpu']}",
            "tokens",
            lines,
        )
