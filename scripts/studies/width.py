#!/usr/bin/env python3
"""Find the best peak learning rate for priors of several widths at equal compute, so that wider ones get fewer updates.

    .venv/bin/python scripts/studies/width.py --tokens runs/quickstart/tokens.zarr
    .venv/bin/python scripts/studies/width.py --tokens runs/quickstart/tokens.zarr --petaflops 0.01

The script trains the recipe's prior once for each width and peak rate, on a token store such as the quickstart's. It
prints the last validation losses on held-out samples, in nats per token, for text and image, with the EMA weights and
with the raw weights. It writes study.json and study.png into --out. A killed study resumes when it is run again;
finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import Recipe
from dalle_cli.errors import UserError
from dalle_cli.prior.train import sample_work, train_prior
from dalle_cli.stores.files import write_atomically, write_json
from dalle_cli.training.precision_choice import with_precision
from dalle_cli.views.plots import SERIES, STYLE, figure_png

LOSSES = ("text", "image", "loss")
VALIDATIONS = 4
"""Number of validations of a run."""
WARMUP_SHARE = 0.03
"""Share of the updates that warm up."""


def integers(text: str) -> list[int]:
    """Parse whole numbers separated by commas."""
    return [int(part) for part in text.split(",")]


def floats(text: str) -> list[float]:
    """Parse numbers separated by commas."""
    return [float(part) for part in text.split(",")]


def study_recipe(options: argparse.Namespace, width: int, rate: float) -> Recipe:
    """Return the recipe with this width and peak rate, and with as many updates as --petaflops allows.

    Raises:
        UserError: the width is no multiple of the recipe's d_head.
    """
    d_head = load_recipe(options.recipe, options.set).prior.model.d_head
    if width % d_head:
        raise UserError(f"--widths {width}: is no multiple of the recipe's d_head {d_head}; choose other widths")
    sizes = [f"prior.model.heads={width // d_head}", f"prior.model.d_model={width}"]
    recipe = load_recipe(options.recipe, [*options.set, *sizes])
    flops = sample_work(with_precision(recipe, "prior", "fp32")).flops * recipe.prior.training.batch_size
    updates = max(VALIDATIONS, round(options.petaflops * 1e15 / flops))
    changes = {
        "training.updates": updates,
        "training.validate_every": updates // VALIDATIONS,
        "training.save_every": updates // VALIDATIONS,
        "training.log_every": max(1, updates // 100),
        "learning_rate.peak": rate,
        "learning_rate.final": rate / 100,
        "learning_rate.warmup_updates": round(WARMUP_SHARE * updates),
    }
    given = {change.partition("=")[0] for change in options.set}
    wanted = [f"prior.{key}={value}" for key, value in changes.items() if f"prior.{key}" not in given]
    return load_recipe(options.recipe, [*options.set, *sizes, *wanted])


def last_validation(run: Path) -> dict[str, float]:
    """Return the last line of a run's metrics.jsonl that holds a validation.

    Raises:
        UserError: the run has no validations, because no samples are held out.
    """
    for text in reversed((run / "metrics.jsonl").read_text().splitlines()):
        line: dict[str, float] = json.loads(text)
        if "val_loss" in line:
            return line
    raise UserError(f"{run}: no samples are held out for validation; --set data.holdout=0.02")


def figure(rows: list[dict[str, Any]]) -> bytes:
    """Return a PNG of losses against the peak rate: one line for each width, dashed for the raw weights."""
    widths = sorted({row["width"] for row in rows})
    with plt.rc_context({**STYLE, "figure.figsize": (9.6, 3.0)}):
        drawn, panels = plt.subplots(1, len(LOSSES))
        for axes, loss in zip(panels, LOSSES, strict=True):
            for at, width in enumerate(widths):
                own = sorted((row for row in rows if row["width"] == width), key=lambda row: row["rate"])
                look: dict[str, Any] = {"color": SERIES[at % len(SERIES)], "marker": "o", "markersize": 3}
                rates = [row["rate"] for row in own]
                axes.plot(rates, [row[loss] for row in own], label=f"width {width}", **look)
                axes.plot(rates, [row[f"raw_{loss}"] for row in own], linestyle="--", **look)
            axes.set(xscale="log", xlabel="peak learning rate", ylabel=f"{loss}, nats")
        panels[0].legend()
        return figure_png(drawn)


def main() -> None:
    """Parse the command line, run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help="token store to train on")
    parser.add_argument(
        "--recipe",
        type=Path,
        default=Path("recipes/quickstart.yaml"),
        help="recipe of the prior [recipes/quickstart.yaml]",
    )
    parser.add_argument("--widths", type=integers, default="64,128,256", help="d_model of each prior [64,128,256]")
    parser.add_argument("--rates", type=floats, default="1e-3,3e-3,9e-3", help="peak rates [1e-3,3e-3,9e-3]")
    parser.add_argument("--petaflops", type=float, default=0.05, help="compute of each run, in 1e15 FLOPs [0.05]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting; repeatable")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/width-study"), help="folder of the runs [runs/width-study]"
    )
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    try:
        for width in options.widths:
            for rate in options.rates:
                recipe, run = study_recipe(options, width, rate), options.out / f"width-{width}-rate-{rate:g}"
                train_prior(recipe, options.tokens, run)
                found = last_validation(run)
                losses = {name: found[f"val_{name}"] for loss in LOSSES for name in (loss, f"raw_{loss}")}
                rows.append({"width": width, "rate": rate, "updates": recipe.prior.training.updates, **losses})
    except UserError as error:
        parser.exit(2, f"width: {error}\n")
    write_json(options.out / "study.json", {"torch": torch.__version__, "petaflops": options.petaflops, "rows": rows})
    write_atomically(options.out / "study.png", figure(rows))
    print(f"{'width':>6} {'rate':>8} {'updates':>8}" + "".join(f"{f'{x} EMA':>10} {'raw':>8}" for x in LOSSES))
    for row in rows:
        losses = "".join(f"{row[loss]:>10.4f} {row[f'raw_{loss}']:>8.4f}" for loss in LOSSES)
        best = min(other["loss"] for other in rows if other["width"] == row["width"]) == row["loss"]
        print(f"{row['width']:>6} {row['rate']:>8g} {row['updates']:>8}{losses}{'  best of its width' if best else ''}")


if __name__ == "__main__":
    main()
