#!/usr/bin/env python3
"""Compare a dVAE and a prior that begin from those of another data set with ones that begin from nothing.

    .venv/bin/python scripts/studies/fine_tuning.py TWEMOJI.tar FLUENT-EMOJI-3D --out runs/fine-tuning

A chain is first trained on the earlier source, for several times as many updates. On the later one, a dVAE and a prior
are then trained twice: from nothing, and from that chain's, at a share of the learning rate and without the schedules
of the dVAE's beginning. The dVAE is fine-tuned briefly, so that its codes keep their meaning. Both priors train on the
same tokens, those of the fine-tuned dVAE, so that their losses compare. The script prints the first validated update at
which each fine-tuned model is as good as the best validation of the one from nothing, and writes study.json and
study.png into --out. A killed study resumes when it is run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from dalle_cli.config.load import load_recipe
from dalle_cli.planning.new_recipe import updates_settings
from dalle_cli.stores.checkpoint import Kind
from dalle_cli.stores.files import write_atomically, write_json
from dalle_cli.views.plots import BLUE, ORANGE, STYLE, figure_png

VALIDATIONS = 30
"""Number of validations of a training."""
LOSSES: dict[str, tuple[Kind, str]] = {
    "dVAE": ("dvae", "val_loss"),
    "prior": ("prior", "val_loss"),
    "prior, images alone": ("prior", "val_image"),
}
"""Held-out losses to compare, each with its stage and its name in the journal."""


@dataclass(frozen=True)
class Curve:
    """A held-out loss at the validated updates of a training."""

    updates: list[int]
    losses: list[float]

    @staticmethod
    def read(out: Path, name: str) -> Curve:
        """Read the loss ``name`` from the journal of a training in ``out``."""
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        points = {line["step"]: line[name] for line in lines if name in line}
        return Curve(list(points), list(points.values()))

    def first_at_most(self, loss: float) -> int | None:
        """Return the first validated update whose loss is at most ``loss``; None if there is none."""
        return next((u for u, found in zip(self.updates, self.losses, strict=True) if found <= loss), None)


def run_dalle(command: str, recipe: str, settings: dict[str, Any], *options: str) -> None:
    """Run a command of dalle in a process of its own."""
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    subprocess.run([sys.executable, "-m", "dalle_cli", command, recipe, *words, *options], check=True)


def train(options: argparse.Namespace) -> dict[Kind, dict[str, Path]]:
    """Train all models and return the folders of their runs, by stage and beginning."""
    recipe = load_recipe(Path(options.recipe), options.set)

    def updates(dvae: int, prior: int) -> dict[str, Any]:
        counts: dict[Kind, int] = {"dvae": dvae, "prior": prior}
        every = {
            f"{stage}.training.{key}": max(1, count // VALIDATIONS)
            for stage, count in counts.items()
            for key in ("validate_every", "save_every")
        }
        return updates_settings(counts, recipe) | every

    given = dict(change.split("=", 1) for change in options.set)
    undrawn = {"prior.drawings": 0}  # pictures at so many validations would take longer than the training
    common = {**undrawn, **given}
    longer = updates(options.times * options.dvae_updates, options.times * options.prior_updates)
    earlier = {**common, **longer, "run": options.out / "earlier", "data.train": options.earlier}
    whole, brief = (updates(count, options.prior_updates) for count in (options.dvae_updates, options.tuned_updates))
    tuned = {**common, **whole, "run": options.out / "tuned", "data.train": options.later}
    ends = {
        f"dvae.objective.{name}": getattr(recipe.dvae.objective, name).end
        for name in ("kl_weight", "marginal_kl_weight", "temperature")
    }
    rates = {
        f"{stage}.learning_rate.peak": options.rate * getattr(recipe, stage).learning_rate.peak
        for stage, _ in LOSSES.values()
    }
    for settings in (earlier, tuned):
        for command in ("train-tokenizer", "tokenize-text"):
            run_dalle(command, options.recipe, settings)
    for command in ("train-dvae", "encode-images", "train-prior"):
        run_dalle(command, options.recipe, earlier)
    dvae, prior = options.out / "dvae-from-nothing", options.out / "prior-from-nothing"
    run_dalle("train-dvae", options.recipe, tuned, "--out", str(dvae))
    run_dalle("train-dvae", options.recipe, {**tuned, **brief, **rates, **ends, "dvae.init": earlier["run"]})
    run_dalle("encode-images", options.recipe, tuned)
    run_dalle("train-prior", options.recipe, tuned, "--out", str(prior))
    run_dalle("train-prior", options.recipe, {**tuned, **rates, "prior.init": earlier["run"]})
    return {
        "dvae": {"nothing": dvae, "earlier": tuned["run"] / "dvae"},
        "prior": {"nothing": prior, "earlier": tuned["run"] / "prior"},
    }


def figure(curves: dict[str, dict[str, Curve]]) -> bytes:
    """Return a PNG with a panel for each loss."""
    with plt.rc_context({**STYLE, "figure.figsize": (12.8, 3.2)}):
        drawn, panels = plt.subplots(1, len(curves))
        for axes, (name, both) in zip(panels, curves.items(), strict=True):
            for (beginning, curve), colour in zip(both.items(), (ORANGE, BLUE), strict=True):
                axes.plot(curve.updates, curve.losses, color=colour, label=f"from {beginning}")
            best = min(both["nothing"].losses)
            axes.axhline(best, color=ORANGE, linestyle=":", linewidth=1)
            last = both["nothing"].losses
            axes.set(xlabel="updates", ylabel="held-out loss, nats", title=name)
            low = min(min(curve.losses) for curve in both.values())
            axes.set_ylim(low - 0.05 * (last[0] - low), last[min(2, len(last) - 1)])
        panels[0].legend()
        return figure_png(drawn)


def main() -> None:
    """Parse the command line, run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("earlier", metavar="EARLIER", help="source of the chain to begin from")
    parser.add_argument("later", metavar="LATER", help="source to fine-tune on")
    parser.add_argument("--recipe", default="own-data", help="recipe of all trainings [own-data]")
    parser.add_argument("--dvae-updates", type=int, default=1500, help="updates of each dVAE [1500]")
    parser.add_argument("--prior-updates", type=int, default=1000, help="updates of each prior [1000]")
    parser.add_argument("--times", type=int, default=3, help="times as many updates of the earlier chain [3]")
    parser.add_argument("--tuned-updates", type=int, default=100, help="updates of the fine-tuned dVAE [100]")
    parser.add_argument("--rate", type=float, default=0.25, help="share of the learning rate to fine-tune with [0.25]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting; repeatable")
    parser.add_argument("--out", type=Path, default=Path("runs/fine-tuning"), help="folder [runs/fine-tuning]")
    options = parser.parse_args()
    folders = train(options)
    curves = {
        name: {beginning: Curve.read(out, loss) for beginning, out in folders[stage].items()}
        for name, (stage, loss) in LOSSES.items()
    }
    rows = []
    print("| loss | updates | best loss from nothing | as good, from the earlier one, after | share | its best |")
    print("|---|---|---|---|---|---|")
    for name, both in curves.items():
        best = min(both["nothing"].losses)
        first, total = both["earlier"].first_at_most(best), both["nothing"].updates[-1]
        row = {"loss": name, "updates": total, "best": best, "first": first, "tuned": min(both["earlier"].losses)}
        rows.append(row)
        share = "never" if first is None else f"{first / total:.2f}"
        print(f"| {name} | {total} | {best:.4f} | {first} | {share} | {row['tuned']:.4f} |")
    points = {name: {beginning: vars(curve) for beginning, curve in both.items()} for name, both in curves.items()}
    write_json(options.out / "study.json", {"rows": rows, "curves": points})
    write_atomically(options.out / "study.png", figure(curves))


if __name__ == "__main__":
    main()
