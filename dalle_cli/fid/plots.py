"""The plots of ``dalle eval-fid``: a figure against the blur's radius or the pool's size, a line for each system."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt

from dalle_cli.views.plots import BLUE, GREEN, GREY, ORANGE, STYLE, VIOLET

COLOURS = (BLUE, ORANGE, GREEN, VIOLET, GREY, "#b03060", "#8a6d1d")
MARKS = "osD^v<>"
SCORES = ("inception_score", "clip_is")
"""Keys of a score by class, of which a figure has one."""
TITLES = {
    "blur_fid": "FID against blur, both sides blurred",
    "blur_score": "Inception Score against blur",
    "pool_fid": "FID against the size of the reranking pool",
    "pool_score": "Inception Score against the size of the reranking pool",
    "pool_accuracy": "Captions drawn right against the size of the reranking pool",
}
"""Plots there can be, in their order on the page."""
AXES = {"blur": "radius of the blur, pixels", "pool": "samples that CLIP chooses among"}
Files = dict[str, tuple[bytes, bytes]]
"""PNG and SVG of each plot."""


def draw_plots(figures: Mapping[str, Any]) -> Files:
    """The plots that ``compare_systems``'s figures have points for."""
    systems = figures["systems"]
    key = next((k for k in SCORES if k in systems[0]), None)
    features = "Inception" if str(figures["features"]).startswith("inception") else "CLIP features"
    found: Files = {}
    for curve in ("blur", "pool"):
        if not any(curve in system for system in systems):
            continue
        found[f"{curve}_fid"] = _curves(systems, curve, "fid", f"FID, {features}")
        if key is not None:
            found[f"{curve}_score"] = _curves(systems, curve, key, f"Inception Score, {features}")
    if any("accuracy" in system for system in systems):
        found["pool_accuracy"] = _accuracies(systems)
    return found


def _curves(systems: Sequence[Mapping[str, Any]], curve: str, key: str, label: str) -> tuple[bytes, bytes]:
    x_name = {"blur": "radius", "pool": "size"}[curve]
    with plt.rc_context({**STYLE, "svg.hashsalt": "dalle"}):
        figure, axes = plt.subplots()
        shown: set[float] = set()
        for number, system in enumerate(systems):
            style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "label": system["name"]}
            points = [point for point in system.get(curve, []) if point.get(key) is not None]
            if points:
                x = [point[x_name] for point in points]
                shown.update(x)
                errors = [point.get(f"{key}_error") or 0.0 for point in points]
                axes.errorbar(x, [point[key] for point in points], yerr=errors, capsize=2, elinewidth=1,
                              marker=MARKS[number % len(MARKS)], markersize=3.5, **style)  # fmt: skip
            elif key in system:
                axes.axhline(system[key], linestyle="--", linewidth=1.2, **style)
        _scale(axes, curve, sorted(shown))
        axes.set_xlabel(AXES[curve])
        axes.set_ylabel(label)
        axes.margins(y=0.1)
        axes.legend()
        return _files(figure)


def _accuracies(systems: Sequence[Mapping[str, Any]]) -> tuple[bytes, bytes]:
    with plt.rc_context({**STYLE, "svg.hashsalt": "dalle"}):
        figure, axes = plt.subplots()
        shown: set[float] = set()
        several = sum("accuracy" in system for system in systems) > 1
        lines = [
            (f"{system['name']}, {group}" if several else group, found["by_pool_size"])
            for system in systems
            for group, found in system.get("accuracy", {}).items()
        ]
        for number, (name, by_size) in enumerate(lines):
            x = [int(size) for size in by_size]
            shown.update(x)
            y, errors = ([100 * share[what] for share in by_size.values()] for what in ("value", "error"))
            axes.errorbar(x, y, yerr=errors, capsize=2, elinewidth=1, marker=MARKS[number % len(MARKS)],
                          markersize=3.5, color=COLOURS[number % len(COLOURS)], label=name)  # fmt: skip
        _scale(axes, "pool", sorted(shown))
        axes.set_ylim(0, 102)
        axes.set_xlabel(AXES["pool"])
        axes.set_ylabel("captions drawn right, %")
        axes.legend()
        return _files(figure)


def _scale(axes: Any, curve: str, shown: Sequence[float]) -> None:
    if curve == "pool":
        axes.set_xscale("log", base=2)
    else:
        axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xticks(shown, [f"{value:g}" for value in shown])
    axes.minorticks_off()


def _files(figure: Any) -> tuple[bytes, bytes]:
    """PNG and SVG, the same bytes whenever they are written; closes the figure."""
    found = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=metadata)
        found.append(buffer.getvalue())
    plt.close(figure)
    return found[0], found[1]
