"""What `benchmark.dcp attention` writes: lines by size, a summary, measured.json, a plot."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_helix.srt.layers.attention import measured

from benchmark.dcp import report


@dataclass(frozen=True)
class Size:
    """Heads by their name, requests, local tokens of each."""

    heads: str
    batch: int
    tokens: int


@dataclass(frozen=True)
class Row(report.Measured, Size):
    """One candidate at one size."""


def ours() -> tuple[Any, ...]:
    from sglang_helix.srt.layers.attention.adapters import ADAPTERS

    return tuple(record for record in ADAPTERS if record.own_file)


def say(line: str) -> None:
    """What is not a figure."""
    print(line, file=sys.stderr, flush=True)


def by_size(rows: list[Row]) -> dict[tuple[str, int, int], dict[str, Row]]:
    """Per size the candidates by their names."""
    sizes: dict[tuple[str, int, int], dict[str, Row]] = {}
    for row in rows:
        sizes.setdefault((row.heads, row.batch, row.tokens), {})[row.name] = row
    return sizes


class Table:
    """A line a size, a column a candidate: microseconds, and the share of the copy's bandwidth.

    A head stands above the first line and wherever there are other candidates.
    """

    def __init__(self) -> None:
        self.names: list[str] = []

    def print(self, rows: list[Row]) -> None:
        for (heads, batch, tokens), found in by_size(rows).items():
            if not found.keys() <= set(self.names):
                self.names = list(found)
                self._print("heads", "B", "tokens", self.names)
            cells = [
                f"{row.median_us:.1f} ({row.copy_share:.0%})" if row else "-"
                for row in map(found.get, self.names)
            ]
            self._print(heads, batch, tokens, cells)

    def _print(self, heads: str, batch: object, tokens: object, cells: list[str]) -> None:
        width = max(14, *(len(name) + 2 for name in self.names))
        line = f"{heads:<9}{batch:>4}{tokens:>8}" + "".join(f"{cell:>{width}}" for cell in cells)
        print(line, flush=True)


def summary(rows: list[Row]) -> str:
    """Per adapter: its time over that of its backend's plain TP, and over the fastest plain one."""
    sizes, lines = by_size(rows), []
    for name in dict.fromkeys(row.name for row in rows):
        for what, others in (
            ("its backend's plain TP", [f"{name} tp"]),
            ("the fastest plain TP", [row.name for row in rows if row.name.endswith(" tp")]),
        ):
            ratios = [
                (found[name].median_us / min(found[o].median_us for o in others if o in found), at)
                for at, found in sizes.items()
                if name in found and any(other in found for other in others)
            ]
            if ratios and not name.endswith(" tp") and name != report.COPY:
                (low, _), (high, at) = min(ratios), max(ratios)
                lines.append(f"{name} over {what}: {low:.2f} to {high:.2f} {list(at)}")
    return "\n".join(lines)


def ship(rows: list[Row], major: int, path: Path = measured.FILE) -> None:
    """Write the adapters' times where servers read them; heads without figures keep theirs."""
    figures = json.loads(path.read_text()) if path.exists() else {}
    names = {record.name for record in ours()}
    for heads in dict.fromkeys(row.heads for row in rows):
        us: dict[str, dict[str, float]] = {}
        for row in rows:
            if row.heads == heads and row.name in names:
                size = f"{row.batch} x {row.tokens}"
                us.setdefault(row.name, {})[size] = float(f"{row.median_us:.4g}")
        figures[heads] = measured.Figures(device=rows[0].device, major=major, us=us)
    path.write_text(json.dumps(figures, indent=1) + "\n")


def plot(rows: list[Row], path: Path) -> str:
    """Share of the copy's bandwidth against local tokens, a panel for each heads and batch."""
    plots = report.pyplot()
    if plots is None:
        return report.no_plot("attention", path)
    shapes = list(dict.fromkeys(row.heads for row in rows))
    batches = list(dict.fromkeys(row.batch for row in rows))
    names = [name for name in dict.fromkeys(row.name for row in rows) if name != report.COPY]
    figure, axes = plots.subplots(
        *(len(shapes), len(batches)),
        figsize=(4 * len(batches), 3 * len(shapes)),
        squeeze=False,
        layout="constrained",
    )
    colours = plots.get_cmap("tab20")
    for heads, line in zip(shapes, axes, strict=True):
        for batch, axis in zip(batches, line, strict=True):
            for name in names:
                points = sorted(
                    (row.tokens, 100 * row.copy_share)
                    for row in rows
                    if (row.heads, row.batch, row.name) == (heads, batch, name)
                )
                if points:
                    style = "--" if name.endswith(" tp") else "-"
                    axis.plot(
                        *zip(*points, strict=True),
                        style,
                        marker="o",
                        markersize=3,
                        color=colours(names.index(name) % 20),
                        label=name,
                    )
            axis.axhline(100, color="grey", linewidth=0.8)
            axis.set(xscale="log", title=f"{heads}, batch {batch}", xlabel="local tokens")
            axis.set_ylabel("% of the copy's bandwidth")
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=6)
    figure.suptitle(f"{rows[0].device}, {rows[0].software}; solid: sharded, dashed: plain TP")
    return report.save(figure, path)
