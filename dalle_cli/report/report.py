"""Write a run's report: report.json, report.html and the contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dalle_cli.config.load import dump_recipe
from dalle_cli.config.schema import Recipe
from dalle_cli.errors import UserError
from dalle_cli.report.artifacts import open_run, store_requests
from dalle_cli.report.evaluations import draw_curves, evaluation_rows, find_evaluations
from dalle_cli.report.figures import DataFigures, ReportFigures, SamplesFigures
from dalle_cli.report.image_tokens import count_codes, reconstruct
from dalle_cli.report.page import page
from dalle_cli.report.samples import draw_sheet, judge_samples, read_ranked
from dalle_cli.report.training import clip_retrieval, prior_drawings, stage_figures, training_curves
from dalle_cli.stores.files import write_atomically, write_json
from dalle_cli.stores.samples import STORE
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.stores.usable_rows import usable_rows
from dalle_cli.views import plots
from dalle_cli.views.contact_sheet import png_bytes
from dalle_cli.views.plots import Plot


@dataclass(frozen=True)
class Report:
    """Path of the written page, and its contents."""

    html: Path
    figures: ReportFigures


def write_report(recipe: Recipe, ranked: Path | None, fids: Sequence[Path], out: Path) -> Report:
    """Write ``out/report.html``, ``report.json`` and, with ranked samples, ``contact-sheet.png``.

    ``ranked`` has lines of ``dalle rerank``. ``fids`` are files of ``dalle eval-fid`` outside the run's folder; those
    inside are found. Stages that have not run are named in the report.

    Raises:
        UserError: there is nothing to report, or a given file is of another kind.
    """
    run = open_run(recipe)
    evaluations = find_evaluations(run.folders.root, fids)
    if run.empty and ranked is None and not evaluations:
        raise UserError(f"{run.folders.root}: no stage has run yet; start with dalle train-dvae, or give --ranked FILE")
    samples = read_ranked(ranked) if ranked is not None else []
    named = {line["store"] for pool in samples for line in pool.lines if isinstance(line.get("store"), str)}
    stores = {path.resolve(): path for path in [*run.folders.samples.glob(f"**/{STORE}"), *map(Path, named)]}
    requests = store_requests(sorted(stores.values()))

    pngs: dict[str, bytes] = {}
    drawn: dict[str, Plot] = {}
    oracle = judge_samples(samples)
    if oracle is not None:
        drawn["bars"] = plots.accuracy_bars(oracle.groups)
        if (by_pool_size := plots.accuracy_by_pool_size(oracle.groups)) is not None:
            drawn["pool_size"] = by_pool_size
    sheet = draw_sheet(run, samples, judged=oracle is not None) if samples else None
    if sheet is not None:
        pngs["contact_sheet"] = png_bytes(sheet[1])
    dvae = run.checkpoints.get("dvae")
    reconstructions = reconstruct(dvae, run.source) if dvae is not None and run.source is not None else None
    if reconstructions is not None:
        pngs["reconstructions"] = png_bytes(reconstructions[1])
    codebook = count_codes(run.tokens) if run.tokens is not None else None
    if codebook is not None:
        drawn["codebook"] = plots.codebook_histogram(codebook[1], codebook[0].perplexity)
    drawn |= training_curves(run)
    drawings = prior_drawings(run)
    if drawings is not None:
        pngs["drawings"] = png_bytes(drawings[1])
    retrieval = clip_retrieval(run)
    if retrieval is not None:
        pngs["retrieval"] = png_bytes(retrieval[1])
    curves, curve_plots = draw_curves(evaluations)
    drawn |= curve_plots

    figures = ReportFigures(
        name=recipe.name,
        description=recipe.description,
        oracle=oracle,
        contact_sheet=sheet[0] if sheet is not None else None,
        reconstructions=reconstructions[0] if reconstructions is not None else None,
        data=_data(run.tokens) if run.tokens is not None else None,
        codebook=codebook[0] if codebook is not None else None,
        stages=stage_figures(run),
        drawings=drawings[0] if drawings is not None else None,
        retrieval=retrieval[0] if retrieval is not None else None,
        fid=evaluation_rows(evaluations),
        curves=curves,
        samples=[SamplesFigures(run.relative(r.store), r.prompts, r.seed, r.settings) for r in requests],
        artifacts=run.artifacts(requests),
        commands=run.commands(),
        missing=run.missing,
    )
    if sheet is not None:
        write_atomically(out / "contact-sheet.png", pngs["contact_sheet"])
    write_json(out / "report.json", figures.as_json())
    write_atomically(out / "report.html", page(figures, pngs, drawn, dump_recipe(recipe)))
    return Report(out / "report.html", figures)


def _data(tokens: TokenReader) -> DataFigures:
    parts = tokens.parts
    return DataFigures(
        source=", ".join(dict.fromkeys(str(state.identity.get("source_name")) for state in parts.values())),
        rows=max((state.rows for state in parts.values()), default=0),
        usable=len(usable_rows(tokens)) if len(parts) == 2 else None,
        skipped={
            part: dict(sorted(state.skipped.items(), key=lambda item: (-item[1], item[0])))
            for part, state in parts.items()
        },
    )
