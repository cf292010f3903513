"""The report as one HTML page, with style and pictures embedded."""

from __future__ import annotations

from collections.abc import Mapping

from dalle_cli.fid.plots import TITLES
from dalle_cli.report.evaluations import features_badge
from dalle_cli.report.figures import ReportFigures
from dalle_cli.views.html import Pngs, render
from dalle_cli.views.plots import Plot

MAX_REASONS = 20
"""Number of reasons for skipped rows shown for each part of a store; report.json has all."""
TRAINING_PLOTS = {
    "loss_dvae": "dVAE: reconstruction",
    "elbo_dvae": "dVAE: ELBO",
    "psnr_dvae": "dVAE: PSNR of reconstructions",
    "kl_dvae": "dVAE: KL to the uniform prior",
    "loss_prior": "Prior: cross-entropy",
    "loss_clip": "CLIP: contrastive loss",
}


def page(figures: ReportFigures, pngs: Pngs, drawn: Mapping[str, Plot], recipe_yaml: str) -> str:
    """Return the page as HTML with the pictures ``pngs``; plots that are not in ``drawn`` are left out."""
    badges = [features_badge(fid.evaluation.features) for fid in figures.fid]
    lines = [(c["artifact"], c["command"], c.get("sha256"), c.get("finished")) for c in figures.commands]
    lines += [(fid.file, fid.evaluation.command, None, None) for fid in figures.fid if fid.evaluation.command]
    return render(
        "report.html",
        figures=figures,
        pngs=pngs,
        drawn=drawn,
        recipe_yaml=recipe_yaml,
        training_plots=TRAINING_PLOTS,
        curve_titles=TITLES,
        badges=badges,
        incomparable=not all(published for _, published in badges),
        notes=list(dict.fromkeys(f"{fid.file}: {text}" for fid in figures.fid for text in fid.warnings)),
        skipped=[
            (part, reason, count)
            for part, counts in (figures.data.skipped if figures.data else {}).items()
            for reason, count in list(counts.items())[:MAX_REASONS]
        ],
        commands=list(dict.fromkeys(lines)),
    )
