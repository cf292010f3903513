"""``dalle eval-fid``'s page: figures of the systems, curves, and their pictures side by side, caption by caption."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dalle_cli.fid.pictures import FilePictures, Pictures
from dalle_cli.fid.plots import SCORES, TITLES, draw_plots
from dalle_cli.fid.presets import Preset
from dalle_cli.fid.systems import System, captions_beside, captions_of_source, per_caption
from dalle_cli.randomness import numpy_generator
from dalle_cli.stores.files import write_atomically, write_json
from dalle_cli.views.contact_sheet import png_bytes
from dalle_cli.views.html import document, image, note, plot_grid, section, table, unbroken, warning

GRID_SIDE = 192
"""Pictures of the grid are shown at most this large."""
FIGURES = ("fid", "kid_mean", "precision", "recall", *SCORES)
STYLE = """
.grid td { width: 200px; min-width: 96px; } .grid td:first-child { min-width: 140px; overflow-wrap: anywhere; }
.grid .wide img { width: 100%; min-width: 0; max-width: 192px; border-radius: 4px; box-shadow: 0 0 0 1px var(--rule); }
.wide + .note { margin-top: 14px; }
"""


@dataclass(frozen=True)
class GridRow:
    """A caption and each system's picture (H, W, 3) of it, None where it has none."""

    caption: str
    pictures: list[NDArray[np.uint8] | None]


def choose_grid(
    systems: Sequence[System], real: Mapping[str, tuple[Pictures, int]], rows: int, seed: int
) -> list[GridRow]:
    """``rows`` captions drawn by ``seed`` among those that every captioned system has, as they come, good or bad.

    Pictures that were not drawn for captions, such as a training set, are shown where they have one of these.
    ``real`` gives the true picture of a caption, where it is known: it stands last.
    """
    places = [(system, per_caption(system)) for system in systems]
    known = [(system, set(found)) for system, found in places if found]
    drawn = [found for system, found in known if system.origin != "pictures"] or [found for _, found in known]
    common = sorted(set.intersection(*drawn)) if drawn else []
    chosen = numpy_generator(seed, "eval-fid", "grid").permutation(len(common))[:rows]
    found = []
    for caption in (common[number] for number in chosen):
        shown = [system.pictures.picture(where[caption]) if caption in where else None for system, where in places]
        if real:
            pictures, row = real.get(caption, (None, 0))
            shown.append(None if pictures is None else pictures.picture(row))
        found.append(GridRow(caption, shown))
    return found


def true_pictures_of(preset: Preset | None, reference: Pictures) -> dict[str, tuple[Pictures, int]]:
    """By caption, where a picture of it is known: the preset's, or the reference's pictures with captions beside."""
    if preset is not None:
        pictures = FilePictures(list(preset.pictures.values()), reference.image_size)
        return {caption: (pictures, row) for row, caption in enumerate(preset.captions.values())}
    if isinstance(reference, FilePictures):
        captions, _ = captions_beside(reference.paths)
    else:
        captions = captions_of_source(reference)
    return {caption: (reference, row) for row, caption in reversed([*enumerate(captions or [])])}


def write_evaluation(figures: Mapping[str, Any], grid: Sequence[GridRow], out: Path) -> Path:
    """Write ``figures.json``, ``figures.csv``, the plots as PNG and SVG, and ``index.html`` into the folder ``out``.

    Returns the page's path.
    """
    plots = draw_plots(figures)
    for name, (png, svg) in plots.items():
        write_atomically(out / f"{name}.png", png)
        write_atomically(out / f"{name}.svg", svg)
    write_json(out / "figures.json", figures)
    write_atomically(out / "figures.csv", figures_csv(figures))
    pngs = {name: png for name, (png, _) in plots.items()}
    write_atomically(out / "index.html", page(figures, pngs, grid))
    return out / "index.html"


def figures_csv(figures: Mapping[str, Any]) -> str:
    """A line for each figure; its curve is ``none`` (the system's own), ``blur``, ``pool`` or ``accuracy``."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["system", "curve", "x", "metric", "value", "error", "n_generated", "n_reference"])
    for system in figures["systems"]:
        points = [("none", "", system)]
        points += [("blur", f"{point['radius']:g}", point) for point in system.get("blur", [])]
        points += [("pool", point["size"], point) for point in system.get("pool", [])]
        for curve, x, point in points:
            for metric in FIGURES:
                if point.get(metric) is not None:
                    error = point.get("kid_std" if metric == "kid_mean" else f"{metric}_error")
                    counts = [point["n_generated"], point.get("n_reference", system["n_reference"])]
                    writer.writerow([system["name"], curve, x, metric, point[metric], error, *counts])
        for group, found in system.get("accuracy", {}).items():
            for size, share in found["by_pool_size"].items():
                counts = [found["prompts"], ""]
                writer.writerow(
                    [system["name"], "accuracy", size, f"right, {group}", share["value"], share["error"], *counts]
                )
    return buffer.getvalue()


def page(figures: Mapping[str, Any], pngs: Mapping[str, bytes], grid: Sequence[GridRow]) -> str:
    """The whole document."""
    systems = figures["systems"]
    names = [system["name"] for system in systems]
    best = min(systems, key=lambda system: system["fid"])
    n = systems[0]["n_reference"]
    result = f"FID {best['fid']:.2f} for {best['name']}, {best['n_generated']:,} pictures against {n:,}"
    rest = ", ".join(f"{system['name']} {system['fid']:.2f}" for system in systems if system is not best)
    header = (
        f"<header><h1>{escape(', '.join(names))}</h1><p>Against <code>{escape(str(figures['reference']))}</code>, "
        f"pictures of {figures['size']} x {figures['size']}, by {escape(figures['features'])}</p>"
        f'<p class="result">{unbroken(result)}{unbroken("; " + rest) if rest else ""}.</p></header>'
    )
    plots = plot_grid(pngs, list(TITLES.items()))
    parts = [
        section("Figures", *map(warning, _warnings(figures)), figures_table(systems), note(_how(figures))),
        section("Curves", plots, *map(note, _how_curves(systems))) if plots else "",
        _grid(names, grid),
        _origin(figures),
    ]
    return document(f"{', '.join(names)}: eval-fid", "\n".join([header, *filter(None, parts)]), STYLE)


def figures_table(systems: Sequence[Mapping[str, Any]]) -> str:
    """The systems' own figures."""
    score = next((key for key in SCORES if key in systems[0]), None)
    names = ["system", "FID", "KID x 1000", "precision", "recall"]
    names += [{"inception_score": "Inception Score", "clip_is": "CLIP score of classes"}[score]] if score else []
    rows = []
    for system in systems:
        cells = [escape(system["name"]), f"<strong>{_value(system, 'fid', 2)}</strong>"]
        cells.append(_value(system, "kid_mean", 2, 1000, "kid_std"))
        cells += [_value(system, key, 3) for key in ("precision", "recall")]
        cells += [_value(system, score, 2)] if score else []
        rows.append([*cells, f"{system['n_generated']:,}", f"<code>{escape(str(system['generated']))}</code>"])
    return table([*names, "pictures", "from"], rows, numbers=range(1, len(names) + 1))


def _value(point: Mapping[str, Any], key: str, digits: int, scale: float = 1, error_key: str | None = None) -> str:
    value, error = point.get(key), point.get(error_key or f"{key}_error")
    if value is None:
        return "–"
    tail = "" if error is None else f' <span class="error">± {scale * error:.{digits}f}</span>'
    return f"{scale * value:.{digits}f}{tail}"


def _warnings(figures: Mapping[str, Any]) -> list[str]:
    systems = figures["systems"]
    own = {text: [s["name"] for s in systems if text in s["warnings"]] for s in systems for text in s["warnings"]}
    foreign = not str(figures["features"]).startswith("inception")
    return [
        *(["These figures are on CLIP's features: they compare with one another, never with published ones."]
          if foreign else []),
        *figures["warnings"],
        *(text if len(names) == len(systems) else f"{', '.join(names)}: {text}" for text, names in own.items()),
    ]  # fmt: skip


def _how(figures: Mapping[str, Any]) -> str:
    system = figures["systems"][0]
    told = [
        "KID: ± is the standard deviation over subsets. Precision and recall: third nearest neighbours, ± the binomial "
        "standard error."
    ]
    if "fid_error" in system:
        told.append(
            f"FID and score: ± is the standard deviation over {figures['bootstrap']} bootstrap sets of the generated "
            "pictures, whole captions at a time; the reference is held fixed."
        )
    if figures.get("protocol"):
        told.append(str(figures["protocol"]))
    return " ".join(told)


def _how_curves(systems: Sequence[Mapping[str, Any]]) -> list[str]:
    told = []
    if any("blur" in system for system in systems):
        told.append(
            "Blur: a Gaussian filter of this standard deviation, in pixels of the pictures as measured, on the "
            "generated and on the real pictures."
        )
    if any("pool" in system for system in systems):
        repeats = max(point["repeats"] for system in systems for point in system.get("pool", []))
        told.append(
            f"Pool: the best by CLIP of a random subset of each caption's samples; mean and standard deviation over "
            f"{repeats} draws. A dashed line is a system that is not reranked. The table has the best of whole pools."
        )
    if any("accuracy" in system for system in systems):
        told.append(
            "Drawn right: measured on the pictures; the mean over all subsets, ± the binomial standard error over "
            "captions."
        )
    return told


def _grid(names: Sequence[str], grid: Sequence[GridRow]) -> str:
    if not grid:
        return ""
    heads = [*names, "real"][: len(grid[0].pictures)]
    shown = [place for place in range(len(heads)) if any(row.pictures[place] is not None for row in grid)]
    rows = []
    for row in grid:
        cells = [
            "–" if (picture := row.pictures[place]) is None
            else image(_thumbnail(picture), f"{heads[place]}: {row.caption}")
            for place in shown
        ]  # fmt: skip
        rows.append([escape(row.caption), *cells])
    return section(
        "Side by side",
        note(f"{len(grid)} captions that all have, drawn by the seed, whether they came out well or not."),
        f'<div class="grid">{table(["caption", *(heads[place] for place in shown)], rows)}</div>',
    )


def _thumbnail(picture: NDArray[np.uint8]) -> bytes:
    drawn = Image.fromarray(picture)
    side = GRID_SIDE // drawn.width * drawn.width if drawn.width <= GRID_SIDE else GRID_SIDE
    method = Image.Resampling.NEAREST if side >= drawn.width else Image.Resampling.LANCZOS
    return png_bytes(drawn.resize((side, side), method))


def _origin(figures: Mapping[str, Any]) -> str:
    command = figures.get("command")
    return section("Made by", f"<pre>{escape(command)}</pre>") if command else ""
