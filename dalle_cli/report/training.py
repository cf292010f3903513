"""State and curves of the trained stages of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from dalle_cli.data.images import read_picture
from dalle_cli.report.artifacts import NAMES, Run
from dalle_cli.stores.checkpoint import Kind, open_checkpoint
from dalle_cli.stores.held_out import split_store
from dalle_cli.training.journal import pictures_of
from dalle_cli.training.picture_grid import RULE
from dalle_cli.training.validation import validation_warnings
from dalle_cli.views import plots


@dataclass(frozen=True)
class StageFigures:
    """State of a stage's training, with its last validation and the last line of metrics.jsonl that has a loss."""

    name: str
    step: int
    updates: int
    validation: dict[str, float]
    last: dict[str, Any] | None
    warnings: list[str]


@dataclass(frozen=True)
class DrawingFigures:
    """Validations of the prior whose drawings are shown, and the captions drawn; empty without a token store."""

    updates: list[int]
    captions: list[str]


@dataclass(frozen=True)
class RetrievalFigures:
    """The validation of CLIP whose ranking is shown, and its captions; empty without a token store."""

    update: int
    captions: list[str]


MOST_DRAWINGS = 8
"""Most validations whose drawings are shown."""


@dataclass(frozen=True)
class _Plot:
    """A plot of a stage's metrics over its updates."""

    stage: Kind
    curves: list[plots.Curve]
    unit: str


_PLOTS = {
    "loss_dvae": _Plot(
        "dvae",
        [("recon_nll", "training", plots.BLUE), ("val_recon_nll", "validation", plots.ORANGE)],
        "-ln p(x|z), nats a value",
    ),
    "elbo_dvae": _Plot(
        "dvae",
        [("elbo", "training", plots.BLUE), ("val_elbo", "validation", plots.ORANGE)],
        "ELBO, nats a value",
    ),
    "psnr_dvae": _Plot("dvae", [("val_psnr", "validation", plots.ORANGE)], "PSNR, dB"),
    "kl_dvae": _Plot(
        "dvae",
        [("kl_per_position", "training", plots.BLUE), ("val_kl_per_position", "validation", plots.ORANGE)],
        "KL, nats a token",
    ),
    "loss_prior": _Plot(
        "prior",
        [
            ("image", "image", plots.BLUE),
            ("val_image", "image, validation", plots.BLUE),
            ("text", "text", plots.ORANGE),
            ("val_text", "text, validation", plots.ORANGE),
        ],
        "nats a token",
    ),
    "loss_clip": _Plot(
        "clip",
        [("loss", "training", plots.BLUE), ("val_loss", "validation", plots.ORANGE)],
        "nats a picture",
    ),
}


def stage_figures(run: Run) -> dict[str, StageFigures]:
    """Return the state of each stage that has a checkpoint."""
    return {
        kind: StageFigures(
            name=NAMES[kind],
            step=checkpoint.step,
            updates=checkpoint.updates(),
            validation=checkpoint.metrics,
            last=next((line for line in reversed(run.metrics(kind)) if "loss" in line), None),
            warnings=validation_warnings(open_checkpoint(checkpoint.path.parent, kind, "last")),
        )
        for kind, checkpoint in run.checkpoints.items()
    }


def training_curves(run: Run) -> dict[str, plots.Plot]:
    """Draw the plots for which the run has metrics."""
    drawn = {
        name: plots.loss_curves(run.metrics(plot.stage), plot.curves, plot.unit)
        for name, plot in _PLOTS.items()
        if plot.stage in run.checkpoints
    }
    return {name: plot for name, plot in drawn.items() if plot is not None}


def prior_drawings(run: Run) -> tuple[DrawingFigures, Image.Image] | None:
    """Join what the prior drew at its validations: a row of true pictures, then one of drawn ones for each validation.

    Returns:
        The validations with the captions, and the pictures; None if nothing was drawn.
    """
    files = pictures_of(run.folders.prior, "drawings")
    some = [files[i] for i in np.linspace(0, len(files) - 1, min(MOST_DRAWINGS, len(files))).round().astype(int)]
    drawn = {update: read_picture(file, "delete it") for update, file in some}
    # prior.drawings may have changed within the run.
    drawn = {update: picture for update, picture in drawn.items() if picture.shape == [*drawn.values()][-1].shape}
    if not drawn:
        return None
    first = next(iter(drawn.values()))
    row = (len(first) - RULE) // 2
    joined = np.concatenate([first[:row], *(picture[row : 2 * row] for picture in drawn.values()), first[-RULE:]])
    captions = _held_out_captions(run, (first.shape[1] - RULE) // row)
    return DrawingFigures(list(drawn), captions), Image.fromarray(joined)


def clip_retrieval(run: Run) -> tuple[RetrievalFigures, Image.Image] | None:
    """Return what CLIP ranked highest for held-out captions at its last validation; None if it had none."""
    files = pictures_of(run.folders.clip, "retrieval")
    if not files:
        return None
    update, file = files[-1]
    sheet = read_picture(file, "delete it")
    captions = _held_out_captions(run, (sheet.shape[1] - RULE) // (run.recipe.image_size + RULE))
    return RetrievalFigures(update, captions), Image.fromarray(sheet)


def _held_out_captions(run: Run, count: int) -> list[str]:
    if run.tokens is None:
        return []
    return run.tokens.strings("caption", split_store(run.tokens, run.recipe)[1][:count])
