"""What scripts/report.py and the packages' benchmarks/report.py have in common."""

from __future__ import annotations

import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

Json = dict[str, Any]

# A table's columns: what a heading's column says of a case, one of `cases` of a result.
Columns = dict[str, Callable[[Json], str]]

OUR_STYLE = "o-C3"
PEER_STYLES = ("s-C0", "D-C9", "v-C2", "P-C5")
FIGURE_STYLES = ("^:C4", "<:C6", ">:C1", "x:C8")
FLOOR_STYLE = "--k"


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


class PackageReport(Protocol):
    """What packages/<name>/benchmarks/report.py provides as its class `Report`.

    It is made of one run: the parsed JSON of a file in benchmarks/results/. Markdown comes without
    a blank line at either end, and shows the plot at `plot_path`, relative to the README it is for.
    """

    def detail(self, plot_path: str) -> str:
        """Return the Markdown for the package's README."""

    def summary(self, plot_path: str) -> str:
        """Return the Markdown for the root's README."""

    def plot(self) -> Plot:
        """Return the plot."""


@dataclass(frozen=True)
class Series:
    """Cases that differ in size alone, and what is known of these sizes beside the run."""

    # Where a case has its size.
    size_key: str
    cases: Sequence[Json]
    # Microseconds that were measured elsewhere, by name and size, and that are aimed at, by size.
    figures: Mapping[str, Mapping[int, float]]
    goals: Mapping[int, float]

    def size(self, case: Json) -> int:
        """The size of a case."""
        return int(case[self.size_key])

    def with_goals(self) -> list[Json]:
        """The cases that have a goal."""
        return [case for case in self.cases if self.size(case) in self.goals]

    def best_figure(self, case: Json) -> float | None:
        """The least microseconds that were measured elsewhere at the size of a case."""
        size = self.size(case)
        return min((us[size] for us in self.figures.values() if size in us), default=None)

    def figure_columns(self, prefix: str = "elsewhere: ", *, with_ratio: bool = False) -> Columns:
        """Figures from elsewhere as they were given, maybe over our time; nothing without one."""

        def cell(figure: Mapping[int, float], case: Json) -> str:
            us = figure.get(self.size(case))
            return figure_cell(us, case) if with_ratio else "" if us is None else f"{us:g}"

        return {f"{prefix}{name}": partial(cell, figure) for name, figure in self.figures.items()}

    def goal_columns(self) -> Columns:
        """The goals and whether they are met, if there are any."""

        def cell(case: Json) -> str:
            us = self.goals.get(self.size(case))
            return f"{us:g}, {'met' if case['us'] <= us else 'missed'}" if us else ""

        return {"goal": cell} if self.goals else {}

    def line(self, label: str, style: str, us: Callable[[Json], float | None]) -> Line:
        """Microseconds against size, where there are any."""
        points = ((self.size(case), us(case)) for case in self.cases)
        return Line(label, style, tuple((x, y) for x, y in points if y is not None))

    def lines(self, label: str) -> list[Line]:
        """Our times, which `label` names, the peers' and the figures from elsewhere."""
        lines = [self.line(label, OUR_STYLE, lambda case: case["us"])]
        for name, style in zip(peer_names(self.cases), PEER_STYLES, strict=False):
            lines.append(self.line(name, style, partial(peer_us, name)))
        for (name, figure), style in zip(self.figures.items(), FIGURE_STYLES, strict=False):
            lines.append(Line(f"{name} (elsewhere)", style, tuple(sorted(figure.items()))))
        return lines


class SeriesReport(ABC):
    """A report of series, such as one of each shape, and of other cases in a table of their own.

    `result` has `cases`, each with `us`, `peers` and `peer_notes`, and `left_out`, `host`, `cpu`,
    `method` and what `measured_on` needs. `references` has `figures`, each a `name` with `us` by
    size, their `source`, `goals` with `us` by size, and maybe `host_us` by name; what else a figure
    or a goal has is its scope.
    """

    # Where a case has its size.
    size_key: str
    # What the plot shows, what the columns mean, what the other cases are, and what calls the host
    # was timed with.
    image: str
    columns_note: str
    others_title: str
    host_title: str

    def __init__(self, result: Json, references: Json) -> None:
        self.result = result
        self.references = references
        self.package = str(result["package"])
        # The other cases by what they are and by size.
        self.others: dict[str, dict[int, Json]] = {}
        series: dict[tuple[tuple[str, Any], ...], list[Json]] = {}
        for case in sorted(result["cases"], key=lambda case: int(case[self.size_key])):
            scope = self.scope(case)
            if scope is None:
                self.others.setdefault(self.kind(case), {})[case[self.size_key]] = case
            else:
                series.setdefault(tuple(scope.items()), []).append(case)
        self.series = [self._make_series(cases, dict(scope)) for scope, cases in series.items()]

    def _make_series(self, cases: Sequence[Json], scope: Json) -> Series:
        """Join cases with the figures and goals of their scope, which may have none."""

        def matches(entry: Json) -> bool:
            return all(entry[key] == value for key, value in scope.items())

        figures = filter(matches, self.references["figures"])
        goals = filter(matches, self.references["goals"])
        return Series(
            self.size_key,
            cases,
            {figure["name"]: by_size(figure["us"]) for figure in figures},
            {size: us for goal in goals for size, us in by_size(goal["us"]).items()},
        )

    @abstractmethod
    def scope(self, case: Json) -> Json | None:
        """What all cases of its series share, as `references` has it; None for the other cases."""

    @abstractmethod
    def kind(self, case: Json) -> str:
        """What a case is, but for its size."""

    @abstractmethod
    def size_name(self, size: int) -> str:
        """A size with its unit."""

    @abstractmethod
    def intro(self) -> str:
        """What was measured on what, and what that can do at best."""

    @abstractmethod
    def title(self, series: Series) -> str:
        """The heading of a table."""

    @abstractmethod
    def columns(self, series: Series, *, is_summary: bool) -> Columns:
        """The columns of a table; fewer in a summary."""

    @abstractmethod
    def plot(self) -> Plot:
        """Return the plot."""

    def name_in_notes(self, case: Json) -> str:
        """What of a case says which peers it lacks."""
        return self.kind(case)

    def other_columns(self) -> Columns:
        """What the table of the other cases has between our times and the peers'."""
        return {}

    def detail(self, plot_path: str) -> str:
        """Return all figures, for the package's README."""
        parts = [
            self.intro(),
            f"![{self.image}]({plot_path})",
            *self._tables(is_summary=False),
            self._legend(),
        ]
        if self.others:
            parts += [f"**{self.others_title}**: µs", self._others_table()]
        parts += [
            self._missing(),
            f"**Host time of a call** from Python, {self.host_title}, {self.result['cpu']}",
            self._host_table(),
            prose(f"Method: {self.result['method']}"),
        ]
        return "\n\n".join(filter(None, parts))

    def summary(self, plot_path: str) -> str:
        """Return the sizes that have goals, for the root's README."""
        parts = [
            self.intro(),
            *self._tables(is_summary=True),
            self._legend(),
            f"![{self.image}]({plot_path})",
        ]
        return "\n\n".join(filter(None, parts))

    def _tables(self, *, is_summary: bool) -> list[str]:
        """Each series: all sizes, or only those that have goals, if any has."""
        parts = []
        for series in self.series:
            cases = (series.with_goals() if is_summary else []) or series.cases
            columns = self.columns(series, is_summary=is_summary)
            parts += [self.title(series), case_table(columns, cases), self._verdict(series)]
        return parts

    def _verdict(self, series: Series) -> str:
        """How many goals are met, and the least by which peers are slower."""
        sentences = []
        if with_goals := series.with_goals():
            met = sum(case["us"] <= series.goals[series.size(case)] for case in with_goals)
            sentences.append(f"{met} of {len(with_goals)} goals are met.")
        ratios = [
            (peer["ratio"], name, series.size(case))
            for case in series.cases
            for name, peer in case["peers"].items()
            if peer
        ]
        ratios += [
            (figure[series.size(case)] / case["us"], f"{name} (elsewhere)", series.size(case))
            for name, figure in series.figures.items()
            for case in series.cases
            if series.size(case) in figure
        ]
        if ratios:
            ratio, name, size = min(ratios)
            # A digit more than elsewhere, so that what just misses does not look equal.
            sentences.append(
                f"The closest of all peers is {name} at {self.size_name(size)}: {ratio:.3f} times "
                "our time."
            )
        return prose(" ".join(sentences))

    def _legend(self) -> str:
        """What the columns mean and where figures come from."""
        text = f"{self.columns_note} All is from this run"
        if any(series.figures for series in self.series):
            text += f" but for “elsewhere”. “Elsewhere”: {self.references['source']}"
        else:
            text += "."
        return prose(text)

    def _others_table(self) -> str:
        """The other cases, a column for each size."""
        sizes = sorted({size for cases in self.others.values() for size in cases})
        rows = []
        for kind, cases in self.others.items():
            present = [cases.get(size) for size in sizes]
            columns = {self.package: us_cell, **self.other_columns()}
            first = kind
            for name, cell in (columns | peer_columns(cases.values())).items():
                cells = [cell(case) if case else "" for case in present]
                if any(cells):
                    rows.append([first, name, *cells])
                    first = ""
        return table(["kind", "", *map(self.size_name, sizes)], rows)

    def _missing(self) -> str:
        """Peers that the run lacks, and why."""
        missing = [f"{name} ({reason})" for name, reason in self.result["left_out"].items()]
        for case in self.result["cases"]:
            for name, reason in case["peer_notes"].items():
                missing.append(f"{name} with {self.name_in_notes(case)} ({reason})")
        if not missing:
            return ""
        return prose(f"Not measured in this run: {'; '.join(dict.fromkeys(missing))}.")

    def _host_table(self) -> str:
        """The host's time of each way to call, here and elsewhere."""
        rows = [
            [name, f"{timing['us']:.2f}", f"{timing['us_min']:.2f}"]
            for name, timing in self.result["host"].items()
        ]
        elsewhere = self.references.get("host_us", {})
        rows += [[f"elsewhere: {name}", f"{us:g}", ""] for name, us in elsewhere.items()]
        return table(["call", "median µs", "min µs"], rows)


def latency_plot(title: str, x_label: str, lines: Iterable[Line]) -> Plot:
    """A plot of the time of a call, without lines that have no point."""
    shown = tuple(line for line in lines if line.points)
    return Plot(title, x_label, "µs a call, in a CUDA graph", shown)


def measured_on(result: Json) -> str:
    """A sentence that says what was measured, on what and when."""
    gpus = f"{result['world_size']} × " if "world_size" in result else ""
    nccl = f"NCCL {result['nccl']}, " if "nccl" in result else ""
    return (
        f"{gpus}{result['gpu']}, driver {result['driver']}, torch {result['torch']}, {nccl}"
        f"{result['package']} {result['version']} (library sha256 "
        f"{result['library_sha256'][:12]}), {result['date'][:10]}."
    )


def by_size(figures: Json) -> dict[int, float]:
    """JSON's keys are strings."""
    return {int(size): us for size, us in figures.items()}


def peer_names(cases: Iterable[Json]) -> list[str]:
    """The peers that any of the cases has, each once."""
    return list(dict.fromkeys(name for case in cases for name in case["peers"]))


def peer_us(name: str, case: Json) -> float | None:
    """Microseconds of a peer, if it was measured."""
    peer = case["peers"].get(name)
    return peer["us"] if peer else None


def case_table(columns: Columns, cases: Iterable[Json]) -> str:
    """Return a Markdown table with a row for each case."""
    return table(list(columns), [[cell(case) for cell in columns.values()] for case in cases])


def peer_columns(cases: Iterable[Json]) -> Columns:
    """A column for each peer of the cases."""
    return {name: partial(peer_cell, name) for name in peer_names(cases)}


def us_cell(case: Json) -> str:
    """Our time."""
    return microseconds(case["us"])


def range_cell(case: Json) -> str:
    """`12.1 to 12.5`: our least and greatest time."""
    return f"{microseconds(case['us_min'])} to {microseconds(case['us_max'])}"


def floor_cell(case: Json) -> str:
    """`12.3 (0.95)`: the floor, and over our time."""
    return f"{microseconds(case['floor_us'])} ({case['floor_ratio']:.2f})"


def timing_cell(timing: Json) -> str:
    """`12.3 (1.05×)`: another's time, and over ours."""
    return f"{microseconds(timing['us'])} ({timing['ratio']:.2f}×)"


def peer_cell(name: str, case: Json) -> str:
    """A peer's time, and over ours; nothing where it was not measured."""
    peer = case["peers"].get(name)
    return timing_cell(peer) if peer else ""


def figure_cell(us: float | None, case: Json) -> str:
    """A time from elsewhere as it was given, and over ours; nothing where there is none."""
    return f"{us:g} ({us / case['us']:.2f}×)" if us else ""


def tokens_name(count: int) -> str:
    """`1 token`, `16 tokens`."""
    return f"{count} token{'s' if count > 1 else ''}"


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
