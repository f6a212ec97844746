"""What scripts/report.py and each package's benchmarks/report.py have in common."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
