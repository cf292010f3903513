"""The page of ``dalle eval-fid``: metrics, curves, and each caption's pictures by all systems side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dalle_cli.errors import UserError
from dalle_cli.fid.figures import (
    FORMAT,
    Evaluation,
    Figures,
    PoolPoint,
    SystemFigures,
    accuracy_json,
    comparable,
    evaluation_json,
)
from dalle_cli.fid.pictures import FilePictures, Pictures
from dalle_cli.fid.plots import TITLES, draw_plots
from dalle_cli.fid.presets import Preset
from dalle_cli.fid.systems import System, captions_beside, captions_of_source, per_caption
from dalle_cli.randomness import numpy_generator
from dalle_cli.stores.files import csv_text, write_atomically, write_json
from dalle_cli.views.contact_sheet import png_bytes
from dalle_cli.views.html import render
from dalle_cli.views.plots import Plot

THUMBNAIL_SIDE = 192
"""Largest side of a picture on the page, in pixels."""
METRICS = ("fid", "kid_mean", "precision", "recall", "score")
"""Metrics in the CSV file."""
SCORE_TITLES = {"inception_score": "Inception Score", "clip_is": "CLIP score of classes"}


@dataclass(frozen=True)
class GridRow:
    """A caption with each system's picture (H, W, 3), then the real one if known; None for a missing picture."""

    caption: str
    pictures: list[NDArray[np.uint8] | None]


def choose_grid(
    systems: Sequence[System], real: Mapping[str, tuple[Pictures, int]], rows: int, seed: int
) -> list[GridRow]:
    """Choose up to ``rows`` captions at random that all systems of generated pictures have, regardless of quality.

    Other pictures, such as a training set, are shown if they have a chosen caption. ``real`` holds the real picture of
    a caption as a row of some pictures.
    """
    places = [(system, per_caption(system)) for system in systems]
    captioned = [(system, set(found)) for system, found in places if found]
    sets = [found for system, found in captioned if system.origin != "pictures"] or [found for _, found in captioned]
    common = sorted(set.intersection(*sets)) if sets else []
    chosen = numpy_generator(seed, "eval-fid", "grid").permutation(len(common))[:rows]
    grid = []
    for caption in (common[number] for number in chosen):
        shown = [system.pictures.picture(where[caption]) if caption in where else None for system, where in places]
        if real:
            pictures, row = real.get(caption, (None, 0))
            shown.append(None if pictures is None else pictures.picture(row))
        grid.append(GridRow(caption, shown))
    return grid


def true_pictures_of(preset: Preset | None, reference: Pictures) -> dict[str, tuple[Pictures, int]]:
    """Return the real picture of each caption: the preset's, or the reference's if it has captions."""
    if preset is not None:
        pictures = FilePictures(list(preset.pictures.values()), reference.image_size)
        return {caption: (pictures, row) for row, caption in enumerate(preset.captions.values())}
    if isinstance(reference, FilePictures):
        captions, _ = captions_beside(reference.paths)
    else:
        captions = captions_of_source(reference)
    # The first of several pictures with one caption wins.
    return {caption: (reference, row) for row, caption in reversed([*enumerate(captions or [])])}


def require_own_page(out: Path) -> None:
    """Raise UserError if ``out`` has a page that ``write_evaluation`` did not write."""
    page, figures = out / "index.html", out / "figures.json"
    if page.exists() and not (figures.is_file() and f'"format": "{FORMAT}"' in figures.read_text("utf-8", "replace")):
        raise UserError(f"{page}: is no page of dalle eval-fid and would be lost; choose another --page")


def write_evaluation(evaluation: Evaluation, grid: Sequence[GridRow], out: Path) -> Path:
    """Write figures.json, figures.csv, plots as PNG and SVG, and index.html into ``out``; return the page's path."""
    plots = draw_plots(evaluation)
    for name, plot in plots.items():
        write_atomically(out / f"{name}.png", plot.png)
        write_atomically(out / f"{name}.svg", plot.svg)
    write_json(out / "figures.json", evaluation_json(evaluation))
    write_atomically(out / "figures.csv", figures_csv(evaluation))
    write_atomically(out / "index.html", page(evaluation, plots, grid))
    return out / "index.html"


def figures_csv(evaluation: Evaluation) -> str:
    """Return a CSV line for each value, of the curve ``none`` (a system's own), ``blur``, ``pool`` or ``accuracy``."""
    return csv_text(_figure_rows(evaluation))


def _figure_rows(evaluation: Evaluation) -> Iterator[Sequence[object]]:
    yield "system", "curve", "x", "metric", "value", "error", "n_generated", "n_reference", "reference"
    for system in evaluation.systems:
        for curves in (system, system.without):
            if curves is None:
                continue
            points: list[tuple[str, str | int, Figures | PoolPoint]] = [("none", "", curves)]
            points += [("blur", f"{point.radius:g}", point) for point in curves.blur]
            points += [("pool", point.size, point) for point in curves.pool]
            for curve, x, point in points:
                for metric in METRICS:
                    if (value := getattr(point, metric, None)) is not None:
                        error = getattr(point, "kid_std" if metric == "kid_mean" else f"{metric}_error")
                        name = evaluation.score_name if metric == "score" else metric
                        counts = point.n_generated, curves.n_reference, "whole" if curves is system else "without"
                        yield system.name, curve, x, name, value, error, *counts
        for group, accuracy in accuracy_json(system.accuracy).items():
            for size, share in accuracy["by_pool_size"].items():
                name, prompts = f"right, {group}", accuracy["prompts"]
                yield system.name, "accuracy", size, name, share["value"], share["error"], prompts, "", ""


def page(evaluation: Evaluation, drawn: Mapping[str, Plot], grid: Sequence[GridRow]) -> str:
    """Return the page as HTML."""
    columns, rows = _shown(evaluation, grid)
    return render(
        "eval_fid.html",
        evaluation=evaluation,
        result=_result(evaluation.systems),
        warnings=_warnings(evaluation),
        score_title=SCORE_TITLES[evaluation.score_name] if evaluation.systems[0].score is not None else None,
        method=_method(evaluation),
        drawn=drawn,
        titles=TITLES,
        curve_notes=_curve_notes(evaluation.systems),
        columns=columns,
        rows=rows,
    )


def _result(systems: Sequence[SystemFigures]) -> str:
    best = min(systems, key=lambda system: system.fid)
    result = f"FID {best.fid:.2f} for {best.name}, {best.n_generated:,} pictures against {best.n_reference:,}"
    rest = ", ".join(f"{system.name} {system.fid:.2f}" for system in systems if system is not best)
    return f"{result}; {rest}." if rest else f"{result}."


def _warnings(evaluation: Evaluation) -> list[str]:
    systems = evaluation.systems
    own = {text: [s.name for s in systems if text in s.warnings] for s in systems for text in s.warnings}
    warnings = [*evaluation.warnings]
    if not evaluation.features.startswith("inception"):
        warnings.insert(
            0, "These figures are on CLIP's features: they compare with one another, never with published ones."
        )
    return warnings + [
        text if len(names) == len(systems) else f"{', '.join(names)}: {text}" for text, names in own.items()
    ]


def _method(evaluation: Evaluation) -> str:
    sentences = [
        "KID: ± is the standard deviation over subsets. Precision and recall: third nearest neighbours, ± the binomial "
        "standard error."
    ]
    if evaluation.systems[0].fid_error is not None:
        sentences.append(
            f"FID and score: ± is the standard deviation over {evaluation.bootstrap} bootstrap sets of the generated "
            "pictures, whole captions at a time; the reference is held fixed."
        )
    if evaluation.protocol:
        sentences.append(evaluation.protocol)
    if (fewer := evaluation.systems[0].without) is not None:
        whole = evaluation.systems[0].n_reference
        sentences.append(
            f"“Some left out” (dashed lines): without {whole - fewer.n_reference:,} of the {whole:,} reference "
            f"pictures, which {evaluation.without} names."
        )
    sentences.append(comparable(evaluation.features))
    return " ".join(sentences)


def _curve_notes(systems: Sequence[SystemFigures]) -> list[str]:
    notes = []
    if any(system.blur for system in systems):
        notes.append(
            "Blur: a Gaussian filter of this standard deviation, in pixels of the pictures as measured, on the "
            "generated and on the real pictures."
        )
    if any(system.pool for system in systems):
        repeats = max(point.repeats for system in systems for point in system.pool)
        notes.append(
            f"Pool: the best by CLIP of a random subset of each caption's samples; mean and standard deviation over "
            f"{repeats} draws. A dashed line is a system that is not reranked. The table has the best of whole pools."
        )
    if any(system.accuracy for system in systems):
        notes.append(
            "Drawn right: measured on the pictures; the mean over all subsets, ± the binomial standard error over "
            "captions."
        )
    return notes


def _shown(
    evaluation: Evaluation, grid: Sequence[GridRow]
) -> tuple[list[str], list[tuple[str, list[tuple[str, bytes | None]]]]]:
    """Return the names of the columns that have pictures, and each caption with its (column, PNG) cells."""
    if not grid:
        return [], []
    names = [*(system.name for system in evaluation.systems), "real"][: len(grid[0].pictures)]
    columns = [number for number in range(len(names)) if any(row.pictures[number] is not None for row in grid)]
    rows = [(row.caption, [(names[number], _thumbnail(row.pictures[number])) for number in columns]) for row in grid]
    return [names[number] for number in columns], rows


def _thumbnail(picture: NDArray[np.uint8] | None) -> bytes | None:
    if picture is None:
        return None
    drawn = Image.fromarray(picture)
    side = THUMBNAIL_SIDE // drawn.width * drawn.width if drawn.width <= THUMBNAIL_SIDE else THUMBNAIL_SIDE
    method = Image.Resampling.NEAREST if side >= drawn.width else Image.Resampling.LANCZOS
    return png_bytes(drawn.resize((side, side), method))
