"""Draws what bench.py measured; scripts/report.py loads this and writes the READMEs and the SVG."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from report_parts import Json, Line, Plot, microseconds, prose, table

# What others measured, and our goals.
REFERENCES = Path(__file__).with_name("references.json")

IMAGE = "![Latency against message size on {} GPUs]({})"

PEER_STYLES = ("s-C0", "D-C9", "v-C2", "P-C5")
REFERENCE_STYLES = ("^:C4", "<:C6", ">:C1", "x:C8")


class Report:
    """Tables and plot of one run of bench.py; see PackageReport in scripts/report_parts.py."""

    def __init__(self, result: Json) -> None:
        references: Json = json.loads(REFERENCES.read_text())
        self.result = result
        self.world_size = int(result["world_size"])
        self.dtype = str(references["dtype"])
        self.source = str(references["source"])
        self.host_references: dict[str, float] = references["host_us"]
        # Microseconds by bytes; none where this number of GPUs was not measured elsewhere.
        self.figures: dict[str, dict[int, float]] = {
            figure["name"]: by_bytes(figure["us"])
            for figure in references["figures"]
            if figure["world_size"] == self.world_size
        }
        self.goals: dict[int, float] = {}
        for goal in references["goals"]:
            if goal["world_size"] == self.world_size:
                self.goals = by_bytes(goal["us"])
        # The main cases, and the others by what they are; both by size.
        self.main: list[Json] = []
        self.others: dict[str, dict[int, Json]] = {}
        for case in sorted(result["cases"], key=lambda case: int(case["bytes"])):
            if case["dtype"] == self.dtype and not case["in_place"] and not case["eager"]:
                self.main.append(case)
            else:
                self.others.setdefault(kind_name(case), {})[case["bytes"]] = case
        self.peers = list(dict.fromkeys(name for case in self.main for name in case["peers"]))

    def detail(self, plot_path: str) -> str:
        """Return all figures, for the package's README."""
        parts = [
            self.intro(),
            IMAGE.format(self.world_size, plot_path),
            self.title(),
            self.main_table(),
            self.verdict(),
            self.legend(),
        ]
        if self.others:
            parts += ["**Other formats and eager calls**: µs", self.others_table()]
        parts += [
            self.missing(),
            f"**Host time of a call** from Python, 4 KiB, {self.result['cpu']}",
            self.host_table(),
            prose(f"Method: {self.result['method']}"),
        ]
        return "\n\n".join(part for part in parts if part)

    def summary(self, plot_path: str) -> str:
        """Return the sizes that have goals, for the root's README."""
        parts = [
            self.intro(),
            self.title(),
            self.main_table(is_summary=True),
            self.verdict(),
            self.legend(),
            IMAGE.format(self.world_size, plot_path),
        ]
        return "\n\n".join(part for part in parts if part)

    def intro(self) -> str:
        """What was measured on what, and what the link and the device can do."""
        result, ceilings = self.result, self.result["ceilings"]
        kernels = ceilings["kernels"]
        by_kernels = (
            f"{kernels['push']['gb_per_s']:.0f} GB/s by kernels that store to a peer, "
            f"{kernels['pull']['gb_per_s']:.0f} GB/s by kernels that load from it, "
            if kernels
            else ""
        )
        return prose(
            f"{self.world_size} × {result['gpu']}, driver {result['driver']}, torch "
            f"{result['torch']}, NCCL {result['nccl']}, custom_ar {result['version']} (library "
            f"sha256 {result['library_sha256'][:12]}), {result['date'][:10]}. In the same run a "
            f"copy to a peer moved {ceilings['peer_copy_gb_per_s']:.0f} GB/s, "
            f"{ceilings['peer_copy_both_ways_gb_per_s']:.0f} GB/s while as much went the other "
            f"way, {by_kernels}and the shortest node of a graph took "
            f"{microseconds(ceilings['node_us'])} µs."
        )

    def title(self) -> str:
        """The heading of the main table."""
        return f"**All-reduce on {self.world_size} GPUs**, {self.dtype}, in CUDA graphs"

    def legend(self) -> str:
        """What the columns mean and where figures come from."""
        text = (
            "Medians in µs of the slowest rank. In brackets: under “link floor”, the floor over "
            "our time; else, a peer's time over ours. All is from this run but for “elsewhere”. "
        )
        if self.figures:
            text += f"“Elsewhere”: {self.source} "
        return prose(text)

    def missing(self) -> str:
        """Peers that the run lacks, and why."""
        missing = [f"{name} ({reason})" for name, reason in self.result["left_out"].items()]
        for case in self.result["cases"]:
            for name, reason in case["peer_notes"].items():
                missing.append(f"{name} with {kind_name(case)} ({reason})")
        if not missing:
            return ""
        return prose(f"Not measured in this run: {'; '.join(dict.fromkeys(missing))}.")

    def main_table(self, *, is_summary: bool = False) -> str:
        """All sizes, or fewer columns and only the sizes that have goals, if there are any."""
        cases = self.main
        columns: dict[str, Callable[[Json], str]] = {
            "message": lambda case: size_name(case["bytes"]),
            "µs": lambda case: microseconds(case["us"]),
        }
        if is_summary:
            cases = [case for case in cases if case["bytes"] in self.goals] or cases
        else:
            columns["min to max"] = lambda case: (
                f"{microseconds(case['us_min'])} to {microseconds(case['us_max'])}"
            )
        columns["link floor"] = lambda case: (
            f"{microseconds(case['floor_us'])} ({case['floor_ratio']:.2f})"
        )
        for name in self.peers:
            columns[name] = partial(peer_cell, name)
        if not is_summary:
            for name, figure in self.figures.items():
                columns[f"elsewhere: {name}"] = partial(reference_cell, figure)

        def elsewhere_ratio(case: Json) -> str:
            known = [us[case["bytes"]] for us in self.figures.values() if case["bytes"] in us]
            return f"{min(known):g} ({min(known) / case['us']:.2f}×)" if known else ""

        def goal(case: Json) -> str:
            us = self.goals.get(case["bytes"])
            return f"{us:g}, {'met' if case['us'] <= us else 'missed'}" if us else ""

        if self.figures:
            columns["best elsewhere"] = elsewhere_ratio
        if self.goals:
            columns["goal"] = goal
        return table(list(columns), [[cell(case) for cell in columns.values()] for case in cases])

    def verdict(self) -> str:
        """How many goals are met, and the least by which peers are slower."""
        sentences = []
        with_goals = [case for case in self.main if case["bytes"] in self.goals]
        if with_goals:
            met = sum(case["us"] <= self.goals[case["bytes"]] for case in with_goals)
            sentences.append(f"{met} of {len(with_goals)} goals are met.")
        ratios = [
            (peer["ratio"], name, case["bytes"])
            for case in self.main
            for name, peer in case["peers"].items()
            if peer
        ]
        ratios += [
            (figure[case["bytes"]] / case["us"], f"{name} (elsewhere)", case["bytes"])
            for name, figure in self.figures.items()
            for case in self.main
            if case["bytes"] in figure
        ]
        if ratios:
            ratio, name, size = min(ratios)
            # A digit more than elsewhere, so that what just misses does not look equal.
            sentences.append(
                f"The closest of all peers is {name} at {size_name(size)}: {ratio:.3f} times our "
                "time."
            )
        return prose(" ".join(sentences))

    def others_table(self) -> str:
        """The other formats and kinds of call, a column for each size."""
        sizes = sorted({size for cases in self.others.values() for size in cases})
        rows = []
        for kind, cases in self.others.items():
            present = [cases.get(size) for size in sizes]
            names = dict.fromkeys(name for case in cases.values() for name in case["peers"])
            ours = [microseconds(case["us"]) if case else "" for case in present]
            rows.append([kind, "custom_ar", *ours])
            for name in names:
                cells = [peer_cell(name, case) if case else "" for case in present]
                if any(cells):
                    rows.append(["", name, *cells])
        return table(["kind", "", *map(size_name, sizes)], rows)

    def host_table(self) -> str:
        """The host's time of each way to call, and of one of torch's own operators."""
        rows = [
            [name, f"{timing['us']:.2f}", f"{timing['us_min']:.2f}"]
            for name, timing in self.result["host"].items()
        ]
        rows += [[f"elsewhere: {name}", f"{us:g}", ""] for name, us in self.host_references.items()]
        return table(["call", "median µs", "min µs"], rows)

    def plot(self) -> Plot:
        """Latency against message size, of all that was measured here and elsewhere."""

        def line(label: str, style: str, us: Callable[[Json], float | None]) -> Line:
            points = ((case["bytes"] / 1024, us(case)) for case in self.main)
            return Line(label, style, tuple((x, y) for x, y in points if y is not None))

        lines = [line("custom_ar", "o-C3", lambda case: case["us"])]
        for name, style in zip(self.peers, PEER_STYLES, strict=False):
            lines.append(line(name, style, partial(peer_us, name)))
        for (name, figure), style in zip(self.figures.items(), REFERENCE_STYLES, strict=False):
            points = tuple((size / 1024, us) for size, us in sorted(figure.items()))
            lines.append(Line(f"{name} (elsewhere)", style, points))
        lines.append(line("link floor", "--k", lambda case: case["floor_us"]))
        return Plot(
            title=f"All-reduce, {self.dtype}, {self.world_size} × {self.result['gpu']}",
            x_label="KiB of the message",
            y_label="µs a call, in a CUDA graph",
            lines=tuple(line for line in lines if line.points),
        )


def kind_name(case: Json) -> str:
    """`bfloat16, in place`."""
    flags = [name for flag, name in (("in_place", "in place"), ("eager", "eager")) if case[flag]]
    return ", ".join([case["dtype"], *flags])


def size_name(count: int) -> str:
    """`256 KiB`."""
    return f"{count / 2**20:g} MiB" if count >= 2**20 else f"{count / 2**10:g} KiB"


def by_bytes(figures: Json) -> dict[int, float]:
    """JSON's keys are strings."""
    return {int(size): us for size, us in figures.items()}


def peer_us(name: str, case: Json) -> float | None:
    """Microseconds of a peer, if it was measured."""
    peer = case["peers"].get(name)
    return peer["us"] if peer else None


def peer_cell(name: str, case: Json) -> str:
    """`12.3 (1.05×)`: a peer's time, and over ours; nothing where it was not measured."""
    peer = case["peers"].get(name)
    return f"{microseconds(peer['us'])} ({peer['ratio']:.2f}×)" if peer else ""


def reference_cell(figure: dict[int, float], case: Json) -> str:
    """A figure from elsewhere as it was given; nothing where there is none."""
    return f"{figure[case['bytes']]:g}" if case["bytes"] in figure else ""
