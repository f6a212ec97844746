"""Draws what bench.py measured; scripts/report.py loads this and writes the READMEs and the SVG."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from report_parts import Json, Line, Plot, microseconds, prose, table

# What others measured, and our goals.
REFERENCES = Path(__file__).with_name("references.json")

IMAGE = "![Latency against tokens on {} GPUs]({})"

# What is drawn of the floor, which is next to nothing for a few tokens.
LEAST_FLOOR_US = 0.5

PEER_STYLES = ("s-C0", "D-C9", "v-C2")
REFERENCE_STYLES = ("^:C4", "<:C6")


class Report:
    """Tables and plot of one run of bench.py; see PackageReport in scripts/report_parts.py."""

    def __init__(self, result: Json) -> None:
        references: Json = json.loads(REFERENCES.read_text())
        self.result = result
        self.world_size = int(result["world_size"])
        self.op = str(references["op"])
        self.dtype = str(references["dtype"])
        self.source = str(references["source"])
        # Microseconds by tokens; none where this number of GPUs was not measured elsewhere.
        self.figures: dict[str, dict[int, float]] = {
            figure["name"]: by_tokens(figure["us"])
            for figure in references["figures"]
            if figure["world_size"] == self.world_size
        }
        self.goals: dict[int, float] = {}
        for goal in references["goals"]:
            if goal["world_size"] == self.world_size:
                self.goals = by_tokens(goal["us"])
        # The main cases, and the others by what they are; both by tokens.
        self.main: list[Json] = []
        self.others: dict[str, dict[int, Json]] = {}
        for case in sorted(result["cases"], key=lambda case: int(case["tokens"])):
            if (case["op"], case["dtype"]) == (self.op, self.dtype):
                self.main.append(case)
            else:
                self.others.setdefault(kind_name(case), {})[case["tokens"]] = case
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
            parts += ["**Other formats, and one tensor alone**: µs", self.others_table()]
        parts += [
            self.missing(),
            f"**Host time of a call** from Python, 1 token, {self.result['cpu']}",
            self.host_table(),
            prose(f"Method: {self.result['method']}"),
        ]
        return "\n\n".join(part for part in parts if part)

    def summary(self, plot_path: str) -> str:
        """Return the numbers of tokens that have goals, for the root's README."""
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
        """What was measured on what, and what a device can do."""
        result, ceilings = self.result, self.result["ceilings"]
        return prose(
            f"{self.world_size} × {result['gpu']}, driver {result['driver']}, torch "
            f"{result['torch']}, NCCL {result['nccl']}, minimax_rms {result['version']} (library "
            f"sha256 {result['library_sha256'][:12]}), {result['date'][:10]}. In the same run a "
            f"copy on each device moved {ceilings['copy_tb_per_s']:.2f} TB/s, read and written, "
            f"and the shortest node of a graph took {microseconds(ceilings['node_us'])} µs."
        )

    def title(self) -> str:
        """The heading of the main table."""
        widths = " + ".join(map(str, self.main[0]["widths"])) if self.main else ""
        return (
            f"**QK norm of MiniMax-M2 on {self.world_size} GPUs**, {self.dtype}, q and k of "
            f"{widths} elements on each, in CUDA graphs"
        )

    def legend(self) -> str:
        """What the columns mean and where figures come from."""
        text = (
            "Medians in µs of the slowest rank. In brackets: under “HBM floor”, the floor over our "
            "time; else, the other's time over ours. The floor is q and k read and written once at "
            "the bandwidth of a large copy; “copy” moves as many bytes and exchanges nothing. All "
            "is from this run but for “elsewhere”. "
        )
        if self.figures:
            text += f"“Elsewhere”: {self.source}"
        return prose(text)

    def missing(self) -> str:
        """Peers that the run lacks, and why."""
        missing = [f"{name} ({reason})" for name, reason in self.result["left_out"].items()]
        for case in self.result["cases"]:
            for name, reason in case["peer_notes"].items():
                tokens = f"{case['tokens']} token{'s' if case['tokens'] > 1 else ''}"
                missing.append(f"{name} with {kind_name(case)}, {tokens} ({reason})")
        if not missing:
            return ""
        return prose(f"Not measured in this run: {'; '.join(dict.fromkeys(missing))}.")

    def main_table(self, *, is_summary: bool = False) -> str:
        """All numbers of tokens, or fewer columns and only those that have goals, if any has."""
        cases = self.main
        columns: dict[str, Callable[[Json], str]] = {
            "tokens": lambda case: str(case["tokens"]),
            "µs": lambda case: microseconds(case["us"]),
        }
        if is_summary:
            cases = [case for case in cases if case["tokens"] in self.goals] or cases
        else:
            columns["min to max"] = lambda case: (
                f"{microseconds(case['us_min'])} to {microseconds(case['us_max'])}"
            )
        columns["HBM floor"] = lambda case: (
            f"{microseconds(case['floor_us'])} ({case['floor_ratio']:.2f})"
        )
        if not is_summary:
            columns["copy"] = lambda case: timing_cell(case["copy"])
        for name in self.peers:
            columns[name] = partial(peer_cell, name)
        for name, figure in self.figures.items():
            columns[f"elsewhere: {name}"] = partial(reference_cell, figure)

        def goal(case: Json) -> str:
            us = self.goals.get(case["tokens"])
            return f"{us:g}, {'met' if case['us'] <= us else 'missed'}" if us else ""

        if self.goals:
            columns["goal"] = goal
        return table(list(columns), [[cell(case) for cell in columns.values()] for case in cases])

    def verdict(self) -> str:
        """How many goals are met, and the least by which peers are slower."""
        sentences = []
        with_goals = [case for case in self.main if case["tokens"] in self.goals]
        if with_goals:
            met = sum(case["us"] <= self.goals[case["tokens"]] for case in with_goals)
            sentences.append(f"{met} of {len(with_goals)} goals are met.")
        ratios = [
            (peer["ratio"], name, case["tokens"])
            for case in self.main
            for name, peer in case["peers"].items()
            if peer
        ]
        ratios += [
            (figure[case["tokens"]] / case["us"], f"{name} (elsewhere)", case["tokens"])
            for name, figure in self.figures.items()
            for case in self.main
            if case["tokens"] in figure
        ]
        if ratios:
            ratio, name, tokens = min(ratios)
            # A digit more than elsewhere, so that what just misses does not look equal.
            sentences.append(
                f"The closest of all peers is {name} at {tokens} token{'s' if tokens > 1 else ''}: "
                f"{ratio:.3f} times our time."
            )
        return prose(" ".join(sentences))

    def others_table(self) -> str:
        """The other formats and the operator for one tensor, a column for each number of tokens."""
        counts = sorted({tokens for cases in self.others.values() for tokens in cases})
        rows = []
        for kind, cases in self.others.items():
            present = [cases.get(tokens) for tokens in counts]
            names = dict.fromkeys(name for case in cases.values() for name in case["peers"])
            rows.append(
                [kind, "minimax_rms", *(microseconds(c["us"]) if c else "" for c in present)]
            )
            rows.append(["", "copy", *(timing_cell(c["copy"]) if c else "" for c in present)])
            for name in names:
                cells = [peer_cell(name, case) if case else "" for case in present]
                if any(cells):
                    rows.append(["", name, *cells])
        header = [f"{tokens} token{'s' if tokens > 1 else ''}" for tokens in counts]
        return table(["kind", "", *header], rows)

    def host_table(self) -> str:
        """The host's time of each way to call, and of one of torch's own operators."""
        rows = [
            [name, f"{timing['us']:.2f}", f"{timing['us_min']:.2f}"]
            for name, timing in self.result["host"].items()
        ]
        return table(["call", "median µs", "min µs"], rows)

    def plot(self) -> Plot:
        """Latency against tokens, of all that was measured here and elsewhere."""

        def line(label: str, style: str, us: Callable[[Json], float | None]) -> Line:
            points = ((case["tokens"], us(case)) for case in self.main)
            return Line(label, style, tuple((x, y) for x, y in points if y is not None))

        lines = [line("minimax_rms", "o-C3", lambda case: case["us"])]
        for name, style in zip(self.peers, PEER_STYLES, strict=False):
            lines.append(line(name, style, partial(peer_us, name)))
        for (name, figure), style in zip(self.figures.items(), REFERENCE_STYLES, strict=False):
            lines.append(Line(f"{name} (elsewhere)", style, tuple(sorted(figure.items()))))
        lines.append(line("copy of q and k", ".:C7", lambda case: case["copy"]["us"]))
        # Further down it says nothing, and would take most of the axis.
        lines.append(
            line(
                "HBM floor",
                "--k",
                lambda case: case["floor_us"] if case["floor_us"] >= LEAST_FLOOR_US else None,
            )
        )
        return Plot(
            title=f"MiniMax-M2 QK norm, {self.dtype}, {self.world_size} × {self.result['gpu']}",
            x_label="tokens",
            y_label="µs a call, in a CUDA graph",
            lines=tuple(line for line in lines if line.points),
        )


def kind_name(case: Json) -> str:
    """`float16, q and k`, or `bfloat16, one tensor of 3072`."""
    widths = case["widths"]
    return f"{case['dtype']}, {'q and k' if len(widths) > 1 else f'one tensor of {widths[0]}'}"


def by_tokens(figures: Json) -> dict[int, float]:
    """JSON's keys are strings."""
    return {int(tokens): us for tokens, us in figures.items()}


def timing_cell(timing: Json) -> str:
    """`12.3 (1.05×)`: a time, and over ours."""
    return f"{microseconds(timing['us'])} ({timing['ratio']:.2f}×)"


def peer_us(name: str, case: Json) -> float | None:
    """Microseconds of a peer, if it was measured."""
    peer = case["peers"].get(name)
    return peer["us"] if peer else None


def peer_cell(name: str, case: Json) -> str:
    """A peer's time, and over ours; nothing where it was not measured."""
    peer = case["peers"].get(name)
    return timing_cell(peer) if peer else ""


def reference_cell(figure: dict[int, float], case: Json) -> str:
    """A figure from elsewhere as it was given, and over our time; nothing where there is none."""
    us = figure.get(case["tokens"])
    return f"{us:g} ({us / case['us']:.2f}×)" if us else ""
