"""Plots of ``dalle eval-fid``: a metric against the blur's radius or the pool size, with a line for each system."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.figure import Figure

from dalle_cli.fid.figures import Curves, Evaluation, Figures, PoolPoint, SystemFigures
from dalle_cli.views.plots import SERIES, STYLE, Plot, figure_plot, label_of

MARKERS = "osD^v<>"
TITLES = {
    "blur_fid": "FID against blur, both sides blurred",
    "blur_score": "Inception Score against blur",
    "pool_fid": "FID against the size of the reranking pool",
    "pool_score": "Inception Score against the size of the reranking pool",
    "pool_accuracy": "Captions drawn right against the size of the reranking pool",
}
"""Titles of the plots, in their order on the page."""
AXES = {"blur": "radius of the blur, pixels", "pool": "samples that CLIP chooses among"}


def draw_plots(evaluation: Evaluation) -> dict[str, Plot]:
    """Draw the plots for which the evaluation has points."""
    systems = evaluation.systems
    features = "Inception" if evaluation.features.startswith("inception") else "CLIP features"
    found: dict[str, Plot] = {}
    curves: dict[Literal["blur", "pool"], bool] = {
        "blur": any(system.blur for system in systems),
        "pool": any(system.pool for system in systems),
    }
    for curve, drawn in curves.items():
        if drawn:
            found[f"{curve}_fid"] = _curves(systems, curve, "fid", f"FID, {features}")
            if systems[0].score is not None:
                found[f"{curve}_score"] = _curves(systems, curve, "score", f"Inception Score, {features}")
    if any(system.accuracy for system in systems):
        found["pool_accuracy"] = _accuracies(systems)
    return found


def _curves(
    systems: Sequence[SystemFigures], curve: Literal["blur", "pool"], metric: Literal["fid", "score"], label: str
) -> Plot:
    with rc_context(STYLE):
        figure = Figure()
        axes = figure.subplots()
        shown: set[float] = set()
        for number, system in enumerate(systems):
            style: dict[str, Any] = {"color": SERIES[number % len(SERIES)], "label": label_of(system.name)}
            points = _points(system, curve, metric)
            if points:
                shown.update(x for x, _, _ in points)
                marked = {**style, "marker": MARKERS[number % len(MARKERS)], "markersize": 3.5}
                x, y, errors = zip(*points, strict=True)
                axes.errorbar(x, y, yerr=errors, capsize=2, elinewidth=1, **marked)
                if system.without is not None and metric == "fid":
                    label = f"{style['label']}, some left out"
                    y = tuple(value for _, value, _ in _points(system.without, curve, metric))
                    axes.plot(x, y, linestyle="--", **{**marked, "label": label})
            elif getattr(system, metric) is not None:
                axes.axhline(getattr(system, metric), linestyle="--", linewidth=1.2, **style)
        _scale(axes, curve, sorted(shown))
        axes.set_xlabel(AXES[curve])
        axes.set_ylabel(label)
        axes.margins(y=0.1)
        axes.legend()
        return figure_plot(figure)


def _points(curves: Curves, curve: Literal["blur", "pool"], metric: str) -> list[tuple[float, float, float]]:
    """Return the radius or size, the metric and its standard error of each point of a curve that has the metric."""
    points: list[tuple[float, Figures | PoolPoint]] = (
        [(point.radius, point) for point in curves.blur]
        if curve == "blur"
        else [(point.size, point) for point in curves.pool]
    )
    return [
        (x, getattr(point, metric), getattr(point, f"{metric}_error") or 0.0)
        for x, point in points
        if getattr(point, metric) is not None
    ]


def _accuracies(systems: Sequence[SystemFigures]) -> Plot:
    with rc_context(STYLE):
        figure = Figure()
        axes = figure.subplots()
        shown: set[float] = set()
        several = sum(bool(system.accuracy) for system in systems) > 1
        lines = [
            (f"{system.name}, {group}" if several else group, accuracy.by_pool_size)
            for system in systems
            for group, accuracy in system.accuracy.items()
        ]
        for number, (name, by_size) in enumerate(lines):
            shown.update(by_size)
            y = [100 * share.value for share in by_size.values()]
            errors = [100 * share.error for share in by_size.values()]
            axes.errorbar(list(by_size), y, yerr=errors, capsize=2, elinewidth=1, marker=MARKERS[number % len(MARKERS)],
                          markersize=3.5, color=SERIES[number % len(SERIES)], label=label_of(name))  # fmt: skip
        _scale(axes, "pool", sorted(shown))
        axes.set_ylim(0, 102)
        axes.set_xlabel(AXES["pool"])
        axes.set_ylabel("captions drawn right, %")
        axes.legend()
        return figure_plot(figure)


def _scale(axes: Any, curve: str, shown: Sequence[float]) -> None:
    if curve == "pool":
        axes.set_xscale("log", base=2)
    else:
        axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xticks(shown, [f"{value:g}" for value in shown])
    axes.minorticks_off()
