"""Plots of pages as PNG and SVG, small and with large letters, to be readable on a phone."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dalle_cli.shapes.accuracy import Accuracy, Share

BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, BLACK = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#222222",
)  # fmt: skip
SERIES = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, BLACK)
"""Colours that differ for colour-blind readers too (Okabe and Ito 2008), in the order in which plots take them."""
GREY = "#6b7280"
STYLE: Any = {
    "figure.figsize": (4.8, 3.0),
    "figure.dpi": 200,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "dalle",  # without it, ids in the file are random
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#c4c8d0",
    "axes.labelcolor": "#4b5160",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceef2",
    "xtick.color": "#4b5160",
    "ytick.color": "#4b5160",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.5,
}
Curve = tuple[str, str, str]
"""Name of a metric in metrics.jsonl, its label and its colour. A name that begins with ``val_`` is drawn dashed."""


class Plot(NamedTuple):
    """A plot, once as a picture for the page and once to print or to edit."""

    png: bytes
    svg: bytes


def label_of(name: str) -> str:
    """Return a user's name as a label for Matplotlib, without formulas and not hidden by an underscore at its start."""
    return f" {name}".replace("$", r"\$") if name.startswith("_") else name.replace("$", r"\$")


def loss_curves(metrics: Sequence[Mapping[str, Any]], curves: Sequence[Curve], unit: str) -> Plot | None:
    """Plot metrics over updates; return None if the run has none of them."""
    with rc_context(STYLE):
        figure = Figure()
        axes = figure.subplots()
        for name, label, colour in curves:
            points = [(line["step"], line[name]) for line in metrics if name in line and math.isfinite(line[name])]
            if points:
                steps, values = zip(*points, strict=True)
                validation = name.startswith("val_")
                mark = "o" if validation or len(points) == 1 else None
                axes.plot(steps, values, color=colour, marker=mark, markersize=3.5, label=label,
                          linestyle="--" if validation else "-")  # fmt: skip
        if not axes.lines:
            return None
        axes.set_xlabel("updates")
        axes.set_ylabel(unit)
        axes.legend()
        return figure_plot(figure)


def codebook_histogram(counts: NDArray[np.int64], perplexity: float) -> Plot:
    """Plot the share of each code among all tokens, the most used first, on a log scale; ``counts`` is (K,)."""
    used = np.sort(counts[counts > 0])[::-1]
    with rc_context(STYLE):
        figure = Figure()
        axes = figure.subplots()
        places = np.arange(1, len(used) + 1)
        axes.fill_between(places, used / counts.sum(), step="mid", color=BLUE, alpha=0.25, linewidth=0)
        axes.step(places, used / counts.sum(), where="mid", color=BLUE)
        axes.axhline(1 / len(counts), color=GREY, linestyle=":", linewidth=1, label="all in equal use")
        axes.axvline(perplexity, color=ORANGE, linewidth=1, label=f"perplexity {perplexity:.0f}")
        if len(used) < len(counts):
            axes.axvspan(len(used) + 0.5, len(counts) + 0.5, color="#f0d8ca", linewidth=0,
                         label=f"{len(counts) - len(used)} dead codes")  # fmt: skip
        axes.set_yscale("log")
        axes.set_xlim(0.5, len(counts) + 0.5)
        axes.set_xlabel("codes, most used first")
        axes.set_ylabel("share of tokens")
        axes.legend()
        return figure_plot(figure)


def accuracy_bars(groups: Mapping[str, Accuracy]) -> Plot:
    """Plot for each group the accuracy of a single sample, the best by CLIP and any sample, with standard errors."""
    with rc_context(STYLE):
        figure = Figure()
        axes = figure.subplots()
        pool = next(iter(groups.values())).pool_size
        bars: list[tuple[str, str, list[Share | None]]] = [
            ("single sample", GREY, [group.single for group in groups.values()]),
            (f"best of {pool} by CLIP", GREEN, [group.best for group in groups.values()]),
            (f"any of {pool} right", "#b7c9dd", [group.any_right for group in groups.values()]),
        ]
        width = 0.26
        for place, (label, colour, shares) in enumerate(bars):
            known = [(x, share) for x, share in enumerate(shares) if share is not None]
            if not known:
                continue
            at = [x + (place - 1) * width for x, _ in known]
            heights = [100 * share.value for _, share in known]
            errors = [100 * share.error for _, share in known]
            axes.bar(at, heights, width * 0.92, yerr=errors, color=colour, label=label,
                     error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#3a3f4b"})  # fmt: skip
            for x, height, error in zip(at, heights, errors, strict=True):
                axes.annotate(f"{height:.0f}", (x, min(height + error, 100)), xytext=(0, 2), ha="center", fontsize=8,
                              textcoords="offset points")  # fmt: skip
        axes.set_xticks(range(len(groups)), list(groups))
        axes.set_xlim(-0.6, len(groups) - 0.4)
        axes.grid(False, axis="x")
        axes.set_ylim(0, 112)
        axes.set_yticks(range(0, 101, 25))
        axes.set_ylabel("captions drawn right, %")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, columnspacing=1,
                      handlelength=1)  # fmt: skip
        return figure_plot(figure)


def accuracy_by_pool_size(groups: Mapping[str, Accuracy]) -> Plot | None:
    """Plot the accuracy of the best by CLIP against the pool size; return None if pools were cut by ``--top``."""
    with rc_context(STYLE):
        figure = Figure()
        axes = figure.subplots()
        sizes: set[int] = set()
        for (name, group), colour in zip(groups.items(), SERIES, strict=False):
            if not group.by_pool_size:
                continue
            x = list(group.by_pool_size)
            sizes.update(x)
            y = np.array([100 * share.value for share in group.by_pool_size.values()])
            error = np.array([100 * share.error for share in group.by_pool_size.values()])
            axes.fill_between(x, y - error, y + error, color=colour, alpha=0.15, linewidth=0)
            axes.plot(x, y, color=colour, marker="o", markersize=3.5, label=name)
        if not sizes:
            return None
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(sizes), [str(k) for k in sorted(sizes)])
        axes.minorticks_off()
        axes.set_ylim(0, 102)
        axes.set_xlabel("samples that CLIP chooses among")
        axes.set_ylabel("captions drawn right, %")
        axes.legend(loc="lower right")
        return figure_plot(figure)


def figure_plot(figure: Figure) -> Plot:
    """Return the figure in both formats."""
    return Plot(figure_png(figure), _saved(figure, "svg", ("Date", "Creator")))


def figure_png(figure: Figure) -> bytes:
    """Return the figure as PNG."""
    return _saved(figure, "png", ("Software",))


def _saved(figure: Figure, kind: Literal["png", "svg"], left_out: Sequence[str]) -> bytes:
    """Return the figure's file without the metadata that would differ between two runs."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=dict.fromkeys(left_out))
    return buffer.getvalue()
