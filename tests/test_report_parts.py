"""A report of several series, of shapes on one GPU, comes out of the parts that all share."""

import pytest
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
    peer_columns,
    us_cell,
)


class ShapesReport(SeriesReport):
    """Matrix products on one GPU: a series for each shape, and one shape that is no main case."""

    size_key = "rows"
    image = "Latency against rows"
    columns_note = "Medians in µs."
    others_title = "Other shapes"
    host_title = "one row"

    def scope(self, case: Json) -> Json | None:
        shape = {key: case[key] for key in ("experts", "width")}
        return shape if case["experts"] > 1 else None

    def kind(self, case: Json) -> str:
        return f"{case['experts']} × {case['width']}"

    def size_name(self, size: int) -> str:
        return f"{size} rows"

    def intro(self) -> str:
        return measured_on(self.result)

    def title(self, series: Series) -> str:
        return f"**{self.kind(series.cases[0])}**"

    def columns(self, series: Series, *, is_summary: bool) -> Columns:
        columns = {"rows": lambda case: str(case["rows"]), "µs": us_cell}
        if not is_summary:
            columns["floor"] = floor_cell
        columns |= peer_columns(series.cases) | series.figure_columns(with_ratio=True)
        return columns | series.goal_columns()

    def plot(self) -> Plot:
        lines = [line for series in self.series for line in series.lines(self.title(series))]
        floor = self.series[0].line("floor", FLOOR_STYLE, lambda case: case["floor_us"])
        return latency_plot("Products", "rows", [*lines, floor])


@pytest.fixture
def report() -> ShapesReport:
    cases = []
    for experts, width in ((8, 64), (4, 32), (1, 32)):
        for rows in (128, 16):
            us = 2.0 * rows
            case: Json = {"experts": experts, "width": width, "rows": rows, "us": us}
            case |= {"floor_us": us / 2, "floor_ratio": 0.5}
            case |= {"peers": {"slow": {"us": us * 2.5, "ratio": 2.5}}, "peer_notes": {}}
            if rows == 16:
                case |= {"peers": {"slow": None}, "peer_notes": {"slow": "too few rows"}}
            cases.append(case)
    result = {"gpu": "Made-up GPU", "driver": "1.2", "torch": "2.11.0", "cpu": "CPU"}
    result |= {"package": "shapes", "version": "0.1.0", "library_sha256": "0123456789abcdef" * 4}
    result |= {"date": "2026-01-02T03:04:05Z", "method": "none.", "left_out": {}, "cases": cases}
    result |= {"host": {"shapes.product": {"us": 10.0, "us_min": 9.0}}}
    references = {
        "source": "Another machine.",
        "figures": [{"name": "other", "experts": 4, "width": 32, "us": {"128": 320}}],
        "goals": [{"experts": 8, "width": 64, "us": {"16": 31, "128": 256}}],
        "host_us": {"other": 12},
    }
    return ShapesReport(result, references)


def test_each_shape_has_its_table(report: ShapesReport):
    assert report.detail("plot.svg").split("\n\n") == [
        "Made-up GPU, driver 1.2, torch 2.11.0, shapes 0.1.0 (library sha256 0123456789ab), "
        "2026-01-02.",
        "![Latency against rows](plot.svg)",
        "**8 × 64**",
        "| rows | µs | floor | slow | goal |\n"
        "| --- | --: | --: | --: | --: |\n"
        "| 16 | 32.0 | 16.0 (0.50) |  | 31, missed |\n"
        "| 128 | 256 | 128 (0.50) | 640 (2.50×) | 256, met |",
        "1 of 2 goals are met. The closest of all peers is slow at 128 rows: 2.500 times our time.",
        "**4 × 32**",
        "| rows | µs | floor | slow | elsewhere: other |\n"
        "| --- | --: | --: | --: | --: |\n"
        "| 16 | 32.0 | 16.0 (0.50) |  |  |\n"
        "| 128 | 256 | 128 (0.50) | 640 (2.50×) | 320 (1.25×) |",
        "The closest of all peers is other (elsewhere) at 128 rows: 1.250 times our time.",
        "Medians in µs. All is from this run but for “elsewhere”. “Elsewhere”: Another machine.",
        "**Other shapes**: µs",
        "| kind |  | 16 rows | 128 rows |\n"
        "| --- | --: | --: | --: |\n"
        "| 1 × 32 | shapes | 32.0 | 256 |\n"
        "|  | slow |  | 640 (2.50×) |",
        "Not measured in this run: slow with 8 × 64 (too few rows); slow with 4 × 32 (too few "
        "rows); slow\nwith 1 × 32 (too few rows).",
        "**Host time of a call** from Python, one row, CPU",
        "| call | median µs | min µs |\n"
        "| --- | --: | --: |\n"
        "| shapes.product | 10.00 | 9.00 |\n"
        "| elsewhere: other | 12 |  |",
        "Method: none.",
    ]


def test_a_summary_has_the_sizes_with_goals(report: ShapesReport):
    del report.series[0].goals[16]
    summary = report.summary("plot.svg")
    of_8, of_4 = summary.split("**4 × 32**")
    assert "| 128 | 256 | 640 (2.50×) | 256, met |" in of_8
    assert "| 16 |" not in of_8
    # All where no size has one.
    assert "| 16 | 32.0 |  |  |" in of_4
    assert summary.endswith("![Latency against rows](plot.svg)")


def test_a_plot_has_what_was_measured(report: ShapesReport):
    plot = report.plot()
    assert [(line.label, line.points) for line in plot.lines] == [
        ("**8 × 64**", ((16, 32.0), (128, 256.0))),
        ("slow", ((128, 640.0),)),
        ("**4 × 32**", ((16, 32.0), (128, 256.0))),
        ("slow", ((128, 640.0),)),
        ("other (elsewhere)", ((128, 320),)),
        ("floor", ((16, 16.0), (128, 128.0))),
    ]
