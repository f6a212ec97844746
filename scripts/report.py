"""Draws the measured tables and plots from packages/*/benchmarks/results/*.json.

Usage: report.py [--check]

A package with results provides benchmarks/report.py, whose class `Report` is made of the JSON of a
run and gives its texts and plot: see PackageReport in report_parts.py. They go between the markers
`<!-- report:begin PACKAGE -->` and `<!-- report:end PACKAGE -->` of its README and of the root's,
and into one SVG beside each JSON. results/tuning*.json and results/soak*.json are not drawn.

With --check nothing is written, and the exit status is 1 when something would be. Only drawing a
plot needs matplotlib: an SVG ends with a digest of what it shows and of itself.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import inspect
import io
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from report_parts import Json, PackageReport, Plot

ROOT = Path(__file__).resolve().parents[1]


def draw(plot: Plot) -> bytes:
    """Return the plot as SVG; the same plot gives the same bytes under one matplotlib."""
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
        svg = io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    return svg.getvalue()


def digest_line(plot: Plot, svg: bytes) -> bytes:
    """Return what ends the file: a digest of the data, of the code that draws it, and of `svg`."""
    content = json.dumps(asdict(plot)) + inspect.getsource(draw)
    digest = hashlib.sha256(content.encode() + svg).hexdigest()
    return f"<!-- report: sha256 {digest} -->\n".encode()


def is_drawn(plot: Plot, path: Path) -> bool:
    """Tell whether the file is what `draw` gave for this plot, by its last line."""
    if not path.exists():
        return False
    *body, last = path.read_bytes().splitlines(keepends=True) or [b""]
    return last == digest_line(plot, b"".join(body))


def load_report(path: Path) -> Callable[[Json], PackageReport]:
    """Return the class `Report` of a package's benchmarks/report.py."""
    name = f"{path.parents[1].name}_report"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    report: Callable[[Json], PackageReport] = module.Report
    return report


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


def find_results() -> dict[Path, list[Path]]:
    """Return the JSONs to draw by what draws them, which may have none.

    Raises:
        ValueError: a package has results, and nothing that draws them.
    """
    results: dict[Path, list[Path]] = {
        path: [] for path in sorted(ROOT.glob("packages/*/benchmarks/report.py"))
    }
    for path in sorted(ROOT.glob("packages/*/benchmarks/results/*.json")):
        if path.name.startswith(("tuning", "soak")):
            continue
        report = path.parents[1] / "report.py"
        if report not in results:
            missing, result = (p.relative_to(ROOT) for p in (report, path))
            raise ValueError(f"{missing} is missing, which draws {result}")
        results[report].append(path)
    return results


def update(check: bool) -> list[Path]:
    """Draw what is out of date, or only look; return the files that are."""
    stale: dict[Path, bytes] = {}
    root_readme = ROOT / "README.md"
    root_text = root_readme.read_text()
    for report_path, results in find_results().items():
        directory = report_path.parents[1]
        make_report = load_report(report_path)
        details, summaries = [], []
        for path in results:
            report = make_report(json.loads(path.read_text()))
            plot, plot_path = report.plot(), path.with_suffix(".svg")
            details.append(report.detail(plot_path.relative_to(directory).as_posix()))
            summaries.append(report.summary(plot_path.relative_to(ROOT).as_posix()))
            if not is_drawn(plot, plot_path):
                svg = b"" if check else draw(plot)
                stale[plot_path] = svg + digest_line(plot, svg)
        readme = directory / "README.md"
        text = replace_section(readme.read_text(), directory.name, "\n\n".join(details))
        if text != readme.read_text():
            stale[readme] = text.encode()
        root_text = replace_section(root_text, directory.name, "\n\n".join(summaries))
    if root_text != root_readme.read_text():
        stale[root_readme] = root_text.encode()
    if not check:
        for path, content in stale.items():
            path.write_bytes(content)
    return list(stale)


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
